// SPDX-License-Identifier: Apache-2.0
// Linear attention of one head, for one instruction set. Included once per ISA.
//
// A tile of rows is turned into floats, mapped by phi and padded, in scratch that stays in the
// nearest cache; matrix products of tiles do the rest. Nothing of the length of a sequence is kept.
#include "linear_attention/backward-inl.h"
#if defined(__AVX512BF16__)
#include "linear_attention/bf16-inl.h"
#endif
#include "linear_attention/tiles-inl.h"

namespace t2p::linear_attention::T2P_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kKeys = 16;  // taken at a time

// state += keys^T values of `count` rows.
template <std::int64_t usual>
T2P_INLINE void add_outer(const Attention& attention, const float* keys, std::int64_t count,
                          const float* values, float* state) {
  const Widths<usual> width(attention);
  for (std::int64_t i = 0; i < width.dp; i += kTileRows) {
    const Matrix left{keys + i, 1, width.dp};
    float* sums = state + i * width.ep;
    std::int64_t j = 0;
    for (; j + 2 * kLanes <= width.ep; j += 2 * kLanes) {
      multiply_tile<2, true>(left, count, values + j, width.ep, sums + j, width.ep);
    }
    if (j < width.ep) {
      multiply_tile<1, true>(left, count, values + j, width.ep, sums + j, width.ep);
    }
  }
}

void accumulate(const Attention& attention, const Head& head, std::int64_t begin, std::int64_t end,
                float* scratch, float* state) {
#if defined(__AVX512BF16__)
  if (attention.k.format == Format::kBf16 && attention.feature != Feature::kElu) {
    return accumulate_bf16(attention, head, begin, end, scratch, state);
  }
#endif
  const std::int64_t dp = head.dp, ep = head.ep;
  float *keys = scratch, *copied = keys + kKeys * dp, *z = state + dp * ep;
  const std::uint8_t* mask = mask_of(attention, head);
  const Read read_keys = reader(attention.k.format, attention.feature);
  const Read read_values = reader(attention.v.format, Feature::kIdentity);
  // Values that already are what a copy of them would be are taken from where they lie.
  const bool in_place =
      attention.v.format == Format::kF32 && !mask && attention.e == ep && attention.v.row == ep;
  const std::int64_t ahead_k = ahead(attention.k, attention.d, kKeys);
  const std::int64_t ahead_v = ahead(attention.v, attention.e, kKeys);
  const bool usual = dp == kUsual && ep == kUsual;
  for (std::int64_t row = begin; row < end; row += kKeys) {
    const std::int64_t count = end - row < kKeys ? end - row : kKeys;
    read_keys(attention.k, head, row, count, count, attention.d, mask, ahead_k, keys);
    const float* values = copied;
    if (in_place) {
      const std::int64_t at = place(attention.v, head, row);
      values = static_cast<const float*>(attention.v.data) + at;
      prefetch_row(attention.v, at + ahead_v * ep, count * ep);
    } else {
      read_values(attention.v, head, row, count, count, attention.e, mask, ahead_v, copied);
    }
    sum_rows(keys, nullptr, count, dp, z);
    if (usual) {
      add_outer<kUsual>(attention, keys, count, values, state);
    } else {
      add_outer<0>(attention, keys, count, values, state);
    }
  }
}

// What a numerator is multiplied by.
T2P_INLINE float factor(const Attention& attention, float denominator) {
  if (!attention.normalize) return attention.scale;
  return attention.scale / (attention.scale * denominator + attention.eps);
}

// The outputs of a tile of queries in scratch: `vectors` of their channels from `column` on.
template <Format format, int vectors>
T2P_INLINE void apply_tile(const float* queries, const Attention& attention, const Head& head,
                           const float* state, std::int64_t column, const float* factors,
                           std::int64_t count, std::int64_t at, const Rows& out) {
  F32 sum[kTileRows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) sum[i][j] = broadcast(0.0f);
  }
  add_products<vectors>({queries, head.dp, 1}, attention.d, state + column, head.ep, sum);
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= count) break;
    const F32 by = broadcast(factors[i]);
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) {
      const std::int64_t c = column + j * kLanes;
      write_vector<format>(out.data, at + i * out.row + c, attention.e - c, mul(by, sum[i][j]));
    }
  }
}

// The outputs of `count` queries, read into scratch in rows up to a multiple of kTileRows.
template <Format format>
void apply_rows(const Attention& attention, const Head& head, std::int64_t row, std::int64_t count,
                const float* state, const float* queries, const Rows& out) {
  const std::int64_t dp = head.dp, ep = head.ep;
  for (; count > 0; row += kTileRows, count -= kTileRows, queries += kTileRows * dp) {
    float factors[kTileRows];
    for (std::int64_t i = 0; i < kTileRows; ++i) {
      factors[i] = attention.normalize ? dot(queries + i * dp, state + dp * ep, dp) : 0.0f;
    }
    for (float& by : factors) by = factor(attention, by);
    const std::int64_t at = place(out, head, row);
    std::int64_t c = 0;
    for (; c + kLanes < attention.e; c += 2 * kLanes) {
      apply_tile<format, 2>(queries, attention, head, state, c, factors, count, at, out);
    }
    if (c < attention.e) {
      apply_tile<format, 1>(queries, attention, head, state, c, factors, count, at, out);
    }
  }
}

template <Format format>
void apply_format(const Attention& attention, const Head& head, std::int64_t begin,
                  std::int64_t end, const float* state, float* queries, const Rows& out) {
  const Read read = reader(attention.q.format, attention.feature);
  const std::int64_t ahead_q = ahead(attention.q, attention.d, kRows);
  for (std::int64_t row = begin; row < end; row += kTileRows) {
    const std::int64_t count = end - row < kTileRows ? end - row : kTileRows;
    read(attention.q, head, row, count, kTileRows, attention.d, nullptr, ahead_q, queries);
    // Else every first write to a line would wait for it.
    const std::int64_t at = place(out, head, row);
    for (std::int64_t i = kTileRows; i < 2 * kTileRows; ++i) {
      prefetch_row(out, at + i * out.row, attention.e);
    }
    apply_rows<format>(attention, head, row, count, state, queries, out);
  }
}

void apply(const Attention& attention, const Head& head, std::int64_t begin, std::int64_t end,
           const float* state, float* scratch, const Rows& out) {
  const auto apply_to = out.format == Format::kF32    ? apply_format<Format::kF32>
                        : out.format == Format::kBf16 ? apply_format<Format::kBf16>
                                                      : apply_format<Format::kF16>;
  apply_to(attention, head, begin, end, state, scratch, out);
}

void scan(const Attention& attention, const Head& head, std::int64_t begin, std::int64_t end,
          float* state, float* scratch, const Rows& out) {
  const std::int64_t dp = head.dp, ep = head.ep;
  float *queries = scratch, *keys = queries + kChunk * dp, *keys_t = keys + kChunk * dp;
  float *values = keys_t + kChunk * dp, *outputs = values + kChunk * ep;
  float *products = outputs + kChunk * ep, *z = state + dp * ep;
  const std::uint8_t* mask = mask_of(attention, head);
  for (std::int64_t row = begin; row < end; row += kChunk) {
    const std::int64_t count = end - row < kChunk ? end - row : kChunk;
    read_rows(attention.q, head, row, count, kChunk, attention.d, attention.feature, nullptr,
              queries);
    read_rows(attention.k, head, row, count, kChunk, attention.d, attention.feature, mask, keys);
    read_rows(attention.v, head, row, count, kChunk, attention.e, Feature::kIdentity, mask, values);
    transpose(keys, kChunk, dp, keys_t);
    multiply_lower(queries, keys_t, dp, products);
    multiply<false>({queries, dp, 1}, kChunk, attention.d, state, ep, ep, outputs, ep);
    for (std::int64_t i = 0; i < kChunk; i += 8) {
      multiply<true>({products + i * kChunk, kChunk, 1}, 8, i + 8, values, ep, ep, outputs + i * ep,
                     ep);
    }
    multiply<true>({keys, 1, dp}, dp, count, values, ep, ep, state, ep);
    for (std::int64_t i = 0; i < count; ++i) {
      add_scaled(1.0f, keys + i * dp, dp, z);
      const float by = factor(attention, dot(queries + i * dp, z, dp));
      write_row(out, head, row + i, attention.e, by, outputs + i * ep);
    }
  }
}

}  // namespace
}  // namespace t2p::linear_attention::T2P_ISA_NAMESPACE

#if defined(T2P_AMX)
#include "linear_attention/amx-inl.h"
#endif

namespace t2p::linear_attention::T2P_ISA_NAMESPACE {

#if defined(T2P_AMX)
const Kernels kKernels = {accumulate_on_tiles, apply_on_tiles, scan, backward};
#else
const Kernels kKernels = {accumulate, apply, scan, backward};
#endif

}  // namespace t2p::linear_attention::T2P_ISA_NAMESPACE

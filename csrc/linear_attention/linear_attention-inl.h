// SPDX-License-Identifier: Apache-2.0
// Linear attention of one head, for one instruction set. Included once per ISA.
//
// A tile of rows is turned into floats, mapped by phi and padded, in scratch that stays in the
// nearest cache; matrix products of tiles do the rest. Nothing of the length of a sequence is kept.
#include "linear_attention/backward-inl.h"
#include "linear_attention/tiles-inl.h"

namespace t2p::linear_attention::T2P_ISA_NAMESPACE {
namespace {

void accumulate(const Attention& attention, const Head& head, std::int64_t begin, std::int64_t end,
                float* scratch, float* state) {
  const std::int64_t dp = head.dp, ep = head.ep;
  float *keys = scratch, *values = keys + kRows * dp, *z = state + dp * ep;
  const std::uint8_t* mask = mask_of(attention, head);
  for (std::int64_t row = begin; row < end; row += kRows) {
    const std::int64_t count = end - row < kRows ? end - row : kRows;
    read_rows(attention.k, head, row, count, count, attention.d, attention.feature, mask, keys);
    read_rows(attention.v, head, row, count, count, attention.e, Feature::kIdentity, mask, values);
    multiply<true>({keys, 1, dp}, dp, count, values, ep, ep, state, ep);
    sum_rows(keys, nullptr, count, dp, z);
  }
}

// What a numerator is multiplied by.
T2P_INLINE float factor(const Attention& attention, const float* query, const float* z,
                        std::int64_t dp) {
  if (!attention.normalize) return attention.scale;
  return attention.scale / (attention.scale * dot(query, z, dp) + attention.eps);
}

void apply(const Attention& attention, const Head& head, std::int64_t begin, std::int64_t end,
           const float* state, float* scratch, const Rows& out) {
  const std::int64_t dp = head.dp, ep = head.ep;
  float *queries = scratch, *outputs = queries + kRows * dp;
  for (std::int64_t row = begin; row < end; row += kRows) {
    const std::int64_t count = end - row < kRows ? end - row : kRows;
    const std::int64_t height = (count + 7) / 8 * 8;
    read_rows(attention.q, head, row, count, height, attention.d, attention.feature, nullptr,
              queries);
    multiply<false>({queries, dp, 1}, height, attention.d, state, ep, ep, outputs, ep);
    for (std::int64_t i = 0; i < count; ++i) {
      const float by = factor(attention, queries + i * dp, state + dp * ep, dp);
      write_row(out, head, row + i, attention.e, by, outputs + i * ep);
    }
  }
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
      const float by = factor(attention, queries + i * dp, z, dp);
      write_row(out, head, row + i, attention.e, by, outputs + i * ep);
    }
  }
}

}  // namespace

const Kernels kKernels = {accumulate, apply, scan, backward};

}  // namespace t2p::linear_attention::T2P_ISA_NAMESPACE

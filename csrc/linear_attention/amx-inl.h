// SPDX-License-Identifier: Apache-2.0
// The passes over all keys and all queries on tiles, for rows in bfloat16 that phi leaves there.
// Included once per ISA, by those that have tiles, after those passes in float32, which do the
// rest: few rows, and queries or states with numbers that tiles are not good for.
//
// Keys and values are multiplied as they are, which is exact. The state is a sum in float32, and
// split in three. How rows are dealt with depends on 32 of them at a time, counted from the first:
// the bits are the same however they are divided among calls, at multiples of 64.
#pragma once

#include "linear_attention/bf16-inl.h"
#include "linear_attention/products-inl.h"

namespace t2p::linear_attention::T2P_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kBlocks = 8;  // of keys, between loads of the sums

// Pairs of rows [16, width] as the left side of a product, [width, 16].
T2P_INLINE void turn(const std::int32_t* pairs, std::int64_t width, std::int32_t* to) {
  transpose(reinterpret_cast<const float*>(pairs), kSide, width, reinterpret_cast<float*>(to));
}

T2P_INLINE void clear(std::int32_t* from, const std::int32_t* end) {
  for (; from < end; from += kLanes) store(from, broadcast(std::int32_t{0}));
}

// As accumulate_bf16.
template <bool relu, std::int64_t usual>
void accumulate_pairs(const Attention& attention, const Head& head, std::int64_t begin,
                      std::int64_t end, float* scratch, float* state) {
  const Widths<usual> width(attention);
  const std::int64_t dp = width.dp, ep = width.ep;
  auto* lefts = reinterpret_cast<std::int32_t*>(scratch);  // [kBlocks, dp, 16]
  std::int32_t* rights = lefts + kBlocks * dp * kSide;     // [kBlocks, 16, ep]
  std::int32_t* keys = rights + kBlocks * kSide * ep;      // [16, dp]
  const Side left{lefts, kSide * kSide, kSide, 0, dp * kSide};
  const Side right{rights, kSide, ep, 0, kSide * ep};
  const std::uint8_t* mask = mask_of(attention, head);
  const std::int64_t ahead_k = ahead(attention.k, width.d, kDepth);
  const std::int64_t ahead_v = ahead(attention.v, width.e, kDepth);
  const tiles::TilesInUse in_use;
  for (std::int64_t row = begin; row < end;) {
    std::int64_t block = 0;
    for (; block < kBlocks && row < end; ++block, row += kDepth) {
      const std::int64_t count = end - row < kDepth ? end - row : kDepth, pairs = (count + 1) / 2;
      std::int32_t* values = rights + block * kSide * ep;
      read_pairs<relu>(attention.k, head, row, count, width.d, mask, ahead_k, keys);
      read_pairs<false>(attention.v, head, row, count, width.e, mask, ahead_v, values);
      sum_pairs(keys, pairs, dp, state + dp * ep);
      clear(keys + pairs * dp, keys + kSide * dp);
      clear(values + pairs * ep, values + kSide * ep);
      turn(keys, dp, lefts + block * dp * kSide);
    }
    multiply_sides<1, true>(left, right, dp, ep, block, state, ep);
  }
}

// The state, with z in 16 more columns if it is wanted, as the right sides
// [blocks of channels, kParts, 16, width]. Returns whether it could be split.
bool split_state(const Head& head, const float* state, std::int64_t width, std::int32_t* to) {
  const std::int64_t dp = head.dp, ep = head.ep;
  const float* z = state + dp * ep;
  Magnitudes magnitudes;
  for (std::int64_t c = 0; c < dp; c += kDepth, to += kParts * kSide * width) {
    for (std::int64_t i = 0; i < kSide; ++i) {
      const std::int64_t channel = c + 2 * i;
      const float* row = state + channel * ep;
      for (std::int64_t j = 0; j < width; j += kLanes) {
        I32 pairs[kParts];
        if (channel >= dp) {
          split(broadcast(0.0f), broadcast(0.0f), pairs);
        } else if (j < ep) {
          split(load(row + j), load(row + ep + j), pairs);
        } else {
          split(broadcast(z[channel]), broadcast(z[channel + 1]), pairs);
        }
        magnitudes.include(pairs[0]);
#pragma GCC unroll 3
        for (int part = 0; part < kParts; ++part) {
          store(to + (part * kSide + i) * width + j, pairs[part]);
        }
      }
    }
  }
  return magnitudes.all_ordinary();
}

// phi of `count` queries as the left side of a product, [height, half], half the channels in pairs;
// the rest is zeros. Returns whether tiles are good for them.
template <bool relu>
T2P_INLINE bool read_left(const Rows& rows, const Head& head, std::int64_t begin,
                          std::int64_t count, std::int64_t height, std::int64_t channels,
                          std::int64_t ahead, std::int64_t half, std::int32_t* to) {
  Magnitudes magnitudes;
  std::int64_t at = place(rows, head, begin);
  for (std::int64_t i = 0; i < count; ++i, at += rows.row, to += half) {
    prefetch_row(rows, at + ahead * rows.row, channels);
    const auto* words = static_cast<const std::uint16_t*>(rows.data) + at;
    for (std::int64_t c = 0; c < channels; c += kDepth) {
      std::uint16_t tail[kDepth];
      const std::uint16_t* from = words + c;
      if (c + kDepth > channels) {
        for (std::int64_t j = 0; j < kDepth; ++j) tail[j] = c + j < channels ? from[j] : 0;
        from = tail;
      }
      const I32 pairs = load_bytes(reinterpret_cast<const std::uint8_t*>(from));
      const I32 phi = relu ? relu_bf16(pairs) : pairs;
      magnitudes.include(phi);
      store(to + c / 2, phi);
    }
  }
  clear(to, to + (height - count) * half);
  return magnitudes.all_ordinary();
}

template <bool relu, std::int64_t usual>
void apply_split(const Attention& attention, const Head& head, std::int64_t begin, std::int64_t end,
                 const float* state, float* scratch, const Rows& out) {
  const Widths<usual> channels(attention);
  const std::int64_t dp = channels.dp, ep = channels.ep;
  // Columns of z are there anyhow where the compiler is to know how many there are.
  const std::int64_t width = usual || attention.normalize ? ep + kSide : ep;
  const std::int64_t blocks = ceil_div(dp, kDepth), half = blocks * kSide;
  auto* rights = reinterpret_cast<std::int32_t*>(scratch);
  std::int32_t* lefts = rights + blocks * kParts * kSide * width;     // [kDepth, half]
  float* products = reinterpret_cast<float*>(lefts + kDepth * half);  // [kDepth, width]
  float* queries = products + kDepth * width;                         // [kDepth, dp]
  if (!split_state(head, state, width, rights)) {
    return apply_format<Format::kBf16>(attention, head, begin, end, state, scratch, out);
  }
  const Side left{lefts, kSide * half, half, 0, kSide};
  const Side right{rights, kSide, width, kSide * width, kParts * kSide * width};
  const std::int64_t ahead_q = ahead(attention.q, channels.d, kDepth);
  const tiles::TilesInUse in_use;
  for (std::int64_t row = begin; row < end; row += kDepth) {
    const std::int64_t count = end - row < kDepth ? end - row : kDepth, at = place(out, head, row);
    for (std::int64_t i = kDepth; i < 2 * kDepth; ++i) {
      prefetch_row(out, at + i * out.row, channels.e);
    }
    if (!read_left<relu>(attention.q, head, row, count, kDepth, channels.d, ahead_q, half, lefts)) {
      read_rows(attention.q, head, row, count, kDepth, attention.d, attention.feature, nullptr,
                queries);
      apply_rows<Format::kBf16>(attention, head, row, count, state, queries, out);
      continue;
    }
    multiply_sides<kParts, false>(left, right, count <= kSide ? kSide : kDepth, width, blocks,
                                  products, width);
    float factors[kDepth] = {};
    if (attention.normalize) {
      for (std::int64_t i = 0; i < kDepth; ++i) factors[i] = products[i * width + ep];
    }
    for (float& by : factors) by = factor(attention, by);
    for (std::int64_t i = 0; i < count; ++i) {
      write_format<Format::kBf16>(out, at + i * out.row, channels.e, broadcast(factors[i]),
                                  products + i * width);
    }
  }
}

// Whether tiles are for the rows, and there are enough to fill some.
T2P_INLINE bool for_tiles(const Attention& attention, std::int64_t rows) {
  return attention.k.format == Format::kBf16 && attention.feature != Feature::kElu && rows >= kSide;
}

// Calls to.operator()<relu, usual>(), as the kernels above are written for.
template <class Call>
T2P_INLINE void with_sizes(const Attention& attention, Call to) {
  const bool relu = attention.feature == Feature::kRelu;
  if (attention.d == kUsual && attention.e == kUsual) {
    relu ? to.template operator()<true, kUsual>() : to.template operator()<false, kUsual>();
  } else {
    relu ? to.template operator()<true, 0>() : to.template operator()<false, 0>();
  }
}

void accumulate_on_tiles(const Attention& attention, const Head& head, std::int64_t begin,
                         std::int64_t end, float* scratch, float* state) {
  if (!for_tiles(attention, head.n)) {
    return accumulate(attention, head, begin, end, scratch, state);
  }
  with_sizes(attention, [&]<bool relu, std::int64_t usual>() {
    accumulate_pairs<relu, usual>(attention, head, begin, end, scratch, state);
  });
}

void apply_on_tiles(const Attention& attention, const Head& head, std::int64_t begin,
                    std::int64_t end, const float* state, float* scratch, const Rows& out) {
  if (!for_tiles(attention, head.m)) {
    return apply(attention, head, begin, end, state, scratch, out);
  }
  with_sizes(attention, [&]<bool relu, std::int64_t usual>() {
    apply_split<relu, usual>(attention, head, begin, end, state, scratch, out);
  });
}

}  // namespace
}  // namespace t2p::linear_attention::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// Sums over keys of products of bfloat16 numbers, with the instruction that multiplies two pairs of
// them and adds both products, exact, to a float32. Included once per ISA, by those that have it.
//
// Only what is in bfloat16 to begin with is multiplied so: keys, after ReLU or as they are, times
// values. The state is a sum in float32 and stays one. It may not be rounded to bfloat16 for
// q^T S: an error up to 2^-8 of every term does not average out where terms cancel. Split in
// two bfloat16, of 16 bits together, it takes as many instructions as the product in float32.
// Numbers below 2^-126 count as zero.
#pragma once

#include "common/pairs-inl.h"
#include "linear_attention/tiles-inl.h"

namespace t2p::linear_attention::T2P_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kPairs = 16;  // of rows taken at a time

// Rows [begin, begin + count), those that the mask leaves out as zeros.
template <bool relu>
T2P_INLINE void read_pairs(const Rows& rows, const Head& head, std::int64_t begin,
                           std::int64_t count, std::int64_t channels, const std::uint8_t* mask,
                           std::int64_t ahead, std::int32_t* to) {
  alignas(64) static constexpr std::uint16_t kZeros[256] = {};
  const std::int64_t first = place(rows, head, begin), next = first + ahead * rows.row;
  const auto* words = static_cast<const std::uint16_t*>(rows.data) + first;
  for (std::int64_t i = 0; i < count; i += 2, to += padded(channels)) {
    const std::uint16_t *a = words + i * rows.row, *b = i + 1 < count ? a + rows.row : kZeros;
    if (mask && !mask[begin + i]) a = kZeros;
    if (mask && i + 1 < count && !mask[begin + i + 1]) b = kZeros;
    prefetch_row(rows, next + i * rows.row, channels);
    prefetch_row(rows, next + (i + 1) * rows.row, channels);
    pair_rows<relu>(a, b, channels, to);
  }
}

// sums [8, vectors kLanes] += a^T b, of pairs of words.
template <int vectors>
T2P_INLINE void multiply_pairs(const std::int32_t* a, std::int64_t lda, const std::int32_t* b,
                               std::int64_t ldb, std::int64_t pairs, float* sums) {
  F32 sum[kTileRows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) sum[i][j] = load(sums + i * ldb + j * kLanes);
  }
  for (std::int64_t k = 0; k < pairs; ++k, a += lda, b += ldb) {
    I32 right[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const I32 left = broadcast(a[i]);
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) sum[i][j] = dot_bf16(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) store(sums + i * ldb + j * kLanes, sum[i][j]);
  }
}

// z += the sum of the keys.
T2P_INLINE void sum_pairs(const std::int32_t* keys, std::int64_t pairs, std::int64_t width,
                          float* z) {
  const I32 ones = broadcast(std::int32_t{0x3F803F80});
#pragma GCC unroll 2
  for (std::int64_t c = 0; c < width; c += kLanes) {
    F32 even = load(z + c), odd = broadcast(0.0f);
    std::int64_t i = 0;
    for (; i + 2 <= pairs; i += 2) {
      const std::int32_t* at = keys + i * width + c;
      even = dot_bf16(even, load(at), ones);
      odd = dot_bf16(odd, load(at + width), ones);
    }
    if (i < pairs) even = dot_bf16(even, load(keys + i * width + c), ones);
    store(z + c, add(even, odd));
  }
}

// As accumulate, of keys and values in bfloat16 that phi leaves there.
void accumulate_bf16(const Attention& attention, const Head& head, std::int64_t begin,
                     std::int64_t end, float* scratch, float* state) {
  const std::int64_t dp = head.dp, ep = head.ep;
  auto* keys = reinterpret_cast<std::int32_t*>(scratch);
  std::int32_t* values = keys + kPairs * dp;
  const std::uint8_t* mask = mask_of(attention, head);
  const bool relu = attention.feature == Feature::kRelu;
  const std::int64_t ahead_k = ahead(attention.k, attention.d, 2 * kPairs);
  const std::int64_t ahead_v = ahead(attention.v, attention.e, 2 * kPairs);
  for (std::int64_t row = begin; row < end; row += 2 * kPairs) {
    const std::int64_t count = end - row < 2 * kPairs ? end - row : 2 * kPairs;
    const std::int64_t pairs = (count + 1) / 2;
    relu ? read_pairs<true>(attention.k, head, row, count, attention.d, mask, ahead_k, keys)
         : read_pairs<false>(attention.k, head, row, count, attention.d, mask, ahead_k, keys);
    read_pairs<false>(attention.v, head, row, count, attention.e, mask, ahead_v, values);
    sum_pairs(keys, pairs, dp, state + dp * ep);
    for (std::int64_t i = 0; i < dp; i += kTileRows) {
      float* sums = state + i * ep;
      std::int64_t j = 0;
      for (; j + 2 * kLanes <= ep; j += 2 * kLanes) {
        multiply_pairs<2>(keys + i, dp, values + j, ep, pairs, sums + j);
      }
      if (j < ep) multiply_pairs<1>(keys + i, dp, values + j, ep, pairs, sums + j);
    }
  }
}

}  // namespace
}  // namespace t2p::linear_attention::T2P_ISA_NAMESPACE

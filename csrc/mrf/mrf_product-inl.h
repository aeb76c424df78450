// SPDX-License-Identifier: Apache-2.0
// The product with dense label weights in bfloat16, with the instruction that multiplies two pairs
// and adds both products to a float32. Included once per ISA, by those that have it.
//
// The lanes of a vector are labels: W_c is laid out so that 32 labels lie side by side for each
// pair of its columns. Rows come in tiles of as many as have their sums in registers.
#pragma once

#include "common/simd.h"
#include "common/transpose-inl.h"
#include "mrf/kernels.h"

namespace t2p::mrf::T2P_ISA_NAMESPACE {
namespace {

constexpr int kPanel = 2 * kLanes;  // labels

// The pair number p of a row of v words.
T2P_INLINE std::int32_t pair_of(const std::uint16_t* row, std::int64_t v, std::int64_t p) {
  const std::uint32_t low = 2 * p < v ? row[2 * p] : 0, high = 2 * p + 1 < v ? row[2 * p + 1] : 0;
  return static_cast<std::int32_t>(low | high << 16);
}

void pack_labels(const std::uint16_t* w_c, std::int64_t v, std::int64_t label, std::int64_t first,
                 std::int32_t* to) {
  for (std::int64_t half = 0; half < kPanel; half += kLanes) {
    for (std::int64_t p = 0; p < kPairs; p += kLanes) {
      const std::int64_t begin = label + half;
      if (v % 2 == 0 && begin + kLanes <= v && first + p + kLanes <= v / 2) {
        const auto* words = reinterpret_cast<const std::int32_t*>(w_c) + begin * (v / 2);
        transpose_square(words + first + p, v / 2, to + p * kPanel + half, kPanel);
        continue;
      }
      std::int32_t block[kLanes * kLanes] = {};
      for (std::int64_t i = 0; i < kLanes && begin + i < v; ++i) {
        for (std::int64_t j = 0; j < kLanes; ++j) {
          block[i * kLanes + j] = pair_of(w_c + (begin + i) * v, v, first + p + j);
        }
      }
      transpose_square(block, kLanes, to + p * kPanel + half, kPanel);
    }
  }
}

// sums [kRows, stride] += rows [kPairs, kRows] times labels [kPairs, kPanel].
template <int kRows>
void multiply_tile(const std::int32_t* rows, const std::int32_t* labels, std::int64_t stride,
                   bool begin, float* sums) {
  F32 left[kRows], right[kRows];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    left[i] = begin ? broadcast(0.0f) : load(sums + i * stride);
    right[i] = begin ? broadcast(0.0f) : load(sums + i * stride + kLanes);
  }
  for (std::int64_t p = 0; p < kPairs; ++p, rows += kRows, labels += kPanel) {
    __builtin_prefetch(labels + kPairs * kPanel, 0, 2);  // the panel after this one
    __builtin_prefetch(labels + kPairs * kPanel + kLanes, 0, 2);
    const I32 a = load(labels), b = load(labels + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const I32 word = broadcast(rows[i]);
      left[i] = dot_bf16(left[i], word, a);
      right[i] = dot_bf16(right[i], word, b);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    store(sums + i * stride, left[i]);
    store(sums + i * stride + kLanes, right[i]);
  }
}

using Multiply = void (*)(const std::int32_t*, const std::int32_t*, std::int64_t, bool, float*);
constexpr Multiply kMultiply[kMostRows] = {multiply_tile<1>,  multiply_tile<2>,  multiply_tile<3>,
                                           multiply_tile<4>,  multiply_tile<5>,  multiply_tile<6>,
                                           multiply_tile<7>,  multiply_tile<8>,  multiply_tile<9>,
                                           multiply_tile<10>, multiply_tile<11>, multiply_tile<12>};

void multiply(const std::int32_t* rows, const std::int32_t* labels, std::int64_t tile,
              std::int64_t stride, bool begin, float* sums) {
  kMultiply[tile - 1](rows, labels, stride, begin, sums);
}

void pack_rows(const std::uint16_t* rows, std::int64_t count, std::int64_t v, std::int64_t first,
               std::int32_t* to) {
  if (v % 2 == 0 && first + kPairs <= v / 2) {
    for (std::int64_t p = 0; p < kPairs; ++p) {
      for (std::int64_t i = 0; i < count; ++i) {
        __builtin_memcpy(to + p * count + i, rows + i * v + 2 * (first + p), sizeof(*to));
      }
    }
    return;
  }
  for (std::int64_t p = 0; p < kPairs; ++p) {
    for (std::int64_t i = 0; i < count; ++i) {
      to[p * count + i] = pair_of(rows + i * v, v, first + p);
    }
  }
}

void add_scaled(const ScaledRow& a, const ScaledRow& b, std::int64_t count, std::uint16_t* to) {
  const F32 of_a = broadcast(a.scale), of_b = broadcast(b.scale);
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const F32 sum = mul(of_b, load_bf16(b.words + i));
    store_bf16(to + i, multiply_add(of_a, load_bf16(a.words + i), sum));
  }
}

void join_products(const JoinedRow& row, const float* products, std::int64_t size,
                   std::int64_t count) {
  const F32 upper = broadcast(row.upper_inverse), lower = broadcast(row.lower_inverse);
  for (std::int64_t i = 0; i < count; i += kLanes) {
    F32 m[kProducts];
#pragma GCC unroll 7
    for (int k = 0; k < kProducts; ++k) m[k] = load(products + k * size + i);
    // Those with labels as they are: on the scale of the others, of powers of two and so exactly.
    m[1] = mul(m[1], load(row.scale + i));
    m[4] = mul(m[4], load(row.scale + row.half + i));
    const F32 left = load(row.inverse + i), right = load(row.inverse + row.half + i);
    const F32 above = mul(add(sub(add(m[0], m[3]), m[4]), m[6]), left);
    const F32 below = mul(add(add(sub(m[0], m[1]), m[2]), m[5]), right);
    store(row.upper + i, mul(above, upper));
    store(row.upper + row.half + i, mul(mul(add(m[2], m[4]), right), upper));
    if (row.lower == nullptr) continue;
    store(row.lower + i, mul(mul(add(m[1], m[3]), left), lower));
    store(row.lower + row.half + i, mul(below, lower));
  }
}

}  // namespace
}  // namespace t2p::mrf::T2P_ISA_NAMESPACE

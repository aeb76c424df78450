// SPDX-License-Identifier: Apache-2.0
// Distances in float64, and the nearest of the codes compared by them. Included once per ISA.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "vq/search.h"

namespace t2p::vq::T2P_ISA_NAMESPACE {
namespace {

using namespace simd::T2P_ISA_NAMESPACE;

T2P_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

struct Nearest {
  double distance;
  std::int64_t index;

  T2P_INLINE void offer(double other, std::int64_t code) {
    const bool better = (other < distance) | ((other == distance) & (code < index));
    distance = better ? other : distance;
    index = better ? code : index;
  }
};

// Offers code[count], count <= kCodes; all kCodes are read. Numbers past the last code stand for
// it, which changes nothing.
template <int kCodes>
T2P_INLINE void offer_batch(const Codebook& codebook, const float* row, const std::int32_t* code,
                            int count, Nearest& nearest) {
  constexpr int kStep = kLanes / 2;
  const std::int64_t d = codebook.d, last = codebook.k - 1;
  const float* codes[kCodes];
  F64 sums[kStep];
#pragma GCC unroll 8
  for (int v = 0; v < kCodes; ++v) {
    codes[v] = codebook.codes + smaller(code[v], last) * d;
    sums[v] = broadcast(0.0);
  }
  std::int64_t t = 0;
  for (; t + kStep <= d; t += kStep) {
    const F64 x = load_f64(row + t);
#pragma GCC unroll 8
    for (int v = 0; v < kCodes; ++v) {
      const F64 difference = sub(x, load_f64(codes[v] + t));
      sums[v] = multiply_add(difference, difference, sums[v]);
    }
  }
  if (const int left = static_cast<int>(d - t)) {
    const F64 x = load_f64_first(row + t, left);
#pragma GCC unroll 8
    for (int v = 0; v < kCodes; ++v) {
      const F64 difference = sub(x, load_f64_first(codes[v] + t, left));
      sums[v] = multiply_add(difference, difference, sums[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = kCodes; v < kStep; ++v) sums[v] = sums[v - kCodes];
  // The distance of a code that is not finite, a NaN, becomes infinite.
  const F64 infinity = broadcast(double{__builtin_inff()});
  const F64 distance = keep_first(min(reduce_add_each(sums), infinity), count, infinity);
  const double least = reduce_min(distance);
  auto equal = bits_where_equal(distance, broadcast(least));
  for (; equal; equal &= equal - 1) {  // hardly ever of two codes
    nearest.offer(least, smaller(code[__builtin_ctz(equal) % kCodes], last));
  }
}

// Offers code[count]; the list has room for kLanes more, which are overwritten.
T2P_INLINE void offer_codes(const Codebook& codebook, const float* row, std::int32_t* code,
                            std::int64_t count, Nearest& nearest) {
  constexpr int kBatch = kLanes / 2, kHalf = kBatch == 8 ? 4 : kBatch;
  for (int i = 0; i < kBatch; ++i) code[count + i] = code[count - 1];
  if (count <= kHalf) {
    return offer_batch<kHalf>(codebook, row, code, static_cast<int>(count), nearest);
  }
  for (std::int64_t i = 0; i < count; i += kBatch) {
    offer_batch<kBatch>(codebook, row, code + i, static_cast<int>(smaller(kBatch, count - i)),
                        nearest);
  }
}

}  // namespace
}  // namespace t2p::vq::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// An iteration whose label weights are of low rank, W_c = A B^T: what a row hears is k numbers, and
// what it says is k numbers. Included once per ISA.
#pragma once

#include "common/exp-inl.h"
#include "common/simd.h"
#include "mrf/kernels.h"

namespace t2p::mrf::T2P_ISA_NAMESPACE {
namespace {

// (unary + heard A^T) / temperature of kLowRankRows rows into scratch [rows, stride], filled up
// with -inf to a whole vector; the largest of each row, or NaN if there is a NaN or +inf.
void hear(const LowRankStep& step, const float* const (&unary)[kLowRankRows], const float* heard,
          std::int64_t stride, float* scratch, float (&largest)[kLowRankRows]) {
  constexpr std::uint32_t kAll = (1u << kLanes) - 1;
  const F32 inverse = broadcast(1.0f / step.temperature), high = broadcast(kInfinity);
  F32 most[kLowRankRows];
  std::uint32_t below[kLowRankRows];
  for (int r = 0; r < kLowRankRows; ++r) most[r] = broadcast(-kInfinity), below[r] = kAll;
  for (std::int64_t a = 0; a < step.v; a += kLanes) {
    const int count = static_cast<int>(step.v - a < kLanes ? step.v - a : kLanes);
    F32 x[kLowRankRows];
#pragma GCC unroll 4
    for (int r = 0; r < kLowRankRows; ++r) {
      x[r] = count == kLanes ? load(unary[r] + a) : load_first(unary[r] + a, count);
    }
    if (heard) {
      const float* weights = step.a + a;
      for (std::int64_t k = 0; k < step.k; ++k, weights += step.v) {
        const F32 weight = count == kLanes ? load(weights) : load_first(weights, count);
#pragma GCC unroll 4
        for (int r = 0; r < kLowRankRows; ++r) {
          x[r] = multiply_add(broadcast(heard[r * step.k + k]), weight, x[r]);
        }
      }
    }
    for (int r = 0; r < kLowRankRows; ++r) {
      float* to = scratch + r * stride + a;
      x[r] = mul(x[r], inverse);
      store(to, x[r]);
      if (count < kLanes) {
        for (int i = count; i < kLanes; ++i) to[i] = -kInfinity;
        x[r] = load(to);
      }
      below[r] &= bits(less(x[r], high));
      most[r] = max(x[r], most[r]);
    }
  }
  for (int r = 0; r < kLowRankRows; ++r) {
    largest[r] = below[r] == kAll ? reduce_max(most[r]) : __builtin_nanf("");
  }
}

// said [rows, k] = share scratch [rows, stride] B.
void say(const LowRankStep& step, const float* scratch, std::int64_t stride,
         const float (&share)[kLowRankRows], float* said) {
  constexpr std::int64_t kTogether = 4;
  for (std::int64_t first = 0; first < step.k; first += kTogether) {
    F32 sums[kLowRankRows][kTogether];
#pragma GCC unroll 4
    for (auto& row : sums) {
#pragma GCC unroll 4
      for (F32& sum : row) sum = broadcast(0.0f);
    }
    const float* weights[kTogether];
    for (std::int64_t j = 0; j < kTogether; ++j) {
      weights[j] = step.b + (first + j < step.k ? first + j : first) * step.v;
    }
    for (std::int64_t a = 0; a < step.v; a += kLanes) {
      const int count = static_cast<int>(step.v - a < kLanes ? step.v - a : kLanes);
      F32 q[kLowRankRows];
#pragma GCC unroll 4
      for (int r = 0; r < kLowRankRows; ++r) q[r] = load(scratch + r * stride + a);
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j) {
        const F32 weight =
            count == kLanes ? load(weights[j] + a) : load_first(weights[j] + a, count);
#pragma GCC unroll 4
        for (int r = 0; r < kLowRankRows; ++r) {
          sums[r][j] = multiply_add(q[r], weight, sums[r][j]);
        }
      }
    }
    for (int r = 0; r < kLowRankRows; ++r) {
      for (std::int64_t j = 0; j < kTogether && first + j < step.k; ++j) {
        said[r * step.k + first + j] = share[r] * reduce_add(sums[r][j]);
      }
    }
  }
}

}  // namespace
}  // namespace t2p::mrf::T2P_ISA_NAMESPACE

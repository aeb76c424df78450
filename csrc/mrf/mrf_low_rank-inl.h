// SPDX-License-Identifier: Apache-2.0
// An iteration whose label weights are of low rank, W_c = A B^T: what a row hears is k numbers, and
// what it says is k numbers. Included once per ISA.
#pragma once

#include "common/exp-inl.h"
#include "common/simd.h"
#include "mrf/kernels.h"

namespace t2p::mrf::T2P_ISA_NAMESPACE {
namespace {

// What a row hears, k numbers; up to the next whole vector `heard` is overwritten.
void gather_words(const LowRankStep& step, std::int64_t row, float* heard) {
  constexpr int kChains = 4;  // of sums, so that one need not wait for another
  const Edges& edges = step.edges;
  const std::int64_t i = row % step.n, last = edges.begin[i + 1];
  for (std::int64_t k = 0; k < step.k; k += kLanes) {
    const float* words = step.words + (row - i) * step.k + k;
    const int count = static_cast<int>(step.k - k < kLanes ? step.k - k : kLanes);
    F32 sums[kChains];
#pragma GCC unroll 4
    for (F32& sum : sums) sum = broadcast(0.0f);
    const auto add_edge = [&](std::int64_t e, F32& sum) {
      const float* from = words + edges.node[e] * step.k;
      const F32 word = count < kLanes ? load_first(from, count) : load(from);
      sum = multiply_add(broadcast(edges.weight[e]), word, sum);
    };
    std::int64_t e = edges.begin[i];
    for (; e + kChains <= last; e += kChains) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) add_edge(e + c, sums[c]);
    }
    for (; e < last; ++e) add_edge(e, sums[0]);
    store(heard + k, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  }
}

// unary + heard A^T of kLowRankRows rows, for `kVectors` vectors of labels from `a` on; or, if
// there are fewer labels left than one vector has lanes, for `count` of them.
template <int kVectors>
T2P_INLINE void add_heard(const LowRankStep& step, const float* const (&unary)[kLowRankRows],
                          const float* heard, std::int64_t a, int count,
                          F32 (&x)[kLowRankRows][kVectors]) {
  const auto read = [&](const float* from) {
    return kVectors == 1 && count < kLanes ? load_first(from, count) : load(from);
  };
#pragma GCC unroll 4
  for (int r = 0; r < kLowRankRows; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) x[r][i] = read(unary[r] + a + i * kLanes);
  }
  if (heard == nullptr) return;
  const float* weights = step.a + a;
  for (std::int64_t k = 0; k < step.k; ++k, weights += step.v) {
    F32 weight[kVectors];
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) weight[i] = read(weights + i * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kLowRankRows; ++r) {
      const F32 number = broadcast(heard[r * step.k + k]);
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) x[r][i] = multiply_add(number, weight[i], x[r][i]);
    }
  }
}

// (unary + heard A^T) / temperature of kLowRankRows rows into scratch [rows, stride], filled up
// with -inf to a whole vector; the largest of each row, or NaN if there is a NaN or +inf.
void hear(const LowRankStep& step, const float* const (&unary)[kLowRankRows], const float* heard,
          std::int64_t stride, float* scratch, float (&largest)[kLowRankRows]) {
  constexpr std::uint32_t kAll = (1u << kLanes) - 1;
  const F32 inverse = broadcast(1.0f / step.temperature), high = broadcast(kInfinity);
  F32 most[kLowRankRows];
  std::uint32_t below[kLowRankRows];
  for (int r = 0; r < kLowRankRows; ++r) most[r] = broadcast(-kInfinity), below[r] = kAll;
  const auto keep = [&](int r, std::int64_t a, int count, F32 x) {
    float* to = scratch + r * stride + a;
    x = mul(x, inverse);
    store(to, x);
    if (count < kLanes) {
      for (int i = count; i < kLanes; ++i) to[i] = -kInfinity;
      x = load(to);
    }
    below[r] &= bits(less(x, high));
    most[r] = max(x, most[r]);
  };
  std::int64_t a = 0;
  for (; a + 2 * kLanes <= step.v; a += 2 * kLanes) {
    F32 x[kLowRankRows][2];
    add_heard<2>(step, unary, heard, a, kLanes, x);
#pragma GCC unroll 4
    for (int r = 0; r < kLowRankRows; ++r) {
      keep(r, a, kLanes, x[r][0]);
      keep(r, a + kLanes, kLanes, x[r][1]);
    }
  }
  for (; a < step.v; a += kLanes) {
    const int count = static_cast<int>(step.v - a < kLanes ? step.v - a : kLanes);
    F32 x[kLowRankRows][1];
    add_heard<1>(step, unary, heard, a, count, x);
    for (int r = 0; r < kLowRankRows; ++r) keep(r, a, count, x[r][0]);
  }
  for (int r = 0; r < kLowRankRows; ++r) {
    largest[r] = below[r] == kAll ? reduce_max(most[r]) : __builtin_nanf("");
  }
}

// The place of the first of v numbers, filled up to a whole vector, that is the largest.
std::int64_t first_of(const float* x, std::int64_t v, float largest) {
  constexpr std::uint32_t kAll = (1u << kLanes) - 1;
  for (std::int64_t a = 0; a < v; a += kLanes) {
    const std::uint32_t smaller = bits(less(load(x + a), broadcast(largest)));
    if (smaller != kAll) return a + __builtin_ctz(~smaller);
  }
  return 0;
}

// said [rows, k] = share scratch [rows, stride] B.
void say(const LowRankStep& step, const float* scratch, std::int64_t stride,
         const float (&share)[kLowRankRows], float* said) {
  // With fewer lanes there are fewer registers for sums.
  constexpr std::int64_t kTogether = kLanes == 16 ? 4 : 2;
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

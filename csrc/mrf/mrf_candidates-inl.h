// SPDX-License-Identifier: Apache-2.0
// An iteration as of mrf_low_rank-inl.h where most labels are ruled out by scores of -inf: only the
// others, a row's candidates, are looked at. Included once per ISA.
#pragma once

#include <limits>

#include "common/simd.h"
#include "mrf/kernels.h"
#include "mrf/mrf_low_rank-inl.h"
#include "mrf/mrf_softmax-inl.h"

namespace t2p::mrf::T2P_ISA_NAMESPACE {
namespace {

std::int64_t find_candidates(const float* unary, std::int64_t v, std::int64_t most,
                             std::int64_t* candidate) {
  const F32 lowest = broadcast(std::numeric_limits<float>::lowest());
  std::int64_t found = 0;
  for (std::int64_t a = 0; a < v; a += kLanes) {
    const int count = static_cast<int>(v - a < kLanes ? v - a : kLanes);
    const F32 x = count < kLanes ? load_first(unary + a, count) : load(unary + a);
    std::uint32_t in = ~bits(less(x, lowest)) & ((1u << count) - 1);
    for (; in != 0; in &= in - 1) {  // a NaN, which is not less, among them
      const std::int64_t label = a + __builtin_ctz(in);
      if (found == most || !(unary[label] < kInfinity)) return 0;
      candidate[found++] = label;
    }
  }
  return found;
}

// Of k numbers each.
T2P_INLINE float dot(const float* x, const float* y, std::int64_t k) {
  F32 sum = broadcast(0.0f);
  std::int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) sum = multiply_add(load(x + i), load(y + i), sum);
  if (i < k) {
    const int count = static_cast<int>(k - i);
    sum = multiply_add(load_first(x + i, count), load_first(y + i, count), sum);
  }
  return reduce_add(sum);
}

// The row `at` of low_rank_step_cpu; false if its maximum is not finite.
bool candidate_row(const LowRankStep& step, std::int64_t at, float* scratch,
                   const LowRankResult& result) {
  const auto& [said, q, sure, labels] = result;
  const std::int64_t row = step.row[at], count = step.candidates[at];
  const std::int64_t* candidate = step.candidate + at * step.most;
  float heard[kMostRank + kLanes];
  if (step.words) gather_words(step, row, heard);
  const float inverse = 1.0f / step.temperature;
  float largest = -kInfinity;
  std::int64_t best = 0;
  bool below = true;
  for (std::int64_t c = 0; c < count; ++c) {
    float x = step.unary[row * step.v + candidate[c]];
    if (step.words) x += dot(heard, step.a + candidate[c] * step.k, step.k);
    x *= inverse;
    below &= x < kInfinity;
    if (x > largest) largest = x, best = candidate[c];
    scratch[c] = x;
  }
  const bool finite = below && largest > -kInfinity;
  if (labels != nullptr) labels[row] = finite ? best : 0;
  if (said == nullptr && q == nullptr && sure == nullptr) return finite;
  for (int i = 0; i < kLanes; ++i) scratch[count + i] = -kInfinity;
  const double total = exponentials_of(scratch, count, largest);
  const float share = finite ? static_cast<float>(1.0 / total) : __builtin_nanf("");
  if (sure != nullptr) sure[row] = share;
  for (std::int64_t c = 0; c < count; ++c) scratch[c] *= share;
  if (q != nullptr) {
    float* to = q + row * step.v;
    for (std::int64_t a = 0; a < step.v; ++a) to[a] = 0;
    for (std::int64_t c = 0; c < count; ++c) to[candidate[c]] = scratch[c];
  }
  if (said == nullptr) return finite;
  for (std::int64_t k = 0; k < step.k; k += kLanes) {
    const int numbers = static_cast<int>(step.k - k < kLanes ? step.k - k : kLanes);
    F32 sum = broadcast(0.0f);
    for (std::int64_t c = 0; c < count; ++c) {
      const float* b = step.b + candidate[c] * step.k + k;
      sum = multiply_add(broadcast(scratch[c]), numbers < kLanes ? load_first(b, numbers) : load(b),
                         sum);
    }
    float word[kLanes];
    store(word, sum);
    for (int i = 0; i < numbers; ++i) said[row * step.k + k + i] = word[i];
  }
  return finite;
}

std::int64_t candidate_rows(const LowRankStep& step, std::int64_t first, std::int64_t count,
                            float* scratch, const LowRankResult& result) {
  std::int64_t bad = -1;
  for (std::int64_t at = first; at < first + count; ++at) {
    if (!candidate_row(step, at, scratch, result) && bad < 0) bad = at;
  }
  return bad;
}

}  // namespace
}  // namespace t2p::mrf::T2P_ISA_NAMESPACE

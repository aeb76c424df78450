// SPDX-License-Identifier: Apache-2.0
// Messages of belief propagation, for one instruction set. Included by mrf-inl.h, once per ISA.
#pragma once

#include <cstdint>

#include "common/exp-inl.h"
#include "common/simd.h"
#include "mrf/kernels.h"

namespace t2p::mrf::T2P_ISA_NAMESPACE {
namespace {

using namespace simd::T2P_ISA_NAMESPACE;

constexpr float kInfinity = __builtin_inff();

void accumulate(const float* from, float weight, std::int64_t v, float* to) {
  const F32 weights = broadcast(weight);
  std::int64_t a = 0;
  for (; a + kLanes <= v; a += kLanes) {
    store(to + a, multiply_add(weights, load(from + a), load(to + a)));
  }
  for (; a < v; ++a) to[a] += weight * from[a];
}

// kVectors vectors of the message from number c on. The last of v labels is repeated where a vector
// goes beyond it; what comes of that is not used.
template <int kVectors>
T2P_INLINE void message_strip(const float* h, const float* w_c, float weight, float temperature,
                              std::int64_t v, std::int64_t c, float* to) {
  const F32 weights = broadcast(weight);
  const int left = static_cast<int>(v - c < kLanes ? v - c : kLanes);
  const auto pair = [&](std::int64_t a, int p) __attribute__((always_inline)) {
    const float* row = w_c + a * v + c + p * kLanes;
    return kVectors == 1 ? load_first(row, left) : load(row);
  };
  F32 most[kVectors];
#pragma GCC unroll 4
  for (F32& part : most) part = broadcast(-kInfinity);
  for (std::int64_t a = 0; a < v; ++a) {
    const F32 score = broadcast(h[a]);
#pragma GCC unroll 4
    for (int p = 0; p < kVectors; ++p) {
      most[p] = max(multiply_add(weights, pair(a, p), score), most[p]);
    }
  }
  if (temperature > 0) {
    const F32 inverse = broadcast(1.0f / temperature);
    F32 sum[kVectors];
#pragma GCC unroll 4
    for (F32& part : sum) part = broadcast(0.0f);
    for (std::int64_t a = 0; a < v; ++a) {
      const F32 score = broadcast(h[a]);
#pragma GCC unroll 4
      for (int p = 0; p < kVectors; ++p) {
        const F32 x = sub(multiply_add(weights, pair(a, p), score), most[p]);
        sum[p] = add(sum[p], exp_nonpositive<true>(mul(x, inverse)));
      }
    }
    for (int p = 0; p < kVectors; ++p) {
      float lane[kLanes];
      store(lane, sum[p]);
      for (float& value : lane) value = temperature * log_of(value);
      most[p] = add(most[p], load(lane));
    }
  }
  for (int p = 0; p < kVectors; ++p) store(to + c + p * kLanes, most[p]);
}

// The message of a known factor, t log sum_a p_a factor[a, c], up to a constant. The caller sees to
// it that the sums neither vanish nor overflow.
template <int kVectors>
T2P_INLINE void factor_strip(const float* p, const float* factor, float temperature, std::int64_t v,
                             std::int64_t c, float* to) {
  const int left = static_cast<int>(v - c < kLanes ? v - c : kLanes);
  F32 sum[kVectors];
#pragma GCC unroll 4
  for (F32& part : sum) part = broadcast(0.0f);
  for (std::int64_t a = 0; a < v; ++a) {
    const float* row = factor + a * v + c;
    const F32 share = broadcast(p[a]);
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q) {
      const F32 entry = kVectors == 1 ? load_first(row, left) : load(row + q * kLanes);
      sum[q] = multiply_add(share, entry, sum[q]);
    }
  }
  for (int q = 0; q < kVectors; ++q) {
    float lane[kLanes];
    store(lane, sum[q]);
    for (int i = 0; i < kLanes; ++i) to[c + q * kLanes + i] = temperature * log_of(lane[i]);
  }
}

// p = exp((h - max h) / t).
T2P_INLINE void exponentials(const float* h, float temperature, std::int64_t v, float* p) {
  float most = -kInfinity;
  for (std::int64_t a = 0; a < v; ++a) most = h[a] > most ? h[a] : most;
  const F32 offset = broadcast(most), inverse = broadcast(1.0f / temperature);
  for (std::int64_t a = 0; a < v; a += kLanes) {  // the buffers end in a spare vector
    store(p + a, exp_nonpositive<true>(mul(sub(load(h + a), offset), inverse)));
  }
}

void send(const Edges& edges, const BeliefStep& step, const float* unary, std::int64_t i,
          const float* from, float* scratch, float* to) {
  const std::int64_t v = step.v, room = v + kLanes;
  float* belief = scratch;
  float* h = scratch + room;
  float* message = h + room;
  float* shares = message + room;
  for (std::int64_t a = 0; a < v; ++a) belief[a] = unary[a];
  for (std::int64_t e = edges.begin[i]; e < edges.begin[i + 1]; ++e) {
    accumulate(from + step.reverse[e] * v, 1.0f, v, belief);
  }
  for (std::int64_t e = edges.begin[i]; e < edges.begin[i + 1]; ++e) {
    const float* back = from + step.reverse[e] * v;
    // Without -inf - -inf: a label that a message rules out stays ruled out.
    for (std::int64_t a = 0; a < v; ++a) {
      h[a] = belief[a] > -kInfinity ? belief[a] - back[a] : belief[a];
    }
    std::int64_t c = 0;
    if (step.factors) {
      const float* factor = step.factors + step.factor_of[e] * v * v;
      for (std::int64_t a = v; a < room; ++a) h[a] = -kInfinity;
      exponentials(h, step.temperature, v, shares);
      for (; c + 4 * kLanes <= v; c += 4 * kLanes) {
        factor_strip<4>(shares, factor, step.temperature, v, c, message);
      }
      for (; c < v; c += kLanes) factor_strip<1>(shares, factor, step.temperature, v, c, message);
    }
    for (; c + 4 * kLanes <= v; c += 4 * kLanes) {
      message_strip<4>(h, step.w_c, edges.weight[e], step.temperature, v, c, message);
    }
    for (; c < v; c += kLanes) {
      message_strip<1>(h, step.w_c, edges.weight[e], step.temperature, v, c, message);
    }
    float most = -kInfinity;
    for (std::int64_t a = 0; a < v; ++a) most = message[a] > most ? message[a] : most;
    const float* before = from + e * v;
    float* after = to + e * v;
    const float kept = step.damping;
    for (std::int64_t a = 0; a < v; ++a) {
      const float fresh = message[a] - most;
      after[a] = kept != 0 ? (1 - kept) * fresh + kept * before[a] : fresh;
    }
  }
}

}  // namespace
}  // namespace t2p::mrf::T2P_ISA_NAMESPACE

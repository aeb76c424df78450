// SPDX-License-Identifier: Apache-2.0
// The choice of one position's token, for one instruction set. Included once per ISA.
//
// A first pass combines the logits into scratch memory that stays in the cache, a second one adds
// up exponentials and looks for the largest score. Gumbel noise costs two logarithms, but an upper
// bound of it, -log(r), costs none: the bits of a float are, read as an integer, a lower bound of
// its logarithm that is off by at most 0.086. Only words whose bound passes the best score so far,
// a handful in a row of thousands, get their noise computed, in float64.
//
// All sums run over 16 lanes whatever the vectors' length, and no product is fused with a sum:
// every instruction set gives the same bits.
#include <cstdint>

#include "common/exp-inl.h"
#include "common/philox-inl.h"
#include "common/simd.h"
#include "masked_sampling/sample_row.h"

namespace t2p::masked_sampling::T2P_ISA_NAMESPACE {
namespace {

using namespace simd::T2P_ISA_NAMESPACE;

constexpr float kInfinity = __builtin_inff();
constexpr int kParts = kCounters / kLanes;  // vectors to 16 lanes

template <Format format>
struct Logits;
template <>
struct Logits<Format::kF32> {
  using Word = float;
  static T2P_INLINE F32 get(const float* p) { return load(p); }
};
template <>
struct Logits<Format::kBf16> {
  using Word = std::uint16_t;
  static T2P_INLINE F32 get(const std::uint16_t* p) { return load_bf16(p); }
};
template <>
struct Logits<Format::kF16> {
  using Word = std::uint16_t;
  static T2P_INLINE F32 get(const std::uint16_t* p) { return load_f16(p); }
};

constexpr std::uint32_t negative_infinity(Format format) {
  return format == Format::kF32 ? 0xff800000u : format == Format::kBf16 ? 0xff80u : 0xfc00u;
}

// Calls body(i, c, u) with the vectors of both rows; the last one is filled up with -inf.
template <Format format, class Body>
T2P_INLINE void for_each_vector(const void* conditional, const void* unconditional, std::int64_t v,
                                const Body& body) {
  using Word = typename Logits<format>::Word;
  constexpr std::uint32_t fill = negative_infinity(format);
  const Word* c = static_cast<const Word*>(conditional);
  const Word* u = unconditional ? static_cast<const Word*>(unconditional) : c;
  std::int64_t i = 0;
  for (; i + kLanes <= v; i += kLanes)
    body(i, Logits<format>::get(c + i), Logits<format>::get(u + i));
  if (i == v) return;
  Word c_end[kLanes], u_end[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (i + lane < v) {
      c_end[lane] = c[i + lane];
      u_end[lane] = u[i + lane];
    } else {
      __builtin_memcpy(c_end + lane, &fill, sizeof(Word));
      __builtin_memcpy(u_end + lane, &fill, sizeof(Word));
    }
  }
  body(i, Logits<format>::get(c_end), Logits<format>::get(u_end));
}

// x into scratch, filled up with -inf to a whole group. Returns its maximum, or NaN if a logit is
// NaN or +inf, or x is.
template <Format format>
float combine(const Round& round, const RowLogits& logits, float* scratch) {
  const F32 low = broadcast(-kInfinity), high = broadcast(kInfinity);
  F32 limit = low;
  if (round.log_min_p > -kInfinity) {
    F32 most = low;
    for_each_vector<format>(logits.conditional, nullptr, round.v,
                            [&](std::int64_t, F32 c, F32) { most = max(c, most); });
    limit = broadcast(reduce_max(most) + round.log_min_p);
  }
  const F32 guidance = broadcast(round.guidance);
  constexpr std::uint32_t kAll = (1u << kLanes) - 1;
  std::uint32_t finite = kAll;
  F32 most = low;
  const auto put = [&](std::int64_t i, F32 c, F32 x) __attribute__((always_inline)) {
    x = select(less(c, limit), low, x);
    finite &= bits(less(x, high));
    most = max(x, most);
    store(scratch + i, x);
  };
  if (logits.unconditional != nullptr) {
    for_each_vector<format>(logits.conditional, logits.unconditional, round.v,
                            [&](std::int64_t i, F32 c, F32 u) {
                              const F32 x = add(c, mul(guidance, sub(c, u)));
                              put(i, c, select(less(low, c), x, c));
                            });
  } else {
    for_each_vector<format>(logits.conditional, nullptr, round.v,
                            [&](std::int64_t i, F32 c, F32) { put(i, c, c); });
  }
  std::int64_t end = (round.v + kLanes - 1) / kLanes * kLanes;
  for (; end % kGroup != 0; end += kLanes) store(scratch + end, low);
  return finite == kAll ? reduce_max(most) : __builtin_nanf("");
}

// The best score so far, and a float that a bound must pass to be worth a look: the score less what
// rounding may have taken from the bound.
struct Best {
  double score = -double{kInfinity};
  std::int64_t token = 0;
  float limit = -kInfinity;

  void offer(double candidate, std::int64_t number, float slack) {
    if (candidate < score || (candidate == score && number > token)) return;
    score = candidate;
    token = number;
    const double magnitude = candidate < 0 ? -candidate : candidate;
    limit = static_cast<float>(candidate - 1e-6 * magnitude - double{slack});
  }
};

// -log(r) <= kBoundAtZero - kBoundSlope * bits(r's upper 24 bits as a float).
constexpr float kBoundSlope = 0.69314718f / 8388608.0f;
constexpr float kBoundAtZero = 0.69314718f * (127 + 24);

// Computes the scores of a group where they may be the largest, the most promising first.
__attribute__((noinline)) void look_closer(const Round& round, const float* x,
                                           const std::int32_t* words, float* bounds,
                                           std::int64_t first, float slack, Best& best) {
  for (;;) {
    int most = 0;
    for (int i = 1; i < kGroup; ++i) most = bounds[i] > bounds[most] ? i : most;
    if (!(bounds[most] > best.limit)) return;
    const double noise = gumbel(static_cast<std::uint32_t>(words[most]));
    best.offer(double{x[most]} + double{round.temperature} * noise, first + most, slack);
    bounds[most] = -kInfinity;
  }
}

struct Sums {
  F32 lanes[kParts];
  double total = 0;

  T2P_INLINE Sums() {
    for (F32& part : lanes) part = broadcast(0.0f);
  }
  // Now and then the lanes go on in float64, so that long rows lose no precision.
  void flush() {
    float lane[kCounters];
    for (int p = 0; p < kParts; ++p) {
      store(lane + p * kLanes, lanes[p]);
      lanes[p] = broadcast(0.0f);
    }
    for (float value : lane) total += double{value};
  }
};

constexpr std::int64_t kFlushGroups = 16;

// exp(x - most) summed up; with `noise`, the best of x + temperature * noise as well.
template <bool noise>
T2P_INLINE double sum_and_sample(const Round& round, std::int64_t row, const float* scratch,
                                 float most, Best& best) {
  const std::int64_t groups = (round.v + kGroup - 1) / kGroup;
  const std::uint64_t seed = static_cast<std::uint64_t>(round.seeds[row / round.n]);
  const auto position = static_cast<std::int32_t>(row % round.n);
  const F32 offset = broadcast(most), at_zero = broadcast(round.temperature * kBoundAtZero),
            slope = broadcast(round.temperature * kBoundSlope);
  const float slack = 1e-4f * round.temperature;
  Sums sums;
  for (std::int64_t g = 0; g < groups; ++g) {
    const float* x = scratch + g * kGroup;
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      F32 exps[4];
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) {
        exps[w] = exp_nonpositive(sub(load(x + w * kCounters + p * kLanes), offset));
      }
      sums.lanes[p] = add(sums.lanes[p], add(add(exps[0], exps[1]), add(exps[2], exps[3])));
    }
    if (g % kFlushGroups == kFlushGroups - 1) sums.flush();
    if constexpr (noise) {
      alignas(64) std::int32_t words[kGroup];
      alignas(64) float bounds[kGroup];
      const F32 limit = broadcast(best.limit);
      std::uint32_t any = 0;
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        I32 word[4];
        const auto counter = static_cast<std::int32_t>(g * kCounters + p * kLanes);
        word[0] = add(lane_numbers(), broadcast(counter));
        word[1] = broadcast(position);
        word[2] = broadcast(static_cast<std::int32_t>(round.step));
        word[3] = broadcast(std::int32_t{0});
        philox_words(word, seed);
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) {
          const int at = w * kCounters + p * kLanes;
          const F32 log2 = to_f32(as_i32(to_f32(shift_right<8>(word[w]))));
          const F32 bound = add(load(x + at), sub(at_zero, mul(slope, log2)));
          any |= bits(less(limit, bound));
          store(words + at, word[w]);
          store(bounds + at, bound);
        }
      }
      if (any) look_closer(round, x, words, bounds, g * kGroup, slack, best);
    }
  }
  sums.flush();
  return sums.total;
}

Choice sample_row(const Round& round, std::int64_t row, const RowLogits& logits, float* scratch) {
  const std::int64_t v = round.v;
  const float most = logits.format == Format::kF32 ? combine<Format::kF32>(round, logits, scratch)
                     : logits.format == Format::kBf16
                         ? combine<Format::kBf16>(round, logits, scratch)
                         : combine<Format::kF16>(round, logits, scratch);
  if (!(most > -kInfinity)) return {0, __builtin_nanf("")};
  if (round.top_k > 0 && round.top_k < v) {
    const float least = kth_largest(scratch, v, round.top_k);
    for (std::int64_t i = 0; i < v; ++i) scratch[i] = scratch[i] < least ? -kInfinity : scratch[i];
  }
  Best best;
  double sum;
  if (round.temperature > 0 && round.token_noise == nullptr) {
    sum = sum_and_sample<true>(round, row, scratch, most, best);
  } else {
    sum = sum_and_sample<false>(round, row, scratch, most, best);
    const float* noise = round.token_noise ? round.token_noise + row * v : nullptr;
    for (std::int64_t i = 0; i < v; ++i) {
      const double g = noise && round.temperature > 0 ? double{noise[i]} : 0.0;
      if (scratch[i] > -kInfinity) {
        best.offer(double{scratch[i]} + double{round.temperature} * g, i, 0.0f);
      }
    }
  }
  const double log_probability = double{scratch[best.token]} - double{most} - log_of(sum);
  return {best.token, static_cast<float>(log_probability)};
}

}  // namespace

const SampleRow kSampleRow = sample_row;

}  // namespace t2p::masked_sampling::T2P_ISA_NAMESPACE

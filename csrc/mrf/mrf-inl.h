// SPDX-License-Identifier: Apache-2.0
// A row of Algorithm 1, for one instruction set. Included once per ISA.
#include <cstdint>

#include "common/exp-inl.h"
#include "common/simd.h"
#include "mrf/kernels.h"
#include "mrf/mrf_belief-inl.h"
#include "mrf/mrf_candidates-inl.h"
#include "mrf/mrf_low_rank-inl.h"
#include "mrf/mrf_softmax-inl.h"
#include "mrf/mrf_window-inl.h"
#if defined(__AVX512BF16__)
#include "mrf/mrf_product-inl.h"
#endif

namespace t2p::mrf::T2P_ISA_NAMESPACE {
namespace {

// A row of numbers in a format known to the compiler.
template <Format format>
struct Row;
template <>
struct Row<Format::kF32> {
  const float* data;
  explicit Row(Values values) : data(static_cast<const float*>(values.data)) {}
  T2P_INLINE F32 vector(std::int64_t at) const { return load(data + at); }
  T2P_INLINE float operator[](std::int64_t at) const { return data[at]; }
};
template <>
struct Row<Format::kBf16> {
  const std::uint16_t* data;
  explicit Row(Values values) : data(static_cast<const std::uint16_t*>(values.data)) {}
  T2P_INLINE F32 vector(std::int64_t at) const { return load_bf16(data + at); }
  T2P_INLINE float operator[](std::int64_t at) const {
    const std::uint32_t word = std::uint32_t{data[at]} << 16;
    float value;
    __builtin_memcpy(&value, &word, sizeof(value));
    return value;
  }
};

// Rounded to the nearest, of two to the even one; a NaN stays one.
T2P_INLINE std::uint16_t to_bf16(float value) {
  std::uint32_t word;
  __builtin_memcpy(&word, &value, sizeof(word));
  if ((word & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(word >> 16 | 0x40u);
  return static_cast<std::uint16_t>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

void put_row(const float* from, std::int64_t v, MutableValues to) {
  if (to.format == Format::kF32) {
    float* out = static_cast<float*>(to.data);
    for (std::int64_t a = 0; a < v; ++a) out[a] = from[a];
  } else {
    std::uint16_t* out = static_cast<std::uint16_t*>(to.data);
    for (std::int64_t a = 0; a < v; ++a) out[a] = to_bf16(from[a]);
  }
}

// Four vectors at a time, so that a row of q is read once for each and sums stay in registers.
constexpr int kStrip = 4 * kLanes;

template <Format format>
void gather_rows(const Edges& edges, const Positions& positions, Values values, std::int64_t row,
                 std::int64_t v, float* message) {
  const Row<format> q(values);
  const std::int64_t position = positions.row[row];
  const std::int64_t i = position % positions.n, base = position - i;
  const std::int64_t first = edges.begin[i], last = edges.begin[i + 1];
  std::int64_t a = 0;
  for (; a + kStrip <= v; a += kStrip) {
    F32 sum[4];
#pragma GCC unroll 4
    for (F32& part : sum) part = broadcast(0.0f);
    for (std::int64_t e = first; e < last; ++e) {
      const std::int64_t slot = positions.slot[base + edges.node[e]];
      if (slot < 0) continue;
      const F32 weight = broadcast(edges.weight[e]);
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        sum[p] = multiply_add(weight, q.vector(slot * v + a + p * kLanes), sum[p]);
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) store(message + a + p * kLanes, sum[p]);
  }
  for (; a < v; ++a) {
    float sum = 0;
    for (std::int64_t e = first; e < last; ++e) {
      const std::int64_t slot = positions.slot[base + edges.node[e]];
      if (slot >= 0) sum += edges.weight[e] * q[slot * v + a];
    }
    message[a] = sum;
  }
  for (std::int64_t e = first; e < last; ++e) {
    const std::int64_t slot = positions.slot[base + edges.node[e]];
    if (slot < 0) message[-1 - slot] += edges.weight[e];
  }
}

void gather(const Edges& edges, const Positions& positions, Values q, std::int64_t row,
            std::int64_t v, float* message) {
  q.format == Format::kF32 ? gather_rows<Format::kF32>(edges, positions, q, row, v, message)
                           : gather_rows<Format::kBf16>(edges, positions, q, row, v, message);
}

// message_cpu for the labels [first, first + kStrip) of one picture. Its q is first copied side by
// side, so that neighbouring positions lie beside each other in the nearest cache instead of at
// strides that share a few of its places; known labels become numbers like all others.
template <Format format>
void gather_columns(const Edges& edges, const Positions& positions, Values values,
                    std::int64_t picture, std::int64_t v, std::int64_t first, float* columns,
                    MutableValues message) {
  const Row<format> q(values);
  const std::int64_t base = picture * positions.n;
  const int count = static_cast<int>(v - first < kStrip ? v - first : kStrip);
  for (std::int64_t i = 0; i < positions.n; ++i) {
    const std::int64_t slot = positions.slot[base + i];
    float* to = columns + i * kStrip;
    if (slot >= 0 && count == kStrip) {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        store(to + p * kLanes, q.vector(slot * v + first + p * kLanes));
      }
    } else {
      for (int a = 0; a < kStrip; ++a) {
        to[a] = slot < 0    ? (-1 - slot == first + a ? 1.0f : 0.0f)
                : a < count ? q[slot * v + first + a]
                            : 0.0f;
      }
    }
  }
  float sums[kStrip];
  for (std::int64_t i = 0; i < positions.n; ++i) {
    const std::int64_t slot = positions.slot[base + i];
    if (slot < 0) continue;
    F32 sum[4];
#pragma GCC unroll 4
    for (F32& part : sum) part = broadcast(0.0f);
    for (std::int64_t e = edges.begin[i]; e < edges.begin[i + 1]; ++e) {
      const float* from = columns + edges.node[e] * kStrip;
      const F32 weight = broadcast(edges.weight[e]);
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) sum[p] = multiply_add(weight, load(from + p * kLanes), sum[p]);
    }
    const bool direct = message.format == Format::kF32 && count == kStrip;
    float* to = direct ? static_cast<float*>(message.data) + slot * v + first : sums;
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) store(to + p * kLanes, sum[p]);
    if (!direct) put_row(sums, count, from(message, slot * v + first));
  }
}

void gather_strip(const Edges& edges, const Positions& positions, Values q, std::int64_t picture,
                  std::int64_t v, std::int64_t strip, float* columns, MutableValues message) {
  const std::int64_t first = strip * kStrip;
  q.format == Format::kF32
      ? gather_columns<Format::kF32>(edges, positions, q, picture, v, first, columns, message)
      : gather_columns<Format::kBf16>(edges, positions, q, picture, v, first, columns, message);
}

// (scale message + unary) / temperature into scratch, filled up with -inf to a whole vector.
// Returns its maximum, or NaN if there is a NaN or +inf.
template <Format format>
float combine(Values values, const float* unary, std::int64_t v, float scale, float temperature,
              float* scratch) {
  const Row<format> message(values);
  const float inverse = 1.0f / temperature;
  const F32 scales = broadcast(scale), inverses = broadcast(inverse), high = broadcast(kInfinity);
  F32 most = broadcast(-kInfinity);
  constexpr std::uint32_t kAll = (1u << kLanes) - 1;
  std::uint32_t below = kAll;
  std::int64_t a = 0;
  for (; a + kLanes <= v; a += kLanes) {
    F32 x = load(unary + a);
    if (message.data) x = multiply_add(scales, message.vector(a), x);
    x = mul(x, inverses);
    below &= bits(less(x, high));
    most = max(x, most);
    store(scratch + a, x);
  }
  float largest = reduce_max(most);
  bool finite = below == kAll;
  for (; a < v; ++a) {
    const float x = (message.data ? unary[a] + scale * message[a] : unary[a]) * inverse;
    finite = finite && x < kInfinity;
    largest = x > largest ? x : largest;
    scratch[a] = x;
  }
  for (; a % kLanes != 0; ++a) scratch[a] = -kInfinity;
  return finite ? largest : __builtin_nanf("");
}

// next = share scratch + damping previous.
template <Format format>
void spread(const float* scratch, Values before, std::int64_t v, float share, float damping,
            MutableValues next) {
  const Row<format> previous(before);
  const F32 shares = broadcast(share), kept = broadcast(damping);
  float* wide = static_cast<float*>(next.data);
  std::uint16_t* narrow = static_cast<std::uint16_t*>(next.data);
  std::int64_t a = 0;
  for (; a + kLanes <= v; a += kLanes) {
    F32 value = mul(load(scratch + a), shares);
    if (previous.data) value = multiply_add(kept, previous.vector(a), value);
    if (next.format == Format::kF32) {
      store(wide + a, value);
    } else {
      // Rounded to the nearest, of two to the even one; these are no larger than 1.
      const I32 word = as_i32(value);
      const I32 odd = bit_and(shift_right<16>(word), broadcast(std::int32_t{1}));
      const I32 rounded = add(add(word, odd), broadcast(std::int32_t{0x7fff}));
      store_high_words(narrow + a, rounded);
    }
  }
  for (; a < v; ++a) {
    const float value = scratch[a] * share + (previous.data ? damping * previous[a] : 0.0f);
    next.format == Format::kF32 ? void(wide[a] = value) : void(narrow[a] = to_bf16(value));
  }
}

bool update_row(Values message, const float* unary, Values previous, std::int64_t v, float scale,
                float damping, float temperature, float* scratch, MutableValues next) {
  const float largest =
      message.format == Format::kF32
          ? combine<Format::kF32>(message, unary, v, scale, temperature, scratch)
          : combine<Format::kBf16>(message, unary, v, scale, temperature, scratch);
  const bool finite = largest > -kInfinity;
  const double total = exponentials_of(scratch, v, largest);
  const float share =
      finite ? static_cast<float>((1.0 - double{damping}) / total) : __builtin_nanf("");
  previous.format == Format::kF32
      ? spread<Format::kF32>(scratch, previous, v, share, damping, next)
      : spread<Format::kBf16>(scratch, previous, v, share, damping, next);
  return finite;
}

std::int64_t low_rank_rows(const LowRankStep& step, std::int64_t first, std::int64_t count,
                           float* scratch, const LowRankResult& result) {
  if (step.candidate) return candidate_rows(step, first, count, scratch, result);
  const auto& [said, q, sure, labels] = result;
  const std::int64_t stride = step.v + kLanes;
  const float* unary[kLowRankRows];
  float heard[kLowRankRows * kMostRank + kLanes], answer[kLowRankRows * kMostRank];
  float largest[kLowRankRows], share[kLowRankRows];
  for (std::int64_t r = 0; r < kLowRankRows;
       ++r) {  // the last row also in the place of lacking ones
    const std::int64_t at = first + (r < count ? r : count - 1);
    unary[r] = step.unary + step.row[at] * step.v;
    if (step.words) gather_words(step, step.row[at], heard + r * step.k);
  }
  hear(step, unary, step.words ? heard : nullptr, stride, scratch, largest);
  std::int64_t bad = -1;
  for (std::int64_t r = 0; r < count; ++r) {
    const bool finite = largest[r] > -kInfinity;
    if (!finite && bad < 0) bad = first + r;
    if (labels != nullptr) {
      labels[step.row[first + r]] = finite ? first_of(scratch + r * stride, step.v, largest[r]) : 0;
    }
    if (said == nullptr && q == nullptr && sure == nullptr) continue;
    const double total = exponentials_of(scratch + r * stride, step.v, largest[r]);
    share[r] = finite ? static_cast<float>(1.0 / total) : __builtin_nanf("");
    if (sure != nullptr) sure[step.row[first + r]] = share[r];
    if (q == nullptr) continue;
    spread<Format::kF32>(scratch + r * stride, {nullptr, Format::kF32}, step.v, share[r], 0,
                         {q + step.row[first + r] * step.v, Format::kF32});
  }
  if (said == nullptr) return bad;
  for (std::int64_t r = count; r < kLowRankRows; ++r) share[r] = 0;
  say(step, scratch, stride, share, answer);
  for (std::int64_t r = 0; r < count; ++r) {
    float* to = said + step.row[first + r] * step.k;
    for (std::int64_t k = 0; k < step.k; ++k) to[k] = answer[r * step.k + k];
  }
  return bad;
}

}  // namespace

const Kernels kKernels{.update_row = update_row,
                       .low_rank_rows = low_rank_rows,
                       .find_candidates = find_candidates,
                       .gather = gather,
                       .strip = kStrip,
                       .gather_strip = gather_strip,
                       .put_row = put_row,
                       .send = send,
                       .accumulate = accumulate,
#if defined(__AVX512BF16__)
                       .pack_rows = pack_rows,
                       .pack_labels = pack_labels,
                       .multiply = multiply,
                       .add_scaled = add_scaled,
                       .join_products = join_products
#endif
};

}  // namespace t2p::mrf::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// Elements of three dtypes as vectors of floats, and the sigmoid. Included by group_norm-inl.h.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "common/half.h"
#include "common/simd.h"
#include "group_norm/kernels.h"

namespace t2p::group_norm::T2P_ISA_NAMESPACE {
namespace {

using namespace simd::T2P_ISA_NAMESPACE;

template <Dtype kDtype>
struct Element {
  using Type = std::uint16_t;
};
template <>
struct Element<Dtype::kFloat32> {
  using Type = float;
};

template <Dtype kDtype>
T2P_INLINE float to_float(typename Element<kDtype>::Type a) {
  if constexpr (kDtype == Dtype::kFloat32) return a;
  if constexpr (kDtype == Dtype::kBfloat16) return bfloat16_to_float(a);
  if constexpr (kDtype == Dtype::kFloat16) return float16_to_float(a);
}

// A vector from p[i] on, of which `left` elements exist; the rest is zeros.
template <Dtype kDtype, bool kWhole>
T2P_INLINE F32 get(const void* p, std::int64_t i, std::int64_t left) {
  const auto* from = static_cast<const typename Element<kDtype>::Type*>(p) + i;
  if constexpr (!kWhole) {
    float lanes[kLanes] = {};
    for (int lane = 0; lane < left; ++lane) lanes[lane] = to_float<kDtype>(from[lane]);
    return load(lanes);
  } else if constexpr (kDtype == Dtype::kFloat32) {
    return load(from);
  } else if constexpr (kDtype == Dtype::kBfloat16) {
    return load_bf16(from);
  } else {
    return load_f16(from);
  }
}

// Rounds to nearest even in the upper half of every lane; a NaN stays one.
T2P_INLINE I32 round_to_bfloat16(F32 a) {
  const I32 word = as_i32(a);
  const I32 odd = bit_and(shift_right<16>(word), broadcast(std::int32_t{1}));
  const I32 rounded = add(word, add(odd, broadcast(std::int32_t{0x7FFF})));
  const I32 magnitude = bit_and(word, broadcast(std::int32_t{0x7FFFFFFF}));
  const M32 nan = less(broadcast(std::int32_t{0x7F800000}), magnitude);
  return select(nan, broadcast(std::int32_t{0x7FC00000}), rounded);
}

template <Dtype kDtype, bool kWhole>
T2P_INLINE void put(void* p, std::int64_t i, std::int64_t left, F32 a) {
  auto* to = static_cast<typename Element<kDtype>::Type*>(p) + i;
  if constexpr (kWhole && kDtype == Dtype::kFloat32) {
    store(to, a);
  } else if constexpr (kWhole && kDtype == Dtype::kBfloat16) {
#if defined(__AVX512BF16__)
    store_bf16(to, a);  // takes numbers below the normal ones for 0
#else
    store_high_words(to, round_to_bfloat16(a));
#endif
  } else if constexpr (kWhole) {
    store_f16(to, a);
  } else {
    float lanes[kLanes];
    store(lanes, a);
    for (int lane = 0; lane < left; ++lane) {
      if constexpr (kDtype == Dtype::kFloat32) to[lane] = lanes[lane];
      if constexpr (kDtype == Dtype::kBfloat16) to[lane] = float_to_bfloat16(lanes[lane]);
      if constexpr (kDtype == Dtype::kFloat16) to[lane] = float_to_float16(lanes[lane]);
    }
  }
}

// Coefficients of a span of elements: one for each, or the same for all.
template <bool kEach>
struct Coefficients {
  explicit Coefficients(const float* p) : all(p) {}
  template <bool kWhole>
  F32 at(std::int64_t i, std::int64_t left) const {
    return get<Dtype::kFloat32, kWhole>(all, i, left);
  }
  const float* all;
};
template <>
struct Coefficients<false> {
  explicit Coefficients(const float* p) : one(broadcast(*p)) {}
  template <bool kWhole>
  F32 at(std::int64_t, std::int64_t) const {
    return one;
  }
  F32 one;
};

// kSiluUnit 2^(j / kLanes), less what j adds below when the power is shifted into the exponent.
constexpr auto kPowers = [] {
  std::array<std::int32_t, kLanes> words{};
  double power = kSiluUnit;
  for (int j = 0; j < kLanes; ++j) {
    const auto word = std::bit_cast<std::int32_t>(static_cast<float>(power));
    words[j] = word - j * ((1 << 23) / kLanes);
    for (int k = 0; k < 16 / kLanes; ++k) power *= 1.0442737824274138;  // 2^(1 / 16)
  }
  return words;
}();

// kSiluUnit (1 + 4^u), with an error in 4^u below 5e-7 of it: 4^u = 2^(n / kLanes) 4^r with
// |r| <= 1 / (4 kLanes), the former from a table, the latter a minimax polynomial. Saturates at
// |u| = 63; any number for NaN. Takes several vectors at once, as the chain is long.
template <int kVectors>
T2P_INLINE void one_plus_power(const F32 (&u)[kVectors], F32 (&result)[kVectors]) {
  constexpr int kShift = kLanes == 16 ? 19 : kLanes == 8 ? 20 : 21;  // 23 - log2(kLanes)
  const F32 magic = broadcast(6291456.0f / kLanes);  // 1.5 * 2^22 / kLanes: the low bits are n
  const F32 powers = as_f32(load(kPowers.data())), one = broadcast(1.0f);
  F32 shifted[kVectors], r[kVectors], p[kVectors];
  for (int k = 0; k < kVectors; ++k) {
    const F32 t = within(u[k], broadcast(63.0f));
    shifted[k] = add(t, magic);
    r[k] = sub(t, sub(shifted[k], magic));
  }
  for (int k = 0; k < kVectors; ++k) {
    if constexpr (kLanes == 16) {
      p[k] = multiply_add(broadcast(0.96090572f), r[k], broadcast(1.3863754f));
    } else {
      p[k] = multiply_add(broadcast(0.44378072f), r[k], broadcast(0.96140392f));
      p[k] = multiply_add(p[k], r[k], broadcast(1.3862954f));
    }
    p[k] = multiply_add(p[k], r[k], one);
  }
  for (int k = 0; k < kVectors; ++k) {
    const I32 n = as_i32(shifted[k]);
    const F32 scale = as_f32(add(as_i32(take(powers, n)), shift_left<kShift>(n)));
    result[k] = multiply_add(scale, p[k], broadcast(static_cast<float>(kSiluUnit)));
  }
}

// 1 / (1 + e^-z) with an absolute error below 2e-7, of which z's own rounding would allow |z| / 4
// units.
T2P_INLINE F32 sigmoid(F32 z) {
  const F32 unit = broadcast(static_cast<float>(kSiluUnit)), u[1] = {mul(z, unit)};
  F32 divisor[1];
  one_plus_power(u, divisor);
  return divide(unit, divisor[0]);
}

}  // namespace
}  // namespace t2p::group_norm::T2P_ISA_NAMESPACE

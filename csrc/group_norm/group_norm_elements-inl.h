// SPDX-License-Identifier: Apache-2.0
// Elements of three dtypes as vectors of floats, and the sigmoid. Included by group_norm-inl.h.
#pragma once

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
    store_high_words(to, round_to_bfloat16(a));
  } else {
    float lanes[kLanes];
    store(lanes, a);
    const int count = kWhole ? kLanes : static_cast<int>(left);
    for (int lane = 0; lane < count; ++lane) {
      if constexpr (kDtype == Dtype::kFloat32) to[lane] = lanes[lane];
      if constexpr (kDtype == Dtype::kBfloat16) to[lane] = float_to_bfloat16(lanes[lane]);
      if constexpr (kDtype == Dtype::kFloat16) to[lane] = float_to_float16(lanes[lane]);
    }
  }
}

// Coefficient i of an array, or the only one.
template <bool kEach, bool kWhole>
T2P_INLINE F32 coefficient(const float* p, std::int64_t i, std::int64_t left) {
  if constexpr (!kEach) return broadcast(*p);
  return get<Dtype::kFloat32, kWhole>(p, i, left);
}

// 1 / (1 + e^-z) with an absolute error below 2e-7, of which z's own rounding would allow |z| / 4
// units: e^-z = 2^n e^-r with |r| <= ln(2) / 2, and for e^-r a minimax polynomial of degree 5.
// Saturates at |z| = 87; NaN for NaN.
T2P_INLINE F32 sigmoid(F32 z) {
  const F32 one = broadcast(1.0f), magic = broadcast(12582912.0f);  // 1.5 * 2^23
  const F32 t = min(broadcast(87.0f), max(broadcast(-87.0f), z));
  const F32 shifted = multiply_add(t, broadcast(-1.44269504f), magic);  // its low bits are n
  const F32 r = multiply_add(sub(shifted, magic), broadcast(0.69314718f), t);
  F32 p = broadcast(-8.314711e-3f);
  p = multiply_add(p, r, broadcast(4.1891117e-2f));
  p = multiply_add(p, r, broadcast(-1.6667092e-1f));
  p = multiply_add(p, r, broadcast(4.9999225e-1f));
  p = multiply_add(p, r, broadcast(-1.0f));
  p = multiply_add(p, r, one);
  const F32 e = as_f32(add(as_i32(p), shift_left<23>(as_i32(shifted))));
  return reciprocal(add(one, e));
}

}  // namespace
}  // namespace t2p::group_norm::T2P_ISA_NAMESPACE

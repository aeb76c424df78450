// SPDX-License-Identifier: Apache-2.0
// The vector type of simd.h for any processor. Included by simd.h, which says what everything
// means.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/isa.h"

namespace t2p::simd::T2P_ISA_NAMESPACE {

constexpr int kLanes = 4;
constexpr bool kFusedMultiplyAdd = false;

struct F32 {
  typedef float type __attribute__((vector_size(16)));
  type v;
};
struct I32 {
  typedef std::int32_t type __attribute__((vector_size(16)));
  type v;
};
struct F64 {
  typedef double type __attribute__((vector_size(16)));
  type v;
};
struct M32 {
  I32::type v;
};

T2P_INLINE F32 load(const float* p) {
  F32 a;
  __builtin_memcpy(&a, p, sizeof(a));
  return a;
}
T2P_INLINE I32 load(const std::int32_t* p) {
  I32 a;
  __builtin_memcpy(&a, p, sizeof(a));
  return a;
}
T2P_INLINE F32 load_first(const float* p, int count) {
  F32 a{};
  for (int i = 0; i < count; ++i) a.v[i] = p[i];
  return a;
}
T2P_INLINE F64 load_f64(const float* p) { return {F64::type{p[0], p[1]}}; }
T2P_INLINE F64 load_f64_first(const float* p, int count) {
  return {F64::type{count > 0 ? p[0] : 0.0, count > 1 ? p[1] : 0.0}};
}
T2P_INLINE F32 load_bf16(const std::uint16_t* p) {
  const std::uint32_t words[kLanes] = {std::uint32_t{p[0]} << 16, std::uint32_t{p[1]} << 16,
                                       std::uint32_t{p[2]} << 16, std::uint32_t{p[3]} << 16};
  F32 a;
  __builtin_memcpy(&a, words, sizeof(a));
  return a;
}
// By integers: half has the exponent of float less 112, and a subnormal one is a multiple of 2^-24.
T2P_INLINE float from_f16(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t{half & 0x8000u} << 16, rest = half & 0x7fffu;
  const float small = static_cast<float>(rest) * 0x1p-24f;
  const bool finite = rest < 0x7c00u;
  std::uint32_t word = (rest << 13) + (finite ? 112u << 23 : 0x7f800000u - (0x7c00u << 13));
  if (rest < 0x400u) __builtin_memcpy(&word, &small, sizeof(word));
  word |= sign;
  float value;
  __builtin_memcpy(&value, &word, sizeof(value));
  return value;
}
T2P_INLINE F32 load_f16(const std::uint16_t* p) {
  return {F32::type{from_f16(p[0]), from_f16(p[1]), from_f16(p[2]), from_f16(p[3])}};
}
T2P_INLINE void store_high_words(std::uint16_t* p, I32 a) {
  for (int i = 0; i < kLanes; ++i) {
    p[i] = static_cast<std::uint16_t>(static_cast<std::uint32_t>(a.v[i]) >> 16);
  }
}
T2P_INLINE void store_f16(std::uint16_t* p, F32 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_float16(a.v[i]);
}
T2P_INLINE void store(float* p, F32 a) { __builtin_memcpy(p, &a, sizeof(a)); }
T2P_INLINE void store(double* p, F64 a) { __builtin_memcpy(p, &a, sizeof(a)); }
T2P_INLINE void store(std::int32_t* p, I32 a) { __builtin_memcpy(p, &a, sizeof(a)); }
T2P_INLINE F32 broadcast(float a) { return {F32::type{a, a, a, a}}; }
T2P_INLINE I32 broadcast(std::int32_t a) { return {I32::type{a, a, a, a}}; }
T2P_INLINE F64 broadcast(double a) { return {F64::type{a, a}}; }

T2P_INLINE F32 add(F32 a, F32 b) { return {a.v + b.v}; }
T2P_INLINE F32 sub(F32 a, F32 b) { return {a.v - b.v}; }
T2P_INLINE F32 mul(F32 a, F32 b) { return {a.v * b.v}; }
T2P_INLINE F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
T2P_INLINE F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
T2P_INLINE F32 multiply_add(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
T2P_INLINE F32 multiply_subtract_from(F32 a, F32 b, F32 c) { return {c.v - a.v * b.v}; }
T2P_INLINE F64 add(F64 a, F64 b) { return {a.v + b.v}; }
T2P_INLINE F64 sub(F64 a, F64 b) { return {a.v - b.v}; }
T2P_INLINE F32 fused_multiply_add(F32 a, F32 b, F32 c) {
  for (int i = 0; i < kLanes; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
}
T2P_INLINE F64 multiply_add(F64 a, F64 b, F64 c) { return {a.v * b.v + c.v}; }

T2P_INLINE M32 less(F32 a, F32 b) { return {a.v < b.v}; }
T2P_INLINE M32 not_greater(F32 a, F32 b) { return {~(a.v > b.v)}; }
T2P_INLINE I32 select(M32 m, I32 a, I32 b) { return {m.v ? a.v : b.v}; }
T2P_INLINE std::uint32_t bits(M32 m) {
  return (m.v[0] & 1u) | (m.v[1] & 2u) | (m.v[2] & 4u) | (m.v[3] & 8u);
}

T2P_INLINE float reduce_min(F32 a) {
  const float low = a.v[0] < a.v[1] ? a.v[0] : a.v[1];
  const float high = a.v[2] < a.v[3] ? a.v[2] : a.v[3];
  return low < high ? low : high;
}
T2P_INLINE float reduce_add(F32 a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
T2P_INLINE double reduce_add(F64 a) { return a.v[0] + a.v[1]; }

T2P_INLINE F32 load_quads(const float* p, std::int64_t) { return load(p); }
T2P_INLINE void transpose_quads(F32 (&a)[4]) {
  const F32::type row[4] = {a[0].v, a[1].v, a[2].v, a[3].v};
  for (int i = 0; i < 4; ++i) a[i].v = F32::type{row[0][i], row[1][i], row[2][i], row[3][i]};
}

T2P_INLINE I32 load_bytes(const std::uint8_t* p) {
  I32 a;
  __builtin_memcpy(&a, p, sizeof(a));
  return a;
}
T2P_INLINE I32 max(I32 a, I32 b) { return {a.v > b.v ? a.v : b.v}; }
T2P_INLINE I32 min(I32 a, I32 b) { return {a.v < b.v ? a.v : b.v}; }
T2P_INLINE M32 not_less(I32 a, I32 b) { return {a.v >= b.v}; }
T2P_INLINE std::int32_t reduce_max(I32 a) {
  const std::int32_t low = a.v[0] > a.v[1] ? a.v[0] : a.v[1];
  const std::int32_t high = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return low > high ? low : high;
}
T2P_INLINE I32 set_bits(M32 m, I32 a, I32 b) { return {a.v | (m.v & b.v)}; }
T2P_INLINE M32 less(I32 a, I32 b) { return {a.v < b.v}; }
T2P_INLINE F32 magnitude(F32 a) { return {a.v < 0 ? -a.v : a.v}; }
T2P_INLINE float reduce_max(F32 a) {
  const float low = a.v[0] > a.v[1] ? a.v[0] : a.v[1];
  const float high = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return low > high ? low : high;
}
T2P_INLINE I32 to_i32(F32 a) {
  I32 b;
  for (int i = 0; i < kLanes; ++i) {
    // What the vector instructions give for NaN and for what does not fit.
    const bool fits = a.v[i] >= -2147483648.0f && a.v[i] < 2147483648.0f;
    b.v[i] = fits ? static_cast<std::int32_t>(__builtin_rintf(a.v[i])) : INT32_MIN;
  }
  return b;
}
T2P_INLINE F32 to_f32(I32 a) { return {__builtin_convertvector(a.v, F32::type)}; }
T2P_INLINE I32 add(I32 a, I32 b) { return {a.v + b.v}; }
T2P_INLINE I32 sub(I32 a, I32 b) { return {a.v - b.v}; }
T2P_INLINE I32 reduce_max_each(const I32 (&a)[4]) {
  return {I32::type{reduce_max(a[0]), reduce_max(a[1]), reduce_max(a[2]), reduce_max(a[3])}};
}
T2P_INLINE F32 reduce_add_each(const F32 (&a)[4]) {
  return {F32::type{reduce_add(a[0]), reduce_add(a[1]), reduce_add(a[2]), reduce_add(a[3])}};
}
T2P_INLINE F64 reduce_add_each(const F64 (&a)[2]) {
  return {F64::type{a[0].v[0] + a[0].v[1], a[1].v[0] + a[1].v[1]}};
}
T2P_INLINE F64 min(F64 a, F64 b) { return {a.v < b.v ? a.v : b.v}; }
T2P_INLINE F64 max(F64 a, F64 b) { return {a.v > b.v ? a.v : b.v}; }
T2P_INLINE F32 divide(F32 a, F32 b) { return {a.v / b.v}; }
T2P_INLINE F32 within(F32 a, F32 limit) { return min(max(a, {-limit.v}), limit); }
T2P_INLINE F32 take(F32 a, I32 index) {
  const I32::type i = index.v & 3;
  return {F32::type{a.v[i[0]], a.v[i[1]], a.v[i[2]], a.v[i[3]]}};
}
T2P_INLINE void stream(float* p, F32 a) { store(p, a); }
T2P_INLINE void stream_fence() {}
T2P_INLINE F64 divide(F64 a, F64 b) { return {a.v / b.v}; }
T2P_INLINE F64 square_root(F64 a) {
  return {F64::type{__builtin_sqrt(a.v[0]), __builtin_sqrt(a.v[1])}};
}
T2P_INLINE F64 keep_first(F64 a, int count, F64 rest) {
  for (int i = count; i < 2; ++i) a.v[i] = rest.v[i];
  return a;
}
T2P_INLINE double reduce_min(F64 a) { return a.v[0] < a.v[1] ? a.v[0] : a.v[1]; }
T2P_INLINE std::uint32_t bits_where_equal(F64 a, F64 b) {
  return (a.v[0] == b.v[0] ? 1u : 0u) | (a.v[1] == b.v[1] ? 2u : 0u);
}
T2P_INLINE F32 square_root(F32 a) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
T2P_INLINE I32 lane_numbers() { return {I32::type{0, 1, 2, 3}}; }
T2P_INLINE int store_chosen(std::int32_t* p, M32 m, I32 a) {
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (m.v[i]) p[count++] = a.v[i];
  }
  return count;
}
T2P_INLINE I32 join_words(I32 a, I32 b) { return {(a.v & 0xffff) | (b.v << 16)}; }
T2P_INLINE I32 join_bytes(const I32 (&a)[4]) {
  return join_words({(a[0].v & 255) | (a[1].v << 8)}, {(a[2].v & 255) | (a[3].v << 8)});
}
T2P_INLINE I32 with_low_byte(I32 a, I32 b) { return {(a.v & ~255) | (b.v & 255)}; }
T2P_INLINE I32 dot_words(I32 sum, I32 a, I32 b) {
  for (int i = 0; i < kLanes; ++i) {
    sum.v[i] += static_cast<std::int16_t>(a.v[i]) * static_cast<std::int16_t>(b.v[i]) +
                (a.v[i] >> 16) * (b.v[i] >> 16);
  }
  return sum;
}
constexpr int kLargestByte = 127;
T2P_INLINE I32 dot_bytes(I32 sum, I32 a, I32 b) {
  for (int i = 0; i < kLanes; ++i) {
    for (int shift = 0; shift < 32; shift += 8) {
      sum.v[i] += static_cast<std::uint8_t>(a.v[i] >> shift) *
                  static_cast<std::int8_t>(static_cast<std::uint8_t>(b.v[i] >> shift));
    }
  }
  return sum;
}

T2P_INLINE I32 bit_and(I32 a, I32 b) { return {a.v & b.v}; }
T2P_INLINE I32 bit_and_or(I32 a, I32 b, I32 c) { return {(a.v & b.v) | c.v}; }
T2P_INLINE I32 bit_xor(I32 a, I32 b) { return {a.v ^ b.v}; }
T2P_INLINE I32 bit_xor(I32 a, I32 b, I32 c) { return bit_xor(bit_xor(a, b), c); }
typedef std::uint32_t U32Vector __attribute__((vector_size(16)));
template <int kBits>
T2P_INLINE I32 shift_left(I32 a) {
  return {(I32::type)((U32Vector)a.v << kBits)};
}
template <int kBits>
T2P_INLINE I32 shift_right(I32 a) {
  return {(I32::type)((U32Vector)a.v >> kBits)};
}
template <int kBits>
T2P_INLINE I32 shift_right_signed(I32 a) {
  return {a.v >> kBits};
}
T2P_INLINE I32 as_i32(F32 a) { return {(I32::type)a.v}; }
T2P_INLINE F32 as_f32(I32 a) { return {(F32::type)a.v}; }
T2P_INLINE M32 negative(I32 a) { return {a.v < 0}; }
T2P_INLINE M32 equal(I32 a, I32 b) { return {a.v == b.v}; }
T2P_INLINE F32 select(M32 m, F32 a, F32 b) { return {m.v ? a.v : b.v}; }
T2P_INLINE I32 multiply_even(I32 a, std::uint32_t b) {
  I32 product;
  for (int i = 0; i < kLanes; i += 2) {
    const std::uint64_t wide = std::uint64_t{static_cast<std::uint32_t>(a.v[i])} * b;
    product.v[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(wide));
    product.v[i + 1] = static_cast<std::int32_t>(static_cast<std::uint32_t>(wide >> 32));
  }
  return product;
}
T2P_INLINE I32 odd_to_even(I32 a) { return {I32::type{a.v[1], 0, a.v[3], 0}}; }
T2P_INLINE I32 interleave_even(I32 a, I32 b) { return {I32::type{a.v[0], b.v[0], a.v[2], b.v[2]}}; }
T2P_INLINE void part_pairs(I32 a, I32 b, I32& first, I32& second) {
  first = {I32::type{a.v[0], a.v[1], b.v[0], b.v[1]}};
  second = {I32::type{a.v[2], a.v[3], b.v[2], b.v[3]}};
}
template <int kTables>
T2P_INLINE void take_each(const float (&tables)[kTables][32], I32 index, F32 (&out)[kTables]) {
  for (int i = 0; i < kTables; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) out[i].v[lane] = tables[i][index.v[lane] & 31];
  }
}

}  // namespace t2p::simd::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// A small vector type, in the form of the instruction set this file is compiled for: F32 holds
// kLanes floats, I32 as many int32, F64 half as many doubles, M32 one truth value per lane.
// Kernels written on it know no intrinsic. load_first reads `count` elements, at most a vector's,
// and fills the rest with zeros; it touches no memory behind them. load_quads puts p[0..3],
// p[stride..stride + 3], ... side by side, and transpose_quads exchanges, in every quad of lanes,
// vector and lane: together they transpose a matrix of kLanes rows four columns at a time.
//
// reduce_add_each reduces as many vectors of doubles as one has lanes, each in the order of
// reduce_add. store_chosen writes the lanes that are set in a mask side by side and returns their
// number; it may write a whole vector.
//
// dot_words adds to every lane of a sum the two products of the signed 16-bit numbers in it,
// dot_bytes the four products of its unsigned bytes `a` and signed bytes `b`. AVX-512 VNNI has an instruction for it; elsewhere the products of two neighbours are first
// added up in 16 bits, so bytes of `a` may not exceed kLargestByte, nor those of `b` +-127.
//
// min and max give `b` where either operand is a NaN.
//
// The scalar form is four lanes of compiler vectors, which
// any processor's baseline (SSE2, NEON) carries.
#pragma once

#include <cstdint>

#include "common/isa.h"

#if T2P_X86
#include <immintrin.h>
#endif

namespace t2p::simd::T2P_ISA_NAMESPACE {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr bool kFusedMultiplyAdd = true;

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
struct F64 {
  __m512d v;
};
struct M32 {
  __mmask16 v;
};

T2P_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
T2P_INLINE I32 load(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
T2P_INLINE F32 load_first(const float* p, int count) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p)};
}
T2P_INLINE F64 load_f64(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
T2P_INLINE F64 load_f64_first(const float* p, int count) {
  return {_mm512_cvtps_pd(_mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << count) - 1), p))};
}
T2P_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
T2P_INLINE void store(std::int32_t* p, I32 a) { _mm512_storeu_si512(p, a.v); }
T2P_INLINE F32 broadcast(float a) { return {_mm512_set1_ps(a)}; }
T2P_INLINE I32 broadcast(std::int32_t a) { return {_mm512_set1_epi32(a)}; }
T2P_INLINE F64 broadcast(double a) { return {_mm512_set1_pd(a)}; }

T2P_INLINE F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
T2P_INLINE F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
T2P_INLINE F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
T2P_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
T2P_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
T2P_INLINE F32 multiply_add(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
T2P_INLINE F32 multiply_subtract_from(F32 a, F32 b, F32 c) {
  return {_mm512_fnmadd_ps(a.v, b.v, c.v)};
}
T2P_INLINE F64 add(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
T2P_INLINE F64 sub(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
T2P_INLINE F64 multiply_add(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }

T2P_INLINE M32 less(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
T2P_INLINE M32 not_greater(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NGT_UQ)}; }
T2P_INLINE I32 select(M32 m, I32 a, I32 b) {
  __m512i v = _mm512_mask_mov_epi32(b.v, m.v, a.v);
  // Else `p = select(m, a, p)` in memory becomes a masked store, which Zen 4 runs in microcode.
  __asm__("" : "+v"(v));
  return {v};
}
T2P_INLINE std::uint32_t bits(M32 m) { return m.v; }

T2P_INLINE float reduce_min(F32 a) { return _mm512_reduce_min_ps(a.v); }
T2P_INLINE float reduce_add(F32 a) { return _mm512_reduce_add_ps(a.v); }
T2P_INLINE double reduce_add(F64 a) { return _mm512_reduce_add_pd(a.v); }

T2P_INLINE F32 load_quads(const float* p, std::int64_t stride) {
  const __m256 low = _mm256_set_m128(_mm_loadu_ps(p + stride), _mm_loadu_ps(p));
  const __m256 high = _mm256_set_m128(_mm_loadu_ps(p + 3 * stride), _mm_loadu_ps(p + 2 * stride));
  return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
}
T2P_INLINE void transpose_quads(F32 (&a)[4]) {
  const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a[0].v, a[1].v));
  const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a[0].v, a[1].v));
  const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(a[2].v, a[3].v));
  const __m512d cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(a[2].v, a[3].v));
  a[0].v = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low));
  a[1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low));
  a[2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high));
  a[3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high));
}

T2P_INLINE I32 load_bytes(const std::uint8_t* p) { return {_mm512_loadu_si512(p)}; }
T2P_INLINE I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
T2P_INLINE I32 min(I32 a, I32 b) { return {_mm512_min_epi32(a.v, b.v)}; }
T2P_INLINE M32 not_less(I32 a, I32 b) { return {_mm512_cmpge_epi32_mask(a.v, b.v)}; }
T2P_INLINE std::int32_t reduce_max(I32 a) { return _mm512_reduce_max_epi32(a.v); }
T2P_INLINE F32 magnitude(F32 a) { return {_mm512_abs_ps(a.v)}; }
T2P_INLINE float reduce_max(F32 a) { return _mm512_reduce_max_ps(a.v); }
T2P_INLINE I32 to_i32(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
T2P_INLINE F32 to_f32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
T2P_INLINE I32 add(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
T2P_INLINE F64 reduce_add_each(const F64 (&a)[8]) {
  __m512d quads[4], pairs[2];
  for (int i = 0; i < 4; ++i) {
    const __m512d low = a[i / 2 + i % 2 * 4].v, high = a[i / 2 + i % 2 * 4 + 2].v;
    quads[i] = _mm512_add_pd(_mm512_shuffle_f64x2(low, high, 0x44),
                             _mm512_shuffle_f64x2(low, high, 0xee));
  }
  for (int i = 0; i < 2; ++i) {
    pairs[i] = _mm512_add_pd(_mm512_shuffle_f64x2(quads[2 * i], quads[2 * i + 1], 0x88),
                             _mm512_shuffle_f64x2(quads[2 * i], quads[2 * i + 1], 0xdd));
  }
  return {_mm512_add_pd(_mm512_unpacklo_pd(pairs[0], pairs[1]),
                        _mm512_unpackhi_pd(pairs[0], pairs[1]))};
}
T2P_INLINE F64 min(F64 a, F64 b) { return {_mm512_min_pd(a.v, b.v)}; }
T2P_INLINE double reduce_min(F64 a) { return _mm512_reduce_min_pd(a.v); }
T2P_INLINE std::uint32_t bits_where_equal(F64 a, F64 b) {
  return _mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ);
}
T2P_INLINE F32 square_root(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
T2P_INLINE I32 lane_numbers() {
  return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
T2P_INLINE int store_chosen(std::int32_t* p, M32 m, I32 a) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m.v, a.v));
  return __builtin_popcount(m.v);
}
T2P_INLINE void store_bytes(std::uint8_t* p, I32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
T2P_INLINE void store_words(std::int16_t* p, I32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
#if defined(__AVX512VNNI__)
T2P_INLINE I32 dot_words(I32 sum, I32 a, I32 b) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
  return sum;
}
constexpr int kLargestByte = 255;
T2P_INLINE I32 dot_bytes(I32 sum, I32 a, I32 b) {
  // By GCC 12's intrinsic a tile of sums is spilled at every step.
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
  return sum;
}
#else
T2P_INLINE I32 dot_words(I32 sum, I32 a, I32 b) {
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
}
constexpr int kLargestByte = 127;
T2P_INLINE I32 dot_bytes(I32 sum, I32 a, I32 b) {
  const __m512i pairs = _mm512_madd_epi16(_mm512_maddubs_epi16(a.v, b.v), _mm512_set1_epi16(1));
  return {_mm512_add_epi32(sum.v, pairs)};
}
#endif

#elif defined(__AVX2__)

constexpr int kLanes = 8;
constexpr bool kFusedMultiplyAdd = true;

struct F32 {
  __m256 v;
};
struct I32 {
  __m256i v;
};
struct F64 {
  __m256d v;
};
struct M32 {
  __m256 v;
};

T2P_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
T2P_INLINE I32 load(const std::int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
T2P_INLINE F32 load_first(const float* p, int count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane))};
}
T2P_INLINE F64 load_f64(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
T2P_INLINE F64 load_f64_first(const float* p, int count) {
  const __m128i lane = _mm_setr_epi32(0, 1, 2, 3);
  return {_mm256_cvtps_pd(_mm_maskload_ps(p, _mm_cmpgt_epi32(_mm_set1_epi32(count), lane)))};
}
T2P_INLINE void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
T2P_INLINE void store(std::int32_t* p, I32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
}
T2P_INLINE F32 broadcast(float a) { return {_mm256_set1_ps(a)}; }
T2P_INLINE I32 broadcast(std::int32_t a) { return {_mm256_set1_epi32(a)}; }
T2P_INLINE F64 broadcast(double a) { return {_mm256_set1_pd(a)}; }

T2P_INLINE F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
T2P_INLINE F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
T2P_INLINE F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
T2P_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
T2P_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
T2P_INLINE F32 multiply_add(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
T2P_INLINE F32 multiply_subtract_from(F32 a, F32 b, F32 c) {
  return {_mm256_fnmadd_ps(a.v, b.v, c.v)};
}
T2P_INLINE F64 add(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
T2P_INLINE F64 sub(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
T2P_INLINE F64 multiply_add(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }

T2P_INLINE M32 less(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
T2P_INLINE M32 not_greater(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NGT_UQ)}; }
T2P_INLINE I32 select(M32 m, I32 a, I32 b) {
  return {_mm256_blendv_epi8(b.v, a.v, _mm256_castps_si256(m.v))};
}
T2P_INLINE std::uint32_t bits(M32 m) { return static_cast<std::uint32_t>(_mm256_movemask_ps(m.v)); }

T2P_INLINE float reduce_min(F32 a) {
  __m128 m = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_min_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_min_ss(m, _mm_shuffle_ps(m, m, 1)));
}
T2P_INLINE float reduce_add(F32 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
T2P_INLINE double reduce_add(F64 a) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

T2P_INLINE F32 load_quads(const float* p, std::int64_t stride) {
  return {_mm256_set_m128(_mm_loadu_ps(p + stride), _mm_loadu_ps(p))};
}
T2P_INLINE void transpose_quads(F32 (&a)[4]) {
  const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(a[0].v, a[1].v));
  const __m256d ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a[0].v, a[1].v));
  const __m256d cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(a[2].v, a[3].v));
  const __m256d cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(a[2].v, a[3].v));
  a[0].v = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low));
  a[1].v = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low));
  a[2].v = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high));
  a[3].v = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high));
}

T2P_INLINE I32 load_bytes(const std::uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
T2P_INLINE I32 max(I32 a, I32 b) { return {_mm256_max_epi32(a.v, b.v)}; }
T2P_INLINE I32 min(I32 a, I32 b) { return {_mm256_min_epi32(a.v, b.v)}; }
T2P_INLINE M32 not_less(I32 a, I32 b) {
  const __m256i less = _mm256_cmpgt_epi32(b.v, a.v);
  return {_mm256_castsi256_ps(_mm256_xor_si256(less, _mm256_set1_epi32(-1)))};
}
T2P_INLINE std::int32_t reduce_max(I32 a) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
T2P_INLINE F32 magnitude(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
T2P_INLINE float reduce_max(F32 a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
T2P_INLINE I32 to_i32(F32 a) { return {_mm256_cvtps_epi32(a.v)}; }
T2P_INLINE F32 to_f32(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
T2P_INLINE I32 add(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
T2P_INLINE F64 reduce_add_each(const F64 (&a)[4]) {
  __m256d pairs[2];
  for (int i = 0; i < 2; ++i) {
    pairs[i] = _mm256_add_pd(_mm256_permute2f128_pd(a[i].v, a[i + 2].v, 0x20),
                             _mm256_permute2f128_pd(a[i].v, a[i + 2].v, 0x31));
  }
  return {_mm256_add_pd(_mm256_unpacklo_pd(pairs[0], pairs[1]),
                        _mm256_unpackhi_pd(pairs[0], pairs[1]))};
}
T2P_INLINE F64 min(F64 a, F64 b) { return {_mm256_min_pd(a.v, b.v)}; }
T2P_INLINE double reduce_min(F64 a) {
  const __m128d m = _mm_min_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_min_sd(m, _mm_unpackhi_pd(m, m)));
}
T2P_INLINE std::uint32_t bits_where_equal(F64 a, F64 b) {
  return static_cast<std::uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)));
}
T2P_INLINE F32 square_root(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
T2P_INLINE I32 lane_numbers() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
T2P_INLINE int store_chosen(std::int32_t* p, M32 m, I32 a) {
  std::int32_t lanes[8];
  store(lanes, a);
  int count = 0;
  for (auto left = bits(m); left; left &= left - 1) p[count++] = lanes[__builtin_ctz(left)];
  return count;
}
T2P_INLINE void store_bytes(std::uint8_t* p, I32 a) {
  const __m256i low = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                       0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8(a.v, low);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p),
                   _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes),
                                      _mm256_extracti128_si256(bytes, 1)));
}
T2P_INLINE void store_words(std::int16_t* p, I32 a) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a.v),
                                        _mm256_extracti128_si256(a.v, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
}
T2P_INLINE I32 dot_words(I32 sum, I32 a, I32 b) {
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v))};
}
constexpr int kLargestByte = 127;
T2P_INLINE I32 dot_bytes(I32 sum, I32 a, I32 b) {
  const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(a.v, b.v), _mm256_set1_epi16(1));
  return {_mm256_add_epi32(sum.v, pairs)};
}

#else

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
T2P_INLINE void store(float* p, F32 a) { __builtin_memcpy(p, &a, sizeof(a)); }
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
T2P_INLINE F64 reduce_add_each(const F64 (&a)[2]) {
  return {F64::type{a[0].v[0] + a[0].v[1], a[1].v[0] + a[1].v[1]}};
}
T2P_INLINE F64 min(F64 a, F64 b) { return {a.v < b.v ? a.v : b.v}; }
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
T2P_INLINE void store_bytes(std::uint8_t* p, I32 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::uint8_t>(a.v[i]);
}
T2P_INLINE void store_words(std::int16_t* p, I32 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::int16_t>(a.v[i]);
}
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

#endif

}  // namespace t2p::simd::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// The vector type of simd.h in AVX-512, with or without VNNI and BF16. Included by simd.h, which
// says what everything means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/isa.h"

namespace t2p::simd::T2P_ISA_NAMESPACE {

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
T2P_INLINE F32 load_bf16(const std::uint16_t* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16))};
}
T2P_INLINE F32 load_f16(const std::uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
T2P_INLINE void store_high_words(std::uint16_t* p, I32 a) {
  const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(a.v, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
}
T2P_INLINE void store_f16(std::uint16_t* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
T2P_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
T2P_INLINE void store(double* p, F64 a) { _mm512_storeu_pd(p, a.v); }
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
T2P_INLINE F32 fused_multiply_add(F32 a, F32 b, F32 c) { return multiply_add(a, b, c); }
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
T2P_INLINE I32 set_bits(M32 m, I32 a, I32 b) { return {_mm512_mask_or_epi32(a.v, m.v, a.v, b.v)}; }
T2P_INLINE M32 less(I32 a, I32 b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
T2P_INLINE F32 magnitude(F32 a) { return {_mm512_abs_ps(a.v)}; }
T2P_INLINE float reduce_max(F32 a) { return _mm512_reduce_max_ps(a.v); }
T2P_INLINE I32 to_i32(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
T2P_INLINE F32 to_f32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
T2P_INLINE I32 add(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
T2P_INLINE I32 sub(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
T2P_INLINE I32 reduce_max_each(const I32 (&a)[16]) {
  I32 quads[4];
  for (int i = 0; i < 4; ++i) {
    __m512i halves[2];
    for (int j = 0; j < 2; ++j) {
      const __m512i low = a[i + 8 * j].v, high = a[i + 8 * j + 4].v;
      halves[j] = _mm512_max_epi32(_mm512_shuffle_i32x4(low, high, 0x44),
                                   _mm512_shuffle_i32x4(low, high, 0xee));
    }
    quads[i] = {_mm512_max_epi32(_mm512_shuffle_i32x4(halves[0], halves[1], 0x88),
                                 _mm512_shuffle_i32x4(halves[0], halves[1], 0xdd))};
  }
  __m512i pairs[2];
  for (int i = 0; i < 2; ++i) {
    pairs[i] = _mm512_max_epi32(_mm512_unpacklo_epi32(quads[2 * i].v, quads[2 * i + 1].v),
                                _mm512_unpackhi_epi32(quads[2 * i].v, quads[2 * i + 1].v));
  }
  return {_mm512_max_epi32(_mm512_unpacklo_epi64(pairs[0], pairs[1]),
                           _mm512_unpackhi_epi64(pairs[0], pairs[1]))};
}
template <class Combine>
T2P_INLINE F32 reduce_each(const F32 (&a)[16], Combine combine) {
  __m512 quads[4];
  for (int i = 0; i < 4; ++i) {
    __m512 halves[2];
    for (int j = 0; j < 2; ++j) {
      const __m512 low = a[i + 8 * j].v, high = a[i + 8 * j + 4].v;
      halves[j] =
          combine(_mm512_shuffle_f32x4(low, high, 0x44), _mm512_shuffle_f32x4(low, high, 0xee));
    }
    quads[i] = combine(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                       _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
  }
  __m512 pairs[2];
  for (int i = 0; i < 2; ++i) {
    pairs[i] = combine(_mm512_unpacklo_ps(quads[2 * i], quads[2 * i + 1]),
                       _mm512_unpackhi_ps(quads[2 * i], quads[2 * i + 1]));
  }
  const __m512d low = _mm512_castps_pd(pairs[0]), high = _mm512_castps_pd(pairs[1]);
  return {combine(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                  _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)))};
}
T2P_INLINE F32 reduce_add_each(const F32 (&a)[16]) {
  return reduce_each(a, [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); });
}
T2P_INLINE F32 reduce_max_each(const F32 (&a)[16]) {
  return reduce_each(a, [](__m512 x, __m512 y) { return _mm512_max_ps(x, y); });
}
T2P_INLINE F64 reduce_add_each(const F64 (&a)[8]) {
  __m512d quads[4], pairs[2];
  for (int i = 0; i < 4; ++i) {
    const __m512d low = a[i / 2 + i % 2 * 4].v, high = a[i / 2 + i % 2 * 4 + 2].v;
    quads[i] =
        _mm512_add_pd(_mm512_shuffle_f64x2(low, high, 0x44), _mm512_shuffle_f64x2(low, high, 0xee));
  }
  for (int i = 0; i < 2; ++i) {
    pairs[i] = _mm512_add_pd(_mm512_shuffle_f64x2(quads[2 * i], quads[2 * i + 1], 0x88),
                             _mm512_shuffle_f64x2(quads[2 * i], quads[2 * i + 1], 0xdd));
  }
  return {_mm512_add_pd(_mm512_unpacklo_pd(pairs[0], pairs[1]),
                        _mm512_unpackhi_pd(pairs[0], pairs[1]))};
}
T2P_INLINE F64 min(F64 a, F64 b) { return {_mm512_min_pd(a.v, b.v)}; }
T2P_INLINE F64 max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
T2P_INLINE F32 divide(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
T2P_INLINE F32 within(F32 a, F32 limit) {
  return {_mm512_range_ps(a.v, limit.v, 0b0010)};  // the smaller magnitude, with the sign of a
}
T2P_INLINE F32 take(F32 a, I32 index) { return {_mm512_permutexvar_ps(index.v, a.v)}; }
T2P_INLINE void stream(float* p, F32 a) { _mm512_stream_ps(p, a.v); }
T2P_INLINE void stream_fence() { _mm_sfence(); }
T2P_INLINE F64 divide(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
T2P_INLINE F64 square_root(F64 a) { return {_mm512_sqrt_pd(a.v)}; }
T2P_INLINE F64 keep_first(F64 a, int count, F64 rest) {
  return {_mm512_mask_mov_pd(rest.v, static_cast<__mmask8>((1u << count) - 1), a.v)};
}
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
T2P_INLINE I32 join_words(I32 a, I32 b) {
  return {_mm512_mask_blend_epi16(0xaaaaaaaa, a.v, _mm512_slli_epi32(b.v, 16))};
}
T2P_INLINE I32 join_bytes(const I32 (&a)[4]) {
  const __m512i low =
      _mm512_mask_blend_epi8(0x2222222222222222, a[0].v, _mm512_slli_epi32(a[1].v, 8));
  const __m512i high =
      _mm512_mask_blend_epi8(0x2222222222222222, a[2].v, _mm512_slli_epi32(a[3].v, 8));
  return join_words({low}, {high});
}
T2P_INLINE I32 with_low_byte(I32 a, I32 b) {
  return {_mm512_ternarylogic_epi32(a.v, _mm512_set1_epi32(255), b.v, 0xb8)};
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
#if defined(__AVX512BF16__)
T2P_INLINE void store_bf16(std::uint16_t* p, F32 a) {
  __m256i words;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(words) : "v"(a.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
}
// The first 16 words and the last 16, in turn.
T2P_INLINE I32 interleave_halves(__m512i words) {
  const __m512i lanes = lane_numbers().v;
  const __m512i order =
      _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16));
  return {_mm512_permutexvar_epi16(order, words)};
}
T2P_INLINE I32 pair_words(const std::uint16_t* a, const std::uint16_t* b) {
  return interleave_halves(_mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a))),
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1));
}
T2P_INLINE I32 load_words_first(const std::uint16_t* p, int count) {
  return {_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), p)};
}
T2P_INLINE I32 pair_words_first(const std::uint16_t* a, const std::uint16_t* b, int count) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  return interleave_halves(
      _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, a)),
                         _mm256_maskz_loadu_epi16(mask, b), 1));
}
T2P_INLINE void store_bf16_first(std::uint16_t* p, F32 a, int count) {
  __m256i words;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(words) : "v"(a.v));
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), words);
}
T2P_INLINE bool all_finite_bf16(I32 a) {
  const __m512i exponents = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(a.v, exponents), exponents) == 0;
}
T2P_INLINE I32 relu_bf16(I32 a) {
  const __mmask32 nan = _mm512_cmpgt_epu16_mask(a.v, _mm512_set1_epi16(-0x80));  // 0xFF80: -inf
  return {_mm512_mask_max_epi16(a.v, ~nan, a.v, _mm512_setzero_si512())};
}
template <int kBits>
T2P_INLINE I32 shift_left_words(I32 a) {
  return {_mm512_slli_epi16(a.v, kBits)};
}
T2P_INLINE I32 sub_words(I32 a, I32 b) { return {_mm512_sub_epi16(a.v, b.v)}; }
T2P_INLINE I32 max_words(I32 a, I32 b) { return {_mm512_max_epu16(a.v, b.v)}; }
T2P_INLINE I32 min_words(I32 a, I32 b) { return {_mm512_min_epu16(a.v, b.v)}; }
T2P_INLINE std::uint32_t bits_where_words_less(I32 a, I32 b) {
  return _mm512_cmplt_epu16_mask(a.v, b.v);
}
T2P_INLINE F32 dot_bf16(F32 sum, I32 a, I32 b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
  return sum;
}
T2P_INLINE I32 join_bf16(F32 a, F32 b) {
  __m512i words;
  __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(words) : "v"(a.v), "v"(b.v));
  return interleave_halves(words);
}
T2P_INLINE F32 exp2_coarse(F32 a) {
  const __m512 r = _mm512_reduce_ps(a.v, 0);  // a less the nearest whole number
  __m512 p = _mm512_set1_ps(0.05517167f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24261114f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69326099f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.99992807f));
  return {_mm512_scalef_ps(p, _mm512_sub_ps(a.v, r))};
}
#endif
#if defined(__AVX512VBMI__)
T2P_INLINE I32 exp2_words(F32 a, F32 b) {
  // 512 (1 + f - 2^f) at the middle of every 64th of an octave; 0 for no weight to be less.
  alignas(64) static constexpr std::uint8_t kBelowLine[64] = {
      0,  3,  5,  8,  10, 12, 14, 16, 18, 20, 22, 24, 25, 27, 28, 30, 31, 33, 34, 35, 36, 37,
      38, 39, 40, 41, 42, 42, 43, 43, 43, 44, 44, 44, 44, 44, 44, 44, 43, 43, 42, 42, 41, 40,
      39, 38, 37, 36, 35, 33, 32, 30, 28, 27, 25, 23, 21, 18, 16, 14, 11, 8,  5,  2};
  const __m512i exponents = _mm512_packus_epi32(_mm512_cvtps_epi32(a.v), _mm512_cvtps_epi32(b.v));
  const __m512i below = _mm512_maskz_permutexvar_epi8(
      0x5555555555555555, _mm512_srli_epi16(exponents, 3), _mm512_load_si512(kBelowLine));
  return {_mm512_srli_epi16(_mm512_sub_epi16(exponents, below), 2)};
}
#endif

T2P_INLINE I32 bit_and(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
T2P_INLINE I32 bit_and_or(I32 a, I32 b, I32 c) {
  return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0xEA)};
}
T2P_INLINE I32 bit_xor(I32 a, I32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
T2P_INLINE I32 bit_xor(I32 a, I32 b, I32 c) {
  return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0x96)};
}
template <int kBits>
T2P_INLINE I32 shift_left(I32 a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
T2P_INLINE I32 shift_right(I32 a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}
template <int kBits>
T2P_INLINE I32 shift_right_signed(I32 a) {
  return {_mm512_srai_epi32(a.v, kBits)};
}
T2P_INLINE I32 as_i32(F32 a) { return {_mm512_castps_si512(a.v)}; }
T2P_INLINE F32 as_f32(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
T2P_INLINE M32 negative(I32 a) { return {_mm512_movepi32_mask(a.v)}; }
T2P_INLINE M32 equal(I32 a, I32 b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
T2P_INLINE F32 select(M32 m, F32 a, F32 b) { return {_mm512_mask_mov_ps(b.v, m.v, a.v)}; }
T2P_INLINE I32 multiply_even(I32 a, std::uint32_t b) {
  return {_mm512_mul_epu32(a.v, _mm512_set1_epi32(static_cast<int>(b)))};
}
// A shuffle, not a shift: those and multiplications share a port of Intel's.
T2P_INLINE I32 odd_to_even(I32 a) { return {_mm512_shuffle_epi32(a.v, _MM_PERM_DDBB)}; }
T2P_INLINE I32 interleave_even(I32 a, I32 b) {
  return {_mm512_mask_shuffle_epi32(a.v, 0xAAAA, b.v, _MM_PERM_CCAA)};
}
T2P_INLINE void part_pairs(I32 a, I32 b, I32& first, I32& second) {
  first = {_mm512_unpacklo_epi64(a.v, b.v)};
  second = {_mm512_unpackhi_epi64(a.v, b.v)};
}
template <int kTables>
T2P_INLINE void take_each(const float (&tables)[kTables][32], I32 index, F32 (&out)[kTables]) {
  for (int i = 0; i < kTables; ++i) {
    const float* table = tables[i];
    out[i] = {_mm512_permutex2var_ps(_mm512_load_ps(table), index.v, _mm512_load_ps(table + 16))};
  }
}

}  // namespace t2p::simd::T2P_ISA_NAMESPACE

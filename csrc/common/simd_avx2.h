// SPDX-License-Identifier: Apache-2.0
// The vector type of simd.h in AVX2 with FMA. Included by simd.h, which says what everything means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/isa.h"

namespace t2p::simd::T2P_ISA_NAMESPACE {

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
T2P_INLINE F32 load_bf16(const std::uint16_t* p) {
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16))};
}
T2P_INLINE F32 load_f16(const std::uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
T2P_INLINE void store_high_words(std::uint16_t* p, I32 a) {
  const __m256i words = _mm256_srli_epi32(a.v, 16);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
T2P_INLINE void store_f16(std::uint16_t* p, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
T2P_INLINE void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
T2P_INLINE void store(double* p, F64 a) { _mm256_storeu_pd(p, a.v); }
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
T2P_INLINE F32 fused_multiply_add(F32 a, F32 b, F32 c) { return multiply_add(a, b, c); }
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
T2P_INLINE I32 set_bits(M32 m, I32 a, I32 b) {
  return {_mm256_or_si256(a.v, _mm256_and_si256(_mm256_castps_si256(m.v), b.v))};
}
T2P_INLINE M32 less(I32 a, I32 b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))}; }
T2P_INLINE F32 magnitude(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
T2P_INLINE float reduce_max(F32 a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
T2P_INLINE I32 to_i32(F32 a) { return {_mm256_cvtps_epi32(a.v)}; }
T2P_INLINE F32 to_f32(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
T2P_INLINE I32 add(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
T2P_INLINE I32 sub(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
T2P_INLINE I32 reduce_max_each(const I32 (&a)[8]) {
  __m256i quads[4], pairs[2];
  for (int i = 0; i < 4; ++i) {
    quads[i] = _mm256_max_epi32(_mm256_permute2x128_si256(a[i].v, a[i + 4].v, 0x20),
                                _mm256_permute2x128_si256(a[i].v, a[i + 4].v, 0x31));
  }
  for (int i = 0; i < 2; ++i) {
    pairs[i] = _mm256_max_epi32(_mm256_unpacklo_epi32(quads[2 * i], quads[2 * i + 1]),
                                _mm256_unpackhi_epi32(quads[2 * i], quads[2 * i + 1]));
  }
  return {_mm256_max_epi32(_mm256_unpacklo_epi64(pairs[0], pairs[1]),
                           _mm256_unpackhi_epi64(pairs[0], pairs[1]))};
}
T2P_INLINE F32 reduce_add_each(const F32 (&a)[8]) {
  __m256 quads[4];
  for (int i = 0; i < 4; ++i) {
    quads[i] = _mm256_add_ps(_mm256_permute2f128_ps(a[i].v, a[i + 4].v, 0x20),
                             _mm256_permute2f128_ps(a[i].v, a[i + 4].v, 0x31));
  }
  return {_mm256_hadd_ps(_mm256_hadd_ps(quads[0], quads[1]), _mm256_hadd_ps(quads[2], quads[3]))};
}
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
T2P_INLINE F64 max(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
T2P_INLINE F32 divide(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
T2P_INLINE F32 within(F32 a, F32 limit) {
  const __m256 lowest = _mm256_xor_ps(limit.v, _mm256_set1_ps(-0.0f));
  return {_mm256_min_ps(_mm256_max_ps(a.v, lowest), limit.v)};
}
T2P_INLINE F32 take(F32 a, I32 index) { return {_mm256_permutevar8x32_ps(a.v, index.v)}; }
T2P_INLINE void stream(float* p, F32 a) { _mm256_stream_ps(p, a.v); }
T2P_INLINE void stream_fence() { _mm_sfence(); }
T2P_INLINE F64 divide(F64 a, F64 b) { return {_mm256_div_pd(a.v, b.v)}; }
T2P_INLINE F64 square_root(F64 a) { return {_mm256_sqrt_pd(a.v)}; }
T2P_INLINE F64 keep_first(F64 a, int count, F64 rest) {
  const __m256i kept =
      _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  return {_mm256_blendv_pd(rest.v, a.v, _mm256_castsi256_pd(kept))};
}
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
T2P_INLINE I32 join_words(I32 a, I32 b) {
  return {_mm256_blend_epi16(a.v, _mm256_slli_epi32(b.v, 16), 0xaa)};
}
T2P_INLINE I32 join_bytes(const I32 (&a)[4]) {
  const __m256i byte = _mm256_set1_epi32(255);
  const __m256i low = _mm256_or_si256(_mm256_and_si256(a[0].v, byte), _mm256_slli_epi32(a[1].v, 8));
  const __m256i high =
      _mm256_or_si256(_mm256_and_si256(a[2].v, byte), _mm256_slli_epi32(a[3].v, 8));
  return join_words({low}, {high});
}
T2P_INLINE I32 with_low_byte(I32 a, I32 b) {
  return {_mm256_blendv_epi8(a.v, b.v, _mm256_set1_epi32(255))};
}
T2P_INLINE I32 dot_words(I32 sum, I32 a, I32 b) {
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v))};
}
constexpr int kLargestByte = 127;
T2P_INLINE I32 dot_bytes(I32 sum, I32 a, I32 b) {
  const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(a.v, b.v), _mm256_set1_epi16(1));
  return {_mm256_add_epi32(sum.v, pairs)};
}

T2P_INLINE I32 bit_and(I32 a, I32 b) { return {_mm256_and_si256(a.v, b.v)}; }
T2P_INLINE I32 bit_and_or(I32 a, I32 b, I32 c) {
  return {_mm256_or_si256(_mm256_and_si256(a.v, b.v), c.v)};
}
T2P_INLINE I32 bit_xor(I32 a, I32 b) { return {_mm256_xor_si256(a.v, b.v)}; }
T2P_INLINE I32 bit_xor(I32 a, I32 b, I32 c) { return bit_xor(bit_xor(a, b), c); }
template <int kBits>
T2P_INLINE I32 shift_left(I32 a) {
  return {_mm256_slli_epi32(a.v, kBits)};
}
template <int kBits>
T2P_INLINE I32 shift_right(I32 a) {
  return {_mm256_srli_epi32(a.v, kBits)};
}
template <int kBits>
T2P_INLINE I32 shift_right_signed(I32 a) {
  return {_mm256_srai_epi32(a.v, kBits)};
}
T2P_INLINE I32 as_i32(F32 a) { return {_mm256_castps_si256(a.v)}; }
T2P_INLINE F32 as_f32(I32 a) { return {_mm256_castsi256_ps(a.v)}; }
T2P_INLINE M32 negative(I32 a) { return {_mm256_castsi256_ps(_mm256_srai_epi32(a.v, 31))}; }
T2P_INLINE M32 equal(I32 a, I32 b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))}; }
T2P_INLINE F32 select(M32 m, F32 a, F32 b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
T2P_INLINE I32 multiply_even(I32 a, std::uint32_t b) {
  return {_mm256_mul_epu32(a.v, _mm256_set1_epi32(static_cast<int>(b)))};
}
T2P_INLINE I32 odd_to_even(I32 a) { return {_mm256_srli_epi64(a.v, 32)}; }
T2P_INLINE I32 interleave_even(I32 a, I32 b) {
  return {_mm256_blend_epi32(a.v, _mm256_slli_epi64(b.v, 32), 0xAA)};
}
T2P_INLINE void part_pairs(I32 a, I32 b, I32& first, I32& second) {
  first = {_mm256_unpacklo_epi64(a.v, b.v)};
  second = {_mm256_unpackhi_epi64(a.v, b.v)};
}
template <int kTables>
T2P_INLINE void take_each(const float (&tables)[kTables][32], I32 index, F32 (&out)[kTables]) {
  // Gathers take longer than to look at one vector of the table, where most are expected.
  const __m256i entry = _mm256_and_si256(index.v, _mm256_set1_epi32(31));
  const __m256i early = _mm256_cmpgt_epi32(_mm256_set1_epi32(24), entry);
  if (_mm256_testz_si256(early, early)) [[likely]] {
    for (int i = 0; i < kTables; ++i) {
      out[i] = {_mm256_permutevar8x32_ps(_mm256_load_ps(tables[i] + 24), entry)};
    }
    return;
  }
  for (int i = 0; i < kTables; ++i) out[i] = {_mm256_i32gather_ps(tables[i], entry, 4)};
}

}  // namespace t2p::simd::T2P_ISA_NAMESPACE

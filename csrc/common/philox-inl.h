// SPDX-License-Identifier: Apache-2.0
// philox.h in vectors, bit for bit. Included once per instruction set, by <op>-inl.h.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/simd.h"

namespace t2p::simd::T2P_ISA_NAMESPACE {

// Each of these takes several vectors at once, in step: every one is a long chain of which each
// link waits for the last, and a processor does not look far enough ahead to find the next chain.

// The words of the counters in the even lanes, a vector for each word of the counter. What the odd
// lanes hold does not matter.
template <int kVectors>
T2P_INLINE void philox_even(I32 (&w)[kVectors][4], std::uint64_t seed) {
  auto key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < philox::kRounds; ++round) {
    const I32 k0 = broadcast(static_cast<std::int32_t>(key0));
    const I32 k1 = broadcast(static_cast<std::int32_t>(key1));
    for (I32(&v)[4] : w) {
      const I32 product0 = multiply_even(v[0], philox::kMultiplier0);
      const I32 product1 = multiply_even(v[2], philox::kMultiplier1);
      v[0] = bit_xor(odd_to_even(product1), v[1], k0);
      v[1] = product1;
      v[2] = bit_xor(odd_to_even(product0), v[3], k1);
      v[3] = product0;
    }
    key0 += philox::kWeyl0;
    key1 += philox::kWeyl1;
  }
}

// The words of kLanes counters for each vector, a lane each.
template <int kVectors>
T2P_INLINE void philox_words(I32 (&w)[kVectors][4], std::uint64_t seed) {
  I32 halves[2 * kVectors][4];
  for (int k = 0; k < kVectors; ++k) {
    for (int i = 0; i < 4; ++i) {
      halves[2 * k][i] = w[k][i];
      halves[2 * k + 1][i] = odd_to_even(w[k][i]);
    }
  }
  philox_even(halves, seed);
  for (int k = 0; k < kVectors; ++k) {
    for (int i = 0; i < 4; ++i) w[k][i] = interleave_even(halves[2 * k][i], halves[2 * k + 1][i]);
  }
}

T2P_INLINE void philox_words(I32 (&w)[4], std::uint64_t seed) {
  I32 one[1][4] = {{w[0], w[1], w[2], w[3]}};
  philox_words(one, seed);
  for (int i = 0; i < 4; ++i) w[i] = one[0][i];
}

T2P_INLINE F32 uniform(I32 word) {
  return mul(add(to_f32(shift_right<1>(word)), broadcast(1.0f)),
             broadcast(4.656612873077392578125e-10f));
}

// One step of Horner's scheme, not fused.
T2P_INLINE F32 horner(F32 sum, F32 x, float next) { return add(mul(sum, x), broadcast(next)); }

// In place.
template <int kVectors>
T2P_INLINE void log_of_uniform(F32 (&u)[kVectors]) {
  F32 f[kVectors], p[kVectors], scale[kVectors];
  for (int k = 0; k < kVectors; ++k) {
    const I32 bits = as_i32(u[k]);
    const I32 exponent = shift_right_signed<23>(add(bits, broadcast(-philox::kSqrtHalfBits)));
    f[k] = add(as_f32(sub(bits, shift_left<23>(exponent))), broadcast(-1.0f));
    scale[k] = mul(to_f32(exponent), broadcast(philox::kLn2));
    p[k] = broadcast(philox::kLog6);
  }
  constexpr float kTerms[] = {philox::kLog5, philox::kLog4, philox::kLog3,
                              philox::kLog2, philox::kLog1, philox::kLog0};
  for (const float next : kTerms) {
    for (int k = 0; k < kVectors; ++k) p[k] = horner(p[k], f[k], next);
  }
  for (int k = 0; k < kVectors; ++k) {
    const F32 square = mul(f[k], f[k]);
    const F32 log1p = add(add(f[k], mul(broadcast(-0.5f), square)), mul(mul(square, f[k]), p[k]));
    u[k] = add(scale[k], log1p);
  }
}

// a[k] and b[k] of words[k][0] and words[k][1].
template <int kVectors>
T2P_INLINE void normal_pairs(const I32 (&words)[kVectors][2], F32 (&a)[kVectors],
                             F32 (&b)[kVectors]) {
  F32 radius[kVectors], t[kVectors], square[kVectors], sine[kVectors], cosine[kVectors];
  for (int k = 0; k < kVectors; ++k) radius[k] = uniform(words[k][0]);
  log_of_uniform(radius);
  for (int k = 0; k < kVectors; ++k) {
    radius[k] = square_root(mul(broadcast(-2.0f), radius[k]));
    const I32 within =
        add(bit_and(words[k][1], broadcast(std::int32_t{0x3FFFFFFF})), broadcast(-0x20000000));
    t[k] = mul(to_f32(within), broadcast(philox::kHalfPiPer2To30));
    square[k] = mul(t[k], t[k]);
    sine[k] = broadcast(philox::kSin2);
    cosine[k] = broadcast(philox::kCos2);
  }
  for (int k = 0; k < kVectors; ++k) {
    sine[k] = horner(horner(sine[k], square[k], philox::kSin1), square[k], philox::kSin0);
    cosine[k] = horner(horner(cosine[k], square[k], philox::kCos1), square[k], philox::kCos0);
  }
  for (int k = 0; k < kVectors; ++k) {
    sine[k] = add(t[k], mul(mul(square[k], t[k]), sine[k]));
    cosine[k] = add(add(broadcast(1.0f), mul(broadcast(-0.5f), square[k])),
                    mul(mul(square[k], square[k]), cosine[k]));
    const I32 angle = words[k][1], odd = shift_left<1>(angle);  // as a sign
    const M32 swapped = negative(odd);
    const I32 sign = broadcast(INT32_MIN);
    const F32 x = mul(radius[k], select(swapped, sine[k], cosine[k]));
    const F32 y = mul(radius[k], select(swapped, cosine[k], sine[k]));
    a[k] = as_f32(bit_xor(as_i32(x), bit_and(bit_xor(angle, odd), sign)));
    b[k] = as_f32(bit_xor(as_i32(y), bit_and(angle, sign)));
  }
}

// The normal numbers of kGroups times 4 kLanes elements, those of kLanes blocks each from `index`
// on; the blocks of one call lie within 2^32 of a multiple of 2^32.
template <int kGroups>
T2P_INLINE void philox_normals(std::uint64_t seed, std::uint64_t offset, std::uint64_t index,
                               F32 (&n)[kGroups][4]) {
  // Lane 4 q + i counts block kLanes / 4 i + q: transposed by quads, four elements of each block
  // lie side by side and blocks follow each other.
  const I32 lane = lane_numbers();
  const I32 block = add(shift_left<kLanes == 16  ? 2
                                   : kLanes == 8 ? 1
                                                 : 0>(bit_and(lane, broadcast(3))),
                        shift_right<2>(lane));
  I32 w[kGroups][4];
  for (int g = 0; g < kGroups; ++g, index += kLanes) {
    w[g][0] = add(broadcast(static_cast<std::int32_t>(static_cast<std::uint32_t>(index))), block);
    w[g][1] = broadcast(static_cast<std::int32_t>(static_cast<std::uint32_t>(index >> 32)));
    w[g][2] = broadcast(static_cast<std::int32_t>(static_cast<std::uint32_t>(offset)));
    w[g][3] = broadcast(static_cast<std::int32_t>(static_cast<std::uint32_t>(offset >> 32)));
  }
  philox_words(w, seed);
  I32 pairs[2 * kGroups][2];
  for (int g = 0; g < kGroups; ++g) {
    for (int i = 0; i < 4; ++i) pairs[2 * g + i / 2][i % 2] = w[g][i];
  }
  F32 a[2 * kGroups], b[2 * kGroups];
  normal_pairs(pairs, a, b);
  for (int g = 0; g < kGroups; ++g) {
    for (int i = 0; i < 2; ++i) {
      n[g][2 * i] = a[2 * g + i];
      n[g][2 * i + 1] = b[2 * g + i];
    }
    transpose_quads(n[g]);
  }
}

}  // namespace t2p::simd::T2P_ISA_NAMESPACE

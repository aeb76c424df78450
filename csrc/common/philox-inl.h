// SPDX-License-Identifier: Apache-2.0
// philox.h in vectors, bit for bit. Included once per instruction set, by <op>-inl.h.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/simd.h"

namespace t2p::simd::T2P_ISA_NAMESPACE {

// The words of the counters in the even lanes, a vector for each word of the counter. What the odd
// lanes hold does not matter.
T2P_INLINE void philox_even(I32 (&w)[4], std::uint64_t seed) {
  auto key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < philox::kRounds; ++round) {
    const I32 product0 = multiply_even(w[0], philox::kMultiplier0);
    const I32 product1 = multiply_even(w[2], philox::kMultiplier1);
    const I32 k0 = broadcast(static_cast<std::int32_t>(key0));
    const I32 k1 = broadcast(static_cast<std::int32_t>(key1));
    w[0] = bit_xor(odd_to_even(product1), w[1], k0);
    w[1] = product1;
    w[2] = bit_xor(odd_to_even(product0), w[3], k1);
    w[3] = product0;
    key0 += philox::kWeyl0;
    key1 += philox::kWeyl1;
  }
}

// The words of kLanes counters, a lane each.
T2P_INLINE void philox_words(I32 (&w)[4], std::uint64_t seed) {
  I32 odd[4];
  for (int i = 0; i < 4; ++i) odd[i] = odd_to_even(w[i]);
  philox_even(w, seed);
  philox_even(odd, seed);
  for (int i = 0; i < 4; ++i) w[i] = interleave_even(w[i], odd[i]);
}

T2P_INLINE F32 uniform(I32 word) {
  return mul(add(to_f32(shift_right<1>(word)), broadcast(1.0f)),
             broadcast(4.656612873077392578125e-10f));
}

// One step of Horner's scheme, not fused.
T2P_INLINE F32 horner(F32 sum, F32 x, float next) { return add(mul(sum, x), broadcast(next)); }

T2P_INLINE F32 log_of_uniform(F32 u) {
  const I32 bits = as_i32(u);
  const I32 exponent = shift_right_signed<23>(add(bits, broadcast(-philox::kSqrtHalfBits)));
  const F32 f = add(as_f32(sub(bits, shift_left<23>(exponent))), broadcast(-1.0f));
  const F32 square = mul(f, f);
  F32 p = horner(broadcast(philox::kLog6), f, philox::kLog5);
  p = horner(p, f, philox::kLog4);
  p = horner(p, f, philox::kLog3);
  p = horner(p, f, philox::kLog2);
  p = horner(p, f, philox::kLog1);
  p = horner(p, f, philox::kLog0);
  const F32 log1p = add(add(f, mul(broadcast(-0.5f), square)), mul(mul(square, f), p));
  return add(mul(to_f32(exponent), broadcast(philox::kLn2)), log1p);
}

T2P_INLINE void normal_pair(I32 radius_word, I32 angle_word, F32& a, F32& b) {
  const F32 radius = square_root(mul(broadcast(-2.0f), log_of_uniform(uniform(radius_word))));
  const I32 within =
      add(bit_and(angle_word, broadcast(std::int32_t{0x3FFFFFFF})), broadcast(-0x20000000));
  const F32 t = mul(to_f32(within), broadcast(philox::kHalfPiPer2To30)), square = mul(t, t);
  const F32 sine_rest =
      horner(horner(broadcast(philox::kSin2), square, philox::kSin1), square, philox::kSin0);
  const F32 cosine_rest =
      horner(horner(broadcast(philox::kCos2), square, philox::kCos1), square, philox::kCos0);
  const F32 sine = add(t, mul(mul(square, t), sine_rest));
  const F32 cosine = add(add(broadcast(1.0f), mul(broadcast(-0.5f), square)),
                         mul(mul(square, square), cosine_rest));
  const I32 odd = shift_left<1>(angle_word);  // as a sign
  const M32 swapped = negative(odd);
  const I32 sign = broadcast(INT32_MIN);
  const F32 x = mul(radius, select(swapped, sine, cosine));
  const F32 y = mul(radius, select(swapped, cosine, sine));
  a = as_f32(bit_xor(as_i32(x), bit_and(bit_xor(angle_word, odd), sign)));
  b = as_f32(bit_xor(as_i32(y), bit_and(angle_word, sign)));
}

// The normal numbers of 4 kLanes elements, those of kLanes blocks from `index` on; the blocks of
// one call lie within 2^32 of a multiple of 2^32.
T2P_INLINE void philox_normals(std::uint64_t seed, std::uint64_t offset, std::uint64_t index,
                               F32 (&n)[4]) {
  // Lane 4 q + i counts block kLanes / 4 i + q: transposed by quads, four elements of each block
  // lie side by side and blocks follow each other.
  const I32 lane = lane_numbers();
  const I32 block = add(shift_left<kLanes == 16  ? 2
                                   : kLanes == 8 ? 1
                                                 : 0>(bit_and(lane, broadcast(3))),
                        shift_right<2>(lane));
  I32 w[4] = {add(broadcast(static_cast<std::int32_t>(static_cast<std::uint32_t>(index))), block),
              broadcast(static_cast<std::int32_t>(static_cast<std::uint32_t>(index >> 32))),
              broadcast(static_cast<std::int32_t>(static_cast<std::uint32_t>(offset))),
              broadcast(static_cast<std::int32_t>(static_cast<std::uint32_t>(offset >> 32)))};
  philox_words(w, seed);
  normal_pair(w[0], w[1], n[0], n[1]);
  normal_pair(w[2], w[3], n[2], n[3]);
  transpose_quads(n);
}

}  // namespace t2p::simd::T2P_ISA_NAMESPACE

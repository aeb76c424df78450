// SPDX-License-Identifier: Apache-2.0
// normal.h in vectors, bit for bit. Included once per instruction set, by <op>-inl.h.
#pragma once

#include <cstdint>

#include "common/normal.h"
#include "common/philox-inl.h"
#include "common/simd.h"

namespace t2p::simd::T2P_ISA_NAMESPACE {

// The standard normal numbers of words.
T2P_INLINE F32 normal_of(I32 word) {
  using namespace normal;
  const I32 m = bit_and_or(word, broadcast(kMagnitude), broadcast(1));
  const I32 bits = as_i32(mul(to_f32(m), broadcast(kSpread)));
  const I32 scaled = bit_and_or(bits, broadcast(kMantissa), broadcast(kOne));
  const F32 s = add(as_f32(scaled), broadcast(-1.5f));
  F32 terms[kTerms];
  take_each(kQuantile.terms, shift_right<23>(bits), terms);
  F32 z = terms[kTerms - 1];
  for (int k = kTerms - 2; k >= 0; --k) z = fused_multiply_add(z, s, terms[k]);
  return as_f32(bit_xor(as_i32(z), bit_and(word, broadcast(INT32_MIN))));
}

// The normal numbers of `blocks` blocks of four elements from `index` on, rounded up to a multiple
// of kLanes: `out` has room for them. The blocks lie within 2^32 of a multiple of 2^32.
T2P_INLINE void philox_normals(std::uint64_t seed, std::uint64_t offset, std::uint64_t index,
                               std::int64_t blocks, float* out) {
  // Words first, numbers after: both want all registers, for several chains at once and for tables.
  const PhiloxPlace place(seed, offset, index);
  float* const end = out + (blocks + kLanes - 1) / kLanes * kLanes * 4;
  auto block = static_cast<std::uint32_t>(index);
  for (float* to = out; to < end; to += 4 * kLanes, block += kLanes) {
    I32 words[4];
    philox_in_order(place, block, words);
    for (int i = 0; i < 4; ++i) store(to + i * kLanes, as_f32(words[i]));
  }
  for (float* to = out; to < end; to += kLanes) store(to, normal_of(as_i32(load(to))));
}

}  // namespace t2p::simd::T2P_ISA_NAMESPACE

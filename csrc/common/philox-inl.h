// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 on the vectors of simd.h: the words of philox.h for kLanes counters at once.
// Included once per ISA.
#pragma once

#include "common/philox.h"
#include "common/simd.h"

namespace t2p::simd::T2P_ISA_NAMESPACE {

// words[w], lane i: word w at counter (c0 + i, c1, c2, c3). A vector's even and odd counters are
// worked on apart, each in the low half of a 64-bit lane, where products come out; what xor leaves
// in the high halves never matters.
T2P_INLINE void philox_lanes(std::uint64_t key, std::uint32_t c0, std::uint32_t c1,
                             std::uint32_t c2, std::uint32_t c3, I32 (&words)[4]) {
  const auto all = [](std::uint32_t a) { return broadcast(static_cast<std::int32_t>(a)); };
  const I32 multiply0 = all(kPhiloxMultiply0), multiply1 = all(kPhiloxMultiply1);
  const I32 first = add(lane_numbers(), all(c0));
  I32 a[2] = {first, high_words(first)}, b[2] = {all(c1), all(c1)}, c[2] = {all(c2), all(c2)},
      d[2] = {all(c3), all(c3)};
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const I32 key0 = all(k0), key1 = all(k1);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const I32 p0 = even_products(a[half], multiply0), p1 = even_products(c[half], multiply1);
      a[half] = bit_xor(high_words(p1), b[half], key0);
      b[half] = p1;
      c[half] = bit_xor(high_words(p0), d[half], key1);
      d[half] = p0;
    }
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  words[0] = interleave_even(a[0], a[1]);
  words[1] = interleave_even(b[0], b[1]);
  words[2] = interleave_even(c[0], c[1]);
  words[3] = interleave_even(d[0], d[1]);
}

}  // namespace t2p::simd::T2P_ISA_NAMESPACE

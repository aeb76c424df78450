// SPDX-License-Identifier: Apache-2.0
// philox.h in vectors, bit for bit. Included once per instruction set, by <op>-inl.h.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/simd.h"

namespace t2p::simd::T2P_ISA_NAMESPACE {

// Each of these takes several vectors at once, in step: every one is a long chain of which each
// link waits for the last, and a processor does not look far enough ahead to find the next chain.

// The rounds from `first` on of the counters in the even lanes, a vector for each word of the
// counter. What the odd lanes hold does not matter.
template <int kVectors>
T2P_INLINE void philox_rounds(I32 (&w)[kVectors][4], std::uint64_t seed, int first) {
  const auto done = static_cast<std::uint32_t>(first);
  auto key0 = static_cast<std::uint32_t>(seed) + done * philox::kWeyl0;
  auto key1 = static_cast<std::uint32_t>(seed >> 32) + done * philox::kWeyl1;
  for (int round = first; round < philox::kRounds; ++round) {
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
  philox_rounds(halves, seed, 0);
  for (int k = 0; k < kVectors; ++k) {
    for (int i = 0; i < 4; ++i) w[k][i] = interleave_even(halves[2 * k][i], halves[2 * k + 1][i]);
  }
}

T2P_INLINE void philox_words(I32 (&w)[4], std::uint64_t seed) {
  I32 one[1][4] = {{w[0], w[1], w[2], w[3]}};
  philox_words(one, seed);
  for (int i = 0; i < 4; ++i) w[i] = one[0][i];
}

// What the counters of one call share: the key, the offset and the upper half of the index. Half of
// the first two rounds depends on nothing else.
class PhiloxPlace {
 public:
  PhiloxPlace(std::uint64_t seed, std::uint64_t offset, std::uint64_t index) : seed_(seed) {
    const auto key0 = static_cast<std::uint32_t>(seed), key1 = high(seed);
    const std::uint64_t first =
        std::uint64_t{philox::kMultiplier1} * static_cast<std::uint32_t>(offset);
    const std::uint64_t second =
        std::uint64_t{philox::kMultiplier0} * (high(first) ^ high(index) ^ key0);
    into_first_ = high(offset) ^ key1;
    into_second_[0] = static_cast<std::uint32_t>(first) ^ (key0 + philox::kWeyl0);
    into_second_[1] = high(second) ^ (key1 + philox::kWeyl1);
    low_ = static_cast<std::uint32_t>(second);
  }

  // The words of the counters in the even lanes whose lower halves of the index are `w[k][0]`.
  template <int kVectors>
  T2P_INLINE void words(I32 (&w)[kVectors][4]) const {
    for (I32(&v)[4] : w) {
      const I32 product0 = multiply_even(v[0], philox::kMultiplier0);
      const I32 v2 = bit_xor(odd_to_even(product0), all(into_first_));
      const I32 product1 = multiply_even(v2, philox::kMultiplier1);
      v[0] = bit_xor(odd_to_even(product1), all(into_second_[0]));
      v[1] = product1;
      v[2] = bit_xor(product0, all(into_second_[1]));
      v[3] = all(low_);
    }
    philox_rounds(w, seed_, 2);
  }

 private:
  static std::uint32_t high(std::uint64_t a) { return static_cast<std::uint32_t>(a >> 32); }
  static T2P_INLINE I32 all(std::uint32_t a) { return broadcast(static_cast<std::int32_t>(a)); }

  std::uint64_t seed_;
  std::uint32_t into_first_, into_second_[2], low_;
};

// The words of kLanes blocks from `block` on, the lower half of an index: those of a block side by
// side, and blocks in order.
T2P_INLINE void philox_in_order(const PhiloxPlace& place, std::uint32_t block, I32 (&words)[4]) {
  // Blocks q and q + kLanes / 4 are neighbours: parting pairs of words puts them apart.
  const I32 lane = lane_numbers();
  const I32 far = shift_left<kLanes == 16  ? 2
                             : kLanes == 8 ? 1
                                           : 0>(bit_and(shift_right<1>(lane), broadcast(1)));
  const I32 first = add(shift_right<2>(lane), far);
  I32 w[2][4];
  w[0][0] = add(broadcast(static_cast<std::int32_t>(block)), first);
  w[1][0] = add(w[0][0], broadcast(kLanes / 2));
  place.words(w);
  for (int k = 0; k < 2; ++k) {
    part_pairs(interleave_even(w[k][0], w[k][1]), interleave_even(w[k][2], w[k][3]), words[2 * k],
               words[2 * k + 1]);
  }
}

}  // namespace t2p::simd::T2P_ISA_NAMESPACE

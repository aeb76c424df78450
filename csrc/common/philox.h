// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10, a counter-based generator: the words at a counter are a function of it and of the
// key, so noise needs no state and is the same on any thread, vector width and device. J. Salmon et
// al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

// Always inlined, because translation units of different instruction sets include this.
#if defined(__CUDACC__)
#define T2P_PHILOX_INLINE __host__ __device__ __forceinline__
#else
#define T2P_PHILOX_INLINE inline __attribute__((always_inline))
#endif

namespace t2p {

struct PhiloxWords {
  std::uint32_t word[4];
};

constexpr int kPhiloxRounds = 10;
constexpr std::uint32_t kPhiloxMultiply0 = 0xD2511F53, kPhiloxMultiply1 = 0xCD9E8D57;
constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9, kPhiloxWeyl1 = 0xBB67AE85;

// The four words at a counter of 128 bits, low word first, under a key of 64 bits.
T2P_PHILOX_INLINE PhiloxWords philox4x32(std::uint64_t key, std::uint32_t c0, std::uint32_t c1,
                                         std::uint32_t c2, std::uint32_t c3) {
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t p0 = std::uint64_t{kPhiloxMultiply0} * c0;
    const std::uint64_t p1 = std::uint64_t{kPhiloxMultiply1} * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// A word as a number in (0, 1): the middle of one of 2^32 equal steps. Exact in float64.
T2P_PHILOX_INLINE double open_uniform(std::uint32_t word) { return (word + 0.5) * 0x1p-32; }

}  // namespace t2p

// SPDX-License-Identifier: Apache-2.0
// Counter-based random numbers, the same bits on every device: Philox4x32-10 of Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), keyed by a seed, counting by an offset
// (the draw: a step, a call) and an index (the place: a block of four elements). No state, so that
// any thread computes the numbers of any element. philox-inl.h has the same in vectors, normal.h
// makes normal numbers of words.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define T2P_HOST_DEVICE __host__ __device__ __forceinline__
#else
#include "common/isa.h"
#define T2P_HOST_DEVICE T2P_INLINE
#endif

namespace t2p::philox {

constexpr int kRounds = 10;
constexpr std::uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

struct Words {
  std::uint32_t v[4];
};

// The four words at (offset, index) of the stream `seed`.
T2P_HOST_DEVICE Words words(Words counter, std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t product0 = std::uint64_t{kMultiplier0} * counter.v[0];
    const std::uint64_t product1 = std::uint64_t{kMultiplier1} * counter.v[2];
    counter = {{static_cast<std::uint32_t>(product1 >> 32) ^ counter.v[1] ^ key0,
                static_cast<std::uint32_t>(product1),
                static_cast<std::uint32_t>(product0 >> 32) ^ counter.v[3] ^ key1,
                static_cast<std::uint32_t>(product0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

T2P_HOST_DEVICE Words words(std::uint64_t seed, std::uint64_t offset, std::uint64_t index) {
  return words({{static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(index >> 32),
                 static_cast<std::uint32_t>(offset), static_cast<std::uint32_t>(offset >> 32)}},
               static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
}

}  // namespace t2p::philox

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace t2p {

// An integer that orders as the float does; -0 and 0 are one.
__device__ inline std::uint32_t ordered(float a) {
  const std::uint32_t word = a == 0 ? 0u : __float_as_uint(a);
  return word & 0x80000000u ? ~word : word | 0x80000000u;
}
// The float of which it is.
__device__ inline float from_ordered(std::uint32_t order) {
  return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// One value for the whole block, of kWarps warps and one dimension, in the same order in every
// thread. `shared` has kWarps elements.
template <int kWarps, class T, class Combine>
__device__ T block_reduce(T value, T* shared, Combine combine) {
  constexpr int kLanes = 32;
  for (int step = kLanes / 2; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  __syncthreads();
  if (threadIdx.x % kLanes == 0) shared[threadIdx.x / kLanes] = value;
  __syncthreads();
  T total = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) total = combine(total, shared[warp]);
  return total;
}

}  // namespace t2p

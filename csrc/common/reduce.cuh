// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace t2p {

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

// SPDX-License-Identifier: Apache-2.0
// What every CUDA launcher does around its launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace t2p {

// Sizes that only decide how often a loop goes round, as tiles and blocks of a grid. The emulated
// build of the tests defines T2P_EMULATED_TILE and takes the second, so that small shapes bring
// every loop to its second turn.
__host__ __device__ constexpr std::int64_t tile_or_emulated(
    [[maybe_unused]] std::int64_t real, [[maybe_unused]] std::int64_t emulated) {
#ifdef T2P_EMULATED_TILE
  return emulated;
#else
  return real;
#endif
}

inline void cuda_check(cudaError_t status, const char* op) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
  }
}

// Makes a tensor's device current while it lives. The runtime is linked statically and has a
// current device of its own, which torch's does not move.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    cuda_check(cudaGetDevice(&previous_), op);
    if (previous_ != device) cuda_check(cudaSetDevice(device), op);
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// As many blocks as a grid may have in its first dimension, which is all that a launch uses.
inline unsigned grid_size(std::int64_t blocks, const char* op) {
  if (blocks > 0x7fffffff) {
    throw std::runtime_error(std::string(op) + ": the tensors are too large for one launch, of " +
                             std::to_string(blocks) + " blocks");
  }
  return static_cast<unsigned>(blocks);
}

// Reports a launch that could not start. It does not wait for the kernel.
inline void check_launch(const char* op) { cuda_check(cudaGetLastError(), op); }

}  // namespace t2p

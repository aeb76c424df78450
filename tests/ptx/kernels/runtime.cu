// SPDX-License-Identifier: Apache-2.0
// What a launcher must not do on the host, each with what is wrong in its name, and one that does
// all of it right. Built with the runtime of cudart/ by test_runtime.py.
#include <cuda_runtime.h>

#include "common/cuda_check.cuh"

namespace {

__device__ float kept[4];

__global__ void twice(float* x) { x[threadIdx.x] *= 2; }

void launch(float* x, cudaStream_t stream) { twice<<<1, 32, 0, stream>>>(x); }

}  // namespace

extern "C" {

void right(float* x, int device, cudaStream_t stream) {
  const t2p::DeviceGuard guard(device, "right");
  int processors = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaFuncSetAttribute(twice, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
  launch(x, stream);
  cudaMemsetAsync(x, 0, 4, stream);
  cudaMemcpyAsync(x + 1, x + 2, 4, cudaMemcpyDeviceToDevice, stream);
  cudaMemcpyToSymbolAsync(kept, x, 4, 0, cudaMemcpyDeviceToDevice, stream);
}

// In another stream.

void launch_in_default_stream(float* x, int device, cudaStream_t) {
  const t2p::DeviceGuard guard(device, "");
  launch(x, nullptr);
}
void fill_in_default_stream(float* x, int device, cudaStream_t) {
  const t2p::DeviceGuard guard(device, "");
  cudaMemsetAsync(x, 0, 4, nullptr);
}
void copy_in_another_stream(float* x, int device, cudaStream_t) {
  const t2p::DeviceGuard guard(device, "");
  cudaMemcpyAsync(x, x + 1, 4, cudaMemcpyDeviceToDevice, reinterpret_cast<cudaStream_t>(2));
}
void copy_to_symbol_in_default_stream(float* x, int device, cudaStream_t) {
  const t2p::DeviceGuard guard(device, "");
  cudaMemcpyToSymbolAsync(kept, x, 4, 0, cudaMemcpyDeviceToDevice, nullptr);
}

// On another device.

void launch_without_guard(float* x, int, cudaStream_t stream) { launch(x, stream); }
void fill_without_guard(float* x, int, cudaStream_t stream) { cudaMemsetAsync(x, 0, 4, stream); }
void limit_without_guard(float*, int, cudaStream_t) {
  cudaFuncSetAttribute(twice, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
}
void attribute_of_the_first(float*, int, cudaStream_t) {
  int processors = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0);
}
void guard_that_stays(float* x, int device, cudaStream_t stream) {
  cudaSetDevice(device);
  launch(x, stream);
}

// Calls that wait, or may.

void wait_for_device(float* x, int device, cudaStream_t) {
  const t2p::DeviceGuard guard(device, "");
  cudaDeviceSynchronize();
  launch(x, nullptr);
}
void wait_for_stream(float* x, int device, cudaStream_t stream) {
  const t2p::DeviceGuard guard(device, "");
  launch(x, stream);
  cudaStreamSynchronize(stream);
}
void memory_of_its_own(float*, int, cudaStream_t) {
  void* own = nullptr;
  cudaMalloc(&own, 64);
}
void memory_in_the_stream(float*, int, cudaStream_t stream) {
  void* own = nullptr;
  cudaMallocAsync(&own, 64, stream);
}
void copy_that_waits(float* x, int, cudaStream_t) {
  float host = 0;
  cudaMemcpy(&host, x, 4, cudaMemcpyDeviceToHost);
}

}  // extern "C"

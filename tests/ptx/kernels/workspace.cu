// SPDX-License-Identifier: Apache-2.0
// Launchers that carve a workspace and touch what they should not of it, as their names say, and
// one that does all of it right. Built with the runtime of cudart/ by test_workspace.py.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/carver.h"
#include "common/cuda_check.cuh"

namespace {

constexpr int kCount = 30;  // odd in units of 16 bytes

struct Parts {
  float *first, *second;
  unsigned char* third;
};

__global__ void fill(Parts parts, int more) {
  const int i = threadIdx.x;
  if (i < kCount + more) parts.first[i] = 1;
  if (i < kCount) parts.second[i] = 2;
  if (i < 3) parts.third[i] = 3;
}
__global__ void add(Parts parts, float* x, int from) {
  if (threadIdx.x < kCount) x[threadIdx.x] = 5 + parts.first[threadIdx.x + from];
}
__global__ void third(Parts parts, int at) { parts.third[at] = 1; }

Parts carve(float* workspace, int count) {
  t2p::Carver carver(workspace);
  Parts parts;
  parts.first = carver.take<float>(count, "first");
  parts.second = carver.take<float>(count, "second");
  parts.third = carver.take<unsigned char>(3, "third");
  return parts;
}

}  // namespace

extern "C" {

std::int64_t workspace_bytes() {
  t2p::Carver carver(nullptr);
  carver.take<float>(kCount, "first");
  carver.take<float>(kCount, "second");
  carver.take<unsigned char>(3, "third");
  return carver.size<char>();
}

void right(float* x, float* workspace, int device, cudaStream_t stream) {
  const t2p::DeviceGuard guard(device, "right");
  carve(workspace, kCount / 2);  // another launch may carve it in another way
  const Parts parts = carve(workspace, kCount);
  fill<<<1, 32, 0, stream>>>(parts, 0);
  add<<<1, 32, 0, stream>>>(parts, x, 0);
}
void write_beyond_the_first(float*, float* workspace, int device, cudaStream_t stream) {
  const t2p::DeviceGuard guard(device, "");
  fill<<<1, 32, 0, stream>>>(carve(workspace, kCount), 1);
}
void read_beyond_the_first(float* x, float* workspace, int device, cudaStream_t stream) {
  const t2p::DeviceGuard guard(device, "");
  const Parts parts = carve(workspace, kCount);
  fill<<<1, 32, 0, stream>>>(parts, 0);
  add<<<1, 32, 0, stream>>>(parts, x, 1);
}
void write_before_the_third(float*, float* workspace, int device, cudaStream_t stream) {
  const t2p::DeviceGuard guard(device, "");
  third<<<1, 1, 0, stream>>>(carve(workspace, kCount), -1);
}
void write_beyond_the_last(float*, float* workspace, int device, cudaStream_t stream) {
  const t2p::DeviceGuard guard(device, "");
  third<<<1, 1, 0, stream>>>(carve(workspace, kCount), 3);
}
void read_of_what_nobody_wrote(float* x, float* workspace, int device, cudaStream_t stream) {
  const t2p::DeviceGuard guard(device, "");
  add<<<1, 32, 0, stream>>>(carve(workspace, kCount), x, 0);
}
void parts_larger_than_the_workspace(float*, float* workspace, int device, cudaStream_t) {
  const t2p::DeviceGuard guard(device, "");
  carve(workspace, 100 * kCount);
}
}

// SPDX-License-Identifier: Apache-2.0
// What comes after the search on CUDA: codes by index, and the loss.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_check.cuh"
#include "common/reduce.cuh"
#include "vq/vq_cuda.cuh"

namespace t2p::vq {
namespace {

using std::int64_t;

// One thread per element, along the contiguous direction of `out`.
template <class T>
__global__ void lookup_kernel(const int64_t* __restrict__ indices,
                              const float* __restrict__ codebook, int64_t k, Rows<T> out) {
  const int64_t n = out.outer * out.inner, d = out.d;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t e = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; e < n * d; e += step) {
    int64_t r = e / d, t = e % d;
    if (out.channel_stride != 1) {
      const int64_t i = e % out.inner, rest = e / out.inner;
      t = rest % d;
      r = rest / d * out.inner + i;
    }
    const int64_t j = indices[r];
    const float value = j >= 0 && j < k ? codebook[j * d + t] : __int_as_float(0x7fc00000);
    out.data[row_offset(r, out.inner, out.outer_stride, out.inner_stride) +
             t * out.channel_stride] = from_float<T>(value);
  }
}

constexpr int kTotalThreads = 256;

// A block adds up one part of the rows, and the last one to be done all parts, each in a fixed
// order. What blocks tell each other goes by volatile accesses on either side of a fence.
__global__ void __launch_bounds__(kTotalThreads)
    total_kernel(const float* __restrict__ distance, int64_t n, double scale,
                 volatile double* losses, int* finished, float* __restrict__ total) {
  __shared__ double partial[kTotalThreads / kWarp];
  __shared__ bool last;
  const auto reduced = [&](double value) {
    return block_reduce<kTotalThreads / kWarp>(value, partial,
                                               [](double a, double b) { return a + b; });
  };
  const int64_t first = blockIdx.x * kLossRows, end = min(n, first + kLossRows);
  double sum = 0;
  for (int64_t r = first + threadIdx.x; r < end; r += kTotalThreads) sum += distance[r];
  sum = reduced(sum);
  if (threadIdx.x == 0) {
    losses[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(finished, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  sum = 0;
  for (unsigned part = threadIdx.x; part < gridDim.x; part += kTotalThreads) sum += losses[part];
  sum = reduced(sum);
  if (threadIdx.x == 0) *total = static_cast<float>(scale * sum);
}

}  // namespace

void lookup_cuda(const int64_t* indices, const float* codebook, int64_t k, int device, void* stream,
                 const MutableRows& out) {
  const int64_t count = out.rows.count() * out.rows.d;
  if (count == 0) return;
  const DeviceGuard guard(device, "vq_lookup");
  constexpr int64_t kMost = tile_or_emulated(1 << 24, 512);  // threads
  const unsigned blocks = blocks_for(count < kMost ? count : kMost, 256);
  with_rows(out, [&](const auto& rows) {
    lookup_kernel<<<blocks, 256, 0, static_cast<cudaStream_t>(stream)>>>(indices, codebook, k,
                                                                         rows);
  });
  check_launch("vq_lookup");
}

void launch_total(const Prepared& codes, const float* distance, int64_t n, double scale,
                  cudaStream_t stream, float* total) {
  total_kernel<<<grid_size(loss_parts(n), "vq_quantize"), kTotalThreads, 0, stream>>>(
      distance, n, scale, codes.losses, codes.finished_losses, total);
}

}  // namespace t2p::vq

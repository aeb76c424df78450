// SPDX-License-Identifier: Apache-2.0
// The plain CUDA road, for any architecture: a block per row, as in mrf-inl.h. The products with a
// dense W_s or W_c are the caller's, or those of mrf_cuda_mma.cu.
//
//   next = (1 - damping) softmax((scale message + unary) / temperature) + damping previous
//   message[row] = sum_e weight[e] q[node[e]]
#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_check.cuh"
#include "mrf/mrf.h"
#include "mrf/mrf_cuda.cuh"

namespace t2p::mrf {
namespace {

using std::int64_t;

// A row is read three times, of which the cache serves two; a NaN makes all of it NaN.
__global__ void __launch_bounds__(kThreads)
    update_kernel(Values message, const float* __restrict__ unary, Values previous, int64_t v,
                  float scale, float damping, float inverse_temperature, MutableValues next) {
  __shared__ float shared[kWarps];
  const int64_t base = blockIdx.x * v;
  const auto x = [&](int64_t a) {
    float value = unary[base + a];
    if (message.data) value = fmaf(scale, get(message, base + a), value);
    return value * inverse_temperature;
  };
  float most = -infinity();
  for (int64_t a = threadIdx.x; a < v; a += kThreads) most = fmaxf(most, x(a));
  most = block_reduce<kWarps>(most, shared, Larger());
  float sum = 0;
  for (int64_t a = threadIdx.x; a < v; a += kThreads) sum += expf(x(a) - most);
  sum = block_reduce<kWarps>(sum, shared, Sum());
  const float share = (1 - damping) / sum;
  for (int64_t a = threadIdx.x; a < v; a += kThreads) {
    float value = expf(x(a) - most) * share;
    if (previous.data) value = fmaf(damping, get(previous, base + a), value);
    put(next, base + a, value);
  }
}

__global__ void __launch_bounds__(kThreads)
    message_kernel(Edges edges, Positions positions, Values q, int64_t v, MutableValues message) {
  const int64_t row = blockIdx.x, position = positions.row[row];
  const int64_t i = position % positions.n, base = position - i;
  const int64_t first = edges.begin[i], last = edges.begin[i + 1];
  for (int64_t a = threadIdx.x; a < v; a += kThreads) {
    float sum = 0;
    for (int64_t e = first; e < last; ++e) {
      const float weight = edges.weight[e];
      if (weight == 0) continue;  // a grid's edges are there whatever they weigh
      const int64_t slot = positions.slot[base + edges.node[e]];
      const float value = slot >= 0 ? get(q, slot * v + a) : (-1 - slot == a ? 1.0f : 0.0f);
      sum = fmaf(weight, value, sum);
    }
    put(message, row * v + a, sum);
  }
}

}  // namespace

void update_cuda(Values message, const float* unary, Values previous, int64_t r, int64_t v,
                 float scale, float damping, float temperature, int device, void* stream,
                 MutableValues next) {
  constexpr const char* kOp = "mrf_mean_field";
  if (r == 0) return;
  const DeviceGuard guard(device, kOp);
  update_kernel<<<static_cast<unsigned>(r), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      message, unary, previous, v, scale, damping, 1 / temperature, next);
  check_launch(kOp);
}

void message_cuda(const Edges& edges, const Positions& positions, Values q, int64_t v, int device,
                  void* stream, MutableValues message) {
  constexpr const char* kOp = "mrf_mean_field";
  if (positions.r == 0) return;
  const DeviceGuard guard(device, kOp);
  message_kernel<<<static_cast<unsigned>(positions.r), kThreads, 0,
                   static_cast<cudaStream_t>(stream)>>>(edges, positions, q, v, message);
  check_launch(kOp);
}

}  // namespace t2p::mrf

// SPDX-License-Identifier: Apache-2.0
// Sums of rows by code on CUDA, of the rows in their order: the same bits whatever the device. Rows
// are ordered by code by a stable counting sort:
//
//   counts[c, j] = rows of code j in chunk c            a block per chunk, integer atomics
//   counts[c, j] = those of the chunks before c         a thread per code
//   begin[j]     = rows of all codes before j           one block
//   rows[begin[j] + counts[c, j]++] = r                 a warp per chunk, 32 rows at a time
//
// O(n + k chunks) time and memory, in 4 launches. A sort of int64 would go over the rows once for
// every few bits of a code, of 64. Not yet run on a GPU.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/carver.h"
#include "common/cuda_check.cuh"
#include "vq/vq_cuda.cuh"

namespace t2p::vq {
namespace {

using std::int64_t;

constexpr const char* kOp = "vq_accumulate";
constexpr int kThreads = 256, kScanThreads = 1024;
// A warp goes over its chunk in steps that wait for each other: chunks are short, but as few as
// their counts for all codes, 16 MiB of them, allow.
constexpr int64_t kFewestRows = tile_or_emulated(512, 64), kMostChunks = tile_or_emulated(512, 4);
constexpr int64_t kMostCounts = 1 << 22;

struct Order {
  int64_t n, k, chunks, chunk_rows;
  unsigned* counts;  // [chunks, k]
  int64_t* begin;    // [k + 1]
  int64_t* rows;     // [n], by code; those whose index is no code's are left out
  int64_t floats;
};

Order carve(float* base, int64_t n, int64_t k) {
  Carver carver(base);
  Order order{n, k};
  int64_t most = k < kMostCounts ? kMostCounts / k : 1;
  most = most < kMostChunks ? most : kMostChunks;
  const int64_t wanted = (n + most - 1) / most;
  order.chunk_rows = wanted > kFewestRows ? wanted : kFewestRows;
  order.chunks = (n + order.chunk_rows - 1) / order.chunk_rows;
  order.counts = carver.take<unsigned>(order.chunks * k, "counts");
  order.begin = carver.take<int64_t>(k + 1, "begin");
  order.rows = carver.take<int64_t>(n, "rows");
  order.floats = carver.size<float>();
  return order;
}

__device__ bool is_code(int64_t j, const Order& order) { return j >= 0 && j < order.k; }

__global__ void count_kernel(const int64_t* __restrict__ indices, Order order) {
  unsigned* counts = order.counts + blockIdx.x * order.k;
  for (int64_t j = threadIdx.x; j < order.k; j += blockDim.x) counts[j] = 0;
  __syncthreads();
  const int64_t first = blockIdx.x * order.chunk_rows, end = min(order.n, first + order.chunk_rows);
  for (int64_t r = first + threadIdx.x; r < end; r += blockDim.x) {
    const int64_t j = indices[r];
    if (is_code(j, order)) atomicAdd(&counts[j], 1u);
  }
}

// Leaves the rows of every code in `begin`, one place further on.
__global__ void chunks_before_kernel(Order order) {
  const int64_t j = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (j >= order.k) return;
  unsigned before = 0;
  for (int64_t c = 0; c < order.chunks; ++c) {
    unsigned& count = order.counts[c * order.k + j];
    const unsigned own = count;
    count = before;
    before += own;
  }
  order.begin[j + 1] = before;
}

// The sum of the values of all lanes up to this one.
__device__ int64_t warp_sum_upto(int64_t value) {
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t before = __shfl_up_sync(kAllLanes, value, step);
    if (threadIdx.x % kWarp >= step) value += before;
  }
  return value;
}

__global__ void __launch_bounds__(kScanThreads) begin_kernel(Order order) {
  __shared__ int64_t sums[kScanThreads / kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int64_t before = 0;
  for (int64_t base = 0; base < order.k; base += kScanThreads) {
    const int64_t j = base + threadIdx.x;
    const int64_t upto = warp_sum_upto(j < order.k ? order.begin[j + 1] : 0);
    if (lane == kWarp - 1) sums[warp] = upto;
    __syncthreads();
    if (warp == 0) sums[lane] = warp_sum_upto(sums[lane]);
    __syncthreads();
    if (j < order.k) order.begin[j + 1] = before + upto + (warp > 0 ? sums[warp - 1] : 0);
    before += sums[kWarp - 1];
    __syncthreads();
  }
  if (threadIdx.x == 0) order.begin[0] = 0;
}
static_assert(kScanThreads == kWarp * kWarp);

__global__ void order_kernel(const int64_t* __restrict__ indices, Order order) {
  const int64_t chunk = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (chunk >= order.chunks) return;
  unsigned* counts = order.counts + chunk * order.k;
  const int64_t first = chunk * order.chunk_rows, end = min(order.n, first + order.chunk_rows);
  for (int64_t base = first; base < end; base += kWarp) {
    const int64_t r = base + lane, j = r < end ? indices[r] : -1;
    const unsigned alike = __match_any_sync(kAllLanes, static_cast<long long>(j));
    const int rank = __popc(alike & ((1u << lane) - 1));  // among those of its code, in their order
    const unsigned at = is_code(j, order) ? counts[j] : 0;
    __syncwarp();
    if (is_code(j, order)) {
      order.rows[order.begin[j] + at + rank] = r;
      if (rank == 0) counts[j] = at + __popc(alike);
    }
    __syncwarp();
  }
}

// One block per code, one thread per channel; the rows of a code are added in their order.
template <class T>
__global__ void accumulate_kernel(Rows<const T> x, Order order, float* __restrict__ counts,
                                  float* __restrict__ sums) {
  for (int64_t j = blockIdx.x; j < order.k; j += gridDim.x) {
    const int64_t begin = order.begin[j], end = order.begin[j + 1];
    if (threadIdx.x == 0) counts[j] = static_cast<float>(end - begin);
    for (int64_t t = threadIdx.x; t < x.d; t += blockDim.x) {
      double sum = 0;
      for (int64_t i = begin; i < end; ++i) {
        sum += to_float(row_pointer(x, order.rows[i])[t * x.channel_stride]);
      }
      sums[j * x.d + t] = static_cast<float>(sum);
    }
  }
}

}  // namespace

int64_t accumulate_workspace_size(int64_t n, int64_t k) { return carve(nullptr, n, k).floats; }

void accumulate_cuda(const AnyRows& x, const int64_t* indices, int64_t k, int device, void* stream,
                     float* workspace, float* counts, float* sums) {
  if (k == 0) return;
  const DeviceGuard guard(device, kOp);
  const auto queue = static_cast<cudaStream_t>(stream);
  const Order order = carve(workspace, x.rows.count(), k);
  if (order.n > 0) {
    count_kernel<<<grid_size(order.chunks, kOp), kThreads, 0, queue>>>(indices, order);
  }
  chunks_before_kernel<<<blocks_for(k, kThreads), kThreads, 0, queue>>>(order);
  begin_kernel<<<1, kScanThreads, 0, queue>>>(order);
  if (order.n > 0) {
    order_kernel<<<blocks_for(order.chunks * kWarp, kThreads), kThreads, 0, queue>>>(indices,
                                                                                     order);
  }
  constexpr int64_t kMost = tile_or_emulated(65536, 8);
  const auto blocks = static_cast<unsigned>(k < kMost ? k : kMost);
  with_rows(x, [&](const auto& rows) {
    accumulate_kernel<<<blocks, 128, 0, queue>>>(rows, order, counts, sums);
  });
  check_launch(kOp);
}

}  // namespace t2p::vq

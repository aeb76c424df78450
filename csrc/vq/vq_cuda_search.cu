// SPDX-License-Identifier: Apache-2.0
// Before and after either road: the centre of the codebook, and the search of undecided rows.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "common/cuda_check.cuh"
#include "vq/vq_cuda.cuh"

namespace t2p::vq {
namespace {

using std::int64_t;

constexpr int kSearchThreads = 256, kSearchWarps = kSearchThreads / kWarp;
constexpr int kCodesAtOnce = 4;  // of one warp, so that it waits for memory less often

// One warp per code: its direction.
__global__ void directions_kernel(Prepared codes) {
  const int64_t d = codes.d;
  const int64_t j = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / kWarp;
  if (j >= codes.k) return;
  const float* code = codes.codebook + j * d;
  double squares = 0;
  for (int64_t t = threadIdx.x % kWarp; t < d; t += kWarp) {
    squares = fma(static_cast<double>(code[t]), static_cast<double>(code[t]), squares);
  }
  const double norm = fmax(sqrt(warp_sum(squares)), 1e-300);  // a code of length 0 stays
  for (int64_t t = threadIdx.x % kWarp; t < d; t += kWarp) {
    codes.directions[j * d + t] = static_cast<float>(code[t] / norm);
  }
}

// The mean of up to 256 codes, one warp per channel.
__global__ void center_kernel(Prepared codes) {
  const int64_t t = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (t >= codes.d) return;
  if (t == 0 && lane == 0) {
    *codes.largest_half_norm = *codes.largest_rounding = 0;
    *codes.undecided_count = *codes.finished_losses = 0;
  }
  const int64_t samples = codes.k < 256 ? codes.k : 256;
  double sum = 0;
  for (int64_t s = lane; s < samples; s += kWarp) {
    sum += codes.scored()[s * codes.k / samples * codes.d + t];
  }
  const float mean = static_cast<float>(warp_sum(sum) / static_cast<double>(samples));
  if (lane != 0) return;
  codes.center[t] = isfinite(mean) ? mean : 0.0f;
  codes.row_center[t] = isfinite(mean) && codes.metric == Metric::kL2 ? mean : 0.0f;
}

// One block per row, which is finite. A warp compares in float64 the codes whose float32 scores are
// not proven to be above that of another.
template <class T>
__global__ void __launch_bounds__(kSearchThreads)
    search_kernel(Rows<const T> x, Prepared codes, Results results) {
  __shared__ Nearest found[kSearchWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t k = codes.k, d = codes.d, rows = *codes.undecided_count;
  const float radius = norm_bound(2 * __int_as_float(*codes.largest_half_norm), d);
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const int64_t r = codes.undecided[i];
    const T* row = row_pointer(x, r);
    float squares = 0;
    for (int64_t t = lane; t < d; t += kWarp) {
      const float centred = to_float(row[t * x.channel_stride]) - codes.row_center[t];
      squares = fmaf(centred, centred, squares);
    }
    const float margin =
        twice_error_bound(codes.metric, norm_bound(warp_sum(squares), d), radius, d);
    float limit = infinity();
    Nearest nearest{infinity(), 0};
    for (int64_t j = warp * kCodesAtOnce; j < k; j += kSearchWarps * kCodesAtOnce) {
      float products[kCodesAtOnce] = {};
      for (int64_t t = lane; t < d; t += kWarp) {
        const float center = codes.center[t];
        const float value = to_float(row[t * x.channel_stride]) - codes.row_center[t];
#pragma unroll
        for (int u = 0; u < kCodesAtOnce; ++u) {
          const int64_t code = min(j + u, k - 1);
          products[u] = fmaf(value, codes.scored()[code * d + t] - center, products[u]);
        }
      }
#pragma unroll
      for (int u = 0; u < kCodesAtOnce; ++u) {
        const int64_t code = min(j + u, k - 1);
        const float score = codes.half_norms[code] - warp_sum(products[u]);
        if (score > limit) continue;
        limit = fminf(limit, score + margin);
        const double exact = warp_distance(codes, row, x.channel_stride, code);
        // Not `offer`: with nothing finite the index stays 0.
        if (exact < nearest.distance) nearest = {exact, code};
      }
    }
    if (lane == 0) found[warp] = nearest;
    __syncthreads();
    if (warp == 0) {
      for (int w = 1; w < kSearchWarps; ++w) nearest.offer(found[w].distance, found[w].index);
      const float result = warp_result(codes, row, x.channel_stride, nearest.distance);
      write_result(results, codes, r, row, x.channel_stride, nearest.index, result);
    }
    __syncthreads();
  }
}

}  // namespace

void launch_center(const Prepared& codes, cudaStream_t stream) {
  if (codes.metric == Metric::kCosine) {
    directions_kernel<<<blocks_for(codes.k * kWarp, 256), 256, 0, stream>>>(codes);
  }
  center_kernel<<<blocks_for(codes.d * kWarp, 128), 128, 0, stream>>>(codes);
}

void launch_search(const AnyRows& x, const Prepared& codes, int64_t most, cudaStream_t stream,
                   const Results& results) {
  // How many rows there are is known on the device alone: enough blocks to fill it.
  constexpr int64_t kBlocks = tile_or_emulated(512, 16);
  const auto blocks = static_cast<unsigned>(most < kBlocks ? most : kBlocks);
  with_rows(x, [&](const auto& rows) {
    search_kernel<<<blocks, kSearchThreads, 0, stream>>>(rows, codes, results);
  });
}

}  // namespace t2p::vq

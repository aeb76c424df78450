// SPDX-License-Identifier: Apache-2.0
// The plain CUDA road: float32 in registers, any architecture. The method is that of vq-inl.h:
//
//   for each row x:  score[j] = |c_j - m|^2 / 2 - (x - m).(c_j - m)      float32, m = about mean(c)
//                    limit    = min(score) + 2 E                         E bounds the rounding
//                    index    = argmin over {j : score[j] <= limit} of |x - c_j|^2 in float64
//
// The scan keeps the best and the second best score of every row. Where the second is beyond the
// limit the best is proven; the other rows, few, are searched again by a warp each.
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/cuda_check.cuh"
#include "vq/vq.h"

namespace t2p::vq {
namespace {

using std::int64_t;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The scan's tile: 64 rows by 128 codes by 16 channels, 4 x 8 scores in each of 256 threads.
constexpr int kTileRows = 64, kTileCodes = 128, kTileChannels = 16;
constexpr int kThreadsX = 16, kThreadsY = 16, kThreads = kThreadsX * kThreadsY;
constexpr int kRowsPerThread = kTileRows / kThreadsY, kCodesPerThread = kTileCodes / kThreadsX;

__device__ float infinity() { return __int_as_float(0x7f800000); }

__device__ int64_t row_offset(int64_t r, int64_t inner, int64_t outer_stride,
                              int64_t inner_stride) {
  return (r / inner) * outer_stride + (r % inner) * inner_stride;
}

template <class T>
__device__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Bound on 2 |s - S| and on a norm from its computed square, as in vq-inl.h.
__device__ float twice_error_bound(float x, float radius, int64_t d) {
  const float steps = static_cast<float>(d + 16);
  const float relative = steps * 0x1p-24f;
  if (relative > 0.25f) return infinity();
  return 2.1f / (1 - relative) * relative * (radius * (x + radius)) +
         4 * steps * FLT_MIN * (1 + x + radius);
}
__device__ float norm_bound(float squares, int64_t d) {
  return 1.001f * sqrtf(squares + static_cast<float>(d) * FLT_MIN);
}

struct Best {
  float score, second;
  int index;

  __device__ void offer(float other, int other_index) {
    const bool better = other < score;
    second = better ? score : fminf(second, other);
    index = better ? other_index : index;
    score = better ? other : score;
  }
  __device__ void merge(const Best& other) {
    const bool better = other.score < score || (other.score == score && other.index < index);
    second = fminf(fminf(second, other.second), better ? score : other.score);
    index = better ? other.index : index;
    score = better ? other.score : score;
  }
};

// How the workspace is used: what is prepared of the codebook, then the best of every split.
struct Workspace {
  float* center;           // [d]
  float* half_norms;       // [k]
  int* largest_half_norm;  // [1], a float >= 0 by its bits, which order as integers do
  Best* best;              // [splits, n]
};

// Row blocks alone may not fill the device: then the codes are split as well.
int64_t split_count(int64_t n, int64_t k) {
  constexpr int64_t kBlocksWanted = 512;
  const int64_t blocks = (n + kTileRows - 1) / kTileRows;
  const int64_t tiles = (k + kTileCodes - 1) / kTileCodes;
  const int64_t splits = kBlocksWanted / (blocks > 0 ? blocks : 1);
  return splits < 1 ? 1 : (splits < tiles ? splits : tiles);
}

// The mean of up to 256 codes, as in vq.cpp.
__global__ void center_kernel(const float* __restrict__ codebook, int64_t k, int64_t d,
                              Workspace workspace) {
  const int64_t t = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (t == 0) *workspace.largest_half_norm = 0;
  if (t >= d) return;
  const int64_t samples = k < 256 ? k : 256;
  double sum = 0;
  for (int64_t s = 0; s < samples; ++s) sum += codebook[s * k / samples * d + t];
  const float mean = static_cast<float>(sum / static_cast<double>(samples));
  workspace.center[t] = isfinite(mean) ? mean : 0.0f;
}

// One warp per code.
__global__ void norms_kernel(const float* __restrict__ codebook, int64_t k, int64_t d,
                             Workspace workspace) {
  const int64_t j = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / kWarp;
  if (j >= k) return;
  float squares = 0;
  bool finite = true;
  for (int64_t t = threadIdx.x % kWarp; t < d; t += kWarp) {
    const float c = codebook[j * d + t];
    const float centred = c - workspace.center[t];
    finite = finite && isfinite(c);
    squares = fmaf(centred, centred, squares);
  }
  finite = __all_sync(kAllLanes, finite);
  const float half = 0.5f * warp_sum(squares);
  if (threadIdx.x % kWarp != 0) return;
  // A code with a NaN or an infinity: an infinite score, and no part in the error bound. A finite
  // one whose norm overflows makes the bound infinite, so that float64 decides.
  workspace.half_norms[j] = finite && isfinite(half) ? half : infinity();
  if (finite)
    atomicMax(workspace.largest_half_norm, __float_as_int(isfinite(half) ? half : infinity()));
}

// Copies a [kCount, kTileChannels] part of centred vectors to shared memory, transposed.
// Consecutive threads read along whichever of the two directions is contiguous.
template <int kCount>
__device__ void load_tile(float (*tile)[kCount + 4], const float* const* vectors, int64_t stride,
                          const float* center, int64_t first, int64_t d, bool channels_contiguous) {
  for (int e = threadIdx.x; e < kCount * kTileChannels; e += kThreads) {
    const int t = channels_contiguous ? e % kTileChannels : e / kCount;
    const int i = channels_contiguous ? e / kTileChannels : e % kCount;
    const int64_t channel = first + t;
    const float* vector = vectors[i];
    tile[t][i] = vector && channel < d ? vector[channel * stride] - center[channel] : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    scan_kernel(Rows<const float> x, const float* __restrict__ codebook, int64_t k,
                int64_t tiles_per_split, Workspace workspace) {
  __shared__ float row_tile[kTileChannels][kTileRows + 4];
  __shared__ float code_tile[kTileChannels][kTileCodes + 4];
  __shared__ const float* row_pointers[kTileRows];
  __shared__ const float* code_pointers[kTileCodes];

  const int tx = threadIdx.x % kThreadsX, ty = threadIdx.x / kThreadsX;
  const int64_t n = x.outer * x.inner, d = x.d;
  const int64_t first_row = blockIdx.x * int64_t{kTileRows};
  for (int i = threadIdx.x; i < kTileRows; i += kThreads) {
    const int64_t r = first_row + i;
    row_pointers[i] =
        r < n ? x.data + row_offset(r, x.inner, x.outer_stride, x.inner_stride) : nullptr;
  }

  Best best[kRowsPerThread];
  for (Best& b : best) b = {infinity(), infinity(), 0};

  const int64_t first_code = blockIdx.y * tiles_per_split * kTileCodes;
  const int64_t last_code = min(k, first_code + tiles_per_split * kTileCodes);
  for (int64_t code = first_code; code < last_code; code += kTileCodes) {
    for (int i = threadIdx.x; i < kTileCodes; i += kThreads) {
      // A code of infinite norm never wins, and must not turn its neighbours' sums into NaN.
      const bool usable = code + i < k && workspace.half_norms[code + i] < infinity();
      code_pointers[i] = usable ? codebook + (code + i) * d : nullptr;
    }
    float products[kRowsPerThread][kCodesPerThread] = {};
    for (int64_t t = 0; t < d; t += kTileChannels) {
      __syncthreads();
      load_tile<kTileRows>(row_tile, row_pointers, x.channel_stride, workspace.center, t, d,
                           x.channel_stride == 1);
      load_tile<kTileCodes>(code_tile, code_pointers, 1, workspace.center, t, d, true);
      __syncthreads();
#pragma unroll
      for (int u = 0; u < kTileChannels; ++u) {
        float rows[kRowsPerThread], codes[kCodesPerThread];
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) rows[i] = row_tile[u][ty + i * kThreadsY];
#pragma unroll
        for (int j = 0; j < kCodesPerThread; ++j) codes[j] = code_tile[u][tx + j * kThreadsX];
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
          for (int j = 0; j < kCodesPerThread; ++j) {
            products[i][j] = fmaf(rows[i], codes[j], products[i][j]);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kCodesPerThread; ++j) {
      const int64_t index = code + tx + j * kThreadsX;
      const float half_norm = index < k ? workspace.half_norms[index] : infinity();
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        best[i].offer(half_norm - products[i][j], static_cast<int>(index));
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    for (int step = kThreadsX / 2; step > 0; step /= 2) {
      best[i].merge({__shfl_xor_sync(kAllLanes, best[i].score, step),
                     __shfl_xor_sync(kAllLanes, best[i].second, step),
                     __shfl_xor_sync(kAllLanes, best[i].index, step)});
    }
    const int64_t r = first_row + ty + i * kThreadsY;
    if (tx == 0 && r < n) workspace.best[blockIdx.y * n + r] = best[i];
  }
}

// One warp per row: joins the splits, and where the best is not proven searches all codes again.
__global__ void resolve_kernel(Rows<const float> x, const float* __restrict__ codebook, int64_t k,
                               int splits, Workspace workspace, int64_t* __restrict__ indices,
                               float* __restrict__ distance) {
  const int64_t n = x.outer * x.inner, d = x.d;
  const int64_t r = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (r >= n) return;
  const float* row = x.data + row_offset(r, x.inner, x.outer_stride, x.inner_stride);

  float squares = 0;
  bool finite = true;
  for (int64_t t = lane; t < d; t += kWarp) {
    const float value = row[t * x.channel_stride];
    const float centred = value - workspace.center[t];
    finite = finite && isfinite(value);
    squares = fmaf(centred, centred, squares);
  }
  if (!__all_sync(kAllLanes, finite)) {
    if (lane == 0) {
      indices[r] = 0;
      distance[r] = __int_as_float(0x7fc00000);
    }
    return;
  }
  Best best = workspace.best[r];
  for (int s = 1; s < splits; ++s) best.merge(workspace.best[s * n + r]);
  const float radius = norm_bound(2 * __int_as_float(*workspace.largest_half_norm), d);
  const float limit = best.score + twice_error_bound(norm_bound(warp_sum(squares), d), radius, d);

  const auto distance64 = [&](int64_t code) {
    double sum = 0;
    for (int64_t t = lane; t < d; t += kWarp) {
      const double difference =
          static_cast<double>(row[t * x.channel_stride]) - codebook[code * d + t];
      sum = fma(difference, difference, sum);
    }
    return warp_sum(sum);
  };
  if (limit < infinity() && best.second > limit) {
    const double exact = distance64(best.index);
    if (lane == 0) {
      indices[r] = best.index;
      distance[r] = static_cast<float>(exact);
    }
    return;
  }
  double nearest = infinity();
  int64_t index = 0;
  for (int64_t j = 0; j < k; ++j) {
    float product = 0;
    for (int64_t t = lane; t < d; t += kWarp) {
      product = fmaf(row[t * x.channel_stride] - workspace.center[t],
                     codebook[j * d + t] - workspace.center[t], product);
    }
    const float score = workspace.half_norms[j] - warp_sum(product);
    if (limit < infinity() && score > limit) continue;
    const double exact = distance64(j);
    if (exact < nearest) {
      nearest = exact;
      index = j;
    }
  }
  if (lane == 0) {
    indices[r] = index;
    distance[r] = static_cast<float>(nearest);
  }
}

// One thread per element, along the contiguous direction of `out`.
__global__ void lookup_kernel(const int64_t* __restrict__ indices,
                              const float* __restrict__ codebook, int64_t k, Rows<float> out) {
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
             t * out.channel_stride] = value;
  }
}

// One block per code, one thread per channel; the rows of a code are added in their order.
__global__ void accumulate_kernel(Rows<const float> x, const int64_t* __restrict__ order,
                                  const int64_t* __restrict__ begin, int64_t k,
                                  float* __restrict__ counts, float* __restrict__ sums) {
  for (int64_t j = blockIdx.x; j < k; j += gridDim.x) {
    if (threadIdx.x == 0) counts[j] = static_cast<float>(begin[j + 1] - begin[j]);
    for (int64_t t = threadIdx.x; t < x.d; t += blockDim.x) {
      double sum = 0;
      for (int64_t i = begin[j]; i < begin[j + 1]; ++i) {
        sum += x.data[row_offset(order[i], x.inner, x.outer_stride, x.inner_stride) +
                      t * x.channel_stride];
      }
      sums[j * x.d + t] = static_cast<float>(sum);
    }
  }
}

// One block: a fixed order, whatever the device.
__global__ void total_kernel(const float* __restrict__ distance, int64_t n, double scale,
                             float* __restrict__ total) {
  __shared__ double partial[kWarp];
  double sum = 0;
  for (int64_t r = threadIdx.x; r < n; r += blockDim.x) sum += distance[r];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  sum = warp_sum(threadIdx.x < blockDim.x / kWarp ? partial[threadIdx.x] : 0.0);
  if (threadIdx.x == 0) *total = static_cast<float>(scale * sum);
}

unsigned blocks_for(int64_t threads, int64_t block) {
  return static_cast<unsigned>((threads + block - 1) / block);
}

}  // namespace

int64_t workspace_size(int64_t n, int64_t k, int64_t d) {
  return d + k + 1 + split_count(n, k) * n * static_cast<int64_t>(sizeof(Best) / sizeof(float));
}

void nearest_cuda(const Rows<const float>& x, const float* codebook, int64_t k, int device,
                  void* stream, float* workspace, int64_t* indices, float* distance) {
  const int64_t n = x.count(), d = x.d;
  if (n == 0) return;
  const DeviceGuard guard(device, "vq_nearest");
  const auto s = static_cast<cudaStream_t>(stream);
  const Workspace w{workspace, workspace + d, reinterpret_cast<int*>(workspace + d + k),
                    reinterpret_cast<Best*>(workspace + d + k + 1)};
  const int64_t tiles = (k + kTileCodes - 1) / kTileCodes, splits = split_count(n, k);
  const int64_t tiles_per_split = (tiles + splits - 1) / splits;
  const int64_t used_splits = (tiles + tiles_per_split - 1) / tiles_per_split;

  center_kernel<<<blocks_for(d, 128), 128, 0, s>>>(codebook, k, d, w);
  norms_kernel<<<blocks_for(k * kWarp, 256), 256, 0, s>>>(codebook, k, d, w);
  const dim3 grid(blocks_for(n, kTileRows), static_cast<unsigned>(used_splits));
  scan_kernel<<<grid, kThreads, 0, s>>>(x, codebook, k, tiles_per_split, w);
  resolve_kernel<<<blocks_for(n * kWarp, 256), 256, 0, s>>>(
      x, codebook, k, static_cast<int>(used_splits), w, indices, distance);
  check_launch("vq_nearest");
}

void lookup_cuda(const int64_t* indices, const float* codebook, int64_t k, int device, void* stream,
                 const Rows<float>& out) {
  const int64_t elements = out.count() * out.d;
  if (elements == 0) return;
  const DeviceGuard guard(device, "vq_lookup");
  const unsigned blocks = blocks_for(elements < (1 << 24) ? elements : 1 << 24, 256);
  lookup_kernel<<<blocks, 256, 0, static_cast<cudaStream_t>(stream)>>>(indices, codebook, k, out);
  check_launch("vq_lookup");
}

void accumulate_cuda(const Rows<const float>& x, const int64_t* order, const int64_t* begin,
                     int64_t k, int device, void* stream, float* counts, float* sums) {
  const DeviceGuard guard(device, "vq_accumulate");
  const unsigned blocks = static_cast<unsigned>(k < 65536 ? k : 65536);
  accumulate_kernel<<<blocks, 128, 0, static_cast<cudaStream_t>(stream)>>>(x, order, begin, k,
                                                                           counts, sums);
  check_launch("vq_accumulate");
}

void total_cuda(const float* distance, int64_t n, double scale, int device, void* stream,
                float* total) {
  const DeviceGuard guard(device, "vq_quantize");
  total_kernel<<<1, 1024, 0, static_cast<cudaStream_t>(stream)>>>(distance, n, scale, total);
  check_launch("vq_quantize");
}

}  // namespace t2p::vq

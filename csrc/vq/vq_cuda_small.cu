// SPDX-License-Identifier: Apache-2.0
// The CUDA road for at most 32 channels: float32 on any architecture, rows in registers. Scores and
// bounds are those of vq_cuda_plain.cu, with one difference. Of every kGroup codes only the least
// score is kept, one instruction for each code; a row's best group and second best score of a group
// cost 4 for all of them. The codes of a group that may hold the nearest are then compared in
// float64, all of them; what has to be proven is only that no other group can hold it.
//
// The floor is n k (d + 1) instructions of a thread, of which a multiprocessor does 128 a clock:
// for 65536 x 8192 x 8 on an H200, 0.14 ms at 33.5e12 a second; 262144 x 16384 x 32 would take 4.2
// ms. Machine code for sm_90 holds 10.0 instructions for a code of 8 channels, 36.9 of 32. A float
// of a code from shared memory serves the kRows rows of a thread. Shared memory hands every lane at
// most 4 bytes a clock, while 4 warps multiply: with fewer than 4 rows it would bind, with 8 it
// takes half of the time that the products take, with 6 two thirds. Not yet run on a GPU.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "common/cuda_check.cuh"
#include "vq/vq_cuda.cuh"

namespace t2p::vq {
namespace {

using std::int64_t;

constexpr int kThreads = 128;
constexpr int kGroup = 16;  // codes

// Rows of a thread, by the channels up to which they are filled with zeros: as many as registers
// hold.
__host__ __device__ constexpr int rows_of_thread(int width) { return width > 16 ? 6 : 8; }
// Codes in shared memory at a time: 16 KiB of them.
__host__ __device__ constexpr int codes_of_tile(int width) {
  return static_cast<int>(tile_or_emulated(4096 / width, 2 * kGroup));
}
constexpr int width_for(int64_t d) { return d <= 4 ? 4 : d <= 8 ? 8 : d <= 16 ? 16 : 32; }

// Of one row and split.
struct Groups {
  float best, second;  // least scores of a group
  int group;           // that of `best`
};

struct Small {
  int64_t padded_codes;
  float* codes;    // [padded_codes, width], centred, filled up with zeros
  Groups* groups;  // [n, splits]
};

// One warp per code: the codes as small_kernel reads them. What is no code, or not finite, scores
// infinity.
__global__ void prepare_kernel(Prepared codes, Small small, int width) {
  const int64_t d = codes.d;
  const int64_t j = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / kWarp;
  const int t = threadIdx.x % kWarp;
  if (j >= small.padded_codes) return;
  const float c = j < codes.k && t < d ? codes.scored()[j * d + t] : 0.0f;
  const float centred = j < codes.k && t < d ? c - codes.center[t] : 0.0f;
  const bool finite = __all_sync(kAllLanes, isfinite(c));
  const float half = 0.5f * warp_sum(centred * centred);
  const bool usable = j < codes.k && finite && isfinite(half);
  if (t < width) small.codes[j * width + t] = usable ? centred : 0.0f;
  if (t != 0) return;
  codes.half_norms[j] = usable ? (codes.metric == Metric::kL2 ? half : 0.0f) : infinity();
  // As in norms_kernel.
  if (j < codes.k && finite) {
    atomicMax(codes.largest_half_norm, __float_as_int(isfinite(half) ? half : infinity()));
  }
}

// A thread has kRows rows, kThreads apart, and sees every code of its block's split.
template <int kWidth, class T>
__global__ void __launch_bounds__(kThreads, 2)
    small_kernel(Rows<const T> x, Prepared codes, Small small, int64_t groups_per_split) {
  constexpr int kRows = rows_of_thread(kWidth), kTileCodes = codes_of_tile(kWidth);
  constexpr int kAtOnce = kWidth > 8 ? 2 : 4;  // codes
  __shared__ float4 tile[kTileCodes * kWidth / 4];
  __shared__ float half_norms[kTileCodes];
  const int64_t n = x.outer * x.inner;
  const int64_t first_row = blockIdx.x * int64_t{kThreads * kRows} + threadIdx.x;

  float row[kRows][kWidth];  // negated: scores are sums
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t r = first_row + i * kThreads;
    const T* from = row_pointer(x, r < n ? r : n - 1);
#pragma unroll
    for (int t = 0; t < kWidth; ++t) {
      row[i][t] = t < codes.d ? codes.row_center[t] - to_float(from[t * x.channel_stride]) : 0.0f;
    }
  }
  Groups groups[kRows];
#pragma unroll
  for (Groups& g : groups) g = {infinity(), infinity(), 0};

  const int64_t first = blockIdx.y * groups_per_split * kGroup;
  const int64_t last = min(small.padded_codes, first + groups_per_split * kGroup);
  for (int64_t code = first; code < last; code += kTileCodes) {
    const int count = static_cast<int>(min(int64_t{kTileCodes}, last - code));
    __syncthreads();
    const auto* from = reinterpret_cast<const float4*>(small.codes + code * kWidth);
    for (int e = threadIdx.x; e < count * kWidth / 4; e += kThreads) tile[e] = from[e];
    for (int e = threadIdx.x; e < count; e += kThreads) half_norms[e] = codes.half_norms[code + e];
    __syncthreads();
#pragma unroll 1
    for (int c = 0; c < count; c += kGroup) {
      float least[kRows];
#pragma unroll
      for (float& value : least) value = infinity();
#pragma unroll 1
      for (int q = c; q < c + kGroup; q += kAtOnce) {
        float score[kRows][kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) score[i][u] = half_norms[q + u];
        }
#pragma unroll
        for (int t = 0; t < kWidth; t += 4) {
#pragma unroll
          for (int u = 0; u < kAtOnce; ++u) {
            const float4 channels = tile[((q + u) * kWidth + t) / 4];
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              score[i][u] = fmaf(row[i][t], channels.x, score[i][u]);
              score[i][u] = fmaf(row[i][t + 1], channels.y, score[i][u]);
              score[i][u] = fmaf(row[i][t + 2], channels.z, score[i][u]);
              score[i][u] = fmaf(row[i][t + 3], channels.w, score[i][u]);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          for (int u = 0; u < kAtOnce; ++u) least[i] = fminf(least[i], score[i][u]);
        }
      }
      const int group = static_cast<int>((code + c) / kGroup);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool better = least[i] < groups[i].best;
        groups[i].second = fminf(groups[i].second, fmaxf(least[i], groups[i].best));
        groups[i].group = better ? group : groups[i].group;
        groups[i].best = better ? least[i] : groups[i].best;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t r = first_row + i * kThreads;
    if (r < n) small.groups[r * gridDim.y + blockIdx.y] = groups[i];
  }
}

// One warp per row: compares the codes of all groups that may hold the nearest. A split of which a
// second group may hold it leaves the row undecided.
template <class T>
__global__ void resolve_small_kernel(Rows<const T> x, Prepared codes, Small small, int splits,
                                     Results results) {
  const int64_t n = x.outer * x.inner, d = codes.d;
  const int64_t r = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (r >= n) return;
  const T* row = row_pointer(x, r);
  const float value = lane < d ? to_float(row[lane * x.channel_stride]) : 0.0f;
  if (!__all_sync(kAllLanes, isfinite(value))) {
    write_result(results, codes, r, row, x.channel_stride, 0, not_a_number());
    return;
  }
  const float centred = lane < d ? value - codes.row_center[lane] : 0.0f;
  const Groups* of_row = small.groups + r * splits;
  float best = infinity();
  for (int s = lane; s < splits; s += kWarp) best = fminf(best, of_row[s].best);
  for (int step = kWarp / 2; step > 0; step /= 2) {
    best = fminf(best, __shfl_xor_sync(kAllLanes, best, step));
  }
  const float radius = norm_bound(2 * __int_as_float(*codes.largest_half_norm), d);
  const float norm = norm_bound(warp_sum(centred * centred), d);
  const float limit = best + twice_error_bound(codes.metric, norm, radius, d);

  Nearest nearest{infinity(), codes.k};
  bool decided = limit < infinity();
  for (int base = 0; decided && base < splits; base += kWarp) {
    const Groups own =
        base + lane < splits ? of_row[base + lane] : Groups{infinity(), infinity(), 0};
    decided = !__any_sync(kAllLanes, own.second <= limit);
    unsigned left = __ballot_sync(kAllLanes, own.best <= limit);
    for (; decided && left; left &= left - 1) {
      // Half of the lanes take the even channels of the group's codes, half the odd ones.
      const int64_t first = int64_t{__shfl_sync(kAllLanes, own.group, __ffs(left) - 1)} * kGroup;
      const int64_t j = first + lane % kGroup;
      const float* code = codes.codebook + min(j, codes.k - 1) * d;
      double sum = 0, squares = 0;
      for (int t = 0; t < d; ++t) {
        const double a = __shfl_sync(kAllLanes, value, t), c = code[t];
        if (t % 2 != lane / kGroup) continue;
        const double difference = a - c;
        sum = codes.metric == Metric::kL2 ? fma(difference, difference, sum) : fma(a, c, sum);
        squares = fma(c, c, squares);
      }
      sum += __shfl_xor_sync(kAllLanes, sum, kGroup);
      squares += __shfl_xor_sync(kAllLanes, squares, kGroup);
      if (codes.metric != Metric::kL2) sum = -sum;
      if (codes.metric == Metric::kCosine) sum /= fmax(sqrt(squares), 1e-300);
      if (j < codes.k && isfinite(sum)) nearest.offer(sum, j);
    }
  }
  if (!decided) {
    if (lane == 0) leave_undecided(codes, r);
    return;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    nearest.offer(__shfl_xor_sync(kAllLanes, nearest.distance, step),
                  __shfl_xor_sync(kAllLanes, nearest.index, step));
  }
  const float result = warp_result(codes, row, x.channel_stride, nearest.distance);
  write_result(results, codes, r, row, x.channel_stride, nearest.index, result);
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Row blocks alone may not fill the device: then the codes are split as well, into parts of 4
// groups or more.
int64_t split_count(int64_t n, const Codes& codes) {
  constexpr int64_t kBlocksWanted = 528, kFewestGroups = 4;  // 4 blocks for 132 multiprocessors
  const int64_t rows = kThreads * rows_of_thread(width_for(codes.d));
  const int64_t most = round_up(codes.k, kGroup * kFewestGroups) / (kGroup * kFewestGroups);
  const int64_t splits = kBlocksWanted / (round_up(n, rows) / rows);
  return splits < 1 ? 1 : (splits < most ? splits : most);
}

struct Workspace {
  Prepared codes;
  Small small;
  int64_t floats;
};

Workspace carve(float* base, int64_t n, const Codes& codes) {
  Carver carver(base);
  Workspace w;
  w.small.padded_codes = round_up(codes.k, kGroup);
  w.codes = take_prepared(carver, codes, w.small.padded_codes, n, n);
  w.small.codes = carver.take<float>(w.small.padded_codes * width_for(codes.d), "codes");
  w.small.groups = carver.take<Groups>(split_count(n, codes) * n, "groups");
  w.floats = carver.size<float>();
  return w;
}

template <int kWidth>
void launch_small(const AnyRows& x, const Workspace& w, int64_t splits, int64_t groups_per_split,
                  cudaStream_t stream) {
  const dim3 grid(blocks_for(x.rows.count(), kThreads * rows_of_thread(kWidth)),
                  static_cast<unsigned>(splits));
  with_rows(x, [&](const auto& rows) {
    small_kernel<kWidth><<<grid, kThreads, 0, stream>>>(rows, w.codes, w.small, groups_per_split);
  });
}

}  // namespace

int64_t workspace_size_small(int64_t n, const Codes& codes) {
  return carve(nullptr, n, codes).floats;
}

Prepared nearest_small(const AnyRows& x, const Codes& codes, int, cudaStream_t stream,
                       float* workspace, const Results& results) {
  const int64_t n = x.rows.count();
  const Workspace w = carve(workspace, n, codes);
  const int64_t groups = w.small.padded_codes / kGroup, wanted = split_count(n, codes);
  const int64_t groups_per_split = (groups + wanted - 1) / wanted;
  const int64_t splits = (groups + groups_per_split - 1) / groups_per_split;

  launch_center(w.codes, stream);
  const int width = width_for(codes.d);
  prepare_kernel<<<blocks_for(w.small.padded_codes * kWarp, 256), 256, 0, stream>>>(w.codes,
                                                                                    w.small, width);
  const auto launch = width == 4    ? launch_small<4>
                      : width == 8  ? launch_small<8>
                      : width == 16 ? launch_small<16>
                                    : launch_small<32>;
  launch(x, w, splits, groups_per_split, stream);
  with_rows(x, [&](const auto& rows) {
    resolve_small_kernel<<<blocks_for(n * kWarp, 256), 256, 0, stream>>>(
        rows, w.codes, w.small, static_cast<int>(splits), results);
  });
  launch_search(x, w.codes, n, stream, results);
  return w.codes;
}

}  // namespace t2p::vq

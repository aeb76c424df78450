// SPDX-License-Identifier: Apache-2.0
// The plain CUDA road: float32 in registers, any architecture. The method is that of vq-inl.h:
//
//   for each row x:  score[j] = |c_j - m|^2 / 2 - (x - m).(c_j - m)      float32, m = about mean(c)
//                    limit    = min(score) + 2 E                         E bounds the rounding
//                    index    = argmin over {j : score[j] <= limit} of |x - c_j|^2 in float64
//
// The scan keeps the best and the second best score of every row, of all blocks that share its
// codes. Where the second is beyond the limit the best is proven; the other rows, few, are searched
// again.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "common/cuda_check.cuh"
#include "common/reduce.cuh"
#include "vq/vq_cuda.cuh"

namespace t2p::vq {
namespace {

using std::int64_t;

// The scan's tile: 64 rows by 128 codes by 16 channels, 4 x 8 scores in each of 256 threads.
constexpr int kTileRows = 64, kTileCodes = 128, kTileChannels = 16;
constexpr int kThreadsX = 16, kThreadsY = 16, kThreads = kThreadsX * kThreadsY;
constexpr int kRowsPerThread = kTileRows / kThreadsY, kCodesPerThread = kTileCodes / kThreadsX;

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

// The same of every row, joined by all blocks that have scored some of the codes. A block's best is
// either left in `best` or, once a better one is there, offered to `second`, by itself or by that
// one, and never both; its second best is offered as well. So `best` ends as the least of all, and
// `second` as the least of all others, in whatever order the blocks come.
struct Joined {
  unsigned long long* best;  // [n], the score by its order above the index: the lowest one on ties
  unsigned* second;          // [n], a score by its order

  __device__ static unsigned long long packed(float score, int index) {
    return static_cast<unsigned long long>(ordered(score)) << 32 | static_cast<unsigned>(index);
  }
  // Of a row of which no block has come.
  __device__ void clear(int64_t r) const {
    best[r] = packed(infinity(), 0);
    second[r] = ordered(infinity());
  }
  __device__ void offer(int64_t r, const Best& mine) const {
    const unsigned long long word = packed(mine.score, mine.index);
    const unsigned long long loser = max(word, atomicMin(&best[r], word));
    atomicMin(&second[r], min(ordered(mine.second), static_cast<unsigned>(loser >> 32)));
  }
  __device__ Best of(int64_t r) const {
    const unsigned long long word = best[r];
    return {from_ordered(static_cast<unsigned>(word >> 32)), from_ordered(second[r]),
            static_cast<int>(word)};
  }
};

// Row blocks alone may not fill the device: then the codes are split as well.
int64_t split_count(int64_t n, int64_t k) {
  constexpr int64_t kBlocksWanted = tile_or_emulated(512, 4);
  const int64_t blocks = (n + kTileRows - 1) / kTileRows;
  const int64_t tiles = (k + kTileCodes - 1) / kTileCodes;
  const int64_t splits = kBlocksWanted / (blocks > 0 ? blocks : 1);
  return splits < 1 ? 1 : (splits < tiles ? splits : tiles);
}

// One warp per code; and one thread per row, so that there is no launch only for these.
__global__ void norms_kernel(Prepared codes, Joined joined, int64_t n) {
  const int64_t d = codes.d;
  const int64_t thread = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, j = thread / kWarp;
  if (thread < n) joined.clear(thread);
  if (j >= codes.k) return;
  float squares = 0;
  bool finite = true;
  for (int64_t t = threadIdx.x % kWarp; t < d; t += kWarp) {
    const float c = codes.scored()[j * d + t];
    const float centred = c - codes.center[t];
    finite = finite && isfinite(c);
    squares = fmaf(centred, centred, squares);
  }
  finite = __all_sync(kAllLanes, finite);
  const float half = 0.5f * warp_sum(squares);
  if (threadIdx.x % kWarp != 0) return;
  // A code with a NaN or an infinity: an infinite score, and no part in the error bound. A finite
  // one whose norm overflows makes the bound infinite, so that float64 decides.
  const float bias = codes.metric == Metric::kL2 ? half : 0.0f;
  codes.half_norms[j] = finite && isfinite(half) ? bias : infinity();
  if (finite)
    atomicMax(codes.largest_half_norm, __float_as_int(isfinite(half) ? half : infinity()));
}

// Copies a [kCount, kTileChannels] part of centred vectors to shared memory, transposed.
// Consecutive threads read along whichever of the two directions is contiguous.
template <int kCount, class T>
__device__ void load_tile(float (*tile)[kCount + 4], const T* const* vectors, int64_t stride,
                          const float* center, int64_t first, int64_t d, bool channels_contiguous) {
  for (int e = threadIdx.x; e < kCount * kTileChannels; e += kThreads) {
    const int t = channels_contiguous ? e % kTileChannels : e / kCount;
    const int i = channels_contiguous ? e / kTileChannels : e % kCount;
    const int64_t channel = first + t;
    const T* vector = vectors[i];
    tile[t][i] =
        vector && channel < d ? to_float(vector[channel * stride]) - center[channel] : 0.0f;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    scan_kernel(Rows<const T> x, Prepared codes, int64_t tiles_per_split, Joined joined) {
  __shared__ float row_tile[kTileChannels][kTileRows + 4];
  __shared__ float code_tile[kTileChannels][kTileCodes + 4];
  __shared__ const T* row_pointers[kTileRows];
  __shared__ const float* code_pointers[kTileCodes];

  const int tx = threadIdx.x % kThreadsX, ty = threadIdx.x / kThreadsX;
  const int64_t n = x.outer * x.inner, d = codes.d, k = codes.k;
  const int64_t first_row = blockIdx.x * int64_t{kTileRows};
  for (int i = threadIdx.x; i < kTileRows; i += kThreads) {
    const int64_t r = first_row + i;
    row_pointers[i] = r < n ? row_pointer(x, r) : nullptr;
  }

  Best best[kRowsPerThread];
  for (Best& b : best) b = {infinity(), infinity(), 0};

  const int64_t first_code = blockIdx.y * tiles_per_split * kTileCodes;
  const int64_t last_code = min(k, first_code + tiles_per_split * kTileCodes);
  for (int64_t code = first_code; code < last_code; code += kTileCodes) {
    for (int i = threadIdx.x; i < kTileCodes; i += kThreads) {
      // A code of infinite norm never wins, and must not turn its neighbours' sums into NaN.
      const bool usable = code + i < k && codes.half_norms[code + i] < infinity();
      code_pointers[i] = usable ? codes.scored() + (code + i) * d : nullptr;
    }
    float products[kRowsPerThread][kCodesPerThread] = {};
    for (int64_t t = 0; t < d; t += kTileChannels) {
      __syncthreads();
      load_tile<kTileRows>(row_tile, row_pointers, x.channel_stride, codes.row_center, t, d,
                           x.channel_stride == 1);
      load_tile<kTileCodes>(code_tile, code_pointers, 1, codes.center, t, d, true);
      __syncthreads();
#pragma unroll
      for (int u = 0; u < kTileChannels; ++u) {
        float row[kRowsPerThread], column[kCodesPerThread];
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) row[i] = row_tile[u][ty + i * kThreadsY];
#pragma unroll
        for (int j = 0; j < kCodesPerThread; ++j) column[j] = code_tile[u][tx + j * kThreadsX];
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
          for (int j = 0; j < kCodesPerThread; ++j) {
            products[i][j] = fmaf(row[i], column[j], products[i][j]);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kCodesPerThread; ++j) {
      const int64_t index = code + tx + j * kThreadsX;
      const float half_norm = index < k ? codes.half_norms[index] : infinity();
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
    if (tx == 0 && r < n) joined.offer(r, best[i]);
  }
}

// One warp per row: notes the row if its best is not proven.
template <class T>
__global__ void resolve_kernel(Rows<const T> x, Prepared codes, Joined joined, Results results) {
  const int64_t n = x.outer * x.inner, d = codes.d;
  const int64_t r = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (r >= n) return;
  const T* row = row_pointer(x, r);

  float squares = 0;
  bool finite = true;
  for (int64_t t = lane; t < d; t += kWarp) {
    const float value = to_float(row[t * x.channel_stride]);
    const float centred = value - codes.row_center[t];
    finite = finite && isfinite(value);
    squares = fmaf(centred, centred, squares);
  }
  if (!__all_sync(kAllLanes, finite)) {
    write_result(results, codes, r, row, x.channel_stride, 0, not_a_number());
    return;
  }
  const Best best = joined.of(r);
  const float radius = norm_bound(2 * __int_as_float(*codes.largest_half_norm), d);
  const float limit =
      best.score + twice_error_bound(codes.metric, norm_bound(warp_sum(squares), d), radius, d);
  if (!(limit < infinity() && best.second > limit)) {
    if (lane == 0) leave_undecided(codes, r);
    return;
  }
  const double exact = warp_distance(codes, row, x.channel_stride, best.index);
  const float result = warp_result(codes, row, x.channel_stride, exact);
  write_result(results, codes, r, row, x.channel_stride, best.index, result);
}

struct Workspace {
  Prepared codes;
  Joined joined;
  int64_t floats;
};

Workspace carve(float* base, int64_t n, const Codes& codes) {
  Carver carver(base);
  Workspace w;
  w.codes = take_prepared(carver, codes, codes.k, n, n);
  w.joined = {carver.take<unsigned long long>(n, "best"), carver.take<unsigned>(n, "second")};
  w.floats = carver.size<float>();
  return w;
}

}  // namespace

int64_t workspace_size_plain(int64_t n, const Codes& codes) {
  return carve(nullptr, n, codes).floats;
}

Prepared nearest_plain(const AnyRows& x, const Codes& codes, int, cudaStream_t stream,
                       float* workspace, const Results& results) {
  const int64_t n = x.rows.count(), k = codes.k;
  const Workspace w = carve(workspace, n, codes);
  const int64_t tiles = (k + kTileCodes - 1) / kTileCodes, splits = split_count(n, k);
  const int64_t tiles_per_split = (tiles + splits - 1) / splits;
  const int64_t used_splits = (tiles + tiles_per_split - 1) / tiles_per_split;

  launch_center(w.codes, stream);
  const int64_t norms_threads = k * kWarp > n ? k * kWarp : n;
  norms_kernel<<<blocks_for(norms_threads, 256), 256, 0, stream>>>(w.codes, w.joined, n);
  const dim3 grid(blocks_for(n, kTileRows), static_cast<unsigned>(used_splits));
  with_rows(x, [&](const auto& rows) {
    scan_kernel<<<grid, kThreads, 0, stream>>>(rows, w.codes, tiles_per_split, w.joined);
    resolve_kernel<<<blocks_for(n * kWarp, 256), 256, 0, stream>>>(rows, w.codes, w.joined,
                                                                   results);
  });
  launch_search(x, w.codes, n, stream, results);
  return w.codes;
}

}  // namespace t2p::vq

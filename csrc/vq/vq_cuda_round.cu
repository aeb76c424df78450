// SPDX-License-Identifier: Apache-2.0
// Rows and codes for the tensor cores: centred, rounded to bfloat16, and what that took away.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "vq/vq_cuda.cuh"
#include "vq/vq_cuda_coarse.cuh"

namespace t2p::vq {
namespace {

using std::int64_t;

constexpr int kThreads = 256;
constexpr int kRoundedVectors = 32, kRoundedChannels = 32;  // of a block of kThreads, at a time

// Of a vector, in each of the 8 threads that share it.
struct Rounded {
  float squares, near_squares, off_squares;  // |y|^2, |y'|^2, |y - y'|^2
  bool finite;
};

// Centres and rounds vectors [32 b, 32 b + 32) in block b; those from `count` on are zeros.
// Consecutive threads read along whichever of the two directions is contiguous.
template <class T>
__device__ Rounded round_vectors(Rows<const T> from, int64_t first, int64_t count,
                                 const float* __restrict__ center, const Packing& packing,
                                 __nv_bfloat16* __restrict__ to) {
  __shared__ float tile[kRoundedVectors][kRoundedChannels + 1];
  __shared__ const T* pointers[kRoundedVectors];  // null past the last vector
  const int64_t begin = blockIdx.x * int64_t{kRoundedVectors};
  const bool channels_contiguous = from.channel_stride == 1;
  const int own = threadIdx.x / 8, own_channel = threadIdx.x % 8 * 4;
  const int64_t vector = begin + threadIdx.x % kRoundedVectors;
  const T* pointer = row_pointer(from, first + vector);
  if (threadIdx.x < kRoundedVectors) pointers[threadIdx.x] = vector < count ? pointer : nullptr;
  Rounded rounded{0, 0, 0, true};
  for (int64_t c = 0; c < packing.chunks * packing.chunk; c += kRoundedChannels) {
    __syncthreads();
    for (int e = threadIdx.x; e < kRoundedVectors * kRoundedChannels; e += kThreads) {
      const int i = channels_contiguous ? e / kRoundedChannels : e % kRoundedVectors;
      const int t = channels_contiguous ? e % kRoundedChannels : e / kRoundedVectors;
      const int64_t channel = c + t;
      tile[i][t] = pointers[i] && channel < from.d
                       ? to_float(pointers[i][channel * from.channel_stride])
                       : 0.0f;
    }
    __syncthreads();
    __nv_bfloat162 pairs[2];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int64_t channel = c + own_channel + u;
      const float value = tile[own][own_channel + u];
      const bool there = pointers[own] && channel < from.d;
      const float centred = there ? value - center[channel] : 0.0f;
      const __nv_bfloat16 half = __float2bfloat16_rn(isfinite(centred) ? centred : 0.0f);
      const float near = __bfloat162float(half), off = centred - near;
      rounded.finite = rounded.finite && isfinite(value);
      rounded.squares = fmaf(centred, centred, rounded.squares);
      rounded.near_squares = fmaf(near, near, rounded.near_squares);
      rounded.off_squares = fmaf(off, off, rounded.off_squares);
      (u % 2 ? pairs[u / 2].y : pairs[u / 2].x) = half;
    }
    auto* at = reinterpret_cast<__nv_bfloat162*>(to + packing.at(begin + own, c + own_channel));
    at[0] = pairs[0];
    at[1] = pairs[1];
  }
  for (int step = 4; step > 0; step /= 2) {
    rounded.squares += __shfl_xor_sync(kAllLanes, rounded.squares, step);
    rounded.near_squares += __shfl_xor_sync(kAllLanes, rounded.near_squares, step);
    rounded.off_squares += __shfl_xor_sync(kAllLanes, rounded.off_squares, step);
    rounded.finite = __shfl_xor_sync(kAllLanes, rounded.finite, step) && rounded.finite;
  }
  return rounded;
}

__global__ void __launch_bounds__(kThreads) round_codes_kernel(Prepared codes, Coarse coarse) {
  const Rows<const float> from{codes.scored(), codes.k, codes.d, 1, codes.d, 1, 1};
  const Rounded rounded =
      round_vectors(from, 0, codes.k, codes.center, coarse.code_packing, coarse.codes);
  const int64_t j = blockIdx.x * int64_t{kRoundedVectors} + threadIdx.x / 8;
  if (threadIdx.x % 8 != 0) return;
  const float half = 0.5f * rounded.squares, near_half = 0.5f * rounded.near_squares;
  const bool usable = j < codes.k && rounded.finite && isfinite(half) && isfinite(near_half);
  const bool l2 = codes.metric == Metric::kL2;
  coarse.bias[j] = !usable ? -infinity() : l2 ? -near_half : 0.0f;
  if (j >= codes.k) return;
  codes.half_norms[j] = !usable ? infinity() : l2 ? half : 0.0f;
  if (!rounded.finite) return;
  // A finite code whose norm overflows makes the bounds infinite, so that float64 decides.
  atomicMax(codes.largest_half_norm, __float_as_int(usable ? half : infinity()));
  atomicMax(codes.largest_rounding, __float_as_int(usable ? rounded.off_squares : infinity()));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    round_rows_kernel(Rows<const T> x, int64_t first, int64_t count, Prepared codes,
                      Coarse coarse) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *codes.undecided_count = 0;
  const Rounded rounded =
      round_vectors(x, first, count, codes.row_center, coarse.row_packing, coarse.rows);
  const int64_t i = blockIdx.x * int64_t{kRoundedVectors} + threadIdx.x / 8;
  if (threadIdx.x % 8 != 0) return;
  RowBounds bounds = bound_row(codes.metric, rounded.squares, rounded.near_squares,
                               rounded.off_squares, __int_as_float(*codes.largest_half_norm),
                               __int_as_float(*codes.largest_rounding), codes.d);
  if (i >= count) bounds.margin = -1;
  if (!rounded.finite) bounds.margin = not_a_number();
  coarse.bounds[i] = bounds;
}

}  // namespace

void launch_round_codes(const Prepared& codes, const Coarse& coarse, cudaStream_t stream) {
  const unsigned blocks = blocks_for(coarse.padded_codes, kRoundedVectors);
  round_codes_kernel<<<blocks, kThreads, 0, stream>>>(codes, coarse);
}

void launch_round_rows(const AnyRows& x, int64_t first, int64_t count, const Prepared& codes,
                       const Coarse& coarse, cudaStream_t stream) {
  const unsigned blocks = blocks_for(coarse.padded_rows, kRoundedVectors);
  with_rows(x, [&](const auto& rows) {
    round_rows_kernel<<<blocks, kThreads, 0, stream>>>(rows, first, count, codes, coarse);
  });
}

}  // namespace t2p::vq

// SPDX-License-Identifier: Apache-2.0
// The forward pass on a GPU. A group that fits into the registers of a block is read once, in one
// launch. Else blocks take moments of slices, and a second launch adds them up, in the order of the
// slices, before it normalises: two reads and one write, and no block waits for another.
//
//   reference:  y = silu((x - mean) / sqrt(var + eps) gain + bias) + residual
#include <cuda_runtime.h>

#include "group_norm/group_norm_cuda.cuh"

namespace t2p::group_norm {
namespace {

constexpr int kMostThreads = 512;
constexpr int kHeld = 10;               // vectors that a thread holds of a group that fits
constexpr int64_t kSliceLeast = 8192;   // elements of a slice of a group, at least
constexpr int64_t kPieceLeast = 32768;  // elements of a channel that a block normalises, at most
constexpr int64_t kRowsLeast = 256;     // rows of a slice with channels last, at least

// What the first launch leaves for the second.
struct Workspace {
  double* origins;  // [b, g]
  Pair* partial;    // [parts], sums over a part of x - origin and of its square
  int64_t doubles;
};

Workspace carve(double* base, int64_t groups, int64_t parts) {
  Carver carver(base);
  Workspace w;
  w.origins = carver.take<double>(groups, "origins");
  w.partial = carver.take<Pair>(parts, "partial");
  w.doubles = carver.size<double>();
  return w;
}

template <class T>
__device__ T result(float x, const Affine& a, bool silu, float residual) {
  float z = fmaf(x - a.centre, a.factor, a.offset);
  if (silu) z *= sigmoid(z);
  return from_float<T>(z + residual);
}

// y[at, at + kWidth), of one channel; x[at, at + kWidth) in `x`.
template <class T, int kWidth>
__device__ void normalise(const Norm& norm, const Affine& a, int64_t at, const Vector<T, kWidth>& x,
                          void* y) {
  Vector<T, kWidth> residual{}, z;
  if (norm.residual != nullptr) residual = read<T, kWidth>(norm.residual, at);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    z.v[j] = result<T>(to_float(x.v[j]), a, norm.silu,
                       norm.residual != nullptr ? to_float(residual.v[j]) : 0.0f);
  }
  write<T, kWidth>(y, at, z);
}

template <class T>
__device__ float element(const Norm& norm, int64_t at) {
  return to_float(static_cast<const T*>(norm.x)[at]);
}

// One block per group, which stays in registers between the sums and the result.
template <class T, int kWidth>
__global__ void __launch_bounds__(kMostThreads, 1)
    whole_kernel(const Norm norm, void* y, double* statistics) {
  __shared__ Pair shared[kWarp];
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int channels = static_cast<int>(norm.c / norm.groups);
  const int per_channel = static_cast<int>(norm.n) / kWidth, vectors = channels * per_channel;
  const int64_t group = blockIdx.x, base = group * channels * norm.n;
  const double origin = element<T>(norm, base);
  Vector<T, kWidth> tile[kHeld];
  int held = 0;
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    const int i = thread + u * threads;
    if (i < vectors) {
      tile[u] = read<T, kWidth>(norm.x, base + static_cast<int64_t>(i) * kWidth);
      held = u + 1;
    }
  }
  Pair moments{0, 0};
  accumulate<kHeld, kWidth>(
      held, [&](int u, int j) { return to_float(tile[u].v[j]); }, origin, moments);
  // The sum is also the barrier between the reads of x and the writes of y, which may be x.
  moments = block_sum(moments, shared);
  const Group own = finish(norm, moments, origin, thread == 0 ? statistics + 2 * group : nullptr);
  const int64_t b = group / norm.groups, first = group % norm.groups * channels;
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    const int i = thread + u * threads;
    if (i < vectors) {
      const Affine a = affine_of(own, gain_of(norm, b, first + i / per_channel));
      normalise<T, kWidth>(norm, a, base + static_cast<int64_t>(i) * kWidth, tile[u], y);
    }
  }
}

// Moments of one of `slices` slices of a group.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    slices_kernel(const Norm norm, int64_t slices, Workspace workspace) {
  constexpr int kTile = kWidth == 1 ? 8 : 4;
  __shared__ Pair shared[kWarps];
  const int64_t group = blockIdx.x / slices, slice = blockIdx.x % slices;
  const int64_t count = norm.c / norm.groups * norm.n, vectors = count / kWidth;
  const int64_t begin = vectors * slice / slices, end = vectors * (slice + 1) / slices;
  const double origin = element<T>(norm, group * count);
  Pair moments{0, 0};
  for (int64_t first = begin + threadIdx.x; first < end; first += kTile * kThreads) {
    Vector<T, kWidth> tile[kTile];
    int held = 0;
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      const int64_t i = first + u * kThreads;
      if (i < end) {
        tile[u] = read<T, kWidth>(norm.x, group * count + i * kWidth);
        held = u + 1;
      }
    }
    accumulate<kTile, kWidth>(
        held, [&](int u, int j) { return to_float(tile[u].v[j]); }, origin, moments);
  }
  moments = block_sum(moments, shared);
  if (threadIdx.x == 0) {
    workspace.partial[blockIdx.x] = moments;
    if (slice == 0) workspace.origins[group] = origin;
  }
}

// Normalises one of `pieces` pieces of a channel.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    apply_kernel(const Norm norm, int64_t slices, int64_t pieces, Workspace workspace, void* y,
                 double* statistics) {
  __shared__ Pair shared[kWarps];
  const int64_t channel = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  const int64_t b = channel / norm.c, c = channel % norm.c, channels = norm.c / norm.groups;
  const int64_t group = b * norm.groups + c / channels;
  Pair moments{0, 0};
  for (int64_t i = threadIdx.x; i < slices; i += blockDim.x) {
    const Pair part = workspace.partial[group * slices + i];
    moments.first += part.first;
    moments.second += part.second;
  }
  moments = block_sum(moments, shared);
  const bool speaks = piece == 0 && c % channels == 0 && threadIdx.x == 0;
  const Group own =
      finish(norm, moments, workspace.origins[group], speaks ? statistics + 2 * group : nullptr);
  const Affine a = affine_of(own, gain_of(norm, b, c));
  const int64_t vectors = norm.n / kWidth, end = vectors * (piece + 1) / pieces;
  for (int64_t i = vectors * piece / pieces + threadIdx.x; i < end; i += blockDim.x) {
    const int64_t at = channel * norm.n + i * kWidth;
    normalise<T, kWidth>(norm, a, at, read<T, kWidth>(norm.x, at), y);
  }
}

// Channels last -----------------------------------------------------------------------------------

// Strips and groups both cut the channels; the pieces between all cuts, in order, are numbered by
// strip + group.
struct Pieces {
  int64_t strips, groups, slices;
  __device__ int64_t at(int64_t b, int64_t strip, int64_t group, int64_t slice) const {
    return (b * (strips + groups) + strip + group) * slices + slice;
  }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    strips_kernel(const Norm norm, const Pieces pieces, Workspace workspace) {
  constexpr int kTile = kWidth == 8 ? 4 : 8;
  __shared__ Pair shared[kWarps][kStripChannels<kWidth>];
  const Strip<kWidth> own(norm, pieces.strips, pieces.slices);
  const int64_t sample = own.b * norm.n * norm.c;
  Pair moments[kWidth] = {};
  if (own.c < own.last) {
    float origin[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      origin[j] = element<T>(norm, sample + (own.c + j) / own.channels * own.channels);
    }
    for (int64_t row = own.begin + own.row; row < own.end; row += kTile * kStripRows<kWidth>) {
      Vector<T, kWidth> tile[kTile];
      int held = 0;
#pragma unroll
      for (int u = 0; u < kTile; ++u) {
        const int64_t i = row + u * kStripRows<kWidth>;
        if (i < own.end) {
          tile[u] = read<T, kWidth>(norm.x, sample + i * norm.c + own.c);
          held = u + 1;
        }
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        accumulate<kTile, 1>(
            held, [&](int u, int) { return to_float(tile[u].v[j]); }, origin[j], moments[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const Pair sum = warp_sum<kStrip<kWidth>>(moments[j]);
    if (threadIdx.x % kWarp < kStrip<kWidth>) {
      shared[threadIdx.x / kWarp][threadIdx.x % kWarp * kWidth + j] = sum;
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x / kWarp; i < own.groups(); i += kWarps) {
    const int64_t group = own.first_group() + i, low = group * own.channels;
    const int64_t begin = low > own.first ? low : own.first;
    const int64_t end = low + own.channels < own.last ? low + own.channels : own.last;
    Pair sum{0, 0};
    for (int64_t c = begin + threadIdx.x % kWarp; c < end; c += kWarp) {
      for (int warp = 0; warp < kWarps; ++warp) {
        sum.first += shared[warp][c - own.first].first;
        sum.second += shared[warp][c - own.first].second;
      }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) {
      workspace.partial[pieces.at(own.b, own.strip, group, own.slice)] = sum;
      if (own.slice == 0 && begin == low) {
        workspace.origins[own.b * norm.groups + group] = element<T>(norm, sample + low);
      }
    }
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    apply_strips_kernel(const Norm norm, const Pieces pieces, Workspace workspace, void* y,
                        double* statistics) {
  __shared__ Group shared[kStripChannels<kWidth>];
  const Strip<kWidth> own(norm, pieces.strips, pieces.slices);
  for (int64_t i = threadIdx.x / kWarp; i < own.groups(); i += kWarps) {
    const int64_t group = own.first_group() + i, low = group * own.channels;
    const int64_t from = low / kStripChannels<kWidth>;
    const int64_t to = (low + own.channels - 1) / kStripChannels<kWidth>;
    const Pair* parts = workspace.partial + pieces.at(own.b, from, group, 0);
    Pair sum{0, 0};
    for (int64_t k = threadIdx.x % kWarp; k < (to - from + 1) * pieces.slices; k += kWarp) {
      sum.first += parts[k].first;
      sum.second += parts[k].second;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) {
      const int64_t at = own.b * norm.groups + group;
      const bool speaks = own.slice == 0 && own.strip == from;
      shared[i] = finish(norm, sum, workspace.origins[at], speaks ? statistics + 2 * at : nullptr);
    }
  }
  __syncthreads();
  if (own.c >= own.last) return;
  Affine a[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const int64_t c = own.c + j;
    a[j] = affine_of(shared[c / own.channels - own.first_group()], gain_of(norm, own.b, c));
  }
  for (int64_t row = own.begin + own.row; row < own.end; row += kStripRows<kWidth>) {
    const int64_t at = (own.b * norm.n + row) * norm.c + own.c;
    const Vector<T, kWidth> x = read<T, kWidth>(norm.x, at);
    Vector<T, kWidth> residual{}, z;
    if (norm.residual != nullptr) residual = read<T, kWidth>(norm.residual, at);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      z.v[j] = result<T>(to_float(x.v[j]), a[j], norm.silu,
                         norm.residual != nullptr ? to_float(residual.v[j]) : 0.0f);
    }
    write<T, kWidth>(y, at, z);
  }
}

// Launches ----------------------------------------------------------------------------------------

int64_t slices_of(const Norm& norm) {
  return parts_of(norm.c / norm.groups * norm.n, kSliceLeast, norm.b * norm.groups);
}

Pieces pieces_of(const Norm& norm, int width) {
  const int64_t strips = blocks_for(norm.c, width == 8 ? kStripChannels<8> : kStripChannels<1>);
  return {strips, norm.groups, parts_of(norm.n, kRowsLeast, norm.b * strips)};
}

int64_t partial_sums(const Norm& norm, int width) {
  if (!norm.channels_last) return norm.b * norm.groups * slices_of(norm);
  const Pieces pieces = pieces_of(norm, width);
  return norm.b * (pieces.strips + pieces.groups) * pieces.slices;
}

template <class T, int kWidth>
void launch(const Norm& norm, cudaStream_t stream, double* memory, void* y, double* statistics) {
  const int64_t groups = norm.b * norm.groups, vectors = norm.c / norm.groups * norm.n / kWidth;
  const Workspace workspace = carve(memory, groups, partial_sums(norm, kWidth));
  if (norm.channels_last) {
    const Pieces pieces = pieces_of(norm, kWidth);
    const unsigned blocks = grid_size(norm.b * pieces.strips * pieces.slices, kOp);
    strips_kernel<T, kWidth><<<blocks, kThreads, 0, stream>>>(norm, pieces, workspace);
    check_launch(kOp);
    apply_strips_kernel<T, kWidth>
        <<<blocks, kThreads, 0, stream>>>(norm, pieces, workspace, y, statistics);
  } else if (vectors <= kMostThreads * kHeld) {
    const int64_t warps = blocks_for(vectors, kWarp);
    const auto threads =
        static_cast<unsigned>(warps * kWarp < kMostThreads ? warps * kWarp : kMostThreads);
    whole_kernel<T, kWidth><<<grid_size(groups, kOp), threads, 0, stream>>>(norm, y, statistics);
  } else {
    const int64_t slices = slices_of(norm), pieces = blocks_for(norm.n, kPieceLeast);
    const int64_t warps = blocks_for(norm.n / kWidth, kWarp);
    const auto threads = static_cast<unsigned>(warps < kWarps ? warps * kWarp : kThreads);
    slices_kernel<T, kWidth>
        <<<grid_size(groups * slices, kOp), kThreads, 0, stream>>>(norm, slices, workspace);
    check_launch(kOp);
    apply_kernel<T, kWidth><<<grid_size(norm.b * norm.c * pieces, kOp), threads, 0, stream>>>(
        norm, slices, pieces, workspace, y, statistics);
  }
  check_launch(kOp);
}

template <class T>
void launch_widest(const Norm& norm, cudaStream_t stream, double* workspace, void* y,
                   double* statistics) {
  constexpr int kWidth = 16 / sizeof(T);
  width_of(norm, y, nullptr) == 1 ? launch<T, 1>(norm, stream, workspace, y, statistics)
                                  : launch<T, kWidth>(norm, stream, workspace, y, statistics);
}

}  // namespace

std::int64_t forward_workspace(const Norm& norm) {
  const int64_t groups = norm.b * norm.groups;
  if (groups == 0 || norm.n == 0) return 0;
  // Which width depends on how the tensors are aligned.
  const int64_t narrow = partial_sums(norm, 1), wide = partial_sums(norm, 8);
  return carve(nullptr, groups, narrow > wide ? narrow : wide).doubles;
}

void forward_cuda(const Norm& norm, int device, void* stream, double* workspace, void* y,
                  double* statistics) {
  const DeviceGuard guard(device, kOp);
  const auto s = static_cast<cudaStream_t>(stream);
  if (norm.b == 0) return;
  if (norm.n == 0) {  // all bits set are a NaN
    cuda_check(cudaMemsetAsync(statistics, 0xff, 2 * norm.b * norm.groups * sizeof(double), s),
               kOp);
    return;
  }
  switch (norm.dtype) {
    case Dtype::kFloat32:
      launch_widest<float>(norm, s, workspace, y, statistics);
      break;
    case Dtype::kBfloat16:
      launch_widest<__nv_bfloat16>(norm, s, workspace, y, statistics);
      break;
    case Dtype::kFloat16:
      launch_widest<__half>(norm, s, workspace, y, statistics);
      break;
  }
}

}  // namespace t2p::group_norm

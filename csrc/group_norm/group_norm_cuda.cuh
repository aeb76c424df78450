// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward kernels share: elements as vectors of 16 bytes, sums in a fixed
// order, and the coefficients of a channel.
#pragma once

#include <cstdint>

#include "common/carver.h"
#include "common/cuda_check.cuh"
#include "common/half.cuh"
#include "group_norm/group_norm.h"

namespace t2p::group_norm {
namespace {

using std::int64_t;

constexpr const char* kOp = "group_norm_silu";
constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// With channels last a block takes a strip of neighbouring channels: kStrip vectors of 16 bytes, or
// a warp of single elements, by as many rows at a time as it has threads.
template <int kWidth>
constexpr int kStrip = kWidth == 1 ? kWarp : 8;
template <int kWidth>
constexpr int kStripChannels = kStrip<kWidth> * kWidth;
template <int kWidth>
constexpr int kStripRows = kThreads / kStrip<kWidth>;

// Neighbouring elements, moved in one instruction.
template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
  T v[kWidth];
};

template <class T, int kWidth>
__device__ Vector<T, kWidth> read(const void* data, int64_t at) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(static_cast<const T*>(data) + at);
}

template <class T, int kWidth>
__device__ void write(void* data, int64_t at, const Vector<T, kWidth>& vector) {
  *reinterpret_cast<Vector<T, kWidth>*>(static_cast<T*>(data) + at) = vector;
}

// Two sums that are always taken together.
struct Pair {
  double first, second;
};

template <int kFrom = 1>
__device__ Pair warp_sum(Pair a) {
#pragma unroll
  for (int step = kFrom; step < kWarp; step *= 2) {
    a.first += __shfl_xor_sync(kAllLanes, a.first, step);
    a.second += __shfl_xor_sync(kAllLanes, a.second, step);
  }
  return a;
}

// The sums over a block of whole warps, at most 32, for every thread.
__device__ Pair block_sum(Pair a, Pair* shared) {
  a = warp_sum(a);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = a;
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarp;
  return warp_sum(lane < blockDim.x / kWarp ? shared[lane] : Pair{0, 0});
}

// Mean and 1 / sqrt(var + eps) of a group. The mean is a float and a rest: x - centre is exact
// where x is near it.
struct Group {
  float centre, rest, inverse;
};

__device__ Group group_of(double mean, double inverse) {
  const auto centre = static_cast<float>(mean);
  return {centre, static_cast<float>(mean - centre), static_cast<float>(inverse)};
}

__device__ Group group_of(const double* statistics, int64_t group) {
  return group_of(statistics[2 * group], statistics[2 * group + 1]);
}

// What a channel is multiplied by and what is added, after it is normalised.
struct Gain {
  float factor, bias;
};
__device__ Gain gain_of(const Norm& norm, int64_t b, int64_t c) {
  const float weight = norm.weight ? norm.weight[c] : 1.0f, bias = norm.bias ? norm.bias[c] : 0.0f;
  const float scale = norm.scale ? 1.0f + norm.scale[b * norm.c + c] : 1.0f;
  const float shift = norm.shift ? norm.shift[b * norm.c + c] : 0.0f;
  return {weight * scale, fmaf(bias, scale, shift)};
}

// z = (x - centre) factor + offset.
struct Affine {
  float centre, factor, offset;
};
__device__ Affine affine_of(const Group& group, const Gain& gain) {
  const float factor = gain.factor * group.inverse;
  return {group.centre, factor, fmaf(-group.rest, factor, gain.bias)};
}

// 1 / (1 + e^-z). The rounding of z log2(e) changes the result by at most |z| / 4 units.
__device__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + exp2f(-1.44269504f * z)); }

// Adds the elements at(u, j), u < held, to the moments about `origin`. They are taken about their
// own mean in float32, where x - mean is exact if the mean is far from zero, and moved in float64.
template <int kVectors, int kWidth, class At>
__device__ void accumulate(int held, const At& at, double origin, Pair& moments) {
  if (held == 0) return;
  const float first = at(0, 0), count = static_cast<float>(held * kWidth);
  float sum = 0;
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    if (u >= held) break;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum += at(u, j) - first;
  }
  const float centre = first + sum / count;
  float rest = 0, square = 0;
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    if (u >= held) break;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float d = at(u, j) - centre;
      rest += d;
      square = fmaf(d, d, square);
    }
  }
  const double way = centre - origin, n = count;
  moments.first += fma(n, way, static_cast<double>(rest));
  moments.second += fma(way, fma(n, way, 2.0 * rest), static_cast<double>(square));
}

// From the moments of a whole group about `origin`; squares beyond float32 make it NaN.
__device__ Group finish(const Norm& norm, Pair moments, double origin, double* statistics) {
  const double total = static_cast<double>(norm.c / norm.groups * norm.n);
  const double way = moments.first / total;
  double variance = fma(-way, way, moments.second / total);
  if (variance < 0) variance = 0;
  const double mean = origin + way;
  const double inverse = 1 / sqrt(variance + norm.eps) + (variance - variance);
  if (statistics != nullptr) {
    statistics[0] = mean;
    statistics[1] = inverse;
  }
  return group_of(mean, inverse);
}

// A block's strip of channels and slice of rows.
template <int kWidth>
struct Strip {
  int64_t b, strip, slice, begin, end;  // rows [begin, end)
  int64_t first, last;                  // channels [first, last)
  int64_t channels;                     // of a group
  int64_t c;                            // the thread's first channel
  int row;                              // the thread's row among kStripRows

  __device__ Strip(const Norm& norm, int64_t strips, int64_t slices) {
    slice = blockIdx.x % slices;
    strip = blockIdx.x / slices % strips;
    b = blockIdx.x / slices / strips;
    begin = norm.n * slice / slices;
    end = norm.n * (slice + 1) / slices;
    first = strip * kStripChannels<kWidth>;
    last = first + kStripChannels<kWidth> < norm.c ? first + kStripChannels<kWidth> : norm.c;
    channels = norm.c / norm.groups;
    c = first + threadIdx.x % kStrip<kWidth> * kWidth;
    row = threadIdx.x / kStrip<kWidth>;
  }
  __device__ int64_t first_group() const { return first / channels; }
  __device__ int64_t groups() const { return (last - 1) / channels - first / channels + 1; }
};

inline int64_t blocks_for(int64_t count, int64_t each) { return (count + each - 1) / each; }

// Into how many parts `rows` is cut, so that all blocks together are enough for any GPU, but none
// has less than `least` rows. Depends on sizes alone, and so do the results.
inline int64_t parts_of(int64_t rows, int64_t least, int64_t others) {
  constexpr int64_t kEnough = 1024, kMost = 256;
  int64_t parts = blocks_for(kEnough, others);
  if (parts > kMost) parts = kMost;
  if (parts > blocks_for(rows, least)) parts = blocks_for(rows, least);
  return parts < 1 ? 1 : parts;
}

inline bool aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

// Elements of a vector of 16 bytes, or 1 where rows of them would not begin on 16 bytes.
inline int width_of(const Norm& norm, const void* a, const void* b) {
  const int width = norm.dtype == Dtype::kFloat32 ? 4 : 8;
  const int64_t run = norm.channels_last ? norm.c : norm.n;
  const bool fits =
      run % width == 0 && aligned(norm.x) && aligned(norm.residual) && aligned(a) && aligned(b);
  return fits ? width : 1;
}

}  // namespace
}  // namespace t2p::group_norm

// SPDX-License-Identifier: Apache-2.0
// What the CUDA roads share: bounds, exact distances, the workspace, and the search of the rows
// that a road could not decide. Each road scans all codes in less than float64 and proves most
// indices.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "common/carver.h"
#include "common/cuda_check.cuh"
#include "common/half.cuh"
#include "vq/vq.h"

namespace t2p::vq {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// A codebook as it came.
struct Codes {
  const float* codebook;  // [k, d]
  std::int64_t k, d;
  Metric metric;
};

// A codebook and what is prepared of it, in the workspace. As on the CPU, rows and codes are scored
// by |c|^2 / 2 - x.c, or without the norms by -x.c. That orders codes as their distances do, for
// kCosine with codes of length 1. Subtracting a vector m from all codes changes no order, if for
// kL2 it is subtracted from the rows as well.
struct Prepared {
  Metric metric;
  const float* codebook;  // [k, d], as it came
  std::int64_t k, d;
  float* directions;  // [k, d] for kCosine: of length 1, in float64 and then rounded; else null
  float* center;      // [d], m: about the mean of the codes as they are scored
  float* row_center;  // [d], m for kL2, else 0
  float* half_norms;  // [k], |c - m|^2 / 2 for kL2, else 0; infinite for a code that is not finite
  // Two floats >= 0 by their bits, which order as integers do.
  int* largest_half_norm;   // [1], of all |c - m|^2 / 2; infinite if a finite code's is
  int* largest_rounding;    // [1], of all |(c - m) - its bfloat16|^2
  int* undecided_count;     // [1]
  std::int64_t* undecided;  // rows, in any order
  double* losses;           // [loss_parts(n)], of quantisations: sums of distances
  int* finished_losses;     // [1], how many of them are there

  __host__ __device__ const float* scored() const { return directions ? directions : codebook; }
};

// Rows of a part of the loss's sum, whatever the device: its order is always the same.
constexpr std::int64_t kLossRows = tile_or_emulated(2048, 512);
constexpr std::int64_t loss_parts(std::int64_t n) { return (n + kLossRows - 1) / kLossRows; }

// For a search of n rows, of which at most `rows` are undecided at a time, and half norms for so
// many codes.
inline Prepared take_prepared(Carver& carver, const Codes& codes, std::int64_t padded_codes,
                              std::int64_t rows, std::int64_t n) {
  const std::int64_t d = codes.d;
  return {codes.metric,
          codes.codebook,
          codes.k,
          d,
          codes.metric == Metric::kCosine ? carver.take<float>(codes.k * d, "directions") : nullptr,
          carver.take<float>(d, "center"),
          carver.take<float>(d, "row_center"),
          carver.take<float>(padded_codes, "half_norms"),
          carver.take<int>(1, "largest_half_norm"),
          carver.take<int>(1, "largest_rounding"),
          carver.take<int>(1, "undecided_count"),
          carver.take<std::int64_t>(rows, "undecided"),
          carver.take<double>(loss_parts(n), "losses"),
          carver.take<int>(1, "finished_losses")};
}

// What a search leaves of every row.
struct Results {
  std::int64_t* indices;  // [n]
  float* distance;        // [n]; of a quantisation |x - c|^2, whatever the metric
  Rows<void> quantized;   // the codes, in the dtype of x; without data unless it quantises
};

// Writes the directions, both centres, and zeros to the maxima and to both counts.
void launch_center(const Prepared& codes, cudaStream_t stream);

// The nearest codes of at most `most` undecided rows by float64 distance, whatever the data.
void launch_search(const AnyRows& x, const Prepared& codes, std::int64_t most, cudaStream_t stream,
                   const Results& results);

// total = scale * the sum of all distances, in float64 in a fixed order.
void launch_total(const Prepared& codes, const float* distance, std::int64_t n, double scale,
                  cudaStream_t stream, float* total);

// The roads, each with the floats of workspace that it wants. They return what they prepared.
std::int64_t workspace_size_plain(std::int64_t n, const Codes& codes);
Prepared nearest_plain(const AnyRows& x, const Codes& codes, int device, cudaStream_t stream,
                       float* workspace, const Results& results);

std::int64_t workspace_size_small(std::int64_t n, const Codes& codes);
Prepared nearest_small(const AnyRows& x, const Codes& codes, int device, cudaStream_t stream,
                       float* workspace, const Results& results);

std::int64_t workspace_size_mma(std::int64_t n, const Codes& codes);
Prepared nearest_mma(const AnyRows& x, const Codes& codes, int device, cudaStream_t stream,
                     float* workspace, const Results& results);

// The road through Hopper's tensor cores, vq_cuda_hopper.cu; whether it was built.
bool hopper_is_built();
std::int64_t workspace_size_hopper(std::int64_t n, const Codes& codes);
Prepared nearest_hopper(const AnyRows& x, const Codes& codes, int device, cudaStream_t stream,
                        float* workspace, const Results& results);

inline unsigned blocks_for(std::int64_t threads, std::int64_t block) {
  return static_cast<unsigned>((threads + block - 1) / block);
}

#ifdef __CUDACC__

__device__ inline float infinity() { return __int_as_float(0x7f800000); }
__device__ inline float not_a_number() { return __int_as_float(0x7fc00000); }

__device__ inline std::int64_t row_offset(std::int64_t r, std::int64_t inner,
                                          std::int64_t outer_stride, std::int64_t inner_stride) {
  return (r / inner) * outer_stride + (r % inner) * inner_stride;
}
template <class T>
__device__ T* row_pointer(const Rows<T>& x, std::int64_t r) {
  return x.data + row_offset(r, x.inner, x.outer_stride, x.inner_stride);
}

template <class T>
__device__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

template <class T>
const T* elements(const void* data) {
  return static_cast<const T*>(data);
}
template <class T>
T* elements(void* data) {
  return static_cast<T*>(data);
}

// Calls `f` with the rows, AnyRows or MutableRows, as those of their type.
template <class Any, class F>
void with_rows(const Any& x, F&& f) {
  const auto& r = x.rows;
  const auto call = [&](auto* data) {
    f(Rows<std::remove_pointer_t<decltype(data)>>{data, r.outer, r.d, r.inner, r.outer_stride,
                                                  r.channel_stride, r.inner_stride});
  };
  switch (x.dtype) {
    case Dtype::kFloat32:
      return call(elements<float>(r.data));
    case Dtype::kBfloat16:
      return call(elements<__nv_bfloat16>(r.data));
    case Dtype::kFloat16:
      return call(elements<__half>(r.data));
  }
}

__device__ inline float norm_bound(float squares, std::int64_t d) {
  return 1.001f * sqrtf(squares + static_cast<float>(d) * FLT_MIN);
}

// Bound on 2 |s - S| for a row of norm `x`, centred for kL2, and codes of norm at most `radius`, as
// in vq_panel-inl.h. Directions are rounded besides, each channel by 2^-24 of itself.
__device__ inline float twice_error_bound(Metric metric, float x, float radius, std::int64_t d) {
  const float steps = static_cast<float>(d + 16);
  const float relative = steps * 0x1p-24f;
  const float reach = metric == Metric::kL2 ? x + radius : x;
  if (relative > 0.25f || !(radius * reach < 1e38f)) return infinity();  // sums might overflow
  const float turned = metric == Metric::kCosine ? 2.05f * 0x1p-24f * x : 0.0f;
  return 2.1f / (1 - relative) * relative * (radius * reach) + turned +
         4 * steps * FLT_MIN * (1 + x + radius);
}

// |x - c|^2 in float64, by a warp.
template <class T>
__device__ double warp_squares(const Prepared& codes, const T* row, std::int64_t channel_stride,
                               std::int64_t code) {
  const float* c = codes.codebook + code * codes.d;
  double sum = 0;
  for (std::int64_t t = threadIdx.x % kWarp; t < codes.d; t += kWarp) {
    const double difference = static_cast<double>(to_float(row[t * channel_stride])) - c[t];
    sum = fma(difference, difference, sum);
  }
  return warp_sum(sum);
}

// What codes are compared by in float64, by a warp: |x - c|^2, -x.c or -x.c / |c|. Infinite for a
// code that is not finite, which sums of finite numbers never are.
template <class T>
__device__ double warp_distance(const Prepared& codes, const T* row, std::int64_t channel_stride,
                                std::int64_t code) {
  const float* c = codes.codebook + code * codes.d;
  double sum = 0, squares = 0;
  if (codes.metric == Metric::kL2) {
    sum = warp_squares(codes, row, channel_stride, code);
  } else {
    for (std::int64_t t = threadIdx.x % kWarp; t < codes.d; t += kWarp) {
      sum = fma(static_cast<double>(to_float(row[t * channel_stride])), static_cast<double>(c[t]),
                sum);
      squares = fma(static_cast<double>(c[t]), static_cast<double>(c[t]), squares);
    }
    sum = -warp_sum(sum);
    // A code of length 0 has the product 0.
    if (codes.metric == Metric::kCosine) sum /= fmax(sqrt(warp_sum(squares)), 1e-300);
  }
  return isfinite(sum) ? sum : infinity();
}

// The distance of a row from what its nearest code was chosen by.
template <class T>
__device__ float warp_result(const Prepared& codes, const T* row, std::int64_t channel_stride,
                             double compared) {
  if (codes.metric != Metric::kCosine) return static_cast<float>(compared);
  double squares = 0;
  for (std::int64_t t = threadIdx.x % kWarp; t < codes.d; t += kWarp) {
    const double value = to_float(row[t * channel_stride]);
    squares = fma(value, value, squares);
  }
  return static_cast<float>(1 + compared / fmax(sqrt(warp_sum(squares)), 1e-300));
}

// By a warp, once the nearest code of a row is known. Where channels do not lie side by side, every
// lane writes to another sector, of which the warps of a block, with the rows beside, fill the rest
// before it leaves the L2 cache. A pass of its own would read the codes in such a way instead.
template <class T>
__device__ void write_result(const Results& results, const Prepared& codes, std::int64_t r,
                             const T* row, std::int64_t channel_stride, std::int64_t index,
                             float distance) {
  if (const Rows<void>& q = results.quantized; q.data != nullptr) {
    T* to = static_cast<T*>(q.data) + row_offset(r, q.inner, q.outer_stride, q.inner_stride);
    const float* code = codes.codebook + index * codes.d;
    for (std::int64_t t = threadIdx.x % kWarp; t < codes.d; t += kWarp) {
      to[t * q.channel_stride] = from_float<T>(code[t]);
    }
    if (codes.metric != Metric::kL2) {
      distance = static_cast<float>(warp_squares(codes, row, channel_stride, index));
    }
  }
  if (threadIdx.x % kWarp != 0) return;
  results.indices[r] = index;
  results.distance[r] = distance;
}

// The nearest of the codes offered, the lowest one on ties, in any order.
struct Nearest {
  double distance;
  std::int64_t index;

  __device__ void offer(double other, std::int64_t code) {
    const bool better = other < distance || (other == distance && code < index);
    distance = better ? other : distance;
    index = better ? code : index;
  }
};

// By one thread.
__device__ inline void leave_undecided(const Prepared& codes, std::int64_t r) {
  codes.undecided[atomicAdd(codes.undecided_count, 1)] = r;
}

#endif

}  // namespace t2p::vq

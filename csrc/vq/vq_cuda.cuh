// SPDX-License-Identifier: Apache-2.0
// What the CUDA roads share: bounds, exact distances, the workspace, and the search of the rows
// that a road could not decide. Each road scans all codes in less than float64 and proves most
// indices.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

#include "vq/vq.h"

namespace t2p::vq {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// A codebook and what is prepared of it, in the workspace.
struct Prepared {
  const float* codebook;  // [k, d]
  std::int64_t k, d;
  float* center;      // [d], about the mean code m
  float* half_norms;  // [k], |c - m|^2 / 2; infinite for a code that is not finite
  // Two floats >= 0 by their bits, which order as integers do.
  int* largest_half_norm;   // [1], infinite if a finite code's is
  int* largest_rounding;    // [1], of all |(c - m) - its bfloat16|^2
  int* undecided_count;     // [1]
  std::int64_t* undecided;  // rows, in any order
};

// Hands out parts of the workspace, each on a 16-byte boundary; without one it only counts.
class Carver {
 public:
  explicit Carver(float* base) : base_(base) {}

  template <class T>
  T* take(std::int64_t count) {
    float* at = base_ ? base_ + used_ : nullptr;
    used_ += (count * static_cast<std::int64_t>(sizeof(T)) + 15) / 16 * 4;
    return reinterpret_cast<T*>(at);
  }
  Prepared take_prepared(const float* codebook, std::int64_t k, std::int64_t d, std::int64_t rows) {
    return {codebook,
            k,
            d,
            take<float>(d),
            take<float>(k),
            take<int>(1),
            take<int>(1),
            take<int>(1),
            take<std::int64_t>(rows)};
  }
  std::int64_t floats() const { return used_; }

 private:
  float* base_;
  std::int64_t used_ = 0;
};

// Writes center, and zeros to the maxima and to the count of undecided rows.
void launch_center(const Prepared& codes, cudaStream_t stream);

// The nearest codes of at most `most` undecided rows by float64 distance, whatever the data.
void launch_search(const Rows<const float>& x, const Prepared& codes, std::int64_t most,
                   cudaStream_t stream, std::int64_t* indices, float* distance);

// The road through tensor cores, vq_cuda_mma.cu: compute capability 8.0 and newer.
std::int64_t workspace_size_mma(std::int64_t n, std::int64_t k, std::int64_t d);
void nearest_mma(const Rows<const float>& x, const float* codebook, std::int64_t k, int device,
                 cudaStream_t stream, float* workspace, std::int64_t* indices, float* distance);

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

// Bound on 2 |s - S| and on a norm from its computed square, as in vq-inl.h.
__device__ inline float twice_error_bound(float x, float radius, std::int64_t d) {
  const float steps = static_cast<float>(d + 16);
  const float relative = steps * 0x1p-24f;
  if (relative > 0.25f) return infinity();
  return 2.1f / (1 - relative) * relative * (radius * (x + radius)) +
         4 * steps * FLT_MIN * (1 + x + radius);
}
__device__ inline float norm_bound(float squares, std::int64_t d) {
  return 1.001f * sqrtf(squares + static_cast<float>(d) * FLT_MIN);
}

// |x - c|^2 in float64, by a warp.
__device__ inline double warp_distance(const float* row, std::int64_t channel_stride,
                                       const float* code, std::int64_t d) {
  double sum = 0;
  for (std::int64_t t = threadIdx.x % kWarp; t < d; t += kWarp) {
    const double difference = static_cast<double>(row[t * channel_stride]) - code[t];
    sum = fma(difference, difference, sum);
  }
  return warp_sum(sum);
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

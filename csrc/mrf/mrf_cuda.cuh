// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of this op share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/reduce.cuh"
#include "mrf/mrf.h"

namespace t2p::mrf {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kPart = 32;  // labels of which label_step_cuda notes a maximum and a sum

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

__device__ inline float get(Values values, std::int64_t at) {
  if (values.format == Format::kF32) return static_cast<const float*>(values.data)[at];
  return __bfloat162float(static_cast<const __nv_bfloat16*>(values.data)[at]);
}

__device__ inline void put(MutableValues values, std::int64_t at, float value) {
  if (values.format == Format::kF32) {
    static_cast<float*>(values.data)[at] = value;
  } else {
    static_cast<__nv_bfloat16*>(values.data)[at] = __float2bfloat16_rn(value);
  }
}

struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// The first kernel of label_step_cuda, step.r > 0, through Hopper's tensor cores,
// mrf_cuda_hopper.cu; whether it was built for the current device.
bool hopper_is_built();
void logits_hopper(const LabelStep& step, int processors, cudaStream_t stream);

}  // namespace t2p::mrf

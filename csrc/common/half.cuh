// SPDX-License-Identifier: Apache-2.0
// Elements of any dtype to float and back, rounding to nearest even, for kernels on a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace t2p {

__device__ inline float to_float(float a) { return a; }
__device__ inline float to_float(__nv_bfloat16 a) { return __bfloat162float(a); }
__device__ inline float to_float(__half a) { return __half2float(a); }
template <class T>
__device__ T from_float(float a);
template <>
__device__ inline float from_float<float>(float a) {
  return a;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float a) {
  return __float2bfloat16_rn(a);
}
template <>
__device__ inline __half from_float<__half>(float a) {
  return __float2half_rn(a);
}

}  // namespace t2p

// SPDX-License-Identifier: Apache-2.0
// Ordinary device code of many kinds: what nvcc makes of it has to run, and to be right.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

extern __shared__ __align__(16) unsigned char dynamic[];

__device__ unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// C = A B^T on tensor cores, A [16 m, k] and B [8 n, k] bfloat16: cp.async in two stages, ldmatrix,
// mma.sync. One warp per tile of C.
__global__ void gemm_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int n, int k) {
  constexpr int kDepth = 16, kPitch = kDepth + 8;
  __shared__ __align__(16) __nv_bfloat16 left[2][16][kPitch], right[2][8][kPitch];
  const int lane = threadIdx.x, row = lane / 2, half = lane % 2 * 8;
  const __nv_bfloat16* from_a = a + static_cast<int64_t>(blockIdx.y) * 16 * k;
  const __nv_bfloat16* from_b = b + static_cast<int64_t>(blockIdx.x) * 8 * k;
  const auto load = [&](int stage, int first) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(&left[stage][row][half])),
        "l"(from_a + row * k + first + half)
        : "memory");
    if (row < 8) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                       shared_address(&right[stage][row][half])),
                   "l"(from_b + row * k + first + half)
                   : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  float sum[4] = {};
  load(0, 0);
  for (int first = 0, stage = 0; first < k; first += kDepth, stage ^= 1) {
    if (first + kDepth < k) {
      load(stage ^ 1, first + kDepth);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncwarp();
    uint32_t x[4], y[2];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(&left[stage][lane % 16][lane / 16 * 8]))
                 : "memory");
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(y[0]), "=r"(y[1])
                 : "r"(shared_address(&right[stage][lane % 8][lane / 8 % 2 * 8]))
                 : "memory");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
    __syncwarp();
  }
  for (int i = 0; i < 4; ++i) {
    c[(blockIdx.y * 16 + lane / 4 + i / 2 * 8) * n + blockIdx.x * 8 + lane % 4 * 2 + i % 2] =
        sum[i];
  }
}

// The mathematical functions that kernels use, each to a column of `y` [threads, 16].
__global__ void functions(const float* x, float* y) {
  const float v = x[threadIdx.x];
  float* out = y + threadIdx.x * 16;
  out[0] = expf(v);
  out[1] = logf(v);
  out[2] = sinf(v);
  out[3] = cosf(v);
  out[4] = tanhf(v);
  out[5] = erff(v);
  out[6] = powf(v, 1.7f);
  out[7] = rsqrtf(v);
  out[8] = log1pf(v);
  out[9] = cbrtf(v);
  out[10] = fmodf(v, 0.7f);
  out[11] = rintf(v);
  out[12] = static_cast<float>(exp(static_cast<double>(v)));
  out[13] = static_cast<float>(1.0 / sqrt(static_cast<double>(v)));
  out[14] = 1.0f / (1.0f + expf(-v));
  out[15] = static_cast<float>(log(static_cast<double>(v)));
}
__global__ void fast_functions(const float* x, float* y) {
  const float v = x[threadIdx.x];
  float* out = y + threadIdx.x * 16;
  for (int i = 0; i < 16; ++i) out[i] = 0;
  out[0] = __expf(v);
  out[1] = __logf(v);
  out[2] = __sinf(v);
  out[3] = __cosf(v);
  out[6] = __powf(v, 1.7f);
  out[14] = __fdividef(1.0f, 1.0f + __expf(-v));
}

// Philox 4x32, 10 rounds (Salmon et al. 2011), key {seed, 0}, counter {thread, 0, 0, 0}.
__global__ void philox(uint32_t* out, uint32_t seed) {
  uint32_t c[4] = {threadIdx.x, 0, 0, 0}, k[2] = {seed, 0};
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c[0]), low0 = 0xD2511F53u * c[0];
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c[2]), low1 = 0xCD9E8D57u * c[2];
    c[0] = high1 ^ c[1] ^ k[0];
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k[1];
    c[3] = low0;
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  reinterpret_cast<uint4*>(out)[threadIdx.x] = make_uint4(c[0], c[1], c[2], c[3]);
}

// Softmax of rows of any of the three types, one block per row.
template <class T>
__device__ void softmax(const T* x, T* y, int d) {
  __shared__ float partial[32];
  x += static_cast<int64_t>(blockIdx.x) * d;
  y += static_cast<int64_t>(blockIdx.x) * d;
  const auto reduce = [&](float v, bool largest) {
    for (int step = 16; step > 0; step /= 2) {
      const float other = __shfl_down_sync(0xffffffffu, v, step);
      v = largest ? fmaxf(v, other) : v + other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    v = partial[0];
    for (unsigned i = 1; i < blockDim.x / 32; ++i) {
      v = largest ? fmaxf(v, partial[i]) : v + partial[i];
    }
    return v;
  };
  float largest = -INFINITY;
  for (int t = threadIdx.x; t < d; t += blockDim.x)
    largest = fmaxf(largest, static_cast<float>(x[t]));
  largest = reduce(largest, true);
  float sum = 0;
  for (int t = threadIdx.x; t < d; t += blockDim.x) sum += expf(static_cast<float>(x[t]) - largest);
  sum = reduce(sum, false);
  for (int t = threadIdx.x; t < d; t += blockDim.x) {
    y[t] = static_cast<T>(expf(static_cast<float>(x[t]) - largest) / sum);
  }
}
__global__ void softmax_float(const float* x, float* y, int d) { softmax(x, y, d); }
__global__ void softmax_half(const __half* x, __half* y, int d) { softmax(x, y, d); }
__global__ void softmax_bfloat(const __nv_bfloat16* x, __nv_bfloat16* y, int d) {
  softmax(x, y, d);
}

// Dynamic shared memory and atomics in both memories.
__global__ void histogram(const int* x, int* counts, int n, int bins) {
  int* own = reinterpret_cast<int*>(dynamic);
  for (int i = threadIdx.x; i < bins; i += blockDim.x) own[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    atomicAdd(&own[x[i]], 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += blockDim.x) atomicAdd(&counts[i], own[i]);
}
// The smallest key and where it is, in one 64-bit atomic.
__global__ void packed_minimum(const float* x, unsigned long long* best, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    const auto key = static_cast<unsigned long long>(__float_as_uint(x[i])) << 32 | i;
    atomicMin(best, key);
  }
}
__global__ void compare_and_swap(float* product, const float* x) {
  unsigned* at = reinterpret_cast<unsigned*>(product);
  unsigned seen = atomicAdd(at, 0), expected;
  do {
    expected = seen;
    seen = atomicCAS(at, expected, __float_as_uint(__uint_as_float(expected) * x[threadIdx.x]));
  } while (seen != expected);
}

// Control flow: a jump table, a function that is called, an array with computed indices.
__device__ __noinline__ float polynomial(float x, int degree) {
  float sum = 0;
  for (int i = degree; i >= 0; --i) sum = sum * x + static_cast<float>(i);
  return sum;
}
__global__ void control(const float* x, float* y) {
  float own[6];
  for (int i = 0; i < 6; ++i) own[i] = x[threadIdx.x] * static_cast<float>(i);
  float value;
  switch (threadIdx.x % 8) {
    case 0:
      value = polynomial(x[threadIdx.x], 3);
      break;
    case 1:
      value = own[threadIdx.x % 6] + 1;
      break;
    case 2:
      value = x[threadIdx.x] / 3;
      break;
    case 3:
      value = polynomial(x[threadIdx.x], threadIdx.x % 5);
      break;
    case 4:
      value = -x[threadIdx.x];
      break;
    case 5:
      value = own[threadIdx.x / 8 % 6];
      break;
    case 6:
      value = sqrtf(x[threadIdx.x]);
      break;
    default:
      value = 7;
  }
  y[threadIdx.x] = value;
}

// Warps: votes, matches, inclusive sums by shuffles, reductions; to `out` [threads, 8].
__global__ void warps(const int* x, unsigned* out) {
  const int v = x[threadIdx.x], lane = threadIdx.x % 32;
  int sum = v;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  unsigned* to = out + threadIdx.x * 8;
  to[0] = __ballot_sync(0xffffffffu, v & 1);
  to[1] = __any_sync(0xffffffffu, v == 3);
  to[2] = __all_sync(0xffffffffu, v < 100);
  to[3] = __match_any_sync(0xffffffffu, v % 4);
  to[4] = static_cast<unsigned>(sum);
  to[5] = __reduce_add_sync(0xffffffffu, static_cast<unsigned>(v));
  to[6] = static_cast<unsigned>(__shfl_sync(0xffffffffu, v, 5, 8));
  to[7] = static_cast<unsigned>(__syncthreads_count(v & 1));
}

// Pairs of halves, and vectors of four.
__global__ void vectors(const float4* x, const __half2* h, float4* y, __half2* g) {
  const float4 v = x[threadIdx.x];
  y[threadIdx.x] = make_float4(v.w, v.z, v.y, v.x);
  g[threadIdx.x] = __hfma2(h[threadIdx.x], h[threadIdx.x], __float2half2_rn(0.5f));
}

__constant__ float weights[4] = {1, 2, 3, 4};
__device__ int calls;
__global__ void module_variables(float* y) {
  y[threadIdx.x] = weights[threadIdx.x % 4];
  atomicAdd(&calls, 1);
}

// SPDX-License-Identifier: Apache-2.0
// Tensor cores as Ampere has them: copies to shared memory that nobody waits for, matrices from
// there to registers, and products of matrices (PTX manual 9.7.9.25, 9.7.14.5). Compiled for an
// older architecture they trap; launchers see to it that such a kernel does not start there.
//
// Fragments: lane = 4 group + t holds, two to a register and the lower channel in the lower half,
//   of A [16, 16]  a[0]: row group,     channels 2 t, 2 t + 1    a[2]: the same, channels + 8
//                  a[1]: row group + 8                           a[3]: the same, channels + 8
//   of B [16, 8]   b[0]: column group,  channels 2 t, 2 t + 1    b[1]: the same, channels + 8
//   of C [16, 8]   c[0], c[1]: row group, columns 2 t, 2 t + 1   c[2], c[3]: row group + 8
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace t2p {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define T2P_AMPERE(...) __trap()
#else
#define T2P_AMPERE(...) asm volatile(__VA_ARGS__)
#endif

__device__ inline std::uint32_t shared_address(const void* at) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(at));
}

// 16 bytes from global to shared memory, both on 16-byte boundaries, past the L1 cache.
__device__ inline void copy_async(std::uint32_t to, const void* from) {
  T2P_AMPERE("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same for the first `bytes` bytes, 0 to 16; the rest becomes zeros.
__device__ inline void copy_async(std::uint32_t to, const void* from, int bytes) {
  T2P_AMPERE("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
             "r"(bytes) : "memory");
}

// Ends a group of this thread's copies.
__device__ inline void commit_copies() { T2P_AMPERE("cp.async.commit_group;" :: : "memory"); }

// Waits until at most the last kLeft groups of this thread are under way.
template <int kLeft>
__device__ void wait_for_copies() {
  T2P_AMPERE("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Two floats of shared memory, on an 8-byte boundary.
__device__ inline float2 load_pair(std::uint32_t from) {
  float2 to;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to.x), "=f"(to.y) : "r"(from) : "memory");
  return to;
}

// Four matrices [8, 8] of 16-bit elements: lane 8 i + r gives the address of row r of matrix i, 16
// bytes, and gets of each matrix row lane / 4, columns 2 (lane % 4) and the next.
__device__ inline void load_matrices(std::uint32_t (&to)[4], std::uint32_t from) {
  T2P_AMPERE("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]),
             "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

// The same, each matrix transposed.
__device__ inline void load_transposed(std::uint32_t (&to)[4], std::uint32_t from) {
  T2P_AMPERE("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]),
             "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

// The larger of two bfloat16 numbers, for both halves; a NaN if either is one.
__device__ inline std::uint32_t max_of_pairs(std::uint32_t a, std::uint32_t b) {
  std::uint32_t most = 0;
  T2P_AMPERE("max.NaN.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
}

// c += a b for bfloat16 and float32 sums. Products are exact; how sums round is left open, and
// tensor cores are known to truncate (Fasi et al. 2021).
__device__ inline void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1) {
  T2P_AMPERE(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(c[0]),
      "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0),
      "r"(b1));
}

#undef T2P_AMPERE

}  // namespace t2p

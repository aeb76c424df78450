// SPDX-License-Identifier: Apache-2.0
// What Hopper has beside mma.cuh: copies in bulk that end at an mbarrier, and products of matrices
// that a warpgroup, 4 warps of which the first has a number divisible by 4, starts and waits for
// (PTX manual 9.7.9.25, 9.7.13.15, 9.7.15). They are there in code compiled for sm_90a only;
// elsewhere they trap, and launchers see to it that such a kernel does not start.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/mma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define T2P_HOPPER(...) asm volatile(__VA_ARGS__)
#else
#define T2P_HOPPER(...) __trap()
#endif

namespace t2p {

// Gives registers back, or takes what others gave back: all warps of a warpgroup, which had the
// number for which the kernel was compiled.
template <int kRegisters>
__device__ void shrink_registers() {
  T2P_HOPPER("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void grow_registers() {
  T2P_HOPPER("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barriers in shared memory. Each of their phases ends when as many threads as were said have
// arrived and all bytes that were announced are there.

__device__ inline void init_barrier(std::uint32_t barrier, int arrivals) {
  T2P_HOPPER("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barriers just initialised known to the copy engine; before the barrier of the block.
__device__ inline void publish_barriers() {
  T2P_HOPPER("fence.mbarrier_init.release.cluster;" :: : "memory");
}

__device__ inline void arrive(std::uint32_t barrier) {
  T2P_HOPPER("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes.
__device__ inline void arrive_expecting(std::uint32_t barrier, std::uint32_t bytes) {
  T2P_HOPPER("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
             "r"(bytes) : "memory");
}

// Waits for the end of a phase: of the first, third, ... with parity 0. What is before the first
// counts as a phase with parity 1.
__device__ inline void wait_for_phase(std::uint32_t barrier, std::uint32_t parity) {
  T2P_HOPPER(
      "{\n.reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n}" ::"r"(barrier),
      "r"(parity) : "memory");
}

// From global to shared memory, everything on 16-byte boundaries. The bytes count at the barrier.
__device__ inline void copy_bulk(std::uint32_t to, const void* from, std::uint32_t bytes,
                                 std::uint32_t barrier) {
  T2P_HOPPER(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// A matrix of 16-bit elements in shared memory, rows of 128 bytes with the swizzle of 128 bytes:
// groups of 8 rows lie 1024 bytes apart, on a 1024-byte boundary. A step of 32 bytes in `at` is one
// of 16 columns (PTX manual 9.7.15.5.1, figure 9.7.15.5.1.2.2).
__device__ inline std::uint64_t swizzled_matrix(std::uint32_t at) {
  return std::uint64_t{(at & 0x3ffff) >> 4} | std::uint64_t{1} << 16 |
         std::uint64_t{1024 >> 4} << 32 | std::uint64_t{1} << 62;
}

// Shows what this thread has stored in shared memory, by copy_async too, to products and copies in
// bulk; before it tells others.
__device__ inline void show_stores() { T2P_HOPPER("fence.proxy.async.shared::cta;" :: : "memory"); }

// The accumulators of a product [64, kColumns] of a warpgroup, of which warp w has the rows from
// 16 w on; otherwise as in mma.cuh, [n][2 h + e] being row group + 8 h, column 8 n + 2 t + e.
template <int kColumns>
using ProductOf = float[kColumns / 8][4];
using Product = ProductOf<128>;

// Before the first product after the accumulators or shared memory were written to.
__device__ inline void begin_products() { T2P_HOPPER("wgmma.fence.sync.aligned;" :: : "memory"); }
__device__ inline void commit_products() {
  T2P_HOPPER("wgmma.commit_group.sync.aligned;" :: : "memory");
}

// Waits until at most the last kLeft groups of products are under way.
template <int kLeft>
__device__ void wait_for_products() {
  T2P_HOPPER("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Keeps the compiler from reading accumulators before it has waited for them.
template <int kTiles>
__device__ void settle(float (&c)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
  }
}

// c += a b^T for bfloat16 matrices a [64, 16] and b [columns, 16]. Neither they nor c may be
// touched until it has been waited for. Roundings are as in mma.cuh.
#define T2P_FOUR(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
__device__ inline void multiply_add(ProductOf<32>& c, std::uint64_t a, std::uint64_t b) {
  T2P_HOPPER(
      "{\n.reg .pred add;\n"
      "setp.eq.u32 add, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, add, 1, 1, 0, 0;\n}" : T2P_FOUR(0),
      T2P_FOUR(1), T2P_FOUR(2), T2P_FOUR(3) : "l"(a), "l"(b) : "memory");
}
__device__ inline void multiply_add(ProductOf<80>& c, std::uint64_t a, std::uint64_t b) {
  T2P_HOPPER(
      "{\n.reg .pred add;\n"
      "setp.eq.u32 add, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
      "%38, %39}, "
      "%40, %41, add, 1, 1, 0, 0;\n}" : T2P_FOUR(0),
      T2P_FOUR(1), T2P_FOUR(2), T2P_FOUR(3), T2P_FOUR(4), T2P_FOUR(5), T2P_FOUR(6), T2P_FOUR(7),
      T2P_FOUR(8), T2P_FOUR(9) : "l"(a), "l"(b) : "memory");
}
__device__ inline void multiply_add(ProductOf<128>& c, std::uint64_t a, std::uint64_t b) {
  T2P_HOPPER(
      "{\n.reg .pred add;\n"
      "setp.eq.u32 add, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
      "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, add, 1, 1, 0, 0;\n}" : T2P_FOUR(0),
      T2P_FOUR(1), T2P_FOUR(2), T2P_FOUR(3), T2P_FOUR(4), T2P_FOUR(5), T2P_FOUR(6), T2P_FOUR(7),
      T2P_FOUR(8), T2P_FOUR(9), T2P_FOUR(10), T2P_FOUR(11), T2P_FOUR(12), T2P_FOUR(13),
      T2P_FOUR(14), T2P_FOUR(15) : "l"(a), "l"(b) : "memory");
}
__device__ inline void multiply_add(ProductOf<256>& c, std::uint64_t a, std::uint64_t b) {
  T2P_HOPPER(
      "{\n.reg .pred add;\n"
      "setp.eq.u32 add, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
      "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, "
      "%74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, "
      "%92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "
      "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "
      "%123, %124, %125, %126, %127}, "
      "%128, %129, add, 1, 1, 0, 0;\n}" : T2P_FOUR(0),
      T2P_FOUR(1), T2P_FOUR(2), T2P_FOUR(3), T2P_FOUR(4), T2P_FOUR(5), T2P_FOUR(6), T2P_FOUR(7),
      T2P_FOUR(8), T2P_FOUR(9), T2P_FOUR(10), T2P_FOUR(11), T2P_FOUR(12), T2P_FOUR(13),
      T2P_FOUR(14), T2P_FOUR(15), T2P_FOUR(16), T2P_FOUR(17), T2P_FOUR(18), T2P_FOUR(19),
      T2P_FOUR(20), T2P_FOUR(21), T2P_FOUR(22), T2P_FOUR(23), T2P_FOUR(24), T2P_FOUR(25),
      T2P_FOUR(26), T2P_FOUR(27), T2P_FOUR(28), T2P_FOUR(29), T2P_FOUR(30), T2P_FOUR(31) : "l"(a),
      "l"(b) : "memory");
}

#undef T2P_FOUR
#undef T2P_HOPPER

}  // namespace t2p

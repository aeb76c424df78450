// SPDX-License-Identifier: Apache-2.0
// Faults of every class, each with a twin that is right. A launch is <<<kBlocks, kThreads>>> unless
// test_faults.py says otherwise; `x` has as many floats as there are threads, and so has `y`. The
// line that is at fault is marked, so that the test knows where to find it.
#include <cstdint>

extern __shared__ float dynamic[];

__device__ int self() { return blockIdx.x * blockDim.x + threadIdx.x; }

// Races ---------------------------------------------------------------------------------------

__global__ void shared_race_without_barrier(const float* x, float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[self()];
  y[self()] = tile[threadIdx.x ^ 32];  // FAULT shared_race_without_barrier
}
__global__ void shared_with_barrier(const float* x, float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[self()];
  __syncthreads();
  y[self()] = tile[threadIdx.x ^ 32];
}

__global__ void shared_race_of_reuse(const float* x, float* y) {
  __shared__ float tile[64];
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    tile[threadIdx.x] = x[self()] + i;  // FAULT shared_race_of_reuse
    __syncthreads();
    sum += tile[63 - threadIdx.x];
  }
  y[self()] = sum;
}
__global__ void shared_reuse_with_barrier(const float* x, float* y) {
  __shared__ float tile[64];
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    tile[threadIdx.x] = x[self()] + i;
    __syncthreads();
    sum += tile[63 - threadIdx.x];
    __syncthreads();
  }
  y[self()] = sum;
}

__global__ void shared_race_within_a_warp(const float* x, float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[self()];
  y[self()] = tile[threadIdx.x ^ 1];  // FAULT shared_race_within_a_warp
}
__global__ void shared_within_a_warp(const float* x, float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[self()];
  __syncwarp();
  y[self()] = tile[threadIdx.x ^ 1];
}

__global__ void shared_race_of_two_writers(const float* x, float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x / 2] = x[self()];  // FAULT shared_race_of_two_writers
  __syncthreads();
  y[self()] = tile[threadIdx.x / 2];
}

__global__ void global_race_between_threads(const float* x, float* y) {
  y[self()] = x[self()];
  y[self() ^ 1] += 1;  // FAULT global_race_between_threads
}
__global__ void global_race_between_blocks(const float* x, float* y) {
  if (threadIdx.x == 0) y[0] = x[blockIdx.x];  // FAULT global_race_between_blocks
}
__global__ void global_race_of_blocks_with_barrier(const float* x, float* y) {
  if (blockIdx.x == 0) y[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (blockIdx.x == 1)
    y[64 + threadIdx.x] = y[threadIdx.x];  // FAULT global_race_of_blocks_with_barrier
}
__global__ void global_atomics(const float* x, float* y) { atomicAdd(y, x[self()]); }
__global__ void global_race_with_an_atomic(const float* x, float* y) {
  atomicAdd(y, x[self()]);
  if (threadIdx.x == 5) y[1] = y[0];  // FAULT global_race_with_an_atomic
}

// Bounds --------------------------------------------------------------------------------------

__global__ void read_beyond_the_end(const float* x, float* y) {
  y[self()] = x[self() + 1];  // FAULT read_beyond_the_end
}
__global__ void write_before_the_start(const float* x, float* y) {
  y[self() - 1] = x[self()];  // FAULT write_before_the_start
}
__global__ void write_far_away(const float* x, float* y) {
  y[self() * int64_t{1} << 40] = x[self()];  // FAULT write_far_away
}
__global__ void shared_beyond_the_end(const float* x, float* y) {
  dynamic[threadIdx.x + 1] = x[self()];  // FAULT shared_beyond_the_end
  y[self()] = dynamic[threadIdx.x + 1];
}
__global__ void shared_into_the_neighbour(const float* x, float* y, int n) {
  __shared__ float first[64], second[64];
  first[threadIdx.x + n] = x[self()];  // FAULT shared_into_the_neighbour
  second[threadIdx.x] = 0;
  __syncthreads();
  y[self()] = first[threadIdx.x] + second[threadIdx.x];
}
__global__ void local_beyond_the_end(const float* x, float* y, int n) {
  float own[8];
  for (int i = 0; i < 8; ++i) own[i] = x[self()];
  own[n] = 1;  // FAULT local_beyond_the_end
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += own[(i * n) & 7];
  y[self()] = sum;
}

// Uninitialised memory ------------------------------------------------------------------------

__global__ void shared_never_written(const float* x, float* y) {
  if (threadIdx.x < 63) dynamic[threadIdx.x] = x[self()];
  __syncthreads();
  y[self()] = dynamic[threadIdx.x];  // FAULT shared_never_written
}
__global__ void shared_all_written(const float* x, float* y) {
  dynamic[threadIdx.x] = x[self()];
  __syncthreads();
  y[self()] = dynamic[threadIdx.x];
}
__global__ void global_never_written(const float* x, float* y) {
  y[self()] += x[self()];  // FAULT global_never_written
}
__global__ void local_never_written(const float* x, float* y, int n) {
  float own[8];
  for (int i = 0; i < n; ++i) own[i] = x[self()];
  y[self()] = own[(n + 1) & 7];  // FAULT local_never_written
}

// Alignment -----------------------------------------------------------------------------------

__global__ void misaligned_vector(const float* x, float* y) {
  if (threadIdx.x < 8) {
    const float4 v =
        *reinterpret_cast<const float4*>(x + 1 + 4 * threadIdx.x);  // FAULT misaligned_vector
    y[self()] = v.x + v.y + v.z + v.w;
  }
}
__global__ void aligned_vector(const float* x, float* y) {
  if (threadIdx.x < 8) {
    const float4 v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x);
    y[self()] = v.x + v.y + v.z + v.w;
  }
}

// Barriers and warps --------------------------------------------------------------------------

__global__ void barrier_in_a_branch(const float* x, float* y) {
  if (threadIdx.x < 40) {
    y[self()] = x[self()];
    __syncthreads();  // FAULT barrier_in_a_branch
  } else {
    y[self()] = 2 * x[self()];
    __threadfence();
    __syncthreads();
    y[self()] += 1;
  }
}
__global__ void barrier_of_some(const float* x, float* y) {
  if (threadIdx.x < 40) __syncthreads();
  y[self()] = x[self()];
  asm volatile("bar.sync 1;" ::: "memory");
}
__global__ void barrier_after_exits(const float* x, float* y) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  y[self()] = x[self()];
}

__global__ void mask_of_absent_lanes(const float* x, float* y) {
  float v = x[self()];
  if (threadIdx.x % 32 < 16) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);  // FAULT mask_of_absent_lanes
    y[self()] = v;
    __threadfence();
  } else {
    y[self()] = 0;
  }
}
__global__ void mask_of_those_present(const float* x, float* y) {
  float v = x[self()];
  if (threadIdx.x % 32 < 16) v += __shfl_xor_sync(0x0000ffffu, v, 1);
  y[self()] = v;
}
__global__ void mask_without_oneself(const float* x, float* y) {
  y[self()] = __shfl_sync(0x0000ffffu, x[self()], 0);  // FAULT mask_without_oneself
}
__global__ void shuffle_from_an_absent_lane(const float* x, float* y) {
  float v = x[self()];
  if (threadIdx.x % 32 < 16)
    v = __shfl_sync(0x0000ffffu, v, 20);  // FAULT shuffle_from_an_absent_lane
  y[self()] = v;
}

// Asynchronous copies -------------------------------------------------------------------------

__device__ void copy_async(float* to, const float* from) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from) : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

template <int kLeft>
__device__ void two_stages(const float* x, float* y) {
  __shared__ float stage[2][64];
  copy_async(&stage[0][threadIdx.x], x + self());
  commit();
  copy_async(&stage[1][threadIdx.x], x + self());
  commit();
  wait<kLeft>();
  __syncthreads();
  const float first = stage[0][threadIdx.x ^ 32];  // FAULT copy_not_waited_for
  wait<0>();
  __syncthreads();
  y[self()] = first + stage[1][threadIdx.x ^ 32];
}
__global__ void copy_not_waited_for(const float* x, float* y) { two_stages<2>(x, y); }
__global__ void copy_waited_for(const float* x, float* y) { two_stages<1>(x, y); }
__global__ void copy_without_barrier(const float* x, float* y) {
  __shared__ float stage[64];
  copy_async(&stage[threadIdx.x], x + self());
  commit();
  wait<0>();
  y[self()] = stage[threadIdx.x ^ 32];  // FAULT copy_without_barrier
}
__global__ void copy_never_waited_for(const float* x, float* y) {
  __shared__ float stage[64];
  copy_async(&stage[threadIdx.x], x + self());
  commit();
  y[self()] = 0;
}
__global__ void copy_beyond_the_end(const float* x, float* y) {
  __shared__ float stage[64];
  copy_async(&stage[threadIdx.x], x + self() + 1);  // FAULT copy_beyond_the_end
  commit();
  wait<0>();
  y[self()] = stage[threadIdx.x];
}

// mbarriers -----------------------------------------------------------------------------------

__device__ unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// One thread has 64 floats copied in bulk, the others wait. Without the wait it is a fault.
template <bool kWait>
__device__ void bulk_copy(const float* x, float* y) {
  __shared__ alignas(16) float stage[64];
  __shared__ alignas(8) uint64_t barrier;
  const unsigned at = shared_address(&barrier);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 256;" ::"r"(at) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 256, "
        "[%2];" ::"r"(shared_address(stage)),
        "l"(x + blockIdx.x * 64), "r"(at)
        : "memory");
  }
  if (kWait) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;\n@!p bra again;\n}" ::"r"(at)
        : "memory");
  }
  y[self()] = stage[threadIdx.x];  // FAULT bulk_copy_not_waited_for
}
#if __CUDA_ARCH__ >= 900
__global__ void bulk_copy_not_waited_for(const float* x, float* y) { bulk_copy<false>(x, y); }
__global__ void bulk_copy_waited_for(const float* x, float* y) { bulk_copy<true>(x, y); }
__global__ void mbarrier_that_never_completes(const float* x, float* y) {
  __shared__ alignas(8) uint64_t barrier;
  const unsigned at = shared_address(&barrier);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 2;" ::"r"(at) : "memory");
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
  }
  __syncthreads();
  asm volatile(
      "{\n.reg .pred p;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;\n@!p bra again;\n}" ::"r"(at)
      : "memory");  // FAULT mbarrier_that_never_completes
  y[self()] = x[self()];
}

// One warp writes what the other one reads, twice, and two mbarriers hand the stage over. kFault: 1
// reads without a wait, 2 lets go of the stage before it has read.
__device__ void wait_for(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ void arrive_at(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
template <int kFault>
__device__ void handover(const float* x, float* y) {
  __shared__ float stage[32];
  __shared__ alignas(8) uint64_t barriers[2];
  const unsigned full = shared_address(barriers), empty = full + 8;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 2) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 32;" ::"r"(full + 8 * lane) : "memory");
  }
  if (threadIdx.x < 32) stage[lane] = 0;
  __syncthreads();
  float sum = 0;
  if (threadIdx.x < 32) {
    for (int i = 0; i < 2; ++i) {
      wait_for(empty, i ^ 1);
      stage[lane] = x[self()] + i;  // FAULT mbarrier_released_too_early
      arrive_at(full);
    }
  } else {
    for (int i = 0; i < 2; ++i) {
      if (kFault != 1) wait_for(full, i);
      if (kFault == 2) arrive_at(empty);
      sum += stage[31 - lane];
      if (kFault != 2) arrive_at(empty);
    }
  }
  y[self()] = sum;
}
__global__ void mbarrier_handover(const float* x, float* y) { handover<0>(x, y); }
__global__ void mbarrier_not_waited_for(const float* x, float* y) { handover<1>(x, y); }
__global__ void mbarrier_released_too_early(const float* x, float* y) { handover<2>(x, y); }
#endif

// Others --------------------------------------------------------------------------------------

__global__ void division_by_zero(const float* x, float* y, int n) {
  y[self()] = x[self()] + static_cast<float>(self() / (n - 3));  // FAULT division_by_zero
}

// SPDX-License-Identifier: Apache-2.0
// The scores of the road through Hopper's tensor cores: wgmma, fed by bulk copies. A block holds
// the scores of 256 rows and 128 codes, half of the rows in each of two warpgroups. A third one, of
// which one thread works, copies: the block's rows once, and codes in stages of 64 channels, as far
// ahead as there are stages. While one warpgroup looks at its scores the other one multiplies.
// Blocks are as many as multiprocessors, and go on to further rows and splits of the codes. What
// comes before and after is in vq_cuda_coarse.cu; rows and codes are packed there as wgmma reads
// them, so that a copy of consecutive bytes is all that it takes.
//
// The floor is that of vq_cuda_mma.cu, 0.70 ms for 65536 x 16384 x 256 on an H200. A product
// [64, 128, 16] takes 64 clocks and reads 6 KiB of shared memory, 96 of the 128 bytes a clock; a
// tile's scores take a thread about 3 instructions each, 20 % of the products' time at d = 256, in
// which the other warpgroup multiplies. Each block reads all codes: 2.1 GB from the L2 cache in
// that time. Not yet run on a GPU.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_check.cuh"
#include "common/hopper.cuh"
#include "vq/vq_cuda.cuh"
#include "vq/vq_cuda_coarse.cuh"
#include "vq/vq_cuda_lists.cuh"

namespace t2p::vq {
namespace {

using std::int64_t;
using std::uint32_t;

constexpr int kBlockRows = 256, kBlockCodes = 128, kChunk = 64, kMostStages = 6;
constexpr int kGroups = 2, kGroupWarps = 4;
constexpr int kThreads = (kGroups + 1) * kGroupWarps * kWarp;  // one of the last group copies
constexpr int kVectorBytes = kChunk * 2;
constexpr int kRowBytes = kBlockRows * kVectorBytes, kCodeBytes = kBlockCodes * kVectorBytes;
constexpr int kBiasBytes = kBlockCodes * 4, kStageBytes = kCodeBytes + kBiasBytes;
constexpr int kAlignment = 1024;  // of what is swizzled

struct Plan {
  int stages;
  int64_t row_blocks, tiles_per_split, splits;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kConsumerWarps = kGroups * kGroupWarps;
constexpr int kProducts = kBlockRows / kGroups / 64;  // of 64 rows, of a warpgroup
constexpr int kStepBytes = 32;
// Of the 168 that a thread may have at most, those of the last group go to the others.
constexpr int kCopyRegisters = 40, kProductRegisters = 232;

using GroupLists = Lists<kProducts, kBlockCodes / 8, 64>;

// Shared memory: the rows, [chunks, kBlockRows, kChunk], stages of codes, stages of their biases.
struct Shared {
  uint32_t rows, codes, biases;
  uint32_t full, empty, rows_full, rows_empty;  // barriers; the first two have one for each stage

  __device__ uint32_t full_at(int stage) const { return full + stage * 8; }
  __device__ uint32_t empty_at(int stage) const { return empty + stage * 8; }
};

// The stage whose turn it is, and the parity of its phase.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ int before(int stages) const { return stage == 0 ? stages - 1 : stage - 1; }
};

// What a block works on: rows of one block and codes of one split. Blocks that run side by side
// take the same codes, which then are in the L2 cache.
struct Item {
  int64_t row_block, split, first, last;  // codes

  __device__ Item(int64_t number, const Coarse& coarse, const Plan& plan)
      : row_block(number % plan.row_blocks),
        split(number / plan.row_blocks),
        first(split * plan.tiles_per_split * kBlockCodes),
        last(min(coarse.padded_codes, first + plan.tiles_per_split * kBlockCodes)) {}
};

// By one thread.
__device__ void produce(const Coarse& coarse, const Plan& plan, const Shared& shared) {
  const int64_t chunks = coarse.code_packing.chunks, items = plan.row_blocks * plan.splits;
  Turn turn;
  uint32_t row_parity = 0;
  for (int64_t number = blockIdx.x; number < items; number += gridDim.x) {
    const Item item(number, coarse, plan);
    wait_for_phase(shared.rows_empty, row_parity ^ 1);
    row_parity ^= 1;
    arrive_expecting(shared.rows_full, static_cast<uint32_t>(chunks) * kRowBytes);
    const __nv_bfloat16* rows = coarse.rows + item.row_block * chunks * kBlockRows * kChunk;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      copy_bulk(shared.rows + static_cast<uint32_t>(chunk) * kRowBytes,
                rows + chunk * kBlockRows * kChunk, kRowBytes, shared.rows_full);
    }
    for (int64_t code = item.first; code < item.last; code += kBlockCodes) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const uint32_t full = shared.full_at(turn.stage);
        wait_for_phase(shared.empty_at(turn.stage), turn.parity ^ 1);
        arrive_expecting(full, chunk == 0 ? kStageBytes : kCodeBytes);
        copy_bulk(shared.codes + turn.stage * kCodeBytes,
                  coarse.codes + (code * chunks + chunk * kBlockCodes) * kChunk, kCodeBytes, full);
        if (chunk == 0) {
          copy_bulk(shared.biases + turn.stage * kBiasBytes, coarse.bias + code, kBiasBytes, full);
        }
        turn.next(plan.stages);
      }
    }
  }
}

// Begins a group of products, of kSteps times 16 channels.
template <int kSteps>
__device__ void multiply_chunk(GroupLists::Scores& scores, uint32_t rows, uint32_t codes) {
  begin_products();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const std::uint64_t b = swizzled_matrix(codes + step * kStepBytes);
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
      multiply_add(scores[m], swizzled_matrix(rows + m * 64 * kVectorBytes + step * kStepBytes), b);
    }
  }
  commit_products();
}

// By a warpgroup.
__device__ void consume(const Coarse& coarse, const Plan& plan, const Shared& shared, int warp) {
  const int lane = threadIdx.x % kWarp;
  const int first_row = warp / kGroupWarps * (kBlockRows / kGroups);
  const int64_t chunks = coarse.code_packing.chunks, items = plan.row_blocks * plan.splits;
  Turn turn;
  uint32_t row_parity = 0;
  for (int64_t number = blockIdx.x; number < items; number += gridDim.x) {
    const Item item(number, coarse, plan);
    GroupLists lists(coarse, item.split,
                     item.row_block * kBlockRows + first_row + warp % kGroupWarps * 16);
    wait_for_phase(shared.rows_full, row_parity);
    row_parity ^= 1;
    for (int64_t code = item.first; code < item.last; code += kBlockCodes) {
      GroupLists::Scores scores;
      wait_for_phase(shared.full_at(turn.stage), turn.parity);
      const uint32_t bias = shared.biases + turn.stage * kBiasBytes + lane % 4 * 8;
#pragma unroll
      for (int n = 0; n < kBlockCodes / 8; ++n) {
        const float2 start = load_pair(bias + n * 32);
#pragma unroll
        for (int m = 0; m < kProducts; ++m) {
          scores[m][n][0] = scores[m][n][2] = start.x;
          scores[m][n][1] = scores[m][n][3] = start.y;
        }
      }
      uint32_t rows = shared.rows + first_row * kVectorBytes;
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        multiply_chunk<kChunk / 16>(scores, rows, shared.codes + turn.stage * kCodeBytes);
        // Those before are done: their stage is free.
        wait_for_products<1>();
        if (chunk > 1 && lane == 0) arrive(shared.empty_at(turn.before(plan.stages)));
        rows += kRowBytes;
        turn.next(plan.stages);
        wait_for_phase(shared.full_at(turn.stage), turn.parity);
      }
      const uint32_t codes = shared.codes + turn.stage * kCodeBytes;
      switch (coarse.last_steps) {
        case 1:
          multiply_chunk<1>(scores, rows, codes);
          break;
        case 2:
          multiply_chunk<2>(scores, rows, codes);
          break;
        case 3:
          multiply_chunk<3>(scores, rows, codes);
          break;
        default:
          multiply_chunk<4>(scores, rows, codes);
      }
      wait_for_products<0>();
#pragma unroll
      for (int m = 0; m < kProducts; ++m) settle(scores[m]);
      if (lane == 0) {
        if (chunks > 1) arrive(shared.empty_at(turn.before(plan.stages)));
        arrive(shared.empty_at(turn.stage));
      }
      turn.next(plan.stages);
      lists.look(scores, static_cast<int>(code));
    }
    lists.store();
    if (lane == 0) arrive(shared.rows_empty);
  }
}

#endif

__global__ void __launch_bounds__(kThreads, 1) coarse_hopper_kernel(Coarse coarse, Plan plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ std::uint64_t barriers[2 * kMostStages + 2];
  extern __shared__ __align__(128) unsigned char dynamic[];
  Shared shared;
  shared.rows = (shared_address(dynamic) + kAlignment - 1) / kAlignment * kAlignment;
  shared.codes = shared.rows + static_cast<uint32_t>(coarse.row_packing.chunks) * kRowBytes;
  shared.biases = shared.codes + plan.stages * kCodeBytes;
  shared.full = shared_address(barriers);
  shared.empty = shared.full + kMostStages * 8;
  shared.rows_full = shared.empty + kMostStages * 8;
  shared.rows_empty = shared.rows_full + 8;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < plan.stages; ++stage) {
      init_barrier(shared.full_at(stage), 1);
      init_barrier(shared.empty_at(stage), kConsumerWarps);
    }
    init_barrier(shared.rows_full, 1);
    init_barrier(shared.rows_empty, kConsumerWarps);
    publish_barriers();
  }
  __syncthreads();
  // The same in all lanes, which the compiler could not know otherwise.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);
  if (warp < kConsumerWarps) {
    grow_registers<kProductRegisters>();
    consume(coarse, plan, shared, warp);
  } else {
    shrink_registers<kCopyRegisters>();
    if (threadIdx.x == kConsumerWarps * kWarp) produce(coarse, plan, shared);
  }
#else
  __trap();
#endif
}

// As many splits as make the blocks of 132 multiprocessors end together, each of 2 tiles or more.
int64_t split_count(int64_t n, int64_t k) {
  constexpr int64_t kProcessors = 132, kMostSplits = 64, kFewestTiles = 2;
  const int64_t blocks = (n + kBlockRows - 1) / kBlockRows;
  const int64_t tiles = (k + kBlockCodes - 1) / kBlockCodes;
  int64_t best = 1, least = INT64_MAX;
  for (int64_t splits = 1; splits <= kMostSplits && splits * kFewestTiles <= tiles; ++splits) {
    const int64_t turns = (blocks * splits + kProcessors - 1) / kProcessors;
    // In tiles: a turn costs about one besides, for its rows and lists.
    const int64_t time = turns * ((tiles + splits - 1) / splits + 1);
    if (time < least) {
      least = time;
      best = splits;
    }
  }
  return best;
}

void launch_coarse(const Coarse& coarse, int64_t row_blocks, int64_t tiles_per_split,
                   int64_t splits, int device, cudaStream_t stream) {
  constexpr const char* kOp = "vq_nearest";
  int most = 0, processors = 0;
  cuda_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp);
  cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), kOp);
  const int rows = static_cast<int>(coarse.row_packing.chunks) * kRowBytes + kAlignment;
  constexpr int kBarrierBytes = 256;  // and what aligns them
  const int fitting = (most - rows - kBarrierBytes) / kStageBytes;
  const Plan plan{fitting < kMostStages ? fitting : kMostStages, row_blocks, tiles_per_split,
                  splits};
  const int shared = rows + plan.stages * kStageBytes;
  cuda_check(cudaFuncSetAttribute(coarse_hopper_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shared),
             kOp);
  const int64_t items = row_blocks * splits;
  const auto blocks = static_cast<unsigned>(items < processors ? items : processors);
  coarse_hopper_kernel<<<blocks, kThreads, shared, stream>>>(coarse, plan);
}

constexpr CoarseRoad kRoad{kBlockRows, kBlockCodes, kChunk, true, 1, split_count, launch_coarse};

}  // namespace

// Whether the current device runs code for sm_90a: only there the kernel has barriers.
bool hopper_is_built() {
  cudaFuncAttributes attributes{};
  cuda_check(cudaFuncGetAttributes(&attributes, coarse_hopper_kernel), "vq_nearest");
  return attributes.sharedSizeBytes > 0;
}

int64_t workspace_size_hopper(int64_t n, const Codes& codes) {
  return workspace_size_coarse(n, codes, kRoad);
}

Prepared nearest_hopper(const AnyRows& x, const Codes& codes, int device, cudaStream_t stream,
                        float* workspace, const Results& results) {
  return nearest_coarse(x, codes, kRoad, device, stream, workspace, results);
}

}  // namespace t2p::vq

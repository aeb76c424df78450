// SPDX-License-Identifier: Apache-2.0
// The logits of mrf_cuda_mma.cu through Hopper's tensor cores:
//
//   x = (mixed W_c^T + unary) / temperature
//
// Labels are the 64 rows of a product and the rows of `mixed` its columns, of which there may be
// any multiple of 8: of 66 rows no more than 80 are multiplied, and W_c is streamed by as many
// blocks as it has tiles of 64 labels. One warpgroup copies chunks of 64 channels, as far ahead as
// there are stages, and one or two multiply; blocks are as many as multiprocessors at most, and go
// on to further tiles. v bfloat16s are the pitch of both matrices, so that neither lies as wgmma
// reads it: 16 bytes at a time are put where its swizzle wants them.
//
// 66 rows of 8192 labels on an H200: the 134 MB of W_c take 31 us at 4.3 TB/s, products 12 us
// beside them. But each of 128 blocks reads the rows too, 138 MB from the L2 cache, which may bound
// it: clusters that share them would lower that. 4096 rows: 2 r v^2 = 550 GFLOP, 0.70 ms at 780
// TFLOP/s; a chunk of 128 labels and 256 rows, 48 KiB, is 1024 clocks of products, and all blocks
// read 48 bytes a clock from the L2 cache. Not yet run on a GPU.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_check.cuh"
#include "common/hopper.cuh"
#include "mrf/mrf.h"
#include "mrf/mrf_cuda.cuh"

namespace t2p::mrf {
namespace {

using std::int64_t;
using std::uint32_t;

constexpr const char* kOp = "mrf_mean_field";

constexpr int kGroupWarps = 4, kGroupThreads = kGroupWarps * kWarp;
constexpr int kGroupLabels = 64;  // of a warpgroup
constexpr int kPartWarps = 2;     // that reduce a part of labels together
constexpr int kChunk = 64;        // channels of a stage
constexpr int kVectorBytes = kChunk * 2;
constexpr int kAlignment = 1024;  // of what is swizzled
constexpr int kMostShared = 227 << 10, kBarrierBytes = 256;

// A block's tile: kGroupsOfBlock warpgroups of 64 labels by kRowsOfBlock rows.
template <int kGroupsOfBlock, int kRowsOfBlock>
struct Tile {
  static constexpr int kGroups = kGroupsOfBlock, kLabels = kGroups * kGroupLabels;
  static constexpr int kRowTiles = kRowsOfBlock / 8, kRows = kRowTiles * 8;
  static constexpr int kConsumerWarps = kGroups * kGroupWarps;
  static constexpr int kParts = kConsumerWarps / kPartWarps;
  static constexpr int kBlock = (kGroups + 1) * kGroupThreads;  // threads; the last group copies
  static constexpr int kLabelBytes = kLabels * kVectorBytes;
  static constexpr int kStageBytes = kLabelBytes + kRows * kVectorBytes;
  // The maximum and sum of 16 labels, of each warp and row.
  static constexpr int kReduced = kParts * kPartWarps * kRows;
  static constexpr int kFixedBytes =
      kAlignment + kBarrierBytes + kReduced * static_cast<int>(sizeof(float2));
  static constexpr int kFitting = (kMostShared - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFitting < 12 ? kFitting : 12;
  static constexpr int kShared = kAlignment + kStages * kStageBytes;
  // How many chunks are begun before one is waited for and told. A stage is free when the products
  // after it have begun: with one more ahead all would wait for each other.
  static constexpr int kAhead = kStages <= 4 ? 1 : kStages * 2 / 3;
  static_assert(kAhead <= kStages - 2);
  static_assert(kStageBytes % kAlignment == 0 && kLabelBytes % kAlignment == 0);
};
// The first three are for few rows, where W_c is read but once and what counts is that all of the
// device reads: blocks of few labels are many. The others are for products.
using Few = Tile<1, 32>;
using Some = Tile<1, 80>;
using More = Tile<1, 128>;
using Square = Tile<2, 128>;
using Wide = Tile<2, 256>;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kWarpLabels = kGroupLabels / kGroupWarps;
static_assert(kWarpLabels * kPartWarps == kPart);
constexpr int kPieces = 8;  // of 16 bytes in a vector, which is a label's or a row's chunk
constexpr int kStepBytes = 32;
// Of the 168 that a thread of 384 may have at most, those of the last group go to the others.
constexpr int kCopyRegisters = 40, kProductRegisters = 232;

struct Shared {
  uint32_t stages;       // labels, then rows of each
  uint32_t full, empty;  // barriers, one for each stage
  uint32_t parts;        // barriers, one for each part
  float2* reduced;       // [warp][row]

  __device__ uint32_t full_at(int stage) const { return full + stage * 8; }
  __device__ uint32_t empty_at(int stage) const { return empty + stage * 8; }
};

// The stage whose turn it is, and the parity of its phase.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ int before() const { return stage == 0 ? kStages - 1 : stage - 1; }
};

// What a block works on. Blocks that run side by side have the same labels where there are several
// blocks of rows, so that W_c is read from memory once.
template <class T>
struct Item {
  int64_t row, label;  // the first ones

  __device__ Item(int64_t number, int64_t row_blocks)
      : row(number % row_blocks * T::kRows), label(number / row_blocks * T::kLabels) {}
};

// Copies a tile's labels and rows, a chunk of channels after the other. A thread has a piece of
// every kAtOnce-th vector.
template <class T>
class Loader {
 public:
  __device__ Loader(const LabelStep& step, const Item<T>& item, int thread) {
    const int vector = thread / kPieces, piece = thread % kPieces;
    const int64_t label = item.label + vector, row = item.row + vector, channel = piece * 8;
    labels_ = reinterpret_cast<const char*>(step.w_c) + (label * step.v + channel) * 2;
    rows_ = reinterpret_cast<const char*>(step.mixed) + (row * step.v + channel) * 2;
    pitch_ = step.v * kAtOnce * 2;
    labels_left_ = static_cast<int>(min(step.v - label, int64_t{T::kLabels}));
    rows_left_ = static_cast<int>(min(step.r - row, int64_t{T::kRows}));
    channels_left_ = step.v - channel;
    // Piece p of vector v is at 16 (p ^ v % 8), the swizzle of 128 bytes.
    to_ = vector * kVectorBytes + (piece ^ (vector % kPieces)) * 16;
  }

  // Begins to copy the next chunk, and zeros in the place of what is beyond the ragged ends.
  __device__ void next(uint32_t stage) {
    const uint32_t to = stage + to_;
    const bool inside = channels_left_ > 0;
#pragma unroll
    for (int i = 0; i < T::kLabels / kAtOnce; ++i) {
      copy_async(to + i * kAtOnce * kVectorBytes, labels_ + i * pitch_,
                 inside && i * kAtOnce < labels_left_ ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < T::kRows / kAtOnce; ++i) {
      copy_async(to + T::kLabelBytes + i * kAtOnce * kVectorBytes, rows_ + i * pitch_,
                 inside && i * kAtOnce < rows_left_ ? 16 : 0);
    }
    labels_ += kVectorBytes;
    rows_ += kVectorBytes;
    channels_left_ -= kChunk;
  }

 private:
  static constexpr int kAtOnce = kGroupThreads / kPieces;  // vectors that a group copies together
  static_assert(kAtOnce % kPieces == 0 && T::kRows % kAtOnce == 0 && T::kLabels % kAtOnce == 0);

  const char *labels_, *rows_;
  int64_t pitch_, channels_left_;
  int labels_left_, rows_left_;
  uint32_t to_;
};

// What a warp has copied and waited for is there: one arrival, as 32 would have to queue.
__device__ void tell(uint32_t full, int thread) {
  show_stores();
  __syncwarp();
  if (thread % kWarp == 0) arrive(full);
}

// By a warpgroup.
template <class T>
__device__ void produce(const LabelStep& step, int64_t row_blocks, int64_t items, int64_t chunks,
                        const Shared& shared, int thread) {
  Turn<T::kStages> turn, told;
  int untold = 0;
  for (int64_t number = blockIdx.x; number < items; number += gridDim.x) {
    Loader<T> loader(step, Item<T>(number, row_blocks), thread);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      wait_for_phase(shared.empty_at(turn.stage), turn.parity ^ 1);
      loader.next(shared.stages + turn.stage * T::kStageBytes);
      commit_copies();
      turn.next();
      if (untold < T::kAhead) {
        ++untold;
        continue;
      }
      wait_for_copies<T::kAhead>();
      tell(shared.full_at(told.stage), thread);
      told.next();
    }
  }
  wait_for_copies<0>();
  for (; untold > 0; --untold) {
    tell(shared.full_at(told.stage), thread);
    told.next();
  }
}

// Two warps have a part of labels between them.
__device__ void wait_for_partner(uint32_t barrier, uint32_t parity) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) arrive(barrier);
  wait_for_phase(barrier, parity);
}

// For lanes that differ in lane / 4.
template <class Combine>
__device__ float reduce_of_eight(float value, Combine combine) {
#pragma unroll
  for (int step = 4; step < kWarp; step *= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

// Where all are ruled out the sum is 0, and still NaN if one is.
__device__ float offset_of(float most) { return most == -infinity() ? 0.0f : most; }

// Of a warp's 16 labels and all rows the x, and of each row the maximum and sum of a part, which
// is two warps' labels.
template <class T>
__device__ void finish(const LabelStep& step, ProductOf<T::kRows>& sums, const Item<T>& item,
                       float inverse_temperature, const Shared& shared, int warp) {
  constexpr int kBatch = T::kRowTiles % 4 == 0 ? 4 : 5;  // whose scores are read together
  static_assert(T::kRowTiles % kBatch == 0);
  const int lane = threadIdx.x % kWarp, column = lane % 4 * 2, part = warp / kPartWarps;
  const int64_t first = item.label + warp * kWarpLabels, v = step.v;
  const bool inside[] = {first < v, first + 8 < v};  // v is a multiple of 8
  const int64_t start = (item.row + column) * v + first + lane / 4;
  const int rows_left = static_cast<int>(min(step.r - item.row, int64_t{T::kRows})) - column;
  const uint32_t barrier = shared.parts + part * 8;
  wait_for_partner(barrier, 0);  // who may still read what is there of the tile before
#pragma unroll
  for (int batch = 0; batch < T::kRowTiles; batch += kBatch) {
    float scores[kBatch][4];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = (batch + i) * 8 + j % 2;
        const bool is_there = row < rows_left && inside[j / 2];
        scores[i][j] = is_there ? __ldg(step.unary + start + row * v + j / 2 * 8) : -infinity();
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = (batch + i) * 8 + e;
        float x[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          x[half] = (sums[batch + i][half * 2 + e] + scores[i][half * 2 + e]) * inverse_temperature;
          if (row < rows_left && inside[half]) step.logits[start + row * v + half * 8] = x[half];
        }
        const float most = reduce_of_eight(fmaxf(x[0], x[1]), Larger()), offset = offset_of(most);
        const float sum = reduce_of_eight(expf(x[0] - offset) + expf(x[1] - offset), Sum());
        if (lane < 4) shared.reduced[warp * T::kRows + row + column] = {most, sum};
      }
    }
  }
  wait_for_partner(barrier, 1);
  if (first - warp % kPartWarps * kWarpLabels >= v) return;
  const int64_t at = item.label / kPart + part;
  const float2* const low = shared.reduced + part * kPartWarps * T::kRows;
  for (int row = threadIdx.x % (kPartWarps * kWarp); row < T::kRows; row += kPartWarps * kWarp) {
    if (item.row + row >= step.r) break;
    const float2 a = low[row], b = low[T::kRows + row];
    const float most = fmaxf(a.x, b.x), offset = offset_of(most);
    const float sum = fmaf(a.y, expf(a.x - offset), b.y * expf(b.x - offset));
    reinterpret_cast<float2*>(step.sums)[(item.row + row) * step.parts + at] = {most, sum};
  }
}

// By a warpgroup.
template <class T>
__device__ void consume(const LabelStep& step, int64_t row_blocks, int64_t items, int64_t chunks,
                        const Shared& shared, float inverse_temperature, int warp) {
  const bool tells = threadIdx.x % kWarp == 0;
  const uint32_t labels = shared.stages + warp / kGroupWarps * kGroupLabels * kVectorBytes;
  const uint32_t rows = shared.stages + T::kLabelBytes;
  Turn<T::kStages> turn;
  for (int64_t number = blockIdx.x; number < items; number += gridDim.x) {
    ProductOf<T::kRows> sums;
#pragma unroll
    for (int n = 0; n < T::kRowTiles; ++n) {
      sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0;
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      wait_for_phase(shared.full_at(turn.stage), turn.parity);
      begin_products();
#pragma unroll
      for (int k = 0; k < kChunk / 16; ++k) {
        const uint32_t at = turn.stage * T::kStageBytes + k * kStepBytes;
        multiply_add(sums, swizzled_matrix(labels + at), swizzled_matrix(rows + at));
      }
      commit_products();
      // Those before are done: their stage is free.
      wait_for_products<1>();
      if (chunk > 0 && tells) arrive(shared.empty_at(turn.before()));
      turn.next();
    }
    wait_for_products<0>();
    settle(sums);
    if (tells) arrive(shared.empty_at(turn.before()));
    finish<T>(step, sums, Item<T>(number, row_blocks), inverse_temperature, shared, warp);
  }
}

#endif

template <class T>
__global__ void __launch_bounds__(T::kBlock, 1)
    logits_hopper_kernel(const LabelStep step, int64_t row_blocks, int64_t items,
                         float inverse_temperature) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ std::uint64_t barriers[2 * T::kStages + T::kParts];
  __shared__ float2 reduced[T::kReduced];
  extern __shared__ __align__(128) unsigned char dynamic[];
  Shared shared;
  shared.stages = (shared_address(dynamic) + kAlignment - 1) / kAlignment * kAlignment;
  shared.full = shared_address(barriers);
  shared.empty = shared.full + T::kStages * 8;
  shared.parts = shared.empty + T::kStages * 8;
  shared.reduced = reduced;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < T::kStages; ++stage) {
      init_barrier(shared.full_at(stage), kGroupWarps);
      init_barrier(shared.empty_at(stage), T::kConsumerWarps);
    }
    for (int part = 0; part < T::kParts; ++part) init_barrier(shared.parts + part * 8, kPartWarps);
  }
  __syncthreads();
  // The same in all lanes, which the compiler could not know otherwise.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);
  const int64_t chunks = (step.v + kChunk - 1) / kChunk;
  if (warp < T::kConsumerWarps) {
    if constexpr (T::kGroups > 1) grow_registers<kProductRegisters>();
    consume<T>(step, row_blocks, items, chunks, shared, inverse_temperature, warp);
  } else {
    if constexpr (T::kGroups > 1) shrink_registers<kCopyRegisters>();
    produce<T>(step, row_blocks, items, chunks, shared,
               static_cast<int>(threadIdx.x) - T::kConsumerWarps * kWarp);
  }
#else
  __trap();
#endif
}

template <class T>
int64_t row_blocks_of(const LabelStep& step) {
  return (step.r + T::kRows - 1) / T::kRows;
}

template <class T>
int64_t items_of(const LabelStep& step) {
  return row_blocks_of<T>(step) * ((step.v + T::kLabels - 1) / T::kLabels);
}

template <class T>
void launch(const LabelStep& step, int64_t processors, cudaStream_t stream) {
  cuda_check(cudaFuncSetAttribute(logits_hopper_kernel<T>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, T::kShared),
             kOp);
  const int64_t items = items_of<T>(step);
  const unsigned blocks = grid_size(items < processors ? items : processors, kOp);
  logits_hopper_kernel<T><<<blocks, T::kBlock, T::kShared, stream>>>(step, row_blocks_of<T>(step),
                                                                     items, 1 / step.temperature);
  check_launch(kOp);
}

}  // namespace

// Whether the current device runs code for sm_90a: only there the kernel has barriers.
bool hopper_is_built() {
  cudaFuncAttributes attributes{};
  cuda_check(cudaFuncGetAttributes(&attributes, logits_hopper_kernel<Wide>), kOp);
  return attributes.sharedSizeBytes > 0;
}

void logits_hopper(const LabelStep& step, int processors, cudaStream_t stream) {
  // Wide tiles take twice as long, and read less.
  const auto turns = [&](int64_t items) { return (items + processors - 1) / processors; };
  const bool wide = 2 * turns(items_of<Wide>(step)) <= turns(items_of<Square>(step));
  const auto run = step.r <= Few::kRows    ? launch<Few>
                   : step.r <= Some::kRows ? launch<Some>
                   : step.r <= More::kRows ? launch<More>
                   : wide                  ? launch<Wide>
                                           : launch<Square>;
  run(step, processors, stream);
}

}  // namespace t2p::mrf

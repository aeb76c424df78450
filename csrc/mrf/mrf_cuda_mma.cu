// SPDX-License-Identifier: Apache-2.0
// Iterations with dense bfloat16 label weights, for compute capability 8.0 and newer:
//
//   x    = (mixed W_c^T + unary) / temperature
//   next = (1 - damping) softmax(x) + damping previous
//
// logits_kernel, or on Hopper that of mrf_cuda_hopper.cu, forms a tile of x by tensor cores, and
// writes it out once in float32, with the maximum and the sum of exponentials of every 32 labels of
// a row. softmax_kernel makes next of them. Every x is summed in the same order whatever the tile,
// so that a row's result does not depend on how many there are.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_check.cuh"
#include "common/mma.cuh"
#include "mrf/mrf.h"
#include "mrf/mrf_cuda.cuh"

namespace t2p::mrf {
namespace {

using std::int64_t;

constexpr const char* kOp = "mrf_mean_field";

constexpr int kChunk = 64;  // channels of a stage
constexpr int kPiece = 8;   // channels in 16 bytes
constexpr int kPieces = kChunk / kPiece;
constexpr int kVectorBytes = kChunk * 2;
constexpr int kSlice = kThreads * kPiece;  // labels of a block of softmax_kernel

// A block's tile: kRowWarps x kLabelWarps warps of kRowTiles x 16 rows by kPart labels, a part.
template <int kRowWarps, int kLabelWarps, int kRowTilesOfWarp, int kStagesOfBlock>
struct Tile {
  static constexpr int kColumns = kLabelWarps, kRowTiles = kRowTilesOfWarp;
  static constexpr int kLabelTiles = kPart / 8, kWarpRows = kRowTiles * 16;
  static constexpr int kRows = kRowWarps * kWarpRows, kLabels = kLabelWarps * kPart;
  static constexpr int kBlock = kRowWarps * kLabelWarps * kWarp;  // threads
  static constexpr int kStages = kStagesOfBlock;
  static constexpr int kStageBytes = (kRows + kLabels) * kVectorBytes;
  static constexpr int kShared = kStages * kStageBytes;
  // What every device since 8.0 gives to a block (8.6, 8.9 and 12.0 the least, 99 KiB).
  static_assert(kShared <= 99 << 10);
};
// The first two are for few rows, where W_c is read but once and what counts is that all of the
// device reads: blocks of few labels are many. The last is for products.
using Low = Tile<2, 2, 2, 6>;   // 64 rows, 64 labels
using Tall = Tile<4, 2, 2, 4>;  // 128 rows, 64 labels
using Wide = Tile<2, 4, 4, 3>;  // 128 rows, 128 labels

int64_t parts_of(int64_t v) { return (v + kPart - 1) / kPart; }

// Of a vector in shared memory, which is a row's or a label's chunk, piece p of 16 bytes is at
// 16 (p ^ vector % 8): the pieces p of 8 vectors in a row lie in different banks.
__device__ std::uint32_t swizzled(int vector, int piece) {
  return vector * kVectorBytes + (piece ^ (vector % kPieces)) * 16;
}

__device__ void store_zeros(std::uint32_t to) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}

// The compiler would rather compute a number again in every round of a loop than keep it.
__device__ void keep(int& number) { asm volatile("" : "+r"(number)); }
__device__ void keep(std::uint32_t& number) { asm volatile("" : "+r"(number)); }

// Copies a tile's rows and labels to shared memory, a chunk of channels after the other. A thread
// has a piece of every kAtOnce-th vector; all that depends on the vector alone is found out once.
template <class T>
class Loader {
 public:
  __device__ Loader(const LabelStep& step, int64_t first_row, int64_t first_label,
                    std::uint32_t stages) {
    const int vector = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    const int64_t row = first_row + vector, label = first_label + vector;
    const int64_t v = step.v, channel = piece * kPiece;
    rows_ = reinterpret_cast<const char*>(step.mixed) + (row * v + channel) * 2;
    labels_ = reinterpret_cast<const char*>(step.w_c) + (label * v + channel) * 2;
    pitch_ = static_cast<std::uint32_t>(v * kAtOnce * 2);
    channels_left_ = static_cast<int>(v - channel);
    rows_left_ = static_cast<int>(min(step.r - row, int64_t{T::kRows}));
    labels_left_ = static_cast<int>(min(v - label, int64_t{T::kLabels}));
    to_ = stages + swizzled(vector, piece);
    keep(pitch_), keep(rows_left_), keep(labels_left_), keep(to_);
    // What is beyond the ragged end is never copied, and stays 0.
    for (int stage = 0; stage < T::kStages; ++stage) {
      const std::uint32_t to = to_ + stage * T::kStageBytes;
      for (int i = 0; i < T::kRows; i += kAtOnce) {
        if (i >= rows_left_) store_zeros(to + i * kVectorBytes);
      }
      for (int i = 0; i < T::kLabels; i += kAtOnce) {
        if (i >= labels_left_) store_zeros(to + (T::kRows + i) * kVectorBytes);
      }
    }
  }

  // Begins to copy the next chunk, and zeros in the place of channels beyond v.
  __device__ void next(int stage) {
    const std::uint32_t to = to_ + stage * T::kStageBytes;
    const int bytes = channels_left_ > 0 ? 16 : 0;
#pragma unroll
    for (int i = 0; i < T::kRows / kAtOnce; ++i) {
      if (i * kAtOnce < rows_left_) {
        copy_async(to + i * kAtOnce * kVectorBytes, rows_ + i * pitch_, bytes);
      }
    }
#pragma unroll
    for (int i = 0; i < T::kLabels / kAtOnce; ++i) {
      if (i * kAtOnce < labels_left_) {
        copy_async(to + (T::kRows + i * kAtOnce) * kVectorBytes, labels_ + i * pitch_, bytes);
      }
    }
    rows_ += kVectorBytes;
    labels_ += kVectorBytes;
    channels_left_ -= kChunk;
  }

 private:
  static constexpr int kAtOnce = T::kBlock / kPieces;  // vectors that all threads copy together
  static_assert(kAtOnce % kPieces == 0 && T::kRows % kAtOnce == 0 && T::kLabels % kAtOnce == 0);

  const char *rows_, *labels_;
  std::uint32_t pitch_, to_;
  int rows_left_, labels_left_, channels_left_;
};

template <class Combine>
__device__ float reduce_of_four(float value, Combine combine) {
  value = combine(value, __shfl_xor_sync(kAllLanes, value, 1));
  return combine(value, __shfl_xor_sync(kAllLanes, value, 2));
}

// Of 16 rows and a part's labels the x, and of each row the part's maximum and sum.
template <class T>
__device__ void finish(const LabelStep& step, float (&sums)[T::kLabelTiles][4], int64_t row,
                       int64_t label, float inverse_temperature) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t at = row + lane / 4 + half * 8;
    float most = -infinity();
#pragma unroll
    for (int n = 0; n < T::kLabelTiles; ++n) {
      const int64_t a = label + n * 8 + lane % 4 * 2;
      float2 x{-infinity(), -infinity()};
      if (at < step.r && a < step.v) {
        const float2 score = *reinterpret_cast<const float2*>(step.unary + at * step.v + a);
        x.x = (sums[n][half * 2] + score.x) * inverse_temperature;
        x.y = (sums[n][half * 2 + 1] + score.y) * inverse_temperature;
        *reinterpret_cast<float2*>(step.logits + at * step.v + a) = x;
      }
      sums[n][half * 2] = x.x;
      sums[n][half * 2 + 1] = x.y;
      most = fmaxf(most, fmaxf(x.x, x.y));
    }
    most = reduce_of_four(most, Larger());
    // Where all are ruled out the sum is 0, and still NaN if one is.
    const float offset = most == -infinity() ? 0.0f : most;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < T::kLabelTiles; ++n) {
      sum += expf(sums[n][half * 2] - offset) + expf(sums[n][half * 2 + 1] - offset);
    }
    sum = reduce_of_four(sum, Sum());
    if (lane % 4 == 0 && at < step.r) {
      reinterpret_cast<float2*>(step.sums)[at * step.parts + label / kPart] = {most, sum};
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kBlock)
    logits_kernel(const LabelStep step, float inverse_temperature) {
  extern __shared__ __align__(128) unsigned char shared[];
  const std::uint32_t stages = shared_address(shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_row = warp / T::kColumns * T::kWarpRows, warp_label = warp % T::kColumns * kPart;
  const int64_t first_row = blockIdx.x * int64_t{T::kRows};
  const int64_t first_label = blockIdx.y * int64_t{T::kLabels};
  // Where the tile is ragged, some warps only help to copy.
  int busy = first_row + warp_row < step.r && first_label + warp_label < step.v;

  Loader<T> loader(step, first_row, first_label, stages);
  int chunks = static_cast<int>((step.v + kChunk - 1) / kChunk), loaded = 0;
  const auto load_next = [&](int stage) {
    if (loaded++ < chunks) loader.next(stage);
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < T::kStages - 1; ++stage) load_next(stage);

  // Of A the rows lane % 16, of B the labels of two fragments side by side; 16 channels further the
  // piece is another by 2, which the swizzle leaves a change of one bit.
  std::uint32_t row_offset = stages + swizzled(warp_row + lane % 16, lane / 16);
  std::uint32_t label_offset =
      stages + swizzled(T::kRows + warp_label + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  float sums[T::kRowTiles][T::kLabelTiles][4] = {};
  keep(busy), keep(chunks), keep(row_offset), keep(label_offset);
  int stage = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_for_copies<T::kStages - 2>();
    __syncthreads();
    load_next(stage == 0 ? T::kStages - 1 : stage - 1);
    const std::uint32_t rows = row_offset + stage * T::kStageBytes;
    const std::uint32_t labels = label_offset + stage * T::kStageBytes;
    stage = stage == T::kStages - 1 ? 0 : stage + 1;
    if (!busy) continue;
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      std::uint32_t a[T::kRowTiles][4], b[T::kLabelTiles / 2][4];
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        load_matrices(a[m], (rows ^ (k * 32)) + m * 16 * kVectorBytes);
      }
#pragma unroll
      for (int p = 0; p < T::kLabelTiles / 2; ++p) {
        load_matrices(b[p], (labels ^ (k * 32)) + p * 16 * kVectorBytes);
      }
#pragma unroll
      for (int n = 0; n < T::kLabelTiles; ++n) {
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
          multiply_add(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
  }
  if (!busy) return;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
    finish<T>(step, sums[m], first_row + warp_row + m * 16, first_label + warp_label,
              inverse_temperature);
  }
}

// Eight values from `at` on, a multiple of 8.
__device__ void get_eight(Values values, int64_t at, float (&to)[kPiece]) {
  if (values.format == Format::kF32) {
    const auto* from = reinterpret_cast<const float4*>(static_cast<const float*>(values.data) + at);
    const float4 low = from[0], high = from[1];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
    return;
  }
  const uint4 words =
      *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(values.data) + at);
  const std::uint32_t pairs[] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(pairs[i] << 16);
    to[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

__device__ void put_eight(MutableValues values, int64_t at, const float (&from)[kPiece]) {
  if (values.format == Format::kF32) {
    auto* to = reinterpret_cast<float4*>(static_cast<float*>(values.data) + at);
    to[0] = {from[0], from[1], from[2], from[3]};
    to[1] = {from[4], from[5], from[6], from[7]};
    return;
  }
  std::uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    pairs[i] = *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(values.data) + at) = {pairs[0], pairs[1],
                                                                              pairs[2], pairs[3]};
}

// A block makes kSlice labels of a row; what its parts come to, each block finds out for itself.
__global__ void __launch_bounds__(kThreads)
    softmax_kernel(const LabelStep step, int64_t slices, MutableValues next) {
  __shared__ float shared[kWarps];
  const int64_t row = blockIdx.x / slices;
  const float2* const parts = reinterpret_cast<const float2*>(step.sums) + row * step.parts;
  float most = -infinity();
  for (int64_t i = threadIdx.x; i < step.parts; i += kThreads) most = fmaxf(most, parts[i].x);
  most = block_reduce<kWarps>(most, shared, Larger());
  float sum = 0;
  for (int64_t i = threadIdx.x; i < step.parts; i += kThreads) {
    sum = fmaf(parts[i].y, expf(parts[i].x - most), sum);
  }
  sum = block_reduce<kWarps>(sum, shared, Sum());
  const float share = (1 - step.damping) / sum;
  const int64_t a = blockIdx.x % slices * kSlice + threadIdx.x * kPiece, at = row * step.v + a;
  if (a >= step.v) return;
  float values[kPiece], before[kPiece] = {};
  get_eight({step.logits, Format::kF32}, at, values);
  if (step.previous.data) get_eight(step.previous, at, before);
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    values[i] = fmaf(step.damping, before[i], expf(values[i] - most) * share);
  }
  put_eight(next, at, values);
}

template <class T>
int64_t blocks_of(const LabelStep& step) {
  return (step.r + T::kRows - 1) / T::kRows * ((step.v + T::kLabels - 1) / T::kLabels);
}

template <class T>
void launch_logits(const LabelStep& step, cudaStream_t stream) {
  cuda_check(cudaFuncSetAttribute(logits_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  T::kShared),
             kOp);
  const dim3 grid(grid_size((step.r + T::kRows - 1) / T::kRows, kOp),
                  static_cast<unsigned>((step.v + T::kLabels - 1) / T::kLabels));
  logits_kernel<T><<<grid, T::kBlock, T::kShared, stream>>>(step, 1 / step.temperature);
  check_launch(kOp);
}

}  // namespace

int64_t label_parts_cuda(int64_t v, int device) {
  if (v % kPiece != 0) return 0;
  int major = 0;
  cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp);
  return major >= 8 ? parts_of(v) : 0;
}

// The floor for 66 rows of 8192 labels on an H200: the 134 MB of W_c at 4.3 TB/s, 31 us. For 4096
// rows 2 r v^2 = 550 GFLOP, 0.70 ms at the 780 TFLOP/s of wgmma (mma.sync reaches less of it); 400
// MB of logits and scores, 0.1 ms. Not yet run on a GPU. Compute capability 9.0 is the only one
// that has wgmma.
void label_step_cuda(const LabelStep& step, int device, void* stream, MutableValues next) {
  if (step.r == 0) return;
  const DeviceGuard guard(device, kOp);
  const auto queue = static_cast<cudaStream_t>(stream);
  int processors = 0, major = 0;
  cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), kOp);
  cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp);
  if (major == 9 && hopper_is_built()) {
    logits_hopper(step, processors, queue);
  } else {
    const auto launch = step.r <= Low::kRows                  ? launch_logits<Low>
                        : blocks_of<Wide>(step) >= processors ? launch_logits<Wide>
                                                              : launch_logits<Tall>;
    launch(step, queue);
  }
  const int64_t slices = (step.v + kSlice - 1) / kSlice;
  softmax_kernel<<<grid_size(step.r * slices, kOp), kThreads, 0, queue>>>(step, slices, next);
  check_launch(kOp);
}

}  // namespace t2p::mrf

// SPDX-License-Identifier: Apache-2.0
// The scores of the road through tensor cores as they are since compute capability 8.0: a block
// holds those of 256 rows and 128 codes in registers, and each of its two columns of warps has
// lists of its own. What comes before and after is in vq_cuda_coarse.cu.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_check.cuh"
#include "common/mma.cuh"
#include "vq/vq_cuda.cuh"
#include "vq/vq_cuda_coarse.cuh"
#include "vq/vq_cuda_lists.cuh"

namespace t2p::vq {
namespace {

using std::int64_t;

// A block's tile: 4 x 2 warps of 64 rows by 64 codes, 32 channels at a time in three stages.
constexpr int kBlockRows = 256, kBlockCodes = 128, kStages = 3;
constexpr int kColumns = 2, kThreads = 256;
constexpr int kWarpTile = 64, kRowTiles = kWarpTile / 16, kCodeTiles = kWarpTile / 8;
constexpr int kChunk = 32;                // channels
constexpr int kPieces = kChunk / 8;       // of 16 bytes, in a vector's chunk
constexpr int kVectorBytes = kChunk * 2;  // of a chunk
constexpr int kRowSlot = kBlockRows * kVectorBytes;
constexpr int kBiasBytes = kBlockCodes * 4, kCodeSlot = kBlockCodes * kVectorBytes + kBiasBytes;

// Shared memory holds kStages slots of codes, then of rows as many as `row_slots`: where all of the
// rows' chunks have a slot they are loaded once. In a slot, vector v has its piece p of 16 bytes at
// 64 v + 16 (p ^ v / 2 % 4): the pieces p of 8 vectors in a row lie in different banks.
__device__ std::uint32_t swizzled(int vector, int piece) {
  return vector * kVectorBytes + (piece ^ (vector / 2 % kPieces)) * 16;
}

class Pipeline {
 public:
  __device__ Pipeline(const Coarse& coarse, int row_slots)
      : coarse_(coarse), resident_(row_slots >= coarse.code_packing.chunks) {
    extern __shared__ __align__(128) unsigned char shared[];
    codes_ = shared_address(shared);
    rows_ = codes_ + kStages * kCodeSlot;
  }

  __device__ std::uint32_t code_slot(int stage) const { return codes_ + stage * kCodeSlot; }
  __device__ std::uint32_t row_slot(int stage, int64_t chunk) const {
    return rows_ + (resident_ ? static_cast<int>(chunk) : stage) * kRowSlot;
  }

  // Begins to load a chunk of the codes from `code` on, and of the block's rows if not there.
  __device__ void load(int stage, int64_t chunk, int64_t code, bool first_tile) const {
    const int e = threadIdx.x;
    const std::uint32_t to = swizzled(e / kPieces, e % kPieces);
    constexpr int kAtOnce = kThreads / kPieces;  // vectors that all threads copy together
    const __nv_bfloat16* from =
        coarse_.codes + (chunk * coarse_.padded_codes + code) * kChunk + e * 8;
#pragma unroll
    for (int i = 0; i < kBlockCodes / kAtOnce; ++i) {
      copy_async(code_slot(stage) + to + i * kAtOnce * kVectorBytes, from + i * kAtOnce * kChunk);
    }
    if (chunk == 0 && e < kBiasBytes / 16) {
      copy_async(code_slot(stage) + kCodeSlot - kBiasBytes + e * 16, coarse_.bias + code + e * 4);
    }
    if (resident_ && !first_tile) return;
    from = coarse_.rows +
           (chunk * coarse_.padded_rows + blockIdx.x * int64_t{kBlockRows}) * kChunk + e * 8;
#pragma unroll
    for (int i = 0; i < kBlockRows / kAtOnce; ++i) {
      copy_async(row_slot(stage, chunk) + to + i * kAtOnce * kVectorBytes,
                 from + i * kAtOnce * kChunk);
    }
  }

 private:
  const Coarse& coarse_;
  const bool resident_;
  std::uint32_t codes_, rows_;
};

using WarpLists = Lists<kRowTiles, kCodeTiles, 16>;

__global__ void __launch_bounds__(kThreads, 1)
    coarse_kernel(Coarse coarse, int64_t tiles_per_split, int row_slots) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_row = warp / kColumns * kWarpTile, warp_code = warp % kColumns * kWarpTile;
  const int64_t chunks = coarse.code_packing.chunks;
  const Pipeline pipeline(coarse, row_slots);
  WarpLists lists(coarse, blockIdx.y * kColumns + warp % kColumns,
                  blockIdx.x * int64_t{kBlockRows} + warp_row);

  const int64_t first = blockIdx.y * tiles_per_split * kBlockCodes;
  const int64_t last = min(coarse.padded_codes, first + tiles_per_split * kBlockCodes);
  int64_t loaded_code = first, loaded_chunk = 0;
  const auto load_next = [&](int stage) {
    if (loaded_code < last) {
      pipeline.load(stage, loaded_chunk, loaded_code, loaded_code == first);
      if (++loaded_chunk == chunks) {
        loaded_chunk = 0;
        loaded_code += kBlockCodes;
      }
    }
    commit_copies();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) load_next(stage);

  // Of A the rows lane % 16, of B the codes of two fragments side by side; 16 channels further the
  // piece is another by 2, which the swizzle leaves a change of one bit.
  const std::uint32_t row_offset = swizzled(warp_row + lane % 16, lane / 16);
  const std::uint32_t code_offset = swizzled(warp_code + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  int stage = 0;
  for (int64_t code = first; code < last; code += kBlockCodes) {
    WarpLists::Scores scores;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      wait_for_copies<kStages - 2>();
      __syncthreads();
      load_next(stage == 0 ? kStages - 1 : stage - 1);
      const std::uint32_t code_slot = pipeline.code_slot(stage);
      if (chunk == 0) {
        const std::uint32_t bias =
            code_slot + kCodeSlot - kBiasBytes + (warp_code + lane % 4 * 2) * 4;
#pragma unroll
        for (int n = 0; n < kCodeTiles; ++n) {
          const float2 start = load_pair(bias + n * 32);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            scores[m][n][0] = scores[m][n][2] = start.x;
            scores[m][n][1] = scores[m][n][3] = start.y;
          }
        }
      }
#pragma unroll
      for (int half = 0; half < kChunk / 16; ++half) {
        std::uint32_t a[kRowTiles][4], b[kCodeTiles / 2][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          load_matrices(a[m], pipeline.row_slot(stage, chunk) +
                                  ((row_offset + m * 16 * kVectorBytes) ^ (half * 32)));
        }
#pragma unroll
        for (int p = 0; p < kCodeTiles / 2; ++p) {
          load_matrices(b[p], code_slot + ((code_offset + p * 16 * kVectorBytes) ^ (half * 32)));
        }
#pragma unroll
        for (int n = 0; n < kCodeTiles; ++n) {
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            multiply_add(scores[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
          }
        }
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    lists.look(scores, static_cast<int>(code) + warp_code);
  }
  lists.store();
}

// Where row blocks alone do not fill the device the codes are split as well, to two tiles or more.
int64_t split_count(int64_t n, int64_t k) {
  constexpr int64_t kBlocksWanted = 528, kFewestTiles = 2;  // 4 for 132 multiprocessors
  const int64_t most = (k + kBlockCodes - 1) / kBlockCodes / kFewestTiles;
  const int64_t splits = kBlocksWanted / ((n + kBlockRows - 1) / kBlockRows);
  return splits < 1 || most < 1 ? 1 : (splits < most ? splits : most);
}

// Slots for all chunks of a block's rows, if so much shared memory is there.
int row_slots_for(int64_t chunks, int device) {
  int most = 0;
  cuda_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "vq_nearest");
  return kStages * kCodeSlot + chunks * kRowSlot <= most ? static_cast<int>(chunks) : kStages;
}

void launch_coarse(const Coarse& coarse, int64_t row_blocks, int64_t tiles_per_split,
                   int64_t splits, int device, cudaStream_t stream) {
  const int row_slots = row_slots_for(coarse.row_packing.chunks, device);
  const int shared = kStages * kCodeSlot + row_slots * kRowSlot;
  cuda_check(
      cudaFuncSetAttribute(coarse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
      "vq_nearest");
  const dim3 grid(static_cast<unsigned>(row_blocks), static_cast<unsigned>(splits));
  coarse_kernel<<<grid, kThreads, shared, stream>>>(coarse, tiles_per_split, row_slots);
}

constexpr CoarseRoad kRoad{kBlockRows, kBlockCodes, kChunk,       false,
                           kColumns,   split_count, launch_coarse};

}  // namespace

int64_t workspace_size_mma(int64_t n, const Codes& codes) {
  return workspace_size_coarse(n, codes, kRoad);
}

// The floor for 65536 x 16384 x 256 on an H200: 2 n k d = 550 GFLOP, 0.70 ms at the 780 TFLOP/s of
// a dense bfloat16 product there (wgmma; mma.sync reaches less of it); 84 MB of rows and codes
// moved once, 0.02 ms at 4.3 TB/s. The tensor cores bind. Not yet run on a GPU.
Prepared nearest_mma(const AnyRows& x, const Codes& codes, int device, cudaStream_t stream,
                     float* workspace, const Results& results) {
  return nearest_coarse(x, codes, kRoad, device, stream, workspace, results);
}

}  // namespace t2p::vq

// SPDX-License-Identifier: Apache-2.0
// The CUDA road through tensor cores, for compute capability 8.0 and newer. All codes are scored in
// bfloat16, and those that two proven bounds let pass, few, compared in float64:
//
//   y = x - m, c = c_j - m, y' and c' their bfloat16    float32, m = about mean(c_j)
//   score[j]  = y'.c' - |c'|^2 / 2                      tensor cores, float32 sums
//   threshold = max(score) - margin(max(score))         vq_cuda_coarse.cuh
//   index     = argmin over {j : score[j] >= threshold} of |x - c_j|^2 in float64
//
// No matrix [n, k] is written: a block holds the scores of 256 rows and 128 codes in registers, and
// each of its two columns of warps keeps for every row the best so far and a short list of the
// codes that pass. That the best only rises makes every code that is left out one that cannot be
// nearest. A row whose list overflows, or whose bounds are of no use, is searched in float32 and
// float64.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

#include "common/cuda_check.cuh"
#include "common/mma.cuh"
#include "vq/vq_cuda.cuh"
#include "vq/vq_cuda_coarse.cuh"

namespace t2p::vq {
namespace {

using std::int64_t;

// A block's tile: 4 x 2 warps of 64 rows by 64 codes, 32 channels at a time in three stages.
constexpr int kBlockRows = 256, kBlockCodes = 128, kStages = 3;
constexpr int kColumns = 2, kThreads = 256;
constexpr int kWarpTile = 64, kRowTiles = kWarpTile / 16, kCodeTiles = kWarpTile / 8;
constexpr int kPieces = kChunk / 8;       // of 16 bytes, in a vector's chunk
constexpr int kVectorBytes = kChunk * 2;  // of a chunk
constexpr int kRowSlot = kBlockRows * kVectorBytes;
constexpr int kBiasBytes = kBlockCodes * 4, kCodeSlot = kBlockCodes * kVectorBytes + kBiasBytes;

// Rows whose workspace is there at a time: 4 blocks for each of 132 multiprocessors.
constexpr int64_t kSlabRows = 528 * kBlockRows;

// Shared memory holds kStages slots of codes, then of rows as many as `row_slots`: where all of the
// rows' chunks have a slot they are loaded once. In a slot, vector v has its piece p of 16 bytes at
// 64 v + 16 (p ^ v / 2 % 4): the pieces p of 8 vectors in a row lie in different banks.
__device__ std::uint32_t swizzled(int vector, int piece) {
  return vector * kVectorBytes + (piece ^ (vector / 2 % kPieces)) * 16;
}

class Pipeline {
 public:
  __device__ Pipeline(const Coarse& coarse, int row_slots)
      : coarse_(coarse), resident_(row_slots >= coarse.chunks) {
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

// What a thread has of its warp's 64 x 64 scores: of rows 16 m + group + 8 h and codes 8 n + 2 t +
// e the element [m][n][2 h + e], lane = 4 group + t.
using Scores = float[kRowTiles][kCodeTiles][4];

// The running bests and lists of a warp's rows. The 4 lanes of a group agree on them.
class Lists {
 public:
  __device__ Lists(const Coarse& coarse, int64_t list, int64_t first_row)
      : first_(first_row + threadIdx.x % kWarp / 4), t_(threadIdx.x % 4) {
    bounds_ = coarse.bounds + first_;
    lists_ = coarse.lists + list * coarse.padded_rows + first_;
    candidates_ = coarse.candidates + (list * coarse.padded_rows + first_) * kCapacity;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      best_[i] = -infinity();
      // What cannot be used scores -inf and never passes; nor does anything for a row given up.
      threshold_[i] = bounds_[8 * i].margin >= 0 ? -FLT_MAX : infinity();
      count_[i] = 0;
    }
  }

  // Looks at the scores of the warp's 64 codes from `code` on.
  __device__ void look(const Scores& scores, int code) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      float top = -infinity();
#pragma unroll
      for (int n = 0; n < kCodeTiles; ++n) {
        top = fmaxf(top, fmaxf(scores[i / 2][n][i % 2 * 2], scores[i / 2][n][i % 2 * 2 + 1]));
      }
      if (__any_sync(kAllLanes, top >= threshold_[i])) note(scores, i, top, code);
    }
  }

  __device__ void store() const {
    if (t_ != 0) return;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) lists_[8 * i] = {best_[i], count_[i]};
  }

 private:
  static constexpr int kSlots = 2 * kRowTiles;  // rows of a thread: first_ + 8 i

  __device__ __forceinline__ void note(const Scores& scores, int i, float top, int code) {
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
    if (top >= threshold_[i] && top > best_[i]) {
      const float threshold = top - bounds_[8 * i].below(top);
      if (threshold > best_[i]) count_[i] = 0;  // none of those noted passes any more
      best_[i] = top;
      threshold_[i] = fmaxf(threshold, threshold_[i]);
    }
    int hits = 0;
#pragma unroll
    for (int u = 0; u < 2 * kCodeTiles; ++u) {
      hits += scores[i / 2][u / 2][i % 2 * 2 + u % 2] >= threshold_[i];
    }
    int upto = hits;  // of this lane and those before it in the group
    for (int step = 1; step < 4; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, upto, step, 4);
      if (t_ >= step) upto += before;
    }
    int at = count_[i] + upto - hits;
    count_[i] = min(count_[i] + __shfl_sync(kAllLanes, upto, 3, 4), kCapacity + 1);
    if (hits == 0) return;
#pragma unroll
    for (int u = 0; u < 2 * kCodeTiles; ++u) {
      const float score = scores[i / 2][u / 2][i % 2 * 2 + u % 2];
      if (score >= threshold_[i]) {
        if (at < kCapacity) {
          candidates_[8 * i * kCapacity + at] = {score, code + u / 2 * 8 + 2 * t_ + u % 2};
        }
        ++at;
      }
    }
  }

  const int64_t first_;
  const int t_;
  const RowBounds* bounds_;
  List* lists_;
  Candidate* candidates_;
  float best_[kSlots], threshold_[kSlots];
  int count_[kSlots];
};

__global__ void __launch_bounds__(kThreads, 1)
    coarse_kernel(Coarse coarse, int64_t tiles_per_split, int row_slots) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_row = warp / kColumns * kWarpTile, warp_code = warp % kColumns * kWarpTile;
  const Pipeline pipeline(coarse, row_slots);
  Lists lists(coarse, blockIdx.y * kColumns + warp % kColumns,
              blockIdx.x * int64_t{kBlockRows} + warp_row);

  const int64_t first = blockIdx.y * tiles_per_split * kBlockCodes;
  const int64_t last = min(coarse.padded_codes, first + tiles_per_split * kBlockCodes);
  int64_t loaded_code = first, loaded_chunk = 0;
  const auto load_next = [&](int stage) {
    if (loaded_code < last) {
      pipeline.load(stage, loaded_chunk, loaded_code, loaded_code == first);
      if (++loaded_chunk == coarse.chunks) {
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
    Scores scores;
    for (int64_t chunk = 0; chunk < coarse.chunks; ++chunk) {
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

// One warp per row: joins the lists and compares those of their codes that still pass.
__global__ void resolve_coarse_kernel(Rows<const float> x, int64_t first, int64_t count,
                                      Prepared codes, Coarse coarse, int lists,
                                      int64_t* __restrict__ indices, float* __restrict__ distance) {
  const int64_t i = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (i >= count) return;
  const int64_t r = first + i;
  const RowBounds bounds = coarse.bounds[i];
  if (isnan(bounds.margin)) {
    if (lane == 0) {
      indices[r] = 0;
      distance[r] = not_a_number();
    }
    return;
  }
  float best = -infinity();
  for (int l = lane; l < lists; l += kWarp) {
    best = fmaxf(best, coarse.lists[l * coarse.padded_rows + i].best);
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, step));
  }
  const float threshold = best - bounds.below(best);
  const float* row = row_pointer(x, r);
  Nearest nearest{infinity(), codes.k};
  bool decided = best > -infinity();  // else the row was given up, or no code can be used
  for (int base = 0; decided && base < lists; base += kWarp) {
    const List list = base + lane < lists ? coarse.lists[(base + lane) * coarse.padded_rows + i]
                                          : List{-infinity(), 0};
    const bool passes = list.best >= threshold;
    decided = !__any_sync(kAllLanes, passes && list.count > kCapacity);
    for (unsigned left = __ballot_sync(kAllLanes, passes); decided && left; left &= left - 1) {
      const int source = __ffs(left) - 1;
      const int noted = __shfl_sync(kAllLanes, list.count, source);
      const Candidate* from =
          coarse.candidates + ((base + source) * coarse.padded_rows + i) * kCapacity;
      const Candidate own = lane < noted ? from[lane] : Candidate{-infinity(), 0};
      unsigned chosen = __ballot_sync(kAllLanes, own.score >= threshold);
      for (; chosen; chosen &= chosen - 1) {
        const int64_t j = __shfl_sync(kAllLanes, own.index, __ffs(chosen) - 1);
        const float* code = codes.codebook + j * codes.d;
        nearest.offer(warp_distance(row, x.channel_stride, code, codes.d), j);
      }
    }
  }
  if (lane != 0) return;
  if (!decided) {
    leave_undecided(codes, r);
    return;
  }
  indices[r] = nearest.index;
  distance[r] = static_cast<float>(nearest.distance);
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Where row blocks alone do not fill the device the codes are split as well, to two tiles or more.
int64_t split_count(int64_t n, int64_t k) {
  constexpr int64_t kBlocksWanted = kSlabRows / kBlockRows, kFewestTiles = 2;
  const int64_t most = round_up(k, kBlockCodes) / kBlockCodes / kFewestTiles;
  const int64_t splits = kBlocksWanted / (round_up(n, kBlockRows) / kBlockRows);
  return splits < 1 || most < 1 ? 1 : (splits < most ? splits : most);
}

struct Workspace {
  Prepared codes;
  Coarse coarse;
  int64_t floats;
};

Workspace carve(float* base, const float* codebook, int64_t n, int64_t k, int64_t d) {
  Carver carver(base);
  Workspace w;
  const int64_t rows = n < kSlabRows ? n : kSlabRows;
  w.codes = carver.take_prepared(codebook, k, d, rows);
  Coarse& c = w.coarse;
  c.chunks = round_up(d, kChunk) / kChunk;
  c.padded_rows = round_up(rows, kBlockRows);
  c.padded_codes = round_up(k, kBlockCodes);
  const int64_t lists = split_count(rows, k) * kColumns * c.padded_rows;
  c.rows = carver.take<__nv_bfloat16>(c.chunks * c.padded_rows * kChunk);
  c.codes = carver.take<__nv_bfloat16>(c.chunks * c.padded_codes * kChunk);
  c.bias = carver.take<float>(c.padded_codes);
  c.bounds = carver.take<RowBounds>(c.padded_rows);
  c.lists = carver.take<List>(lists);
  c.candidates = carver.take<Candidate>(lists * kCapacity);
  w.floats = carver.floats();
  return w;
}

// Slots for all chunks of a block's rows, if so much shared memory is there.
int row_slots_for(int64_t chunks, int device) {
  int most = 0;
  cuda_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "vq_nearest");
  return kStages * kCodeSlot + chunks * kRowSlot <= most ? static_cast<int>(chunks) : kStages;
}

}  // namespace

int64_t workspace_size_mma(int64_t n, int64_t k, int64_t d) {
  return carve(nullptr, nullptr, n, k, d).floats;
}

// The floor for 65536 x 16384 x 256 on an H200: 2 n k d = 550 GFLOP, 0.70 ms at the 780 TFLOP/s of
// a dense bfloat16 product there (wgmma; mma.sync reaches less of it); 84 MB of rows and codes
// moved once, 0.02 ms at 4.3 TB/s. The tensor cores bind. Not yet run on a GPU.
void nearest_mma(const Rows<const float>& x, const float* codebook, int64_t k, int device,
                 cudaStream_t stream, float* workspace, int64_t* indices, float* distance) {
  const int64_t n = x.count();
  const Workspace w = carve(workspace, codebook, n, k, x.d);
  const int64_t tiles = w.coarse.padded_codes / kBlockCodes;
  const int row_slots = row_slots_for(w.coarse.chunks, device);
  const int shared = kStages * kCodeSlot + row_slots * kRowSlot;
  cuda_check(
      cudaFuncSetAttribute(coarse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
      "vq_nearest");

  launch_center(w.codes, stream);
  launch_round_codes(w.codes, w.coarse, stream);
  for (int64_t first = 0; first < n; first += kSlabRows) {
    const int64_t count = n - first < kSlabRows ? n - first : kSlabRows;
    // Of a last slab with fewer rows the splits are those of a whole one: the workspace is for
    // that.
    const int64_t splits = split_count(n < kSlabRows ? n : kSlabRows, k);
    const int64_t tiles_per_split = (tiles + splits - 1) / splits;
    const int64_t used_splits = (tiles + tiles_per_split - 1) / tiles_per_split;
    launch_round_rows(x, first, count, w.codes, w.coarse, stream);
    const dim3 grid(blocks_for(count, kBlockRows), static_cast<unsigned>(used_splits));
    coarse_kernel<<<grid, kThreads, shared, stream>>>(w.coarse, tiles_per_split, row_slots);
    resolve_coarse_kernel<<<blocks_for(count * kWarp, 256), 256, 0, stream>>>(
        x, first, count, w.codes, w.coarse, static_cast<int>(used_splits) * kColumns, indices,
        distance);
    launch_search(x, w.codes, count, stream, indices, distance);
  }
}

}  // namespace t2p::vq

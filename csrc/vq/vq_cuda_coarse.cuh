// SPDX-License-Identifier: Apache-2.0
// What the tensor cores' road keeps in the workspace, and its bounds: how far below the largest
// score that of the nearest code may be, for scores y'.c' - |c'|^2 / 2 in bfloat16. The two bounds
// are those of vq_bounds-inl.h, and the smaller holds:
//
// - Scores are off by at most E = |y - y'| |c| + |y'| |c - c'| + (|c|^2 - |c'|^2) / 2: that of the
//   nearest code is at most 2E below that of any other.
// - For kL2, |y - c| and |y' - c'| differ by at most e = |y - y'| + |c - c'|. A code of score S has
//   |y' - c'| = D = sqrt(|y'|^2 - 2 S), the nearest then at most D + 2e: its score is at most
//   2eD + 2e^2 below S. That is little where rows are near to their codes.
//
// To both come the roundings of float32. The norms of y, y' and y - y' are measured for every row;
// for those of c and c - c' the largest of all codes serve.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/cuda_check.cuh"
#include "vq/vq_cuda.cuh"

namespace t2p::vq {

struct __align__(16) RowBounds {
  float margin;         // 2E; -1 gives the row up, NaN says that it is not finite
  float half_norm;      // |y'|^2 / 2 and what scores are off by
  float slope, offset;  // 2eD + 2e^2 = slope * sqrt(D^2 / 2) + offset

  // The margin below a score.
  __device__ float below(float score) const {
    return fminf(margin, slope * sqrtf(fmaxf(half_norm - score, 0.0f)) + offset);
  }
};

// A list holds, for every row, the codes of one split and column of warps that may be nearest.
constexpr int kCapacity = 16;
struct Candidate {
  float score;
  int index;
};
struct List {
  float best;  // of all codes looked at, -inf if none can be used
  int count;   // beyond kCapacity: the row is given up
};

// Rows or codes are [tiles, chunks, vectors of a tile, channels of a chunk], so that what a block
// loads of a chunk is contiguous. Vectors, and channels, are filled up with zeros. Swizzled, vector
// v has its piece p of 8 channels at place p ^ v % 8: as wgmma finds it with its swizzle of 128
// bytes.
struct Packing {
  std::int64_t chunks, tile;
  int chunk;  // channels; 64 if swizzled
  bool swizzled;

  __device__ std::int64_t at(std::int64_t vector, std::int64_t channel) const {
    const std::int64_t in_tile = vector % tile;
    const int in_chunk = static_cast<int>(channel % chunk);
    const int piece = in_chunk / 8 ^ (swizzled ? static_cast<int>(in_tile % 8) : 0);
    return ((vector / tile * chunks + channel / chunk) * tile + in_tile) * chunk + piece * 8 +
           in_chunk % 8;
  }
};
struct Coarse {
  std::int64_t padded_rows, padded_codes;
  int last_steps;  // of 16 channels, in the last chunk
  Packing row_packing, code_packing;
  __nv_bfloat16 *rows, *codes;
  float* bias;            // [padded_codes], -|c'|^2 / 2 for kL2, else 0; -inf for what is no code
                          // or not finite
  RowBounds* bounds;      // [padded_rows]
  List* lists;            // [lists, padded_rows]
  Candidate* candidates;  // [lists, padded_rows, kCapacity]
};

void launch_round_codes(const Prepared& codes, const Coarse& coarse, cudaStream_t stream);

// Of the rows [first, first + count); none is undecided afterwards.
void launch_round_rows(const AnyRows& x, std::int64_t first, std::int64_t count,
                       const Prepared& codes, const Coarse& coarse, cudaStream_t stream);

// A road through tensor cores: the sizes of its blocks, and its product.
struct CoarseRoad {
  int block_rows, block_codes, chunk;
  bool swizzled;
  int lists_of_split;
  std::int64_t (*splits)(std::int64_t rows, std::int64_t k);
  void (*launch)(const Coarse& coarse, std::int64_t row_blocks, std::int64_t tiles_per_split,
                 std::int64_t splits, int device, cudaStream_t stream);
};

// Rows whose workspace is there at a time: 4 blocks for each of 132 multiprocessors.
constexpr std::int64_t kSlabRows = tile_or_emulated(528 * 256, 512);

std::int64_t workspace_size_coarse(std::int64_t n, const Codes& codes, const CoarseRoad& road);
Prepared nearest_coarse(const AnyRows& x, const Codes& codes, const CoarseRoad& road, int device,
                        cudaStream_t stream, float* workspace, const Results& results);

__device__ inline RowBounds bound_row(Metric metric, float squares, float near_squares,
                                      float off_squares, float largest_half_norm,
                                      float largest_rounding, std::int64_t d) {
  const bool l2 = metric == Metric::kL2;
  const float radius = norm_bound(2 * largest_half_norm, d);
  const float rounding = norm_bound(largest_rounding, d);
  const float off = norm_bound(off_squares, d), norm = norm_bound(squares, d) + off;
  const float code_norm = radius + rounding;
  // Of float32: once for what centring does to scores, as in vq-inl.h. Tensor cores add 16 products
  // to a sum and may truncate each of the 17 to 24 bits of the largest, no sum being more than
  // code_norm (norm + code_norm): in d / 16 of them that is less than 2.2 of such bounds.
  const float rounded = 4 * twice_error_bound(metric, norm, code_norm, d);
  const float margin =
      2.02f * (off * radius + norm * rounding + (l2 ? rounding * code_norm : 0.0f)) + rounded;
  // Centring moves rows and codes by 2^-24 of their norms.
  const float moved = off + rounding + 0x1p-21f * (norm + radius);
  RowBounds bounds;
  bounds.margin = margin < 1e37f && code_norm * (norm + code_norm) < 1e37f ? margin : -1.0f;
  bounds.half_norm = 0.5f * near_squares * (1 + static_cast<float>(d + 32) * 0x1p-23f) + rounded;
  bounds.slope = l2 ? 2.86f * moved : 0.0f;
  bounds.offset = l2 ? 2.02f * moved * moved + rounded : infinity();
  return bounds;
}

}  // namespace t2p::vq

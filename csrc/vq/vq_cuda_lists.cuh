// SPDX-License-Identifier: Apache-2.0
// Which codes pass, as seen by the threads that hold the scores of a product on tensor cores.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

#include "vq/vq_cuda_coarse.cuh"

namespace t2p::vq {

// The running bests and lists of a warp's rows: those of kRowTiles tiles of 16, kTileStep apart.
// The 4 lanes of a group agree on them.
template <int kRowTiles, int kCodeTiles, int kTileStep>
class Lists {
 public:
  // What a thread has of its warp's scores: of rows kTileStep m + group + 8 h and codes 8 n + 2 t +
  // e the element [m][n][2 h + e], lane = 4 group + t.
  using Scores = float[kRowTiles][kCodeTiles][4];

  __device__ Lists(const Coarse& coarse, std::int64_t list, std::int64_t first_row)
      : first_(first_row + threadIdx.x % kWarp / 4), t_(threadIdx.x % 4) {
    bounds_ = coarse.bounds + first_;
    lists_ = coarse.lists + list * coarse.padded_rows + first_;
    candidates_ = coarse.candidates + (list * coarse.padded_rows + first_) * kCapacity;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      best_[i] = -infinity();
      // What cannot be used scores -inf and never passes; nor does anything for a row given up.
      threshold_[i] = bounds_[row(i)].margin >= 0 ? -FLT_MAX : infinity();
      count_[i] = 0;
    }
  }

  // Looks at the scores of the codes from `code` on.
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
    for (int i = 0; i < kSlots; ++i) lists_[row(i)] = {best_[i], count_[i]};
  }

 private:
  static constexpr int kSlots = 2 * kRowTiles;  // rows of a thread: first_ + row(i)
  static __device__ constexpr int row(int i) { return i / 2 * kTileStep + i % 2 * 8; }

  __device__ __forceinline__ void note(const Scores& scores, int i, float top, int code) {
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
    if (top >= threshold_[i] && top > best_[i]) {
      const float threshold = top - bounds_[row(i)].below(top);
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
    __syncwarp();  // places of a list that began anew were written to by other lanes before
    if (hits == 0) return;
#pragma unroll
    for (int u = 0; u < 2 * kCodeTiles; ++u) {
      const float score = scores[i / 2][u / 2][i % 2 * 2 + u % 2];
      if (score >= threshold_[i]) {
        if (at < kCapacity) {
          candidates_[row(i) * kCapacity + at] = {score, code + u / 2 * 8 + 2 * t_ + u % 2};
        }
        ++at;
      }
    }
  }

  const std::int64_t first_;
  const int t_;
  const RowBounds* bounds_;
  List* lists_;
  Candidate* candidates_;
  float best_[kSlots], threshold_[kSlots];
  int count_[kSlots];
};

}  // namespace t2p::vq

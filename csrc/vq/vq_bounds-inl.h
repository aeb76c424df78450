// SPDX-License-Identifier: Apache-2.0
// How far below the largest integer that of the nearest code may be. Included by vq_coarse-inl.h,
// once per ISA.
//
// With x ~ x' = a p and c ~ c' = b (q - z), p and q integers, the score |c|^2/2 - x.c orders codes
// about as the integer p.(q - z) - |c'|^2/(2ab) does, largest first; z p.1 is left in, since it is
// the same for all of them. There are two bounds, and the smaller holds:
//
// - The score is off by at most E = |x - x'| |c| + |x'| |c - c'|, and for kL2 by |c - c'| |c| more,
//   so the nearest code's integer is at most 2E/(ab) below the largest.
// - For kL2, |x - c| and |x' - c'| differ by at most e = |x - x'| + |c - c'|, so the nearest code's
//   |x' - c'| is at most D + 2e if the least of them is D: it is (2eD + 2e^2)/(ab) below. That is
//   little where rows are near to their codes and both far from the centre.
//
// To both come the roundings of float32. The norms of x, x' and x - x' are measured for every row;
// for those of c, c' and c - c' the largest of all codes serve.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "vq/search.h"
#include "vq/vq_integers-inl.h"
#include "vq/vq_panel-inl.h"

namespace t2p::vq::T2P_ISA_NAMESPACE {
namespace {

// What turns the scores of kLanes rows into integers, and what bounds them, row by row.
struct RowBounds {
  float per_unit = 0;           // 1 / (ab); 0 if the rows cannot be used
  std::int32_t margin[kLanes];  // 2E / (ab); -1 gives a row up
  std::int32_t zero[kLanes];    // z p.1
  float half_norm[kLanes];      // |x'|^2 / (2ab): less the integer it is |x' - c'|^2 / (2ab)
  float slope[kLanes];          // (2eD + 2e^2) / (ab) = slope * sqrt(D^2 / (2ab)) + offset
  float offset[kLanes];
};

class CodeBounds {
 public:
  CodeBounds(const Codebook& codebook, const CoarseCodebook& coarse)
      : l2_(codebook.metric == Metric::kL2),
        d_(static_cast<float>(codebook.d)),
        radius_(norm_bound(2 * coarse.largest_half_norm, codebook.d)),
        rounding_(norm_bound(coarse.largest_rounding, codebook.d)),
        float_error_(codebook.d, codebook.metric),
        float_slope_(float_error_.slope(radius_)) {}

  T2P_INLINE void bound_rows(const Rounding& rows, float per_unit, std::int32_t code_zero,
                             RowBounds& bounds) const {
    // As norm_bound.
    const F32 tiny = broadcast(d_ * kSmallestNormal), slack = broadcast(1.001f);
    const F32 off = mul(slack, square_root(add(rows.off_squares, tiny)));
    const F32 norm = add(mul(slack, square_root(add(rows.squares, tiny))), off);

    // What sums of d squares, and float32 numbers that became integers, are off by. The first bound
    // does not know the norms of rows.
    const float code_norm = radius_ + rounding_, relative = (d_ + 32) * 0x1p-24f + 0x1p-20f;
    const float code_error = 0.51f * per_unit * code_norm * code_norm * relative + 4;
    const F32 half_norm = mul(rows.near_squares, broadcast(0.5f * per_unit));
    const F32 integer_error = multiply_add(half_norm, broadcast(relative), broadcast(code_error));

    F32 error = mul(off, broadcast(2.01f * radius_));
    error = multiply_add(norm, broadcast(2.01f * rounding_ + float_slope_), error);
    error = add(error, broadcast(float_slope_ * radius_ + float_error_.tiny));
    if (l2_) error = add(error, broadcast(2.01f * rounding_ * code_norm));
    const F32 margin = multiply_add(error, broadcast(1.01f * per_unit), broadcast(code_error));

    // Centring moves rows and codes by 2^-24 of their norms.
    const F32 moved = multiply_add(add(norm, broadcast(radius_)), broadcast(0x1p-21f),
                                   add(off, broadcast(rounding_)));
    const F32 slope = mul(moved, broadcast(__builtin_sqrtf(8.1f * per_unit)));
    const F32 offset = multiply_add(mul(moved, moved), broadcast(2.01f * per_unit),
                                    add(integer_error, integer_error));

    bounds.per_unit = per_unit;
    store(bounds.margin, select(less(margin, broadcast(kLargestMargin)), to_i32(margin),
                                broadcast(std::int32_t{-1})));
    store(bounds.zero, rows.sum);
    for (int m = 0; m < kLanes; ++m) bounds.zero[m] *= code_zero;
    store(bounds.half_norm, add(half_norm, integer_error));
    store(bounds.slope, l2_ ? slope : broadcast(0.f));
    store(bounds.offset, l2_ ? offset : broadcast(2 * kLargestMargin));
  }

 private:
  const bool l2_;
  const float d_;
  const float radius_, rounding_;  // at least |c| and |c - c'|
  const TwiceErrorBound float_error_;
  const float float_slope_;
};

// The margins below the integers `best` of kLanes rows.
T2P_INLINE I32 margins(const RowBounds& bounds, I32 best) {
  const I32 given = load(bounds.margin);
  const F32 squared = sub(load(bounds.half_norm), to_f32(sub(best, load(bounds.zero))));
  const F32 margin = multiply_add(load(bounds.slope), square_root(max(squared, broadcast(0.f))),
                                  load(bounds.offset));
  return select(less(margin, to_f32(given)), to_i32(margin), given);
}

}  // namespace
}  // namespace t2p::vq::T2P_ISA_NAMESPACE

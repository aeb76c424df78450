// SPDX-License-Identifier: Apache-2.0
// A block of rows in small integers, for the coarse stage. Included by vq_coarse-inl.h, once per
// ISA.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "vq/search.h"
#include "vq/vq_bounds-inl.h"
#include "vq/vq_integers-inl.h"
#include "vq/vq_panel-inl.h"
#if defined(T2P_AMX)
#include "vq/vq_tiles-inl.h"
#endif

namespace t2p::vq::T2P_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kCoarseBlockRows = 128;

// sums[m][v] = the integers of row m against the codes of vector v of a panel.
template <class Integers, int kRows>
T2P_INLINE void score_integers(const std::uint8_t* __restrict panel,
                               const float* __restrict half_norms,
                               const std::uint8_t* __restrict rows, std::int64_t steps,
                               float per_unit, I32 (&sums)[kRows][kCoarseVectors]) {
#pragma GCC unroll 4
  for (int v = 0; v < kCoarseVectors; ++v) {
    const I32 start = to_i32(mul(load(half_norms + v * kLanes), broadcast(per_unit)));
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) sums[m][v] = start;
  }
  for (std::int64_t s = 0; s < steps; ++s) {
    I32 code[kCoarseVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kCoarseVectors; ++v) {
      code[v] = load_bytes(panel + (s * kCoarseCodes + v * kLanes) * 4);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      std::int32_t four;
      __builtin_memcpy(&four, rows + (s * kLanes + m) * 4, 4);
      const I32 row = broadcast(four);
#pragma GCC unroll 4
      for (int v = 0; v < kCoarseVectors; ++v) {
        sums[m][v] = Integers::dot(sums[m][v], code[v], row);
      }
    }
  }
}

template <class Integers>
class RoundedRows {
 public:
  RoundedRows(const Codebook& codebook, const CoarseCodebook& coarse, const Rows<const float>& x,
              std::uint8_t* scratch)
      : codebook_(codebook),
        coarse_(coarse),
        x_(x),
        d_(codebook.d),
        steps_(coarse_steps<Integers>(d_)),
        stored_(stored_steps<Integers>(d_)),
        rows_(scratch),
        turned_(rows_ + kCoarseBlockRows * 4 * stored_),
        staged_(reinterpret_cast<float*>(turned_ + kCoarseBlockRows * 4 * turned_steps(d_))),
        code_bounds_(codebook, coarse) {}

  // Bytes of scratch memory.
  static std::int64_t scratch_size(std::int64_t d) {
    return kCoarseBlockRows *
           (4 * (stored_steps<Integers>(d) + turned_steps(d)) + d * std::int64_t{sizeof(float)});
  }

  void load(std::int64_t first, std::int64_t count) {
    stage(first, count);
    for (std::int64_t i = 0; i < count; i += kLanes) {
      round(i, smaller(kLanes, count - i), bounds_[i / kLanes]);
#if defined(T2P_AMX)
      if (tiled()) turn_steps(rows_ + i * 4 * stored_, stored_, turned_ + i * 4 * stored_);
#endif
    }
  }

  // As it came.
  T2P_INLINE const float* row(std::int64_t i) const { return row_ + i * stride_; }
  T2P_INLINE std::int64_t stride() const { return stride_; }

  T2P_INLINE const RowBounds& bounds(std::int64_t i) const { return bounds_[i / kLanes]; }
  T2P_INLINE RowBounds& bounds(std::int64_t i) { return bounds_[i / kLanes]; }

  // The integers of step s of kLanes rows from row i on.
  T2P_INLINE I32 integers(std::int64_t i, std::int64_t s) const {
    return load_bytes(rows_ + (i * stored_ + s * kLanes) * 4);
  }

  // Of the rows [i, i + kRows), all of one step, against panel p.
  template <int kRows>
  T2P_INLINE void score(std::int64_t p, std::int64_t i, I32 (&sums)[kRows][kCoarseVectors]) const {
    score_integers<Integers, kRows>(panel(p), half_norms(p),
                                    rows_ + (i / kLanes * kLanes * stored_ + i % kLanes) * 4,
                                    steps_, bounds(i).per_unit, sums);
  }

#if defined(T2P_AMX)
  bool tiled() const { return turned_steps(d_) > 0; }

  // Vector v of panel p, for the rows [i, i + 2 kLanes).
  T2P_INLINE void tile_codes(std::int64_t p, int v, std::int64_t i, TileCodes& to) const {
    to.codes = panel(p) + v * tiles::kTileBytes;
    const F32 half = simd::T2P_ISA_NAMESPACE::load(half_norms(p) + v * kLanes);
    store(to.start[0], to_i32(mul(half, broadcast(bounds(i).per_unit))));
    store(to.start[1], to_i32(mul(half, broadcast(bounds(i + kLanes).per_unit))));
  }

  // Asks for a part of panel p: parts are as many as there are pairs of groups in a block.
  T2P_INLINE void prefetch(std::int64_t p, std::int64_t part) const {
    constexpr std::int64_t kParts = kCoarseBlockRows / (2 * kLanes);
    const std::int64_t lines = stored_ * kCoarseVectors / kParts;
    const std::uint8_t* at = panel(p) + part * lines * tiles::kTileBytes;
    for (std::int64_t l = 0; l < lines; ++l) __builtin_prefetch(at + l * tiles::kTileBytes, 0, 2);
  }

  // Of the rows [i, i + 2 kLanes) against all those vectors, one after another.
  T2P_INLINE void score_groups(std::int64_t i, const TileCodes* vectors, int count,
                               std::int32_t* to, std::int64_t to_row) const {
    const std::uint8_t* rows = turned_ + i * 4 * stored_;
    int v = 0;
    for (; v + 2 <= count; v += 2) {
      score_tiles<2>(rows, stored_, vectors + v, to + v * kLanes, to_row);
    }
    if (v < count) score_tiles<1>(rows, stored_, vectors + v, to + v * kLanes, to_row);
  }
#endif

 private:
  // Of the rows for tiles.
  static std::int64_t turned_steps(std::int64_t d) {
    const bool tiled = Integers::kChannels == 4 && d >= kLeastTileChannels;
    return tiled ? stored_steps<Integers>(d) : 0;
  }
  T2P_INLINE const std::uint8_t* panel(std::int64_t p) const {
    return coarse_.panels + p * stored_ * kCoarseCodes * 4;
  }
  T2P_INLINE const float* half_norms(std::int64_t p) const {
    return coarse_.half_norms + p * kCoarseCodes;
  }

  // Rows are read in place if they are evenly spaced and their channels lie next to each other.
  void stage(std::int64_t first, std::int64_t count) {
    const std::int64_t o = first / x_.inner, i = first % x_.inner;
    stride_ = x_.inner > 1 ? x_.inner_stride : x_.outer_stride;
    row_ = x_.data + o * x_.outer_stride + i * x_.inner_stride;
    if (x_.channel_stride == 1 && (x_.inner == 1 || i + count <= x_.inner)) return;
    const float* row[kCoarseBlockRows];
    for (std::int64_t r = 0; r < count; ++r) row[r] = x_.row(first + r);
    for (std::int64_t t = 0; t < d_; ++t) {
      for (std::int64_t r = 0; r < count; ++r) staged_[r * d_ + t] = row[r][t * x_.channel_stride];
    }
    row_ = staged_;
    stride_ = d_;
  }

  // Rounds the rows [i, i + count), with one step for all of them.
  T2P_INLINE void round(std::int64_t i, std::int64_t count, RowBounds& bounds) {
    const float* rows = row_ + i * stride_;
    F32 channel[4], largest = broadcast(0.f);
    for (std::int64_t t = 0; t < d_; t += 4) {
      load_channels(rows, stride_, count, codebook_.row_center, t, d_, channel);
      // In this order a NaN gives way to the other operand.
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) largest = max(magnitude(channel[c]), largest);
    }
    // The step is at least what keeps the half norms of the codes in range.
    const float range = reduce_max(largest) / Integers::kRowRange;
    const float floor = coarse_.largest_half_norm / (coarse_.scale * kLargestHalfNorm);
    const float scale = range > floor ? range : floor;
    const float unit = scale * coarse_.scale;
    const bool usable = unit > 1e-30f && unit < 1e30f;
    Rounding rounding{broadcast(scale), broadcast(usable ? 1 / scale : 0.0f)};
    std::uint8_t* to = rows_ + i * 4 * stored_;
    __builtin_memset(to + steps_ * 4 * kLanes, 0,
                     static_cast<std::size_t>((stored_ - steps_) * 4 * kLanes));
    for (std::int64_t t = 0; t < d_; t += 4) {
      load_channels(rows, stride_, count, codebook_.row_center, t, d_, channel);
      rounding.template round<Integers>(channel, 0, to, 4 * kLanes);
      to += 4 / Integers::kChannels * 4 * kLanes;
    }
    code_bounds_.bound_rows(rounding, usable ? 1 / unit : 0.0f, Integers::kCodeZero, bounds);
    for (std::int64_t m = usable ? count : 0; m < kLanes; ++m) bounds.margin[m] = -1;
  }

  const Codebook& codebook_;
  const CoarseCodebook& coarse_;
  const Rows<const float>& x_;
  const std::int64_t d_, steps_, stored_;
  std::uint8_t* const rows_;    // [kCoarseBlockRows / kLanes, stored, kLanes, 4]
  std::uint8_t* const turned_;  // for tiles: [kCoarseBlockRows, stored, 4]
  float* const staged_;         // [kCoarseBlockRows, d], as they came
  const CodeBounds code_bounds_;
  const float* row_ = nullptr;  // the first, as they came
  std::int64_t stride_ = 0;
  RowBounds bounds_[kCoarseBlockRows / kLanes];
};

}  // namespace
}  // namespace t2p::vq::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// The coarse stage: all codes scored in small integers, few compared in float64. Included by
// vq-inl.h, once per ISA.
//
// With x ~ a p and c ~ b (q - z), p and q integers, the score |c|^2/2 - x.c of a row orders codes
// as the integer p.q - |c|^2/(2ab) does, largest first: z p.1 is the same for all of them. It is
// off by at most E = |x - a p| |c| + |a p| |c - b (q - z)|, plus the roundings of float32, so the
// nearest code is among those whose integer is at least the largest one less 2E/(ab). All norms but
// that of c, for which the largest serves, are measured, not guessed.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "vq/search.h"
#include "vq/vq_distance-inl.h"
#include "vq/vq_integers-inl.h"
#include "vq/vq_panel-inl.h"

namespace t2p::vq::T2P_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kCoarseBlockRows = 128;

// Panels are scanned in groups: the maxima of a tile's rows are only stored, and looked at once per
// group. With few channels all of it stays in the L1 cache, with many in the L2.
constexpr int kMaxCoarseGroup = 16;
constexpr std::int64_t kCoarseGroupBytes = 160 * 1024;
// Lanes of a panel, at most, that are compared for a row before it is given up.
constexpr int kMaxCandidates = 64;

T2P_INLINE int coarse_group(std::int64_t d) {
  const std::int64_t fitting = kCoarseGroupBytes / (kCoarseCodes * d);
  return static_cast<int>(fitting < 4 ? 4 : smaller(fitting, kMaxCoarseGroup));
}

// What turns the scores of a tile of rows into integers.
struct CoarseTile {
  float per_unit;               // 1 / (ab); 0 if the tile cannot be used
  std::int32_t margin[kLanes];  // 2E / (ab) of each row; -1 gives a row up
};

// maxima[m] = the largest integers of row m, lane by lane, among the vectors of a panel.
template <class Integers>
T2P_INLINE void coarse_maxima(const std::uint8_t* __restrict panel,
                              const float* __restrict half_norms,
                              const std::uint8_t* __restrict rows, std::int64_t stride,
                              std::int64_t steps, float per_unit, I32 (&maxima)[kTileRows]) {
  I32 sums[kTileRows][kCoarseVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kCoarseVectors; ++v) {
    const I32 start = to_i32(mul(load(half_norms + v * kLanes), broadcast(per_unit)));
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m) sums[m][v] = start;
  }
  for (std::int64_t s = 0; s < steps; ++s) {
    I32 code[kCoarseVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kCoarseVectors; ++v) {
      code[v] = load_bytes(panel + (s * kCoarseCodes + v * kLanes) * 4);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m) {
      std::int32_t four;
      __builtin_memcpy(&four, rows + m * stride + 4 * s, 4);
      const I32 row = broadcast(four);
#pragma GCC unroll 4
      for (int v = 0; v < kCoarseVectors; ++v) {
        sums[m][v] = Integers::dot(sums[m][v], code[v], row);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; ++m) {
    maxima[m] = sums[m][0];
#pragma GCC unroll 4
    for (int v = 1; v < kCoarseVectors; ++v) maxima[m] = max(maxima[m], sums[m][v]);
  }
}

// Of the panels of a group, for one row.
using Maxima = std::int32_t[kMaxCoarseGroup][kLanes];

template <class Integers>
class CoarseSearch {
 public:
  CoarseSearch(const Codebook& codebook, const CoarseCodebook& coarse, const Rows<const float>& x,
               PanelRange panels, std::uint8_t* scratch)
      : codebook_(codebook),
        coarse_(coarse),
        x_(x),
        panels_(panels),
        d_(codebook.d),
        stride_(coarse_stride(coarse.format, d_)),
        rows_(scratch),
        staged_(reinterpret_cast<float*>(scratch + kCoarseBlockRows * stride_)),
        radius_(norm_bound(2 * coarse.largest_half_norm, d_)),
        code_rounding_(norm_bound(coarse.largest_rounding, d_)),
        float_error_(radius_, d_) {}

  void run(std::int64_t first, std::int64_t count, double* distance, std::int64_t* indices) {
    stage_rows(first, count);
    const std::int64_t tiles = (count + kTileRows - 1) / kTileRows;
    for (std::int64_t i = 0; i < tiles; ++i) {
      round_tile(i * kTileRows, smaller(kTileRows, count - i * kTileRows), tiles_[i]);
    }
    scan(tiles, count);
    for (std::int64_t i = 0; i < count; ++i) resolve(i, distance[i], indices[i]);
  }

 private:
  // Where a row's channels lie next to each other, they are read in place.
  void stage_rows(std::int64_t first, std::int64_t count) {
    std::int64_t o = first / x_.inner, i = first % x_.inner;
    for (std::int64_t r = 0; r < count; ++r) {
      row_[r] = x_.data + o * x_.outer_stride + i * x_.inner_stride;
      if (++i == x_.inner) i = 0, ++o;
    }
    if (x_.channel_stride == 1) return;
    for (std::int64_t t = 0; t < d_; ++t) {
      for (std::int64_t r = 0; r < count; ++r) {
        staged_[r * d_ + t] = row_[r][t * x_.channel_stride];
      }
    }
    for (std::int64_t r = 0; r < count; ++r) row_[r] = staged_ + r * d_;
  }

  T2P_INLINE F32 centred(const float* row, std::int64_t t) const {
    const int left = static_cast<int>(smaller(kLanes, d_ - t));
    return sub(load_first(row + t, left), load_first(codebook_.row_center + t, left));
  }

  // Rounds the rows [i, i + count), with one step for all of them.
  T2P_INLINE void round_tile(std::int64_t i, std::int64_t count, CoarseTile& tile) {
    alignas(64) float squares[kLanes]{}, rounding[kLanes]{};
    F32 largest = broadcast(0.f);
    for (std::int64_t m = 0; m < count; ++m) {
      F32 sum = broadcast(0.f);
      for (std::int64_t t = 0; t < d_; t += kLanes) {
        const F32 value = centred(row_[i + m], t);
        largest = max(magnitude(value), largest);
        sum = multiply_add(value, value, sum);
      }
      squares[m] = reduce_add(sum);
    }
    // The step is at least what keeps the half norms of the codes in range.
    const float range = reduce_max(largest) / Integers::kRowRange;
    const float floor = coarse_.largest_half_norm / (coarse_.scale * kLargestHalfNorm);
    const float scale = range > floor ? range : floor;
    const float unit = scale * coarse_.scale;
    const bool usable = unit > 1e-30f && unit < 1e30f;
    tile.per_unit = usable ? 1 / unit : 0.0f;
    const F32 step = broadcast(scale), per_step = broadcast(usable ? 1 / scale : 0.0f);
    for (std::int64_t m = 0; m < kTileRows; ++m) {
      std::uint8_t* integers = rows_ + (i + m) * stride_;
      if (m >= count) {
        __builtin_memset(integers, 0, static_cast<std::size_t>(4 * coarse_steps<Integers>(d_)));
        continue;
      }
      F32 sum = broadcast(0.f);
      for (std::int64_t t = 0; t < d_; t += kLanes) {
        const F32 value = centred(row_[i + m], t);
        const I32 rounded = to_i32(mul(value, per_step));
        Integers::store_integers(integers, t, rounded);
        const F32 off = multiply_subtract_from(step, to_f32(rounded), value);
        sum = multiply_add(off, off, sum);
      }
      rounding[m] = reduce_add(sum);
    }
    // norm_bound and E, for all rows of the tile at once.
    const F32 tiny = broadcast(static_cast<float>(d_) * kSmallestNormal), slack = broadcast(1.001f);
    const F32 off = mul(slack, square_root(add(load(rounding), tiny)));
    const F32 norm = add(mul(slack, square_root(add(load(squares), tiny))), off);
    F32 error = mul(off, broadcast(2.01f * radius_));
    error = multiply_add(norm, broadcast(2.01f * code_rounding_ + float_error_.slope), error);
    error = add(error, broadcast(float_error_.slope * radius_ + float_error_.tiny));
    const float half_norm = coarse_.largest_half_norm * tile.per_unit;
    const F32 margin =
        multiply_add(error, broadcast(1.01f * tile.per_unit), broadcast(half_norm * 0x1p-20f + 4));
    store(tile.margin, select(less(margin, broadcast(usable ? kLargestMargin : 0.0f)),
                              to_i32(margin), broadcast(std::int32_t{-1})));
  }

  void scan(std::int64_t tiles, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      const bool given_up = tiles_[i / kTileRows].margin[i % kTileRows] < 0;
      best_[i] = INT32_MIN;
      candidates_[i] = given_up ? kGivenUp : 0;
      threshold_[i] = given_up ? INT32_MAX : INT32_MIN;
    }
    const std::int64_t steps = coarse_steps<Integers>(d_), panel_bytes = steps * kCoarseCodes * 4;
    const int group = coarse_group(d_);
    alignas(64) Maxima maxima[kTileRows];
    for (std::int64_t p = panels_.begin; p < panels_.end; p += group) {
      const int size = static_cast<int>(smaller(group, panels_.end - p));
      for (std::int64_t i = 0; i < tiles; ++i) {
        const std::uint8_t* rows = rows_ + i * kTileRows * stride_;
        for (int q = 0; q < size; ++q) {
          I32 largest[kTileRows];
          coarse_maxima<Integers>(coarse_.panels + (p + q) * panel_bytes,
                                  coarse_.half_norms + (p + q) * kCoarseCodes, rows, stride_, steps,
                                  tiles_[i].per_unit, largest);
#pragma GCC unroll 8
          for (int m = 0; m < kTileRows; ++m) store(maxima[m][q], largest[m]);
        }
        const int rows_here = static_cast<int>(smaller(kTileRows, count - i * kTileRows));
        for (int m = 0; m < rows_here; ++m) {
          collect(maxima[m], size, p, i * kTileRows + m, tiles_[i].margin[m]);
        }
      }
    }
  }

  // Notes the lanes of a group of panels that may hold row i's nearest code.
  T2P_INLINE void collect(const Maxima& maxima, int size, std::int64_t first_panel, std::int64_t i,
                          std::int32_t margin) {
    if (threshold_[i] != INT32_MIN) {  // past the first group most have nothing to add
      I32 largest = load(maxima[0]);
      for (int q = 1; q < size; ++q) largest = max(largest, load(maxima[q]));
      if (!bits(not_less(largest, broadcast(threshold_[i])))) return;
    }
    I32 largest = load(maxima[0]), second = broadcast(INT32_MIN), panel = broadcast(0);
    for (int q = 1; q < size; ++q) {
      const I32 score = load(maxima[q]);
      second = max(second, min(largest, score));
      panel = select(not_less(largest, score), panel, broadcast(q));
      largest = max(largest, score);
    }
    const std::int32_t top = reduce_max(largest);
    best_[i] = top > best_[i] ? top : best_[i];
    // Padding, and nothing else, is below all of this.
    if (best_[i] < INT32_MIN / 2) return give_up(i);
    threshold_[i] = best_[i] - margin;
    const I32 threshold = broadcast(threshold_[i]);
    if (bits(not_less(second, threshold))) {
      for (int q = 0; q < size && candidates_[i] != kGivenUp; ++q) {
        note(i, bits(not_less(load(maxima[q]), threshold)), maxima[q], broadcast(q), first_panel);
      }
      return;
    }
    alignas(64) std::int32_t score[kLanes];
    store(score, largest);
    note(i, bits(not_less(largest, threshold)), score, panel, first_panel);
  }

  // Adds the lanes that are set in `left` to the list of row i.
  T2P_INLINE void note(std::int64_t i, std::uint32_t left, const std::int32_t (&score)[kLanes],
                       I32 panel, std::int64_t first_panel) {
    alignas(64) std::int32_t panels[kLanes];
    store(panels, panel);
    for (; left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      if (candidates_[i] >= kMaxCandidates) {
        candidates_[i] = drop_candidates(i, candidates_[i]);
        if (candidates_[i] >= kMaxCandidates) return give_up(i);
      }
      const int count = candidates_[i]++;
      score_[i][count] = score[lane];
      place_[i][count] = static_cast<std::int32_t>((first_panel + panels[lane]) * kLanes + lane);
    }
  }

  void give_up(std::int64_t i) {
    candidates_[i] = kGivenUp;
    threshold_[i] = INT32_MAX;
  }

  // Keeps what is still above the threshold of row i.
  T2P_INLINE int drop_candidates(std::int64_t i, int count) {
    int kept = 0;
    for (int c = 0; c < count; ++c) {
      score_[i][kept] = score_[i][c];
      place_[i][kept] = place_[i][c];
      kept += score_[i][c] >= threshold_[i];
    }
    return kept;
  }

  T2P_INLINE void resolve(std::int64_t i, double& distance, std::int64_t& index) {
    Nearest nearest{double{kInfinity}, kUndecided};
    if (candidates_[i] != kGivenUp) {
      const int count = drop_candidates(i, candidates_[i]);
      std::int32_t code[kMaxCandidates * kCoarseVectors + kOfferRoom];
      for (int c = 0; c < count; ++c) {
        const std::int32_t place = place_[i][c], lane = place % kLanes;
        const std::int32_t first = (place - lane) * kCoarseVectors + lane;
        for (int v = 0; v < kCoarseVectors; ++v) code[c * kCoarseVectors + v] = first + v * kLanes;
      }
      offer_codes(codebook_, row_[i], code, count * kCoarseVectors, nearest);
    }
    distance = nearest.distance;
    index = nearest.index;
  }

  static constexpr int kGivenUp = kMaxCandidates + 1;
  using Candidates = std::int32_t[kMaxCandidates];

  const Codebook& codebook_;
  const CoarseCodebook& coarse_;
  const Rows<const float>& x_;
  const PanelRange panels_;
  const std::int64_t d_, stride_;
  std::uint8_t* const rows_;  // [kCoarseBlockRows, stride_]
  float* const staged_;       // [kCoarseBlockRows, d], as they came
  const float radius_, code_rounding_;
  const TwiceErrorBound float_error_;
  const float* row_[kCoarseBlockRows];
  CoarseTile tiles_[kCoarseBlockRows / kTileRows];
  std::int32_t best_[kCoarseBlockRows], threshold_[kCoarseBlockRows];
  int candidates_[kCoarseBlockRows];
  Candidates score_[kCoarseBlockRows], place_[kCoarseBlockRows];  // place = panel * kLanes + lane
};

std::int64_t coarse_scratch_size(std::int64_t d) {
  const std::int64_t stride =
      coarse_stride(d > kMaxWordChannels ? Format::kBytes : Format::kWords, d);
  return kCoarseBlockRows * (stride + d * std::int64_t{sizeof(float)});
}

void coarse_block(const Codebook& codebook, const CoarseCodebook& coarse,
                  const Rows<const float>& x, std::int64_t first, std::int64_t count,
                  PanelRange panels, std::uint8_t* scratch, double* distance,
                  std::int64_t* indices) {
  if (coarse.format == Format::kWords) {
    CoarseSearch<Words>(codebook, coarse, x, panels, scratch).run(first, count, distance, indices);
  } else {
    CoarseSearch<Bytes>(codebook, coarse, x, panels, scratch).run(first, count, distance, indices);
  }
}

}  // namespace
}  // namespace t2p::vq::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// The search of a block of rows among the codes, for one instruction set: here the fine stage, in
// vq_coarse-inl.h the one before it. Included once per ISA.
//
// Squared distance orders codes as the score |c|^2/2 - x.c does, and the scores of a tile of rows
// against a panel of codes are a small matrix product held in registers. Their float32 values are
// only used to discard codes. With S the exact score, s the computed one and E >= |s - S|, the
// nearest code has s <= min(s) + 2E; the few codes under that limit are compared by their float64
// distance. E grows with the norms of x and c, so both are centred on the codebook first: far from
// the origin the limit would otherwise let every code pass. It is that of the largest code, and
// where this leaves too many, every code's own: in training a few codes may be large, and all
// others still as small as they began.
#include <cstdint>

#include "common/simd.h"
#include "vq/search.h"
#include "vq/vq_coarse-inl.h"
#include "vq/vq_distance-inl.h"
#include "vq/vq_panel-inl.h"

namespace t2p::vq::T2P_ISA_NAMESPACE {
namespace {

// Panels are scanned in groups: minima are first only stored, then merged with a row's state once
// per group. The panels of a group, and the rows of a block, share the L2 cache (64 and 256 KiB).
constexpr int kMaxGroup = 8;
constexpr std::int64_t kGroupFloats = 16 * 1024;
constexpr std::int64_t kBlockFloats = 64 * 1024;

T2P_INLINE std::int64_t group_size(std::int64_t d) {
  const std::int64_t fitting = kGroupFloats / (d * kPanelCodes + 1);
  return fitting < 1 ? 1 : smaller(fitting, kMaxGroup);
}

// A vector's padding behind every row; and no power of two between rows, which would crowd the few
// places that the cache has for such addresses.
T2P_INLINE std::int64_t row_stride(std::int64_t d) { return (d / kLanes + 2) * kLanes; }

std::int64_t block_rows(std::int64_t d) {
  const std::int64_t fitting = kBlockFloats / d;
  return fitting < 64 || d < 32 ? 64 : smaller(fitting / kTileRows * kTileRows, kMaxBlockRows);
}

std::int64_t scratch_size(std::int64_t d) {
  return (block_rows(d) + kTileRows + 1) * row_stride(d) + group_size(d) * (d + 1) * kPanelCodes;
}

// The kPanelVectors codes of a panel that share a lane compete as one. Of each row and lane the
// scan keeps the smallest such minimum, the second smallest and the panel of the smallest.
struct alignas(64) Lanes {
  float best[kLanes];
  float second[kLanes];
  std::int32_t panel[kLanes];
};

using Minima = float[kMaxGroup][kTileRows][kLanes];

T2P_INLINE void merge_minima(const Minima& minima, int m, std::int64_t first_panel, int count,
                             Lanes& row) {
  F32 best = load(row.best), second = load(row.second);
  I32 panel = load(row.panel);
  for (int q = 0; q < count; ++q) {
    const F32 score = load(minima[q][m]);
    second = min(second, max(score, best));
    panel = select(less(score, best), broadcast(static_cast<std::int32_t>(first_panel) + q), panel);
    best = min(score, best);
  }
  store(row.best, best);
  store(row.second, second);
  store(row.panel, panel);
}

class BlockSearch {
 public:
  BlockSearch(const Codebook& codebook, const Rows<const float>& x, const std::int64_t* rows,
              PanelRange panels, float* scratch)
      : codebook_(codebook),
        x_(x),
        row_numbers_(rows),
        panels_(panels),
        d_(codebook.d),
        stride_(row_stride(d_)),
        rows_(scratch),
        row_(rows_ + (block_rows(d_) + kTileRows) * stride_),
        group_(row_ + stride_),
        bound_(d_, codebook.metric),
        largest_half_norm_(codebook.largest_half_norm) {}

  void run(std::int64_t count, double* distance, std::int64_t* indices) {
    load_rows(count);
    scan(count);
    resolve(count, distance, indices);
  }

 private:
  // Centres the rows; the last tile is filled up with zeros.
  void load_rows(std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      const float* row = contiguous_row(i);
      float* centred = rows_ + i * stride_;
      F32 squares = broadcast(0.f);
      for (std::int64_t t = 0; t < d_; t += kLanes) {
        const int left = static_cast<int>(smaller(kLanes, d_ - t));
        const F32 value =
            sub(load_first(row + t, left), load_first(codebook_.row_center + t, left));
        squares = multiply_add(value, value, squares);
        store(centred + t, value);
      }
      squares_[i] = reduce_add(squares);
    }
    for (std::int64_t i = count * stride_; i < (count + kTileRows - 1) * stride_; ++i) rows_[i] = 0;
  }

  void scan(std::int64_t count) {
    for (std::int64_t i = 0; i < count + kTileRows - 1; ++i) {
      store(lanes_[i].best, broadcast(kInfinity));
      store(lanes_[i].second, broadcast(kInfinity));
      store(lanes_[i].panel, broadcast(static_cast<std::int32_t>(panels_.begin)));
    }
    const std::int64_t group = group_size(d_);
    Panel panels[kMaxGroup];
    Minima minima;
    for (std::int64_t p = panels_.begin; p < panels_.end; p += group) {
      const int size = static_cast<int>(smaller(group, panels_.end - p));
      for (int q = 0; q < size; ++q) panels[q] = panel(p + q, q);
      for (std::int64_t i = 0; i < count; i += kTileRows) {
        for (int q = 0; q < size; ++q) {
          Scores scores;
          score_tile(rows_ + i * stride_, stride_, panels[q], d_, scores);
#pragma GCC unroll 8
          for (int m = 0; m < kTileRows; ++m) {
            F32 least = scores[m][0];
#pragma GCC unroll 4
            for (int v = 1; v < kPanelVectors; ++v) least = min(least, scores[m][v]);
            store(minima[q][m], least);
          }
        }
        for (int m = 0; m < kTileRows; ++m) merge_minima(minima, m, p, size, lanes_[i + m]);
      }
    }
  }

  // Compares by float64 distance the codes that the scan could not discard. Where a lane's second
  // minimum is under the limit its panel is not known: those rows are scored once more, with E of
  // every code: s - E <= min(s + E) holds for the nearest.
  void resolve(std::int64_t count, double* distance, std::int64_t* indices) {
    const float radius = norm_bound(2 * largest_half_norm_, d_);
    std::int64_t again[kMaxBlockRows], repeated = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      Nearest nearest{double{kInfinity}, panels_.begin * kPanelCodes};
      const float margin = bound_.of(norm_bound(squares_[i], d_), radius);
      const float limit = reduce_min(load(lanes_[i].best)) + margin;
      const auto ambiguous = bits(not_greater(load(lanes_[i].second), broadcast(limit)));
      if (ambiguous || !(limit < kInfinity)) {
        limit_[i] = limit < kInfinity ? least_above(i, limit) : kInfinity;
        again[repeated++] = i;
      } else {
        const float* row = contiguous_row(i);
        std::int32_t code[kPanelCodes + kOfferRoom];
        const M32 left = not_greater(load(lanes_[i].best), broadcast(limit));
        const int lanes = store_chosen(code, left, lane_numbers());
        for (int c = lanes; c-- > 0;) {
          const int lane = code[c];
          const std::int32_t first = lanes_[i].panel[lane] * kPanelCodes + lane;
          for (int v = 0; v < kPanelVectors; ++v) code[c * kPanelVectors + v] = first + v * kLanes;
        }
        offer_codes(codebook_, row, code, lanes * kPanelVectors, nearest);
      }
      distance[i] = nearest.distance;
      indices[i] = nearest.index;
    }
    if (repeated) score_again(again, repeated, distance, indices);
  }

  // The least s + 2E of the codes that row i knows and that are not over the limit.
  float least_above(std::int64_t i, float limit) const {
    const float norm = norm_bound(squares_[i], d_);
    float least = limit;
    for (int lane = 0; lane < kLanes; ++lane) {
      const float best = lanes_[i].best[lane];
      if (!(best <= limit)) continue;
      float radius = 0;  // of the codes of which one has that score
      for (int v = 0; v < kPanelVectors; ++v) {
        const std::int64_t code = lanes_[i].panel[lane] * kPanelCodes + v * kLanes + lane;
        const float* from = codebook_.scored + smaller(code, codebook_.k - 1) * d_;
        F32 squares = broadcast(0.f);
        for (std::int64_t t = 0; t < d_; t += kLanes) {
          const int left = static_cast<int>(smaller(kLanes, d_ - t));
          const F32 value = sub(load_first(from + t, left), load_first(codebook_.center + t, left));
          squares = multiply_add(value, value, squares);
        }
        const float other = norm_bound(reduce_add(squares), d_);
        radius = other <= radius ? radius : other;
      }
      const float above = best + bound_.of(norm, radius);
      if (above < least) least = above;
    }
    return least;
  }

  void score_again(const std::int64_t* rows, std::int64_t count, double* distance,
                   std::int64_t* indices) {
    // Side by side, where the scan had other rows.
    for (std::int64_t r = 0; r < count; ++r) {
      const float* from = rows_ + rows[r] * stride_;
      for (std::int64_t t = 0; t < d_; ++t) rows_[r * stride_ + t] = from[t];
    }
    for (std::int64_t p = panels_.begin; p < panels_.end; ++p) {
      const Panel codes = panel(p, 0);
      F32 radius[kPanelVectors];
      for (int v = 0; v < kPanelVectors; ++v) {
        radius[v] = norm_bound(square_sums(codes.codes + v * kLanes, d_), d_);
      }
      for (std::int64_t r = 0; r < count; r += kTileRows) {
        Scores scores;
        score_tile(rows_ + r * stride_, stride_, codes, d_, scores);
        for (std::int64_t m = 0; m < smaller(kTileRows, count - r); ++m) {
          const std::int64_t i = rows[r + m];
          Nearest nearest{distance[i], indices[i]};
          for (int v = 0; v < kPanelVectors; ++v) {
            const F32 norm = broadcast(norm_bound(squares_[i], d_));
            const F32 error = mul(broadcast(0.51f), bound_.of(norm, radius[v]));
            const M32 left = not_greater(sub(scores[m][v], error), broadcast(limit_[i]));
            if (!bits(left)) continue;
            const auto first = static_cast<std::int32_t>(p * kPanelCodes + v * kLanes);
            std::int32_t code[kLanes + kOfferRoom];
            const int offered = store_chosen(code, left, add(lane_numbers(), broadcast(first)));
            offer_codes(codebook_, contiguous_row(i), code, offered, nearest);
          }
          distance[i] = nearest.distance;
          indices[i] = nearest.index;
        }
      }
    }
    for (std::int64_t r = 0; r < count; ++r) {
      const std::int64_t i = rows[r];
      if (!__builtin_isfinite(squares_[i]) && !all_finite(contiguous_row(i), d_)) {
        distance[i] = __builtin_nan("");
        indices[i] = 0;
      }
    }
  }

  // Panel p: packed by the caller, or packed here into place q of the group.
  Panel panel(std::int64_t p, int q) {
    if (codebook_.panels) {
      return {codebook_.panels + p * kPanelCodes * d_, codebook_.half_norms + p * kPanelCodes};
    }
    float* codes = group_ + q * (d_ + 1) * kPanelCodes;
    float* half_norms = codes + d_ * kPanelCodes;
    const std::int64_t code = p * kPanelCodes;
    const float largest =
        pack_panel(codebook_, code, smaller(kPanelCodes, codebook_.k - code), codes, half_norms);
    if (largest > largest_half_norm_) largest_half_norm_ = largest;
    return {codes, half_norms};
  }

  const float* contiguous_row(std::int64_t i) const {
    const float* row = x_.row(row_numbers_[i]);
    if (x_.channel_stride == 1) return row;
    for (std::int64_t t = 0; t < d_; ++t) row_[t] = row[t * x_.channel_stride];
    return row_;
  }

  const Codebook& codebook_;
  const Rows<const float>& x_;
  const std::int64_t* const row_numbers_;
  const PanelRange panels_;
  const std::int64_t d_;
  const std::int64_t stride_;
  float* const rows_;   // [block_rows + kTileRows, stride_], centred
  float* const row_;    // [stride_], as it came
  float* const group_;  // [group_size, d + 1, kPanelCodes]
  const TwiceErrorBound bound_;
  float largest_half_norm_;
  float squares_[kMaxBlockRows];  // |x - center|^2
  float limit_[kMaxBlockRows];
  Lanes lanes_[kMaxBlockRows + kTileRows];
};

void search_block(const Codebook& codebook, const Rows<const float>& x, const std::int64_t* rows,
                  std::int64_t count, PanelRange panels, float* scratch, double* distance,
                  std::int64_t* indices) {
  BlockSearch(codebook, x, rows, panels, scratch).run(count, distance, indices);
}

}  // namespace

const SearchKernels kSearch{
    .panel_codes = kPanelCodes,
    .block_rows = block_rows,
    .scratch_size = scratch_size,
    .pack_panel = pack_panel,
    .search_block = search_block,
    .coarse_codes = kCoarseCodes,
    .coarse_block_rows = kCoarseBlockRows,
    .coarse_pays = kLanes > 4,
    .coarse_panel_bytes = coarse_panel_bytes,
    .largest_magnitude = largest_magnitude,
    .coarse_scale = coarse_scale,
    .pack_coarse = pack_coarse,
    .coarse_scratch_size = coarse_scratch_size,
    .coarse_block = coarse_block,
};

}  // namespace t2p::vq::T2P_ISA_NAMESPACE

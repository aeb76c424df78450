// SPDX-License-Identifier: Apache-2.0
// The coarse stage: all codes are scored in small integers, and those whose integers the bounds of
// vq_bounds-inl.h let pass, few, compared in float64. Included by vq-inl.h, once per ISA.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "vq/search.h"
#include "vq/vq_bounds-inl.h"
#include "vq/vq_distance-inl.h"
#include "vq/vq_integers-inl.h"
#include "vq/vq_panel-inl.h"
#include "vq/vq_rows-inl.h"
#include "vq/vq_words-inl.h"

namespace t2p::vq::T2P_ISA_NAMESPACE {
namespace {

// Panels are scanned in groups: the maxima of a tile's rows are only stored, and looked at once per
// group. With few channels all of it stays in the L1 cache, with many in the L2.
constexpr int kMaxCoarseGroup = 16, kMaxGroupVectors = 31, kMaxTileVectors = 12;
constexpr std::int64_t kCoarseGroupBytes = 160 * 1024;
// Lanes of a panel, at most, that are noted for a row before it is given up.
constexpr int kMaxCandidates = 128;
// With few channels and many panels the codes of a panel that share a lane compete as one, and are
// scored again if it passes; else what it takes to keep them apart is little.
constexpr std::int64_t kFewChannels = 64;
T2P_INLINE bool merge_lanes(std::int64_t d, std::int64_t panels) {
  return d < kLeastTileChannels && d <= kFewChannels && panels > 6 + d / 4;
}

T2P_INLINE int coarse_group(std::int64_t d, bool merged) {
  const std::int64_t fitting = kCoarseGroupBytes / (kCoarseCodes * d);
  const int most = merged                    ? kMaxCoarseGroup
                   : d >= kLeastTileChannels ? kMaxTileVectors / kCoarseVectors
                                             : kMaxGroupVectors / kCoarseVectors;
  return static_cast<int>(fitting < 4 ? 4 : smaller(fitting, most));
}

// Of the panels of a group, or of their vectors, for one row.
using Maxima = std::int32_t[kMaxGroupVectors][kLanes];

// The search in bytes.
class ByteSearch {
 public:
  ByteSearch(const Codebook& codebook, const CoarseCodebook& coarse, const Rows<const float>& x,
             PanelRange panels, std::uint8_t* scratch)
      : codebook_(codebook),
        panels_(panels),
        merged_(merge_lanes(codebook.d, panels.end - panels.begin)),
        rows_(codebook, coarse, x, scratch) {}

  void run(std::int64_t first, std::int64_t count, double* distance, std::int64_t* indices) {
    rows_.load(first, count);
    scan(count);
    for (std::int64_t i = 0; i < count; i += kResolvedRows) {
      resolve(i, smaller(kResolvedRows, count - i), distance + i, indices + i);
    }
  }

 private:
  void scan(std::int64_t count) {
    // Up to the last vector's end: what is beyond the rows is given up like them.
    for (std::int64_t i = 0; i < (count + kLanes - 1) / kLanes * kLanes; ++i) {
      best_[i] = INT32_MIN;
      candidates_[i] = rows_.bounds(i).margin[i % kLanes] < 0 ? kGivenUp : 0;
    }
    const int group = coarse_group(codebook_.d, merged_), kept = merged_ ? 1 : kCoarseVectors;
#if defined(T2P_AMX)
    if (rows_.tiled()) return scan_tiles(count, group);
#endif
    alignas(64) Maxima maxima[kLanes];
    for (std::int64_t p = panels_.begin; p < panels_.end; p += group) {
      const int size = static_cast<int>(smaller(group, panels_.end - p));
      for (std::int64_t i = 0; i < count; i += kLanes) {
        for (int tile = 0; tile < kLanes && i + tile < count; tile += kTileRows) {
          for (int q = 0; q < size; ++q) {
            I32 sums[kTileRows][kCoarseVectors];
            rows_.score<kTileRows>(p + q, i + tile, sums);
#pragma GCC unroll 8
            for (int m = 0; m < kTileRows; ++m) {
              if (merged_) {
                I32 largest = sums[m][0];
#pragma GCC unroll 4
                for (int v = 1; v < kCoarseVectors; ++v) largest = max(largest, sums[m][v]);
                store(maxima[tile + m][q], largest);
              } else {
#pragma GCC unroll 4
                for (int v = 0; v < kCoarseVectors; ++v) {
                  store(maxima[tile + m][q * kCoarseVectors + v], sums[m][v]);
                }
              }
            }
          }
        }
        collect(maxima, size * kept, p * kept, i);
      }
    }
  }

#if defined(T2P_AMX)
  void scan_tiles(std::int64_t count, int group) {
    const tiles::TilesInUse in_use;
    alignas(64) Maxima maxima[2 * kLanes];
    TileCodes vectors[kMaxTileVectors];
    for (std::int64_t p = panels_.begin; p < panels_.end; p += group) {
      const int size = static_cast<int>(smaller(group, panels_.end - p));
      for (std::int64_t i = 0; i < count; i += 2 * kLanes) {
        for (int q = 0; q < size; ++q) {
          for (int v = 0; v < kCoarseVectors; ++v) {
            rows_.tile_codes(p + q, v, i, vectors[q * kCoarseVectors + v]);
          }
          if (p + group + q < panels_.end) rows_.prefetch(p + group + q, i / (2 * kLanes));
        }
        rows_.score_groups(i, vectors, size * kCoarseVectors, maxima[0][0], sizeof(Maxima));
        for (std::int64_t j = i; j < smaller(count, i + 2 * kLanes); j += kLanes) {
          collect(maxima + (j - i), size * kCoarseVectors, p * kCoarseVectors, j);
        }
      }
    }
  }
#endif

  // Notes the lanes of a group of panels, or of their vectors, that may hold the nearest codes of
  // the rows [i, i + kLanes). Past the first group there are hardly any.
  T2P_INLINE void collect(const Maxima* maxima, int size, std::int64_t first, std::int64_t i) {
    I32 largest[kLanes];
    for (int m = 0; m < kLanes; ++m) {
      largest[m] = load(maxima[m][0]);
      for (int q = 1; q < size; ++q) largest[m] = max(largest[m], load(maxima[m][q]));
    }
    const I32 top = reduce_max_each(largest);
    raise_threshold(i, top);
    std::uint32_t rows = bits(not_less(top, load(threshold_ + i)));
    for (; rows; rows &= rows - 1) {
      const int m = __builtin_ctz(rows);
      const I32 threshold = broadcast(threshold_[i + m]);
      I32 hits = broadcast(0);
      for (int q = 0; q < size; ++q) {
        hits = set_bits(not_less(load(maxima[m][q]), threshold), hits, broadcast(1 << q));
      }
      alignas(64) std::int32_t panels[kLanes];
      store(panels, hits);
      for (std::uint32_t lanes = bits(less(broadcast(0), hits)); lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        for (auto left = static_cast<std::uint32_t>(panels[lane]); left; left &= left - 1) {
          const int q = __builtin_ctz(left);
          note(i + m, maxima[m][q][lane], (first + q) * kLanes + lane);
        }
      }
    }
  }

  // The best integers of the rows [i, i + kLanes), and how low those of their nearest codes may be.
  T2P_INLINE void raise_threshold(std::int64_t i, I32 top) {
    const RowBounds& bounds = rows_.bounds(i);
    const I32 best = max(load(best_ + i), top), margin = margins(bounds, best);
    store(best_ + i, best);
    // Padding, and nothing else, is below all of the others.
    const M32 none = less(best, broadcast(INT32_MIN / 2));
    if (bits(none)) {
      alignas(64) std::int32_t found[kLanes];
      store(found, best);
      for (int m = 0; m < kLanes; ++m) {
        if (found[m] < INT32_MIN / 2) give_up(i + m);
      }
    }
    store(threshold_ + i,
          select(less(load(bounds.margin), broadcast(0)), broadcast(INT32_MAX), sub(best, margin)));
  }

  T2P_INLINE void note(std::int64_t i, std::int32_t score, std::int64_t place) {
    if (candidates_[i] >= kMaxCandidates) {
      if (candidates_[i] == kGivenUp) return;
      candidates_[i] = drop_candidates(i, candidates_[i]);
      if (candidates_[i] >= kMaxCandidates) return give_up(i);
    }
    const int count = candidates_[i]++;
    score_[i][count] = score;
    place_[i][count] = static_cast<std::int32_t>(place);
  }

  void give_up(std::int64_t i) {
    candidates_[i] = kGivenUp;
    rows_.bounds(i).margin[i % kLanes] = -1;
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

  // The nearest of what is noted for the rows [i, i + count). Each step is taken for all of them,
  // with few branches in between: the chains of instructions are long, and have to overlap.
  void resolve(std::int64_t i, std::int64_t count, double* distance, std::int64_t* indices) {
    int lanes = 0, begin[kResolvedRows + 1];
    std::int32_t row[kResolvedRows * kMaxCandidates], place[kResolvedRows * kMaxCandidates];
    for (std::int64_t r = 0; r < count; ++r) {
      begin[r] = lanes;
      const int noted = candidates_[i + r] == kGivenUp ? 0 : candidates_[i + r];
      for (int c = 0; c < noted; ++c) {
        row[lanes] = static_cast<std::int32_t>(r);
        place[lanes] = place_[i + r][c];
        lanes += score_[i + r][c] >= threshold_[i + r];
      }
    }
    begin[count] = lanes;
    Nearest nearest[kResolvedRows];
    for (std::int64_t r = 0; r < count; ++r) nearest[r] = {double{kInfinity}, kUndecided};
    if (merged_) {
      offer_rescored(i, row, place, lanes, nearest);
    } else if (codebook_.d <= kFewChannels) {
      offer_each(codebook_, rows_.row(i), rows_.stride(), row, place, lanes, nearest);
    } else {
      for (std::int64_t r = 0; r < count; ++r) {
        std::int32_t code[kMaxCandidates + kOfferRoom];
        const int codes = begin[r + 1] - begin[r];
        __builtin_memcpy(code, place + begin[r], static_cast<std::size_t>(codes) * sizeof *code);
        if (codes) offer_codes(codebook_, rows_.row(i + r), code, codes, nearest[r]);
      }
    }
    for (std::int64_t r = 0; r < count; ++r) {
      distance[r] = nearest[r].distance;
      indices[r] = nearest[r].index;
    }
  }

  // Scores the codes of lanes place[count] of rows i + row[count] again, and offers those that
  // pass.
  T2P_INLINE void offer_rescored(std::int64_t i, const std::int32_t* row, const std::int32_t* place,
                                 int count, Nearest* nearest) {
    constexpr int kMost = kResolvedRows * kMaxCandidates * kCoarseVectors;
    std::int32_t code_row[kMost + 1], code[kMost + 1];
    int codes = 0;
    for (int c = 0; c < count; ++c) {
      const std::int32_t panel = place[c] / kLanes, lane = place[c] % kLanes;
      const I32 threshold = broadcast(threshold_[i + row[c]]);
      I32 sums[1][kCoarseVectors];
      rows_.score<1>(panel, i + row[c], sums);
#pragma GCC unroll 4
      for (int v = 0; v < kCoarseVectors; ++v) {
        code_row[codes] = row[c];
        code[codes] = panel * kCoarseCodes + v * kLanes + lane;
        codes += static_cast<int>(bits(not_less(sums[0][v], threshold)) >> lane & 1);
      }
    }
    offer_each(codebook_, rows_.row(i), rows_.stride(), code_row, code, codes, nearest);
  }

  static constexpr int kGivenUp = kMaxCandidates + 1;
  static constexpr std::int64_t kResolvedRows = 16;
  using Candidates = std::int32_t[kMaxCandidates];

  const Codebook& codebook_;
  const PanelRange panels_;
  const bool merged_;
  RoundedRows<Bytes> rows_;
  std::int32_t best_[kCoarseBlockRows], threshold_[kCoarseBlockRows];
  int candidates_[kCoarseBlockRows];
  Candidates score_[kCoarseBlockRows],
      place_[kCoarseBlockRows];  // place = panel * kLanes + lane, or the code
};

std::int64_t coarse_scratch_size(std::int64_t d) {
  return d > kMaxWordChannels ? RoundedRows<Bytes>::scratch_size(d)
                              : RoundedRows<Words>::scratch_size(d);
}

void coarse_block(const Codebook& codebook, const CoarseCodebook& coarse,
                  const Rows<const float>& x, std::int64_t first, std::int64_t count,
                  PanelRange panels, std::uint8_t* scratch, double* distance,
                  std::int64_t* indices) {
  if (coarse.format == Format::kWords) {
    WordSearch(codebook, coarse, x, panels, scratch).run(first, count, distance, indices);
  } else {
    ByteSearch(codebook, coarse, x, panels, scratch).run(first, count, distance, indices);
  }
}

}  // namespace
}  // namespace t2p::vq::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// The coarse search in 16-bit words, for few channels: the nearest code of most rows is found with
// no list of candidates. Included by vq_coarse-inl.h, once per ISA.
//
// Here rows lie side by side and codes are taken one by one, so that the largest integer of a row
// and the second largest stay in registers. The number of the code goes along in the lowest byte of
// its integer, which is taken off it: of at most 256 codes, a span, the largest such value tells
// which code it is, and loses less than 256, little beside what rounding to words does.
//
// With M the largest integer of a row and m(M) the margin of vq_bounds-inl.h, the nearest code is
// at least M - m(M). M is at least `best` without its lowest byte, M', and M - m(M) grows with M;
// so it is at least M' - m(M'), and its value with a number in it at least M' - m(M') - 255. Where
// the second largest is less, the code of the largest is the nearest. The rows that are left have
// their codes scored again, and those from M' - m(M') on are compared.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "vq/search.h"
#include "vq/vq_bounds-inl.h"
#include "vq/vq_distance-inl.h"
#include "vq/vq_integers-inl.h"
#include "vq/vq_rows-inl.h"

namespace t2p::vq::T2P_ISA_NAMESPACE {
namespace {

// A span's codes, and their numbers from memory: an addition would be one more operation on
// vectors, which are what the scan waits for.
constexpr int kSpanCodes = 256 / kCoarseCodes * kCoarseCodes;
struct Numbers {
  std::int32_t of[kSpanCodes];
  constexpr Numbers() : of{} {
    for (int j = 0; j < kSpanCodes; ++j) of[j] = j;
  }
};
constexpr Numbers kNumbers;

class WordSearch {
 public:
  WordSearch(const Codebook& codebook, const CoarseCodebook& coarse, const Rows<const float>& x,
             PanelRange panels, std::uint8_t* scratch)
      : codebook_(codebook),
        coarse_(coarse),
        panels_(panels),
        steps_(coarse_steps<Words>(codebook.d)),
        rows_(codebook, coarse, x, scratch) {}

  void run(std::int64_t first, std::int64_t count, double* distance, std::int64_t* indices) {
    rows_.load(first, count);
    for (std::int64_t i = 0; i < count; i += kTile) {
      Found found[kTileVectors];
      if (steps_ == 2) {
        scan<2>(i, found);
      } else {
        scan<4>(i, found);
      }
      for (std::int64_t r = i, g = 0; r < smaller(i + kTile, count); r += kLanes, ++g) {
        resolve(r, smaller(kLanes, count - r), found[g], distance + r, indices + r);
      }
    }
  }

 private:
  static constexpr int kTileVectors = kLanes == 16 ? 2 : 1;
  static constexpr std::int64_t kTile = kTileVectors * kLanes;
  static constexpr int kSpanPanels = kSpanCodes / kCoarseCodes;
  static constexpr int kMaxCompared = 128;  // codes of a row that are compared, at most

  // Of kLanes rows: the largest and second largest integers, a code's number in the lowest byte,
  // and the first panel of the span which the largest is of.
  struct Found {
    I32 best = broadcast(INT32_MIN), second = broadcast(INT32_MIN), panel = broadcast(0);
  };

  // The rows [i, i + kTile).
  template <int kSteps>
  void scan(std::int64_t i, Found (&found)[kTileVectors]) const {
    I32 row[kTileVectors][kSteps];
    for (int g = 0; g < kTileVectors; ++g) {
      for (int s = 0; s < kSteps; ++s) row[g][s] = rows_.integers(i + g * kLanes, s);
    }
    for (std::int64_t p = panels_.begin; p < panels_.end; p += kSpanPanels) {
      const std::int64_t end = smaller(p + kSpanPanels, panels_.end);
      // What a code's sum begins with is one number for kLanes rows.
      alignas(64) std::int32_t start[kTileVectors][kSpanCodes];
      for (std::int64_t j = 0; j < (end - p) * kCoarseCodes; j += kLanes) {
        const F32 half_norm = load(coarse_.half_norms + p * kCoarseCodes + j);
        for (int g = 0; g < kTileVectors; ++g) {
          const float per_unit = rows_.bounds(i + g * kLanes).per_unit;
          store(start[g] + j, to_i32(mul(half_norm, broadcast(per_unit))));
        }
      }
      I32 best[kTileVectors], second[kTileVectors];
      for (int g = 0; g < kTileVectors; ++g) best[g] = second[g] = broadcast(INT32_MIN);
      int at = 0;
      for (std::int64_t q = p; q < end; ++q) {
        const std::uint8_t* panel = coarse_.panels + q * kSteps * kCoarseCodes * 4;
        for (int j = 0; j < kCoarseCodes; ++j, ++at) {
          I32 sums[kTileVectors];
#pragma GCC unroll 4
          for (int g = 0; g < kTileVectors; ++g) sums[g] = broadcast(start[g][at]);
#pragma GCC unroll 4
          for (int s = 0; s < kSteps; ++s) {
            std::int32_t two;
            __builtin_memcpy(&two, panel + (s * kCoarseCodes + j) * 4, 4);
            const I32 code = broadcast(two);
#pragma GCC unroll 4
            for (int g = 0; g < kTileVectors; ++g) sums[g] = dot_words(sums[g], row[g][s], code);
          }
          const I32 number = broadcast(kNumbers.of[at]);
#pragma GCC unroll 4
          for (int g = 0; g < kTileVectors; ++g) {
            const I32 value = with_low_byte(sums[g], number);
            second[g] = max(second[g], min(best[g], value));
            best[g] = max(best[g], value);
          }
        }
      }
      for (int g = 0; g < kTileVectors; ++g) {
        Found& all = found[g];
        all.second = max(max(all.second, second[g]), min(all.best, best[g]));
        all.panel =
            select(less(all.best, best[g]), broadcast(static_cast<std::int32_t>(p)), all.panel);
        all.best = max(all.best, best[g]);
      }
    }
  }

  // The nearest codes of the rows [i, i + count), count at most kLanes.
  T2P_INLINE void resolve(std::int64_t i, std::int64_t count, const Found& found, double* distance,
                          std::int64_t* indices) const {
    const RowBounds& bounds = rows_.bounds(i);
    const I32 low = broadcast(255), largest = sub(found.best, bit_and(found.best, low));
    const I32 threshold = sub(largest, margins(bounds, largest));
    alignas(64) std::int32_t code[kLanes], limit[kLanes];
    alignas(64) double distances[kLanes];
    store(limit, threshold);
    store(code, bit_and(found.best, low));
    alignas(64) std::int32_t panel[kLanes];
    store(panel, found.panel);
    for (int m = 0; m < kLanes; ++m) code[m] += panel[m] * kCoarseCodes;
    measure(i, count, code, distances);
    // Padding, and nothing else, is below all of the others.
    const std::uint32_t none = bits(less(found.best, broadcast(INT32_MIN / 2))) |
                               bits(less(load(bounds.margin), broadcast(0)));
    const std::uint32_t open = bits(not_less(found.second, sub(threshold, low)));
    for (std::int64_t m = 0; m < count; ++m) {
      Nearest nearest{distances[m], code[m]};
      if (!(distances[m] < double{kInfinity})) nearest = {double{kInfinity}, kUndecided};
      if (none >> m & 1) {
        nearest.index = kUndecided;
      } else if (open >> m & 1) {
        compare(i + m, limit[m], nearest);
      }
      distance[m] = nearest.distance;
      indices[m] = nearest.index;
    }
  }

  T2P_INLINE void measure(std::int64_t i, std::int64_t count, const std::int32_t* code,
                          double* distances) const {
    constexpr int kHalf = kLanes / 2;
    for (int m = 0; m < kLanes; m += kHalf) {
      const float* rows = rows_.row(i + smaller(m, count - 1));
      const std::int64_t left = count > m ? count - m : 1;
      if (codebook_.metric == Metric::kL2) {
        store(distances + m,
              distance_each<Metric::kL2>(codebook_, rows, rows_.stride(), left, code + m));
      } else if (codebook_.metric == Metric::kDot) {
        store(distances + m,
              distance_each<Metric::kDot>(codebook_, rows, rows_.stride(), left, code + m));
      } else {
        store(distances + m,
              distance_each<Metric::kCosine>(codebook_, rows, rows_.stride(), left, code + m));
      }
    }
  }

  // Offers all codes of row i whose integers reach the limit.
  void compare(std::int64_t i, std::int32_t limit, Nearest& nearest) const {
    std::int32_t code[kMaxCompared + kCoarseCodes + kOfferRoom];
    int count = 0;
    for (std::int64_t p = panels_.begin; p < panels_.end; ++p) {
      I32 sums[1][kCoarseVectors];
      rows_.score<1>(p, i, sums);
      for (int v = 0; v < kCoarseVectors; ++v) {
        const M32 left = not_less(sums[0][v], broadcast(limit));
        if (!bits(left)) continue;
        const auto first = static_cast<std::int32_t>(p * kCoarseCodes + v * kLanes);
        count += store_chosen(code + count, left, add(lane_numbers(), broadcast(first)));
      }
      if (count > kMaxCompared) {
        nearest.index = kUndecided;
        return;
      }
    }
    offer_codes(codebook_, rows_.row(i), code, count, nearest);
  }

  const Codebook& codebook_;
  const CoarseCodebook& coarse_;
  const PanelRange panels_;
  const std::int64_t steps_;
  RoundedRows<Words> rows_;
};

}  // namespace
}  // namespace t2p::vq::T2P_ISA_NAMESPACE

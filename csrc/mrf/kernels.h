// SPDX-License-Identifier: Apache-2.0
// Between mrf.cpp and the kernels for one instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "mrf/mrf.h"

namespace t2p::mrf {

// The values from number `at` on; null stays null.
inline Values from(Values values, std::int64_t at) {
  const std::int64_t bytes = at * (values.format == Format::kF32 ? 4 : 2);
  return {values.data ? static_cast<const char*>(values.data) + bytes : nullptr, values.format};
}
inline MutableValues from(MutableValues values, std::int64_t at) {
  const std::int64_t bytes = at * (values.format == Format::kF32 ? 4 : 2);
  return {static_cast<char*>(values.data) + bytes, values.format};
}

constexpr int kLowRankRows = 4;  // that are taken together

// Of a label product: rows of a tile at most, and pairs of columns that are taken at a time.
constexpr std::int64_t kMostRows = 12, kPairs = 256, kPanelLabels = 32;

// Of a product by halves: what takes the place of eight products of quarters.
constexpr int kProducts = 7;

// scale times numbers in bfloat16.
struct ScaledRow {
  const std::uint16_t* words;
  float scale;
};

// Where a row of the upper half and one of the lower half, null if there is none, have their place,
// `half` labels behind each other their left and right parts, and how what is in them was scaled.
struct JoinedRow {
  std::int64_t half;
  const float *scale, *inverse;  // of labels
  float upper_inverse, lower_inverse;
  float *upper, *lower;
};

struct Kernels {
  // One row of update_cpu, all arguments [v]; false if its maximum is not finite. `scratch` has v
  // floats and a vector more.
  bool (*update_row)(Values message, const float* unary, Values previous, std::int64_t v,
                     float scale, float damping, float temperature, float* scratch,
                     MutableValues next);

  // low_rank_step_cpu for the rows [first, first + count), at most kLowRankRows. The first whose
  // maximum is not finite, or -1. `scratch` has kLowRankRows times v floats and a vector.
  std::int64_t (*low_rank_rows)(const LowRankStep& step, std::int64_t first, std::int64_t count,
                                float* scratch, const LowRankResult& result);

  // The labels of v scores above -inf, in order; how many, or 0 if there are more than `most`, or a
  // NaN or an infinity among them.
  std::int64_t (*find_candidates)(const float* unary, std::int64_t v, std::int64_t most,
                                  std::int64_t* candidate);

  // message_cpu for one row, into v floats.
  void (*gather)(const Edges& edges, const Positions& positions, Values q, std::int64_t row,
                 std::int64_t v, float* message);

  // The same for all rows of a picture and `strip` labels; `columns` has n strips of floats.
  std::int64_t strip;
  void (*gather_strip)(const Edges& edges, const Positions& positions, Values q,
                       std::int64_t picture, std::int64_t v, std::int64_t number, float* columns,
                       MutableValues message);

  // v floats, rounded to the format.
  void (*put_row)(const float* from, std::int64_t v, MutableValues to);

  // belief_step_cpu for all edges of position i of one picture. `scratch` has 4 v floats and a
  // vector more each.
  void (*send)(const Edges& edges, const BeliefStep& step, const float* unary, std::int64_t i,
               const float* from, float* scratch, float* to);

  // to += weight * from, for v floats.
  void (*accumulate)(const float* from, float weight, std::int64_t v, float* to);

  // Parts of label_product_cpu, null where there is no instruction for them: rows of a tile and the
  // pairs [first, first + kPairs) as [kPairs, rows]; labels and the same pairs as
  // [kPairs, kPanelLabels], both with zeros behind their edges; and sums [tile, stride], begun or
  // added to, of their products.
  void (*pack_rows)(const std::uint16_t* rows, std::int64_t count, std::int64_t v,
                    std::int64_t first, std::int32_t* to) = nullptr;
  void (*pack_labels)(const std::uint16_t* w_c, std::int64_t v, std::int64_t label,
                      std::int64_t first, std::int32_t* to) = nullptr;
  void (*multiply)(const std::int32_t* rows, const std::int32_t* labels, std::int64_t tile,
                   std::int64_t stride, bool begin, float* sums) = nullptr;

  // a + b in bfloat16, and `count` labels of the rows that kProducts products make, which lie
  // `size` floats apart; both counts whole vectors.
  void (*add_scaled)(const ScaledRow& a, const ScaledRow& b, std::int64_t count,
                     std::uint16_t* to) = nullptr;
  void (*join_products)(const JoinedRow& row, const float* products, std::int64_t size,
                        std::int64_t count) = nullptr;
};

// Of AMX. A tile is 16 rows; a chunk of it is 32 columns, 16 pairs of a panel, as [16, 32] words.
constexpr std::int64_t kTileRows = 16, kChunkWords = kTileRows * 32, kStepChunks = 8;

// Sums, begun or added to, of `count` tiles of rows and `panels` panels that follow each other,
// over some chunks of both.
struct TileProduct {
  const std::uint16_t* rows = nullptr;  // [count, rows_stride], of each the first chunks
  std::int64_t rows_stride = 0, count = 0;
  const std::int32_t* labels = nullptr;  // [panels, kPairs, kPanelLabels], as well
  std::int64_t panels = 0, chunks = 0;
  const std::uint16_t* next_rows = nullptr;  // what will be taken after these, or null
  const std::int32_t* next_labels = nullptr;
  bool begin = false;
  float* sums = nullptr;  // [count, sums_stride], of which [panels, 2, 16, 16] are meant
  std::int64_t sums_stride = 0;
  // Where sums of pairs of tiles go in the end, if all their rows and labels are meant; or null.
  float* message = nullptr;  // [message_rows, message_stride], of which message_labels are meant
  std::int64_t message_stride = 0, message_rows = 0, message_labels = 0;

  T2P_INLINE bool goes_to_message(std::int64_t tile, std::int64_t panel) const {
    const std::int64_t pair = tile / 2 * 2, tiles = pair + 2 < count ? pair + 2 : count;
    return message != nullptr && tiles * kTileRows <= message_rows &&
           (panel + 1) * kPanelLabels <= message_labels;
  }
};

struct TileKernels {
  // Chunks of a tile from column `first` on, with zeros where there are no more rows or columns.
  void (*pack_rows)(const std::uint16_t* rows, std::int64_t count, std::int64_t v,
                    std::int64_t first, std::int64_t chunks, std::uint16_t* to);
  void (*multiply)(const TileProduct& product);
  // `count` rows in the place of the pairs of a panel, for its labels from `label` on, with zeros
  // behind them up to a whole chunk.
  void (*pair_rows)(const std::uint16_t* rows, std::int64_t count, std::int64_t v,
                    std::int64_t label, std::int32_t* to);
  // `count` labels of a tile's row of sums, which begins at `sums`, rounded to bfloat16.
  void (*round_row)(const float* sums, std::int64_t count, std::uint16_t* to);
};

namespace amx {
extern const TileKernels kTiles;
}

// Where the instruction set has none, null.
const TileKernels* tile_kernels();

// label_product_cpu by them.
void label_product_by_tiles(const std::uint16_t* rows, const std::int32_t* packed, std::int64_t r,
                            std::int64_t v, int threads, float* message);

// log(a) of mrf.cpp.
float log_of(float a);

T2P_DECLARE_FOR_ISAS(Kernels, kKernels)

}  // namespace t2p::mrf

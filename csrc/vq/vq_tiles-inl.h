// SPDX-License-Identifier: Apache-2.0
// Rows and codes in bytes, multiplied by tiles. Included by vq_rows-inl.h at the level amx.
//
// A panel as it lies, four channels of a code side by side, is three right sides next to each
// other for every 64 channels. Rows become left sides: 64 channels of one row side by side.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "common/tiles.h"
#include "common/transpose-inl.h"
#include "vq/vq_integers-inl.h"

namespace t2p::vq::T2P_ISA_NAMESPACE {
namespace {

static_assert(kLanes == tiles::kTileRows && kCoarseVectors == 3);

// Rows, [steps, kLanes] of four channels each, as left sides [kLanes, steps].
T2P_INLINE void turn_steps(const std::uint8_t* from, std::int64_t steps, std::uint8_t* to) {
  for (std::int64_t s = 0; s < steps; s += kTileSteps) {
    transpose_square(reinterpret_cast<const std::int32_t*>(from) + s * kLanes, kLanes,
                     reinterpret_cast<std::int32_t*>(to) + s, steps);
  }
}

// The codes of one vector of a panel, and what the sums of two groups of rows begin with there.
struct TileCodes {
  const std::uint8_t* codes;  // [steps], 4 kCoarseCodes bytes apart
  alignas(64) std::int32_t start[2][kLanes];
};

// to[m] = the integers of row m of both groups against the codes of two vectors, side by side, or
// of one; `to_row` is bytes between rows.
template <int kVectors>
T2P_INLINE void score_tiles(const std::uint8_t* rows, std::int64_t steps, const TileCodes* vectors,
                            std::int32_t* to, std::int64_t to_row) {
  using namespace tiles;
  constexpr std::int64_t kStep = 4 * kCoarseCodes;
  const std::int64_t row = 4 * steps;
  const std::uint8_t* lower = rows + kLanes * row;
  const std::uint8_t *left = vectors[0].codes, *right = vectors[kVectors - 1].codes;
  load_tile<0>(vectors[0].start[0], 0);
  load_tile<1>(vectors[0].start[1], 0);
  if constexpr (kVectors == 2) {
    load_tile<2>(vectors[1].start[0], 0);
    load_tile<3>(vectors[1].start[1], 0);
  }
  for (std::int64_t s = 0; s < steps; s += kTileSteps) {
    load_tile<4>(rows + 4 * s, row);
    load_tile<6>(left + s * kStep, kStep);
    load_tile<5>(lower + 4 * s, row);
    add_product_bytes<0, 4, 6>();
    if constexpr (kVectors == 2) {
      load_tile<7>(right + s * kStep, kStep);
      add_product_bytes<1, 5, 6>();
      add_product_bytes<2, 4, 7>();
      add_product_bytes<3, 5, 7>();
    } else {
      add_product_bytes<1, 5, 6>();
    }
  }
  std::int32_t* below = to + kLanes * (to_row / 4);
  store_tile<0>(to, to_row);
  store_tile<1>(below, to_row);
  if constexpr (kVectors == 2) {
    store_tile<2>(to + kLanes, to_row);
    store_tile<3>(below + kLanes, to_row);
  }
}

}  // namespace
}  // namespace t2p::vq::T2P_ISA_NAMESPACE

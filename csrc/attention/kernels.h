// SPDX-License-Identifier: Apache-2.0
// Between attention.cpp and the kernels for one instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/attention.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace t2p::attention {

// At most: keys of a block, those whose scores are summed at a time, and queries that are.
constexpr std::int64_t kKeys = 64, kMostTogether = 8, kMostLanes = 16;

// Of a task, a multiple of any vector: a block of keys is read and converted once for these.
inline std::int64_t queries_of(const Attention& attention) {
  return attention.d + attention.e <= 256 ? 256 : 64;
}

// In floats; 32 more for every part, so that each begins on a cache line's boundary.
inline std::int64_t scratch_size(const Attention& attention) {
  const std::int64_t queries = queries_of(attention), d = attention.d + kMostLanes,
                     e = attention.e + kMostLanes;
  return queries * (d + e + 2) + (kKeys + kMostTogether) * (d + e + 2 * kMostLanes);
}

// With tiles: queries of a task, and keys of a block.
constexpr std::int64_t kTiledQueries = 256, kTiledKeys = 128;

struct TileSizes {
  explicit TileSizes(const Attention& attention)
      : steps((attention.d + 31) / 32), width((attention.e + 16) / 16 * 16) {}
  // Of a block of keys and values as they are prepared, in numbers of 32 bits.
  std::int64_t block() const { return kTiledKeys * (steps * 16 + width / 2 + 1) + 16; }
  std::int64_t steps;  // of 32 channels, in a product of a query and a key
  std::int64_t width;  // of values and a one behind them, up to a multiple of 16
};

// Queries, outputs, largest scores; two times scores and offsets; and a block.
inline std::int64_t tiled_scratch_size(const Attention& attention) {
  const TileSizes sizes(attention);
  const std::int64_t tiled = kTiledQueries * (sizes.steps * 16 + sizes.width + 1) +
                             2 * 32 * (kTiledKeys + 1) + sizes.block();
  return std::max(tiled, scratch_size(attention));
}

struct Kernels {
  // The outputs of the queries [begin, end) of one head, at most queries_of(attention), with tiles
  // kTiledQueries. `scratch` lies on a cache line's boundary. `blocks` are the head's keys and
  // values, prepared, or null.
  void (*attend)(const Attention& attention, std::int64_t batch, std::int64_t head,
                 std::int64_t begin, std::int64_t end, const std::int32_t* blocks, float* scratch,
                 const Rows& out);
  // A block of kTiledKeys keys from `first` on, or those that are left, with their values, for
  // bfloat16 with tiles; null where there are none.
  void (*prepare)(const Attention& attention, std::int64_t batch, std::int64_t head,
                  std::int64_t first, std::int32_t* to);
};

T2P_DECLARE_FOR_ISAS(Kernels, kKernels)

}  // namespace t2p::attention

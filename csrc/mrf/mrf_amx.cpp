// SPDX-License-Identifier: Apache-2.0
// The product with dense label weights in bfloat16, by tiles.
//
// A chunk is 32 columns, what a tile has in a row. Packed labels are right sides as they lie; rows
// are copied into tiles that lie side by side, because 16 rows of thousands of labels share a few
// places of the nearest cache. Two tiles of rows and two of labels give four tiles of sums: four
// loads for four products. The second cache keeps up with the half of them that are rows; labels
// are taken kStepChunks at a time so that they stay in the nearest one.
#include "common/pairs-inl.h"
#include "common/tiles.h"
#include "mrf/kernels.h"

namespace t2p::mrf::amx {
namespace {

using namespace tiles;

static_assert(2 * kTileRows == kPanelLabels && kPairs % (kStepChunks * kTileRows) == 0);

void pack_rows(const std::uint16_t* rows, std::int64_t count, std::int64_t v, std::int64_t first,
               std::int64_t chunks, std::uint16_t* to) {
  for (std::int64_t i = 0; i < kTileRows; ++i) {
    std::uint16_t* row = to + i * kTileWords;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::int64_t column = first + chunk * kTileWords;
      std::uint16_t* words = row + chunk * kTileRows * kTileWords;
      if (i < count && column + kTileWords <= v) {
        __builtin_memcpy(words, rows + i * v + column, kTileBytes);
        continue;
      }
      for (std::int64_t j = 0; j < kTileWords; ++j) {
        words[j] = i < count && column + j < v ? rows[i * v + column + j] : 0;
      }
    }
  }
}

// What will be wanted next, some lines at a time, to have been asked for in so many steps.
struct Fetch {
  const char* next;
  const char* end;
  std::int64_t lines;

  Fetch(const void* from, std::int64_t bytes, std::int64_t steps)
      : next(static_cast<const char*>(from)),
        end(next + (from ? bytes : 0)),
        lines((bytes / 64 + steps - 1) / steps) {}

  T2P_INLINE void step() {
    for (std::int64_t i = 0; i < lines && next < end; ++i, next += 64) {
      __builtin_prefetch(next, 0, 2);
    }
  }
};

constexpr std::int64_t kTileSums = kTileRows * kTileRows, kPanelSums = 2 * kTileSums;

template <bool both>
void multiply_tiles(const std::uint16_t* rows, std::int64_t below, const std::int32_t* labels,
                    std::int64_t chunks, bool begin, Fetch& fetch, float* sums,
                    std::int64_t sums_below) {
  constexpr std::int64_t kStride = kTileRows * sizeof(float);
  if (begin) {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
  } else {
    load_tile<0>(sums, kStride);
    load_tile<1>(sums + kTileSums, kStride);
    if (both) load_tile<2>(sums + sums_below, kStride);
    if (both) load_tile<3>(sums + sums_below + kTileSums, kStride);
  }
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    fetch.step();
    load_tile<6>(labels, kPanelLabels * sizeof(*labels));
    load_tile<7>(labels + kTileRows, kPanelLabels * sizeof(*labels));
    load_tile<4>(rows, kTileBytes);
    if (both) load_tile<5>(rows + below, kTileBytes);
    add_product_bf16<0, 4, 6>();
    add_product_bf16<1, 4, 7>();
    if (both) add_product_bf16<2, 5, 6>();
    if (both) add_product_bf16<3, 5, 7>();
    rows += kTileRows * kTileWords;
    labels += kTileRows * kPanelLabels;
  }
  store_tile<0>(sums, kStride);
  store_tile<1>(sums + kTileSums, kStride);
  if (both) store_tile<2>(sums + sums_below, kStride);
  if (both) store_tile<3>(sums + sums_below + kTileSums, kStride);
}

void multiply(const TileProduct& product) {
  const TilesInUse in_use;
  const std::int64_t steps = (product.count + 1) / 2 * product.chunks;
  for (std::int64_t panel = 0; panel < product.panels; ++panel) {
    constexpr std::int64_t kPanel = kPairs * kPanelLabels;
    const std::int32_t* labels = product.labels + panel * kPanel;
    const bool last = panel + 1 == product.panels;
    Fetch fetch(last ? product.next : labels + kPanel,
                product.chunks * kTileRows * kPanelLabels * std::int64_t{sizeof(*labels)}, steps);
    for (std::int64_t tile = 0; tile < product.count; tile += 2) {
      const std::uint16_t* rows = product.rows + tile * product.rows_stride;
      float* sums = product.sums + tile * product.sums_stride + panel * kPanelSums;
      const auto multiply_them =
          tile + 1 < product.count ? multiply_tiles<true> : multiply_tiles<false>;
      multiply_them(rows, product.rows_stride, labels, product.chunks, product.begin, fetch, sums,
                    product.sums_stride);
    }
  }
}

void pair_rows(const std::uint16_t* rows, std::int64_t count, std::int64_t v, std::int64_t label,
               std::int32_t* to) {
  const std::int64_t labels = v - label < kPanelLabels ? v - label : kPanelLabels;
  const std::uint16_t nothing[kPanelLabels] = {};
  for (std::int64_t i = 0; i < count || i % kTileWords != 0; i += 2, to += kPanelLabels) {
    const std::uint16_t* a = i < count ? rows + i * v + label : nothing;
    const std::uint16_t* b = i + 1 < count ? rows + (i + 1) * v + label : nothing;
    if (labels < kPanelLabels) __builtin_memset(to, 0, kPanelLabels * sizeof(*to));
    simd::amx::pair_rows<false>(a, b, labels, to);
  }
}

void round_row(const float* sums, std::int64_t count, std::uint16_t* to) {
  using namespace simd::amx;
  for (; count >= kTileRows; count -= kTileRows, sums += kTileSums, to += kTileRows) {
    store_bf16(to, load(sums));
  }
  if (count == 0) return;
  std::uint16_t rest[kTileRows];
  store_bf16(rest, load(sums));
  for (std::int64_t i = 0; i < count; ++i) to[i] = rest[i];
}

}  // namespace

const TileKernels kTiles{
    .pack_rows = pack_rows, .multiply = multiply, .pair_rows = pair_rows, .round_row = round_row};

}  // namespace t2p::mrf::amx

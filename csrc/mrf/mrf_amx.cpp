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

// Where four tiles of sums lie; a row of one takes `stride` floats.
struct Sums {
  float* data;
  std::int64_t stride, right, below;
};

template <bool both>
void multiply_tiles(const std::uint16_t* rows, std::int64_t below, const std::int32_t* labels,
                    std::int64_t chunks, Fetch& next_rows, Fetch& next_labels, const Sums* from,
                    const Sums& to) {
  if (from == nullptr) {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
  } else {
    const std::int64_t stride = from->stride * std::int64_t{sizeof(float)};
    load_tile<0>(from->data, stride);
    load_tile<1>(from->data + from->right, stride);
    if (both) load_tile<2>(from->data + from->below, stride);
    if (both) load_tile<3>(from->data + from->below + from->right, stride);
  }
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    next_rows.step();
    next_labels.step();
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
  const std::int64_t stride = to.stride * std::int64_t{sizeof(float)};
  store_tile<0>(to.data, stride);
  store_tile<1>(to.data + to.right, stride);
  if (both) store_tile<2>(to.data + to.below, stride);
  if (both) store_tile<3>(to.data + to.below + to.right, stride);
}

void multiply(const TileProduct& product) {
  constexpr std::int64_t kPanel = kPairs * kPanelLabels;
  const TilesInUse in_use;
  const std::int64_t steps = (product.count + 1) / 2 * product.chunks;
  const std::int64_t rows_bytes = product.count * product.rows_stride * 2;
  const std::int64_t labels_bytes = product.chunks * kTileRows * kPanelLabels * 4;
  Fetch next_rows(product.next_rows, rows_bytes, product.panels * steps);
  for (std::int64_t panel = 0; panel < product.panels; ++panel) {
    const std::int32_t* labels = product.labels + panel * kPanel;
    const bool last = panel + 1 == product.panels;
    Fetch next_labels(last ? product.next_labels : labels + kPanel, labels_bytes, steps);
    for (std::int64_t tile = 0; tile < product.count; tile += 2) {
      const Sums sums{product.sums + tile * product.sums_stride + panel * kPanelSums, kTileRows,
                      kTileSums, product.sums_stride};
      Sums to = sums;
      if (product.goes_to_message(tile, panel)) {
        const std::int64_t stride = product.message_stride, row = tile * kTileRows;
        to = {product.message + row * stride + panel * kPanelLabels, stride, kTileRows,
              kTileRows * stride};
      }
      const auto multiply_them =
          tile + 1 < product.count ? multiply_tiles<true> : multiply_tiles<false>;
      multiply_them(product.rows + tile * product.rows_stride, product.rows_stride, labels,
                    product.chunks, next_rows, next_labels, product.begin ? nullptr : &sums, to);
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

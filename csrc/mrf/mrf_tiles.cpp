// SPDX-License-Identifier: Apache-2.0
// Products in bfloat16 by the tiles of AMX: with dense label weights, as mrf_product.cpp packs
// them, and with weights of pairs of positions.
#include <algorithm>

#include "common/block_cache.h"
#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "mrf/kernels.h"

namespace t2p::mrf {
namespace {

constexpr std::int64_t kStepWords = kStepChunks * kChunkWords;  // of a tile
constexpr std::int64_t kStepColumns = kStepWords / kTileRows;
constexpr std::int64_t kPanelWords = kPairs * kPanelLabels, kPanelSums = kTileRows * kPanelLabels;
constexpr std::int64_t kSquare = kTileRows * kTileRows;  // sums of a tile

// The labels of a step in panel `number`.
const std::int32_t* labels_of(const std::int32_t* packed, std::int64_t panels, std::int64_t step,
                              std::int64_t number) {
  const std::int64_t pairs = step * kStepColumns / 2, part = pairs / kPairs;
  return packed + (part * panels + number) * kPanelWords + pairs % kPairs * kPanelLabels;
}

// One row of a tile's sums, of `count` labels.
void copy_row(const float* sums, std::int64_t row, std::int64_t count, float* to) {
  constexpr std::int64_t kSide = kTileRows;
  const float* from = sums + row * kSide;
  for (; count >= kSide; count -= kSide, from += kSquare, to += kSide) std::copy_n(from, kSide, to);
  std::copy_n(from, count, to);
}

// Chunks of a step of a product over `columns`.
std::int64_t chunks_of(std::int64_t step, std::int64_t columns) {
  constexpr std::int64_t kChunkColumns = kChunkWords / kTileRows;
  return std::min(kStepChunks, ceil_div(columns - step * kStepColumns, kChunkColumns));
}

// Rows of v columns as [step, tile, kStepWords].
void tile_rows(const TileKernels& kernels, const std::uint16_t* rows, std::int64_t r,
               std::int64_t v, int threads, std::uint16_t* to) {
  const std::int64_t tiles = ceil_div(r, kTileRows);
  parallel_for(threads, ceil_div(v, kStepColumns) * tiles, [&](std::int64_t task) {
    const std::int64_t step = task / tiles, row = task % tiles * kTileRows;
    kernels.pack_rows(rows + row * v, std::min(kTileRows, r - row), v, step * kStepColumns,
                      chunks_of(step, v), to + task * kStepWords);
  });
}

}  // namespace

const TileKernels* tile_kernels() {
#if T2P_X86
  return chosen_isa() == Isa::kAmx ? &amx::kTiles : nullptr;
#else
  return nullptr;
#endif
}

void label_product_by_tiles(const std::uint16_t* rows, const std::int32_t* packed, std::int64_t r,
                            std::int64_t v, int threads, float* message) {
  const TileKernels& kernels = *tile_kernels();
  const std::int64_t tiles = ceil_div(r, kTileRows), panels = ceil_div(v, kPanelLabels);
  const std::int64_t steps = ceil_div(v, kStepColumns);
  const CachedArray<std::uint16_t> tiled(steps * tiles * kStepWords);
  tile_rows(kernels, rows, r, v, threads, tiled.data());
  // A task's sums and a part of its rows fit into the second cache.
  constexpr std::int64_t kMostTiles = 32, kMostPanels = 16;
  const std::int64_t groups = ceil_div(tiles, kMostTiles);
  const std::int64_t width =
      std::clamp<std::int64_t>(panels * groups / (2 * std::int64_t{threads}), 1, kMostPanels);
  const std::int64_t blocks = ceil_div(panels, width);
  parallel_for(threads, groups * blocks, [&](std::int64_t task) {
    const std::int64_t first = task / blocks * kMostTiles,
                       last = std::min(first + kMostTiles, tiles);
    const std::int64_t begin = task % blocks * width, end = std::min(begin + width, panels);
    const std::int64_t stride = (end - begin) * kPanelSums;
    thread_local Buffer<float> sums;
    sums.reserve((last - first) * stride);
    const std::int64_t label = begin * kPanelLabels, row = first * kTileRows;
    TileProduct product{.rows_stride = kStepWords,
                        .count = last - first,
                        .panels = end - begin,
                        .sums = sums.data(),
                        .sums_stride = stride,
                        .message_stride = v,
                        .message_rows = r - row,
                        .message_labels = v - label};
    const auto rows_of = [&](std::int64_t step) {
      return tiled.data() + (step * tiles + first) * kStepWords;
    };
    for (std::int64_t step = 0; step < steps; ++step) {
      const bool ends = step + 1 == steps;
      product.rows = rows_of(step);
      product.labels = labels_of(packed, panels, step, begin);
      product.next_rows = ends ? nullptr : rows_of(step + 1);
      product.next_labels = ends ? nullptr : labels_of(packed, panels, step + 1, begin);
      product.chunks = chunks_of(step, v);
      product.begin = step == 0;
      product.message = ends ? message + row * v + label : nullptr;
      kernels.multiply(product);
    }
    for (std::int64_t i = 0; i < std::min((last - first) * kTileRows, r - row); ++i) {
      for (std::int64_t panel = 0; panel < end - begin; ++panel) {
        if (product.goes_to_message(i / kTileRows, panel)) continue;
        const std::int64_t at = panel * kPanelLabels;
        copy_row(sums.data() + i / kTileRows * stride + panel * kPanelSums, i % kTileRows,
                 std::min(kPanelLabels, v - label - at), message + (row + i) * v + label + at);
      }
    }
  });
}

bool has_mix() { return tile_kernels() != nullptr; }

void mix_cpu(const Mix& mix, int threads, std::uint16_t* to) {
  constexpr std::int64_t kPanels = 4;  // of a task, so that it takes some lines of a row at once
  constexpr std::int64_t kLabels = kPanels * kPanelLabels;
  const TileKernels& kernels = *tile_kernels();
  const std::int64_t tiles = ceil_div(mix.r, kTileRows), steps = ceil_div(mix.r, kStepColumns);
  const CachedArray<std::uint16_t> weights(steps * tiles * kStepWords);
  tile_rows(kernels, mix.weights, mix.r, mix.r, threads, weights.data());
  parallel_for(threads, ceil_div(mix.v, kLabels), [&](std::int64_t task) {
    const std::int64_t label = task * kLabels, count = std::min(kLabels, mix.v - label);
    const std::int64_t panels = ceil_div(count, kPanelLabels);
    thread_local Buffer<std::int32_t> pairs(kPanels * kPanelWords);
    thread_local Buffer<float> sums;
    sums.reserve(tiles * kPanels * kPanelSums);
    const auto row_of = [&](std::int64_t row) {
      return &sums[row / kTileRows * kPanels * kPanelSums + row % kTileRows * kTileRows];
    };
    for (std::int64_t step = 0; step < steps; ++step) {
      const std::int64_t row = step * kStepColumns;
      for (std::int64_t panel = 0; panel < panels; ++panel) {
        kernels.pair_rows(mix.q + row * mix.v, std::min(kStepColumns, mix.r - row), mix.v,
                          label + panel * kPanelLabels, pairs.data() + panel * kPanelWords);
      }
      kernels.multiply({.rows = weights.data() + step * tiles * kStepWords,
                        .rows_stride = kStepWords,
                        .count = tiles,
                        .labels = pairs.data(),
                        .panels = panels,
                        .chunks = chunks_of(step, mix.r),
                        .begin = step == 0,
                        .sums = sums.data(),
                        .sums_stride = kPanels * kPanelSums});
    }
    for (std::int64_t j = 0; j < mix.k; ++j) {
      const std::int64_t here = mix.labels[j] - label;
      if (here < 0 || here >= count) continue;
      const float* other = mix.others + j;
      for (std::int64_t row = 0; row < mix.r; ++row) {
        row_of(row)[here / kTileRows * kSquare + here % kTileRows] += other[row * mix.k];
      }
    }
    for (std::int64_t row = 0; row < mix.r; ++row) {
      kernels.round_row(row_of(row), count, to + row * mix.v + label);
    }
  });
}

}  // namespace t2p::mrf

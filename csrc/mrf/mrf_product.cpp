// SPDX-License-Identifier: Apache-2.0
// The product with dense label weights in bfloat16.
//
// With AMX it is made by tiles (mrf_tiles.cpp). Else, from some dozens of rows on, it is made by
// halves (V. Strassen, Gaussian elimination is not optimal, 1969): rows, labels and columns are
// halved, and seven products of quarters and of their sums take the place of eight. Sums are
// rounded to bfloat16 too. So that no row or label loses to a neighbour of larger numbers, each is
// first brought to magnitudes of 1 to 2 by a power of two, which is exact (G. Ballard et al.,
// Improving the numerical stability of fast matrix multiplication, 2016, section 5: outside
// scaling).
#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/block_cache.h"
#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "mrf/kernels.h"
#include "mrf/mrf.h"

namespace t2p::mrf {
namespace {

constexpr std::int64_t kPanelWords = kPairs * kPanelLabels;
constexpr int kSums = 5;  // of quarters of W_c that are kept

// What products of quarters take. A quarter is in one half of the rows, or labels, and in one half
// of the columns; a sign of 0 is for none.
struct Quarter {
  int half, columns;
  float sign;
};
struct Product {
  Quarter rows[2], labels[2];
  int sum;  // number among those kept, -1 for a quarter as it is
};
constexpr Quarter kNone{0, 0, 0};
constexpr Product kTerms[kProducts] = {
    {{{0, 0, 1}, {1, 1, 1}}, {{0, 0, 1}, {1, 1, 1}}, 0},
    {{{1, 0, 1}, {1, 1, 1}}, {{0, 0, 1}, kNone}, -1},
    {{{0, 0, 1}, kNone}, {{1, 0, 1}, {1, 1, -1}}, 1},
    {{{1, 1, 1}, kNone}, {{0, 1, 1}, {0, 0, -1}}, 2},
    {{{0, 0, 1}, {0, 1, 1}}, {{1, 1, 1}, kNone}, -1},
    {{{1, 0, 1}, {0, 0, -1}}, {{0, 0, 1}, {1, 0, 1}}, 3},
    {{{0, 1, 1}, {1, 1, -1}}, {{0, 1, 1}, {1, 1, 1}}, 4},
};

// How packed label weights lie in memory.
struct Layout {
  std::int64_t v;
  std::int64_t panels = ceil_div(v, kPanelLabels), parts = ceil_div(ceil_div(v, 2), kPairs);
  bool halves = v % (4 * kPairs) == 0 && tile_kernels() == nullptr;
  std::int64_t scales = parts * panels * kPanelWords;  // and their inverses behind them
  std::int64_t sums = scales + 2 * v;
  std::int64_t words = halves ? sums + kSums * (parts / 2) * (panels / 2) * kPanelWords : scales;

  std::int64_t panel(std::int64_t part, std::int64_t number) const {
    return (part * panels + number) * kPanelWords;
  }
  // Panel `number` of a product by halves.
  std::int64_t panel(const Product& product, std::int64_t part, std::int64_t number) const {
    if (product.sum < 0) {
      const Quarter& quarter = product.labels[0];
      return panel(part + quarter.columns * (parts / 2), number + quarter.half * (panels / 2));
    }
    return sums + ((product.sum * (parts / 2) + part) * (panels / 2) + number) * kPanelWords;
  }
};

// The power of two that brings the largest magnitude to 1 to 2 and its inverse, which for zeros is
// 0 too. False if not all are finite.
bool scale_of(const std::uint16_t* words, std::int64_t count, float* scale, float* inverse) {
  std::int16_t most = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    most = std::max(most, static_cast<std::int16_t>(words[i] & 0x7fff));
  }
  const std::uint32_t exponent = most >> 7;
  const std::uint32_t kept = exponent == 0 ? 127 : std::min<std::uint32_t>(exponent, 253);
  const std::uint32_t up = (254 - kept) << 23, down = exponent == 0 ? 0 : kept << 23;
  std::memcpy(scale, &up, sizeof(up));
  std::memcpy(inverse, &down, sizeof(down));
  return exponent < 255;
}

// Tiles of equal height, or one row less.
struct Tiles {
  std::int64_t rows, count = ceil_div(rows, kMostRows);
  std::int64_t first(std::int64_t tile) const { return tile * rows / count; }
  std::int64_t height(std::int64_t tile) const { return first(tile + 1) - first(tile); }
};

// sums [tiles.rows, stride], begun or added to, of rows and a panel.
void multiply_panel(const Kernels& kernels, const Tiles& tiles, std::int64_t begin,
                    std::int64_t end, const std::int32_t* rows, const std::int32_t* panel,
                    std::int64_t stride, bool fresh, float* sums) {
  const std::int64_t top = tiles.first(begin);
  for (std::int64_t tile = begin; tile < end; ++tile) {
    const std::int64_t row = tiles.first(tile);
    kernels.multiply(rows + row * kPairs, panel, tiles.height(tile), stride, fresh,
                     sums + (row - top) * stride);
  }
}

// So many panels that there are some tasks for each thread.
std::int64_t task_width(std::int64_t panels, std::int64_t groups, std::int64_t most, int threads) {
  return std::clamp<std::int64_t>(panels * groups / (2 * std::int64_t{threads}), 1, most);
}

void multiply_whole(const Kernels& kernels, const std::uint16_t* rows, const std::int32_t* packed,
                    std::int64_t r, const Layout& layout, int threads, float* message) {
  const Tiles tiles{r};
  const CachedArray<std::int32_t> tiled(layout.parts * kPairs * r);
  parallel_for(threads, layout.parts, [&](std::int64_t part) {
    for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
      const std::int64_t row = tiles.first(tile);
      kernels.pack_rows(rows + row * layout.v, tiles.height(tile), layout.v, part * kPairs,
                        tiled.data() + (part * r + row) * kPairs);
    }
  });
  // A task's sums and a part of its rows fit into the second cache.
  constexpr std::int64_t kTiles = 32, kPanels = 8;
  const std::int64_t groups = ceil_div(tiles.count, kTiles);
  const std::int64_t width = task_width(layout.panels, groups, kPanels, threads);
  const std::int64_t blocks = ceil_div(layout.panels, width);
  parallel_for(threads, groups * blocks, [&](std::int64_t task) {
    const std::int64_t first = task / blocks * kTiles, last = std::min(first + kTiles, tiles.count);
    const std::int64_t begin = task % blocks * width, end = std::min(begin + width, layout.panels);
    const std::int64_t stride = (end - begin) * kPanelLabels, top = tiles.first(first);
    thread_local Buffer<float> sums;
    sums.reserve((tiles.first(last) - top) * stride);
    for (std::int64_t part = 0; part < layout.parts; ++part) {
      for (std::int64_t panel = begin; panel < end; ++panel) {
        multiply_panel(kernels, tiles, first, last, tiled.data() + part * r * kPairs,
                       packed + layout.panel(part, panel), stride, part == 0,
                       sums.data() + (panel - begin) * kPanelLabels);
      }
    }
    const std::int64_t label = begin * kPanelLabels, count = std::min(stride, layout.v - label);
    for (std::int64_t row = top; row < tiles.first(last); ++row) {
      std::copy_n(sums.data() + (row - top) * stride, count, message + row * layout.v + label);
    }
  });
}

// Rows in two halves: the upper one has one more if their number is odd, and zeros stand beside it.
struct Halves {
  const std::uint16_t* rows;
  std::int64_t r, v;
  const float* scale;
  std::int64_t upper = ceil_div(r, 2);

  ScaledRow row(const Quarter& quarter, std::int64_t i, std::int64_t column) const {
    const std::int64_t at = quarter.half * upper + i;
    const std::uint16_t* from = rows + quarter.columns * (v / 2) + column;
    return at < r ? ScaledRow{from + at * v, quarter.sign * scale[at]} : ScaledRow{from, 0};
  }
};

void multiply_halves(const Kernels& kernels, const Halves& halves, const float* inverse,
                     const std::int32_t* packed, const Layout& layout, int threads,
                     float* message) {
  const std::int64_t parts = layout.parts / 2, panels = layout.panels / 2, upper = halves.upper;
  const std::int64_t v = layout.v;
  const Tiles tiles{upper};
  const CachedArray<std::int32_t> tiled(kProducts * parts * kPairs * upper);
  const auto rows_of = [&](std::int64_t product, std::int64_t part) {
    return tiled.data() + (product * parts + part) * upper * kPairs;
  };
  parallel_for(threads, kProducts * parts, [&](std::int64_t task) {
    const std::int64_t product = task / parts, part = task % parts;
    const Product& terms = kTerms[product];
    std::uint16_t sums[kMostRows * 2 * kPairs];
    for (std::int64_t tile = 0; tile < tiles.count; ++tile) {
      const std::int64_t row = tiles.first(tile), height = tiles.height(tile);
      for (std::int64_t i = 0; i < height; ++i) {
        kernels.add_scaled(halves.row(terms.rows[0], row + i, part * 2 * kPairs),
                           halves.row(terms.rows[1], row + i, part * 2 * kPairs), 2 * kPairs,
                           sums + i * 2 * kPairs);
      }
      kernels.pack_rows(sums, height, 2 * kPairs, 0, rows_of(product, part) + row * kPairs);
    }
  });
  constexpr std::int64_t kPanels = 16;  // a product's sums fit into the second cache
  const std::int64_t width = task_width(panels, 1, kPanels, threads);
  const auto* scales = reinterpret_cast<const float*>(packed + layout.scales);
  parallel_for(threads, ceil_div(panels, width), [&](std::int64_t task) {
    const std::int64_t begin = task * width, end = std::min(begin + width, panels);
    const std::int64_t stride = (end - begin) * kPanelLabels, size = upper * stride;
    thread_local Buffer<float> sums;
    sums.reserve(kProducts * size);
    for (std::int64_t product = 0; product < kProducts; ++product) {
      for (std::int64_t part = 0; part < parts; ++part) {
        for (std::int64_t panel = begin; panel < end; ++panel) {
          multiply_panel(kernels, tiles, 0, tiles.count, rows_of(product, part),
                         packed + layout.panel(kTerms[product], part, panel), stride, part == 0,
                         sums.data() + product * size + (panel - begin) * kPanelLabels);
        }
      }
    }
    const std::int64_t label = begin * kPanelLabels;
    for (std::int64_t i = 0; i < upper; ++i) {
      const bool both = upper + i < halves.r;
      const JoinedRow row{.half = v / 2,
                          .scale = scales + label,
                          .inverse = scales + v + label,
                          .upper_inverse = inverse[i],
                          .lower_inverse = both ? inverse[upper + i] : 0,
                          .upper = message + i * v + label,
                          .lower = both ? message + (upper + i) * v + label : nullptr};
      kernels.join_products(row, sums.data() + i * stride, size, stride);
    }
  });
}

// Sums of quarters of W_c, with labels scaled, of one panel and part.
void pack_sum(const Kernels& kernels, const std::uint16_t* w_c, const Layout& layout,
              const float* scale, const Product& product, std::int64_t part, std::int64_t panel,
              std::int32_t* packed) {
  std::uint16_t sums[kPanelLabels * 2 * kPairs];
  for (std::int64_t i = 0; i < kPanelLabels; ++i) {
    ScaledRow row[2];
    for (int k = 0; k < 2; ++k) {
      const Quarter& quarter = product.labels[k];
      const std::int64_t label = quarter.half * (layout.v / 2) + panel * kPanelLabels + i;
      const std::int64_t column = quarter.columns * (layout.v / 2) + part * 2 * kPairs;
      row[k] = {w_c + label * layout.v + column, quarter.sign * scale[label]};
    }
    kernels.add_scaled(row[0], row[1], 2 * kPairs, sums + i * 2 * kPairs);
  }
  kernels.pack_labels(sums, 2 * kPairs, 0, 0, packed + layout.panel(product, part, panel));
}

}  // namespace

std::int64_t packed_labels_size(std::int64_t v) {
  const Layout layout{v};
  // Where a tenth would be padding, there is nothing to gain.
  const bool padded = 10 * layout.parts * kPairs > 11 * ceil_div(v, 2);
  return T2P_DISPATCH_BF16(kKernels).multiply == nullptr || padded ? 0 : layout.words;
}

void pack_labels_cpu(const std::uint16_t* w_c, std::int64_t v, int threads, std::int32_t* packed) {
  const Kernels& kernels = T2P_DISPATCH_BF16(kKernels);
  const Layout layout{v};
  parallel_for(threads, layout.panels, [&](std::int64_t panel) {
    for (std::int64_t part = 0; part < layout.parts; ++part) {
      kernels.pack_labels(w_c, v, panel * kPanelLabels, part * kPairs,
                          packed + layout.panel(part, panel));
    }
  });
  if (!layout.halves) return;
  auto* scale = reinterpret_cast<float*>(packed + layout.scales);
  std::atomic<bool> finite{true};
  parallel_for(threads, layout.panels, [&](std::int64_t panel) {
    for (std::int64_t label = panel * kPanelLabels; label < (panel + 1) * kPanelLabels; ++label) {
      if (!scale_of(w_c + label * v, v, scale + label, scale + v + label)) finite = false;
    }
  });
  if (!finite) std::fill_n(scale, v, 0.0f);  // they are of no use then
  parallel_for(threads, layout.panels / 2, [&](std::int64_t panel) {
    for (const Product& product : kTerms) {
      for (std::int64_t part = 0; product.sum >= 0 && part < layout.parts / 2; ++part) {
        pack_sum(kernels, w_c, layout, scale, product, part, panel, packed);
      }
    }
  });
}

void label_product_cpu(const std::uint16_t* rows, const std::int32_t* packed, std::int64_t r,
                       std::int64_t v, int threads, float* message) {
  if (tile_kernels()) return label_product_by_tiles(rows, packed, r, v, threads, message);
  // By halves with as many rows as pay, and as many at a time as have their place in a cache.
  constexpr std::int64_t kLeastRows = 32, kChunk = 256;
  const Kernels& kernels = T2P_DISPATCH_BF16(kKernels);
  const Layout layout{v};
  const std::int64_t chunks = ceil_div(r, kChunk);
  const Buffer<float> scale(2 * (r + 1));
  bool halves = layout.halves && r >= kLeastRows && packed[layout.scales] != 0;
  for (std::int64_t row = 0; halves && row < r; ++row) {
    halves = scale_of(rows + row * v, v, &scale[row], &scale[r + row]);
  }
  if (!halves) {
    if (r > 0) multiply_whole(kernels, rows, packed, r, layout, threads, message);
    return;
  }
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t first = chunk * r / chunks, count = (chunk + 1) * r / chunks - first;
    multiply_halves(kernels, {rows + first * v, count, v, &scale[first]}, &scale[r + first], packed,
                    layout, threads, message + first * v);
  }
}

}  // namespace t2p::mrf

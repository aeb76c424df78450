// SPDX-License-Identifier: Apache-2.0
// The search for the nearest code, without the kernels: splitting over threads, stages, crowds.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "vq/packed.h"
#include "vq/search.h"
#include "vq/vq-inl.h"
#include "vq/vq.h"

namespace t2p::vq {
namespace {

// Below these the codebook is searched faster than it is rounded.
constexpr std::int64_t kLeastCoarseRows = 24, kLeastCoarseCodes = 64;
// Rows of a block: at least so many, and a multiple of what fills vectors.
constexpr std::int64_t kLeastBlockRows = 32, kRowStep = 16;

// Splits [0, count) into `parts` ranges of nearly equal length.
PanelRange part(std::int64_t count, std::int64_t parts, std::int64_t i) {
  return {count * i / parts, count * (i + 1) / parts};
}

// Runs search(first, count, panels, distance, indices) for blocks of rows and, where even small
// ones do not fill the threads, for parts of the panels; keeps the better of what the parts found.
// Parts are the last resort: a part knows none of the codes of the others, and may have to choose
// exactly between codes that are all far.
template <class Search>
void search_blocks(int threads, std::int64_t rows, std::int64_t block_rows, std::int64_t panels,
                   const Search& search, double* distance, std::int64_t* indices) {
  const std::int64_t wanted = threads > 1 ? 4 * threads : 1;
  const std::int64_t filling = ceil_div(ceil_div(rows, wanted), kRowStep) * kRowStep;
  block_rows = std::min(block_rows, std::max(filling, kLeastBlockRows));
  const std::int64_t blocks = ceil_div(rows, block_rows);
  const std::int64_t splits = std::clamp<std::int64_t>(wanted / blocks, 1, ceil_div(panels, 8));
  const Buffer<double> split_distance(splits > 1 ? splits * rows : 0);
  const Buffer<std::int64_t> split_index(splits > 1 ? splits * rows : 0);
  double* to_distance = splits > 1 ? split_distance.data() : distance;
  std::int64_t* to_index = splits > 1 ? split_index.data() : indices;
  parallel_for(threads, blocks * splits, [&](std::int64_t task) {
    const std::int64_t split = task / blocks, first = task % blocks * block_rows;
    search(first, std::min(block_rows, rows - first), part(panels, splits, split),
           to_distance + split * rows + first, to_index + split * rows + first);
  });
  for (std::int64_t r = 0; splits > 1 && r < rows; ++r) {
    // Parts are in the order of the codes: the first of equals has the lowest index.
    std::int64_t best = r;
    bool decided = to_index[r] != kUndecided;
    for (std::int64_t s = 1; s < splits; ++s) {
      decided &= to_index[s * rows + r] != kUndecided;
      if (to_distance[s * rows + r] < to_distance[best]) best = s * rows + r;
    }
    distance[r] = to_distance[best];
    indices[r] = decided ? to_index[best] : kUndecided;
  }
}

// The coarse stage for all rows; those that it gives up have kUndecided as their index.
void search_coarse(const SearchKernels& kernels, const Codebook& codebook,
                   const std::uint8_t* packed, const Rows<const float>& x, int threads,
                   double* distance, std::int64_t* indices) {
  const std::int64_t n = x.count(), d = codebook.d;
  const PackedLayout layout(kernels, codebook.k, d);
  CoarseCodebook coarse = header_of(packed).coarse;
  if (coarse.scale == 0) {
    std::fill_n(indices, n, kUndecided);
    return;
  }
  coarse.panels = at<std::uint8_t>(packed, layout.panels);
  coarse.half_norms = at<float>(packed, layout.half_norms);
  const std::int64_t panels = ceil_div(codebook.k, kernels.coarse_codes);

  // Where the bound decides little, as when most codes are alike, the stage is left early.
  std::atomic<std::int64_t> tried{0}, given_up{0};
  search_blocks(
      threads, n, kernels.coarse_block_rows, panels,
      [&](std::int64_t first, std::int64_t count, PanelRange range, double* to,
          std::int64_t* index) {
        if (given_up * 2 > tried && tried >= 2 * kernels.coarse_block_rows) {
          std::fill_n(index, count, kUndecided);
          return;
        }
        thread_local Buffer<std::uint8_t> scratch;
        scratch.reserve(kernels.coarse_scratch_size(d));
        kernels.coarse_block(codebook, coarse, x, first, count, range, scratch.data(), to, index);
        tried += count;
        given_up += std::count(index, index + count, kUndecided);
      },
      distance, indices);
}

// The fine stage for the rows [count] of x.
void search_fine(const SearchKernels& kernels, Codebook codebook, const Rows<const float>& x,
                 const std::int64_t* rows, std::int64_t count, int threads, double* distance,
                 std::int64_t* indices) {
  const std::int64_t k = codebook.k, d = codebook.d;
  const std::int64_t width = kernels.panel_codes, panels = ceil_div(k, width);
  const std::int64_t block_rows = kernels.block_rows(d);
  Buffer<float> packed, half_norms;
  if (count > block_rows) {
    packed.reserve(panels * width * d);
    half_norms.reserve(panels * width);
    const Buffer<float> largest(panels);
    constexpr std::int64_t kPanelsPerTask = 4;
    parallel_for(threads, ceil_div(panels, kPanelsPerTask), [&](std::int64_t task) {
      const std::int64_t end = std::min((task + 1) * kPanelsPerTask, panels);
      for (std::int64_t p = task * kPanelsPerTask; p < end; ++p) {
        largest[p] =
            kernels.pack_panel(codebook, p * width, std::min(width, k - p * width),
                               packed.data() + p * width * d, half_norms.data() + p * width);
      }
    });
    codebook.panels = packed.data();
    codebook.half_norms = half_norms.data();
    codebook.largest_half_norm = *std::max_element(largest.data(), largest.data() + panels);
  }
  search_blocks(
      threads, count, block_rows, panels,
      [&](std::int64_t first, std::int64_t block, PanelRange range, double* to,
          std::int64_t* index) {
        thread_local Buffer<float> scratch;
        scratch.reserve(kernels.scratch_size(d));
        kernels.search_block(codebook, x, rows + first, block, range, scratch.data(), to, index);
      },
      distance, indices);
}

// The distance of row r from what the search compared.
float finish(Metric metric, const Rows<const float>& x, std::int64_t r, double compared) {
  if (metric != Metric::kCosine) return static_cast<float>(compared);
  const float* row = x.row(r);
  double squares = 0;
  for (std::int64_t t = 0; t < x.d; ++t) {
    squares += double{row[t * x.channel_stride]} * row[t * x.channel_stride];
  }
  return static_cast<float>(1 + (squares > 0 ? compared / std::sqrt(squares) : compared));
}

// A codebook, or one of the two that a crowd makes of it.
struct Codes {
  const float* values;         // [k, d]
  const std::int64_t* number;  // [k], or null if it is the codebook
  std::int64_t k;
  const std::uint8_t* packed;  // or null
};

// Both stages. Gives what was compared, in float64, and the code's number in the codebook.
void search(const Rows<const float>& x, const Codes& codes, Metric metric, int threads,
            double* exact, std::int64_t* indices) {
  const SearchKernels& kernels = T2P_AMX_DISPATCH(kSearch);
  const std::int64_t n = x.count(), d = x.d, k = codes.k;
  Codebook prepared{
      .metric = metric, .codes = codes.values, .scored = codes.values, .k = k, .d = d};
  Buffer<float> directions;
  const auto find_directions = [&] {
    if (metric != Metric::kCosine || directions.data()) return;
    directions = normalize(codes.values, k, d, threads);
    prepared.scored = directions.data();
  };
  const std::uint8_t* packed = codes.packed;
  const bool coarse =
      packed || (kernels.coarse_pays && n >= kLeastCoarseRows && k >= kLeastCoarseCodes);
  Buffer<std::uint8_t> own;
  if (coarse && !packed) {
    find_directions();
    own.reserve(PackedLayout(kernels, k, d).size);
    pack(kernels, prepared, threads, own.data());
    packed = own.data();
  }
  Buffer<float> center;
  if (coarse) {
    prepared.center = at<float>(packed, PackedLayout(kernels, k, d).center);
  } else {
    find_directions();
    center.reserve(d);
    find_center(prepared.scored, k, d, center.data());
    prepared.center = center.data();
  }
  const Buffer<float> origin(d);
  std::fill_n(origin.data(), d, 0.0f);
  prepared.row_center = metric == Metric::kL2 ? prepared.center : origin.data();
  if (coarse) {
    search_coarse(kernels, prepared, packed, x, threads, exact, indices);
  } else {
    std::fill_n(indices, n, kUndecided);
  }

  const std::int64_t count = std::count(indices, indices + n, kUndecided);
  if (count) {
    const Buffer<std::int64_t> rows(count), index(count);
    const Buffer<double> compared(count);
    for (std::int64_t r = 0, i = 0; r < n; ++r) {
      if (indices[r] == kUndecided) rows[i++] = r;
    }
    find_directions();
    search_fine(kernels, prepared, x, rows.data(), count, threads, compared.data(), index.data());
    for (std::int64_t i = 0; i < count; ++i) {
      exact[rows[i]] = compared[i];
      indices[rows[i]] = std::isinf(compared[i]) ? 0 : index[i];
    }
  }
  for (std::int64_t r = 0; codes.number && r < n; ++r) indices[r] = codes.number[indices[r]];
}

// The rows to which a code of the crowd may be nearer than what was found among the others. If the
// crowd's first code is z, no other one is nearer than |x - z| - radius. Where the radius is so
// small that float64 does not tell them apart, all are as near as the first.
void find_open(const Rows<const float>& x, const float* first, float radius, int threads,
               const double* exact, bool* open) {
  const std::int64_t n = x.count(), d = x.d;
  constexpr std::int64_t kRows = 64;
  const float slack = 1 - static_cast<float>(d + 16) * 0x1p-23f;
  parallel_for(threads, ceil_div(n, kRows), [&](std::int64_t block) {
    thread_local Buffer<float> contiguous;
    contiguous.reserve(d);
    for (std::int64_t r = block * kRows, end = std::min(r + kRows, n); r < end; ++r) {
      const float* row = x.row(r);
      if (x.channel_stride != 1) {
        for (std::int64_t t = 0; t < d; ++t) contiguous[t] = row[t * x.channel_stride];
        row = contiguous.data();
      }
      const float computed = distance(row, first, d);
      const double away = std::isfinite(computed) ? double{slack} * computed : 0;
      const double least = away - radius, found = std::sqrt(exact[r]);
      open[r] = radius > away * 0x1p-56 && !(least > found * (1 + 0x1p-40));
    }
  });
}

// The search of a codebook with a crowd: among the others, and for some rows in the crowd.
void search_crowd(const Rows<const float>& x, const Codes& others, const Codes& near,
                  std::int64_t representative, float radius, Metric metric, int threads,
                  double* exact, std::int64_t* indices) {
  search(x, others, metric, threads, exact, indices);
  if (near.k == 0) return;
  const std::int64_t n = x.count(), d = x.d;
  const Buffer<bool> open(n);
  find_open(x, others.values + representative * d, radius, threads, exact, open.data());
  const std::int64_t count = std::count(open.data(), open.data() + n, true);
  if (count == 0) return;
  const Buffer<std::int64_t> rows(count), index(count);
  const Buffer<double> compared(count);
  const Buffer<float> gathered(count * d);
  for (std::int64_t r = 0, i = 0; r < n; ++r) {
    if (open[r]) rows[i++] = r;
  }
  constexpr std::int64_t kRows = 64;
  parallel_for(threads, ceil_div(count, kRows), [&](std::int64_t block) {
    for (std::int64_t i = block * kRows, end = std::min(i + kRows, count); i < end; ++i) {
      const float* row = x.row(rows[i]);
      for (std::int64_t t = 0; t < d; ++t) gathered[i * d + t] = row[t * x.channel_stride];
    }
  });
  search({.data = gathered.data(),
          .outer = count,
          .d = d,
          .inner = 1,
          .outer_stride = d,
          .channel_stride = 1,
          .inner_stride = d},
         near, metric, threads, compared.data(), index.data());
  for (std::int64_t i = 0; i < count; ++i) {
    double& best = exact[rows[i]];
    if (compared[i] < best || (compared[i] == best && index[i] < indices[rows[i]])) {
      best = compared[i];
      indices[rows[i]] = index[i];
    }
  }
}

}  // namespace

void nearest_cpu(const Rows<const float>& x, const float* codebook, std::int64_t k, Metric metric,
                 const std::uint8_t* packed, int threads, std::int64_t* indices, float* distance) {
  const std::int64_t n = x.count(), d = x.d;
  if (n == 0) return;
  const Buffer<double> exact(n);
  Crowd crowd;
  if (packed && header_of(packed).others) {
    const PackedHeader header = header_of(packed);
    const CrowdLayout layout(T2P_AMX_DISPATCH(kSearch), header.others, header.near, d);
    const Codes others{at<float>(packed, layout.other_codes),
                       at<std::int64_t>(packed, layout.other_index), header.others,
                       packed + layout.others};
    const Codes near{at<float>(packed, layout.near_codes),
                     at<std::int64_t>(packed, layout.near_index), header.near,
                     packed + layout.near};
    search_crowd(x, others, near, header.representative, header.radius, metric, threads,
                 exact.data(), indices);
  } else if (!packed && n >= kLeastCoarseRows && crowd.find(codebook, k, d, metric, threads)) {
    const Codes others{crowd.other_codes.data(), crowd.other_index.data(), crowd.others, nullptr};
    const Codes near{crowd.near_codes.data(), crowd.near_index.data(), crowd.near, nullptr};
    search_crowd(x, others, near, crowd.representative, crowd.radius, metric, threads, exact.data(),
                 indices);
  } else {
    search(x, {codebook, nullptr, k, packed}, metric, threads, exact.data(), indices);
  }
  constexpr std::int64_t kRows = 8192;
  parallel_for(threads, ceil_div(n, kRows), [&](std::int64_t task) {
    for (std::int64_t r = task * kRows, end = std::min(r + kRows, n); r < end; ++r) {
      distance[r] = finish(metric, x, r, exact[r]);
    }
  });
}

}  // namespace t2p::vq

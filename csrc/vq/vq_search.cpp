// SPDX-License-Identifier: Apache-2.0
// The search for the nearest code, without the kernels: packing, splitting over threads, stages.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "vq/search.h"
#include "vq/vq-inl.h"
#include "vq/vq.h"

namespace t2p::vq {
namespace {

// Below these the codebook is searched faster than it is rounded.
constexpr std::int64_t kLeastCoarseRows = 24, kLeastCoarseCodes = 64;
// What is packed in a few microseconds, sooner than another thread has begun.
constexpr std::int64_t kLeastSharedPacking = 16 * 1024;
// With so few channels words take no more time than bytes, or may pay for themselves.
constexpr std::int64_t kLeastByteChannels = 3, kMostWordChannels = 8;

// The mean of up to 256 codes. The search is exact about any finite centre; the mean makes its
// rounding small where the data are far from the origin.
void find_center(const float* codebook, std::int64_t k, std::int64_t d, float* center) {
  const std::int64_t samples = std::min<std::int64_t>(k, 256);
  Buffer<double> sum(d);
  std::fill_n(sum.data(), d, 0.0);
  for (std::int64_t s = 0; s < samples; ++s) {
    const float* code = codebook + s * k / samples * d;
    for (std::int64_t t = 0; t < d; ++t) sum[t] += code[t];
  }
  for (std::int64_t t = 0; t < d; ++t) {
    const float mean = static_cast<float>(sum[t] / static_cast<double>(samples));
    center[t] = std::isfinite(mean) ? mean : 0.0f;
  }
}

// Words take up to half more time than bytes, which leave more codes to compare. How many is
// estimated: of codes that are spread evenly, with the mean deviation s from the centre, the one
// nearest to a row is about 4.2 s k^(-1/d) away, and bytes are off by about 0.005 sqrt(d) of the
// largest deviation. A row's comparison with one code weighs as much as what words take longer for
// about 2500.
Format choose_format(const Codebook& codebook, float magnitude) {
  const std::int64_t k = codebook.k, d = codebook.d;
  if (d > kMostWordChannels) return Format::kBytes;
  if (d < kLeastByteChannels) return Format::kWords;
  const std::int64_t samples = std::min<std::int64_t>(k, 256);
  double deviation = 0;
  for (std::int64_t s = 0; s < samples; ++s) {
    for (std::int64_t t = 0; t < d; ++t) {
      const float value = codebook.scored[s * k / samples * d + t] - codebook.center[t];
      if (std::isfinite(value)) deviation += std::abs(value);
    }
  }
  deviation /= static_cast<double>(samples * d);
  const double channels = static_cast<double>(d), codes = static_cast<double>(k);
  const double widening =
      0.0025 * std::sqrt(channels) * magnitude / deviation * std::pow(codes, 1 / channels);
  const double compared = std::pow(1 + widening, channels) - 1;
  return compared < codes / 2500 ? Format::kBytes : Format::kWords;
}

// Splits [0, count) into `parts` ranges of nearly equal length.
PanelRange part(std::int64_t count, std::int64_t parts, std::int64_t i) {
  return {count * i / parts, count * (i + 1) / parts};
}

// Runs search(first, count, panels, distance, indices) for blocks of rows and, where those do not
// fill the threads, for parts of the panels; keeps the better of what the parts found.
template <class Search>
void search_blocks(int threads, std::int64_t rows, std::int64_t block_rows, std::int64_t panels,
                   const Search& search, double* distance, std::int64_t* indices) {
  const std::int64_t blocks = ceil_div(rows, block_rows), wanted = threads > 1 ? 4 * threads : 1;
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

// What vq_pack makes of a codebook, at the beginning of its bytes; the center [d], the panels and
// the half norms follow, each on a cache line's boundary.
struct PackedHeader {
  std::int32_t isa, metric;
  std::int64_t k, d;
  CoarseCodebook coarse;  // its pointers are not used; a scale of 0: the stage cannot be used
};

std::int64_t aligned(std::int64_t bytes) { return ceil_div(bytes, 64) * 64; }

struct PackedLayout {
  std::int64_t center, panels, half_norms, size;

  // Words are the larger of the formats, and used for few channels alone.
  PackedLayout(const SearchKernels& kernels, std::int64_t k, std::int64_t d) {
    const Format largest = d > kMostWordChannels ? Format::kBytes : Format::kWords;
    const std::int64_t count = ceil_div(k, kernels.coarse_codes);
    center = aligned(sizeof(PackedHeader));
    panels = center + aligned(d * sizeof(float));
    half_norms = panels + aligned(count * kernels.coarse_panel_bytes(largest, d));
    size = half_norms + aligned(count * kernels.coarse_codes * sizeof(float));
  }
};

template <class T>
T* at(std::uint8_t* bytes, std::int64_t offset) {
  return reinterpret_cast<T*>(bytes + offset);
}
template <class T>
const T* at(const std::uint8_t* bytes, std::int64_t offset) {
  return reinterpret_cast<const T*>(bytes + offset);
}

PackedHeader header_of(const std::uint8_t* packed) {
  PackedHeader header;
  std::memcpy(&header, packed, sizeof header);
  return header;
}

// `codebook` without a center, which is found here.
void pack(const SearchKernels& kernels, Codebook codebook, int threads, std::uint8_t* packed) {
  const std::int64_t k = codebook.k, d = codebook.d;
  if (k * d < kLeastSharedPacking) threads = 1;
  const PackedLayout layout(kernels, k, d);
  find_center(codebook.scored, k, d, at<float>(packed, layout.center));
  codebook.center = at<float>(packed, layout.center);

  const std::int64_t width = kernels.coarse_codes, panels = ceil_div(k, width);
  constexpr std::int64_t kPanelsPerTask = 8;
  const std::int64_t tasks = ceil_div(panels, kPanelsPerTask);
  const Buffer<float> magnitude(tasks), half_norm(tasks), rounding(tasks);
  const auto codes_of = [&](std::int64_t first_panel, std::int64_t end_panel) {
    return std::min(end_panel * width, k) - first_panel * width;
  };
  parallel_for(threads, tasks, [&](std::int64_t task) {
    const std::int64_t first = task * kPanelsPerTask,
                       end = std::min(first + kPanelsPerTask, panels);
    magnitude[task] = kernels.largest_magnitude(codebook, first * width, codes_of(first, end));
  });
  const float largest = *std::max_element(magnitude.data(), magnitude.data() + tasks);
  const Format format = choose_format(codebook, largest);
  const float scale = kernels.coarse_scale(format, largest, d);
  PackedHeader header{.isa = static_cast<std::int32_t>(chosen_isa()),
                      .metric = static_cast<std::int32_t>(codebook.metric),
                      .k = k,
                      .d = d,
                      .coarse = {.format = format, .scale = scale}};
  if (scale != 0) {
    const std::int64_t panel_bytes = kernels.coarse_panel_bytes(format, d);
    parallel_for(threads, tasks, [&](std::int64_t task) {
      const std::int64_t first = task * kPanelsPerTask,
                         end = std::min(first + kPanelsPerTask, panels);
      half_norm[task] = rounding[task] = 0;
      for (std::int64_t p = first; p < end; ++p) {
        kernels.pack_coarse(format, codebook, p * width, codes_of(p, p + 1), scale,
                            at<std::uint8_t>(packed, layout.panels) + p * panel_bytes,
                            at<float>(packed, layout.half_norms) + p * width, half_norm[task],
                            rounding[task]);
      }
    });
    header.coarse.largest_half_norm = *std::max_element(half_norm.data(), half_norm.data() + tasks);
    header.coarse.largest_rounding = *std::max_element(rounding.data(), rounding.data() + tasks);
  }
  std::memcpy(packed, &header, sizeof header);
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

// The codes at length 1, in float64 and then rounded; a code of length 0 stays.
Buffer<float> normalize(const float* codebook, std::int64_t k, std::int64_t d, int threads) {
  Buffer<float> directions(k * d);
  constexpr std::int64_t kCodes = 64;
  parallel_for(threads, ceil_div(k, kCodes), [&](std::int64_t task) {
    for (std::int64_t j = task * kCodes, end = std::min(j + kCodes, k); j < end; ++j) {
      double squares = 0;
      for (std::int64_t t = 0; t < d; ++t) {
        squares += double{codebook[j * d + t]} * codebook[j * d + t];
      }
      const double norm = squares > 0 ? std::sqrt(squares) : 1;
      for (std::int64_t t = 0; t < d; ++t) {
        directions[j * d + t] = static_cast<float>(codebook[j * d + t] / norm);
      }
    }
  });
  return directions;
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

}  // namespace

std::int64_t packed_size(std::int64_t k, std::int64_t d) {
  return PackedLayout(T2P_DISPATCH(kSearch), k, d).size;
}

void pack_cpu(const float* codebook, std::int64_t k, std::int64_t d, Metric metric, int threads,
              std::uint8_t* packed) {
  Buffer<float> directions;
  if (metric == Metric::kCosine) directions = normalize(codebook, k, d, threads);
  const float* scored = metric == Metric::kCosine ? directions.data() : codebook;
  pack(T2P_DISPATCH(kSearch),
       {.metric = metric, .codes = codebook, .scored = scored, .k = k, .d = d}, threads, packed);
}

bool packed_for(const std::uint8_t* packed, std::int64_t k, std::int64_t d, Metric metric) {
  const PackedHeader header = header_of(packed);
  return header.isa == static_cast<std::int32_t>(chosen_isa()) && header.k == k && header.d == d &&
         header.metric == static_cast<std::int32_t>(metric);
}

void nearest_cpu(const Rows<const float>& x, const float* codebook, std::int64_t k, Metric metric,
                 const std::uint8_t* packed, int threads, std::int64_t* indices, float* distance) {
  const std::int64_t n = x.count(), d = x.d;
  if (n == 0) return;
  const SearchKernels& kernels = T2P_DISPATCH(kSearch);
  Codebook prepared{.metric = metric, .codes = codebook, .scored = codebook, .k = k, .d = d};
  Buffer<float> directions;
  const auto find_directions = [&] {
    if (metric != Metric::kCosine || directions.data()) return;
    directions = normalize(codebook, k, d, threads);
    prepared.scored = directions.data();
  };
  const bool coarse =
      packed || (kernels.coarse_pays && n >= kLeastCoarseRows && k >= kLeastCoarseCodes);
  Buffer<std::uint8_t> own;
  if (coarse && !packed) {
    find_directions();
    own.reserve(packed_size(k, d));
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
  const Buffer<double> exact(n);
  if (coarse) search_coarse(kernels, prepared, packed, x, threads, exact.data(), indices);

  std::atomic<std::int64_t> count{coarse ? 0 : n};
  constexpr std::int64_t kRows = 8192;
  parallel_for(threads, coarse ? ceil_div(n, kRows) : 0, [&](std::int64_t task) {
    std::int64_t undecided = 0;
    for (std::int64_t r = task * kRows, end = std::min(r + kRows, n); r < end; ++r) {
      distance[r] = finish(metric, x, r, exact[r]);
      undecided += indices[r] == kUndecided;
    }
    count += undecided;
  });
  if (count == 0) return;

  const Buffer<std::int64_t> rows(count), index(count);
  for (std::int64_t r = 0, i = 0; r < n; ++r) {
    if (!coarse || indices[r] == kUndecided) rows[i++] = r;
  }
  find_directions();
  search_fine(kernels, prepared, x, rows.data(), count, threads, exact.data(), index.data());
  for (std::int64_t i = 0; i < count; ++i) {
    distance[rows[i]] = finish(metric, x, rows[i], exact[i]);
    indices[rows[i]] = std::isinf(exact[i]) ? 0 : index[i];
  }
}

}  // namespace t2p::vq

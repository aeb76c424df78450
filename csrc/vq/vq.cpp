// SPDX-License-Identifier: Apache-2.0
#include "vq/vq.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "common/buffer.h"
#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "vq/search.h"
#include "vq/vq-inl.h"

namespace t2p::vq {
namespace {

// Below these the codebook is searched faster than it is rounded.
constexpr std::int64_t kLeastCoarseRows = 24, kLeastCoarseCodes = 64;
// With so few channels words take no more time than bytes, or may pay for themselves.
constexpr std::int64_t kLeastByteChannels = 3, kMostWordChannels = 8;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The mean of up to 256 codes. The search is exact about any finite centre; the mean makes its
// rounding small where the data are far from the origin.
Buffer<float> center_of(const float* codebook, std::int64_t k, std::int64_t d) {
  const std::int64_t samples = std::min<std::int64_t>(k, 256);
  Buffer<double> sum(d);
  Buffer<float> center(d);
  std::fill_n(sum.data(), d, 0.0);
  for (std::int64_t s = 0; s < samples; ++s) {
    const float* code = codebook + s * k / samples * d;
    for (std::int64_t t = 0; t < d; ++t) sum[t] += code[t];
  }
  for (std::int64_t t = 0; t < d; ++t) {
    const float mean = static_cast<float>(sum[t] / static_cast<double>(samples));
    center[t] = std::isfinite(mean) ? mean : 0.0f;
  }
  return center;
}

// Words take twice the time of bytes, which leave more codes to compare. How many is estimated: of
// codes that are spread evenly, with the mean deviation s from the centre, the one nearest to a row
// is about 4.2 s k^(-1/d) away, and bytes are off by about 0.005 sqrt(d) of the largest deviation.
// A row's comparison with one code weighs as much as a scan of about 1000.
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
  return compared < codes / 1000 ? Format::kBytes : Format::kWords;
}

void check_index(const char* op, std::int64_t index, std::int64_t k) {
  if (index < 0 || index >= k) [[unlikely]] {
    throw std::out_of_range(concat(op, ": index ", index, " is outside [0, ", k, ")"));
  }
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

// The coarse stage for all rows; those that it gives up have kUndecided as their index.
void search_coarse(const SearchKernels& kernels, const Codebook& codebook,
                   const Rows<const float>& x, int threads, double* distance,
                   std::int64_t* indices) {
  const std::int64_t n = x.count(), k = codebook.k, d = codebook.d;
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
  if (scale == 0) {
    std::fill_n(indices, n, kUndecided);
    return;
  }

  const std::int64_t panel_bytes = kernels.coarse_panel_bytes(format, d);
  const Buffer<std::uint8_t> packed(panels * panel_bytes);
  const Buffer<float> half_norms(panels * width);
  parallel_for(threads, tasks, [&](std::int64_t task) {
    const std::int64_t first = task * kPanelsPerTask,
                       end = std::min(first + kPanelsPerTask, panels);
    half_norm[task] = rounding[task] = 0;
    for (std::int64_t p = first; p < end; ++p) {
      kernels.pack_coarse(format, codebook, p * width, codes_of(p, p + 1), scale,
                          packed.data() + p * panel_bytes, half_norms.data() + p * width,
                          half_norm[task], rounding[task]);
    }
  });
  const CoarseCodebook coarse{
      .format = format,
      .scale = scale,
      .panels = packed.data(),
      .half_norms = half_norms.data(),
      .largest_half_norm = *std::max_element(half_norm.data(), half_norm.data() + tasks),
      .largest_rounding = *std::max_element(rounding.data(), rounding.data() + tasks)};

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

void nearest_cpu(const Rows<const float>& x, const float* codebook, std::int64_t k, Metric metric,
                 int threads, std::int64_t* indices, float* distance) {
  const std::int64_t n = x.count(), d = x.d;
  if (n == 0) return;
  const SearchKernels& kernels = T2P_DISPATCH(kSearch);
  Buffer<float> directions;
  if (metric == Metric::kCosine) directions = normalize(codebook, k, d, threads);
  const float* scored = metric == Metric::kCosine ? directions.data() : codebook;
  const Buffer<float> center = center_of(scored, k, d), origin(d);
  std::fill_n(origin.data(), d, 0.0f);
  const Codebook prepared{.metric = metric,
                          .codes = codebook,
                          .scored = scored,
                          .center = center.data(),
                          .row_center = metric == Metric::kL2 ? center.data() : origin.data(),
                          .k = k,
                          .d = d};
  const Buffer<double> exact(n);
  const bool coarse = kernels.coarse_pays && n >= kLeastCoarseRows && k >= kLeastCoarseCodes;
  if (coarse) search_coarse(kernels, prepared, x, threads, exact.data(), indices);

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
  search_fine(kernels, prepared, x, rows.data(), count, threads, exact.data(), index.data());
  for (std::int64_t i = 0; i < count; ++i) {
    distance[rows[i]] = finish(metric, x, rows[i], exact[i]);
    indices[rows[i]] = std::isinf(exact[i]) ? 0 : index[i];
  }
}

void lookup_cpu(const std::int64_t* indices, const float* codebook, std::int64_t k, int threads,
                const Rows<float>& out) {
  const std::int64_t n = out.count(), d = out.d;
  constexpr std::int64_t kRows = 64;
  parallel_for(threads, ceil_div(n, kRows), [&](std::int64_t block) {
    const std::int64_t begin = block * kRows, end = std::min(begin + kRows, n);
    for (std::int64_t r = begin; r < end; ++r) check_index("vq_lookup", indices[r], k);
    if (out.channel_stride == 1) {
      for (std::int64_t r = begin; r < end; ++r) {
        std::copy_n(codebook + indices[r] * d, d, out.row(r));
      }
      return;
    }
    constexpr std::int64_t kChannels = 16;  // a cache line of each code at a time
    for (std::int64_t t0 = 0; t0 < d; t0 += kChannels) {
      const std::int64_t t1 = std::min(t0 + kChannels, d);
      for (std::int64_t r = begin; r < end; ++r) {
        const float* code = codebook + indices[r] * d;
        float* row = out.row(r);
        for (std::int64_t t = t0; t < t1; ++t) row[t * out.channel_stride] = code[t];
      }
    }
  });
}

void accumulate_cpu(const Rows<const float>& x, const std::int64_t* indices, std::int64_t k,
                    int threads, float* counts, float* sums) {
  const std::int64_t n = x.count(), d = x.d;
  // A stable counting sort: the rows of code j are order[begin[j]], ..., order[begin[j + 1] - 1].
  Buffer<std::int64_t> begin(k + 1), order(n);
  std::fill_n(begin.data(), k + 1, 0);
  for (std::int64_t r = 0; r < n; ++r) {
    check_index("vq_accumulate", indices[r], k);
    ++begin[indices[r] + 1];
  }
  for (std::int64_t j = 0; j < k; ++j) begin[j + 1] += begin[j];
  for (std::int64_t r = 0; r < n; ++r) order[begin[indices[r]]++] = r;
  for (std::int64_t j = k; j > 0; --j) begin[j] = begin[j - 1];
  begin[0] = 0;

  const std::int64_t tasks = std::min<std::int64_t>(k, 8 * threads);
  parallel_for(threads, tasks, [&](std::int64_t task) {
    // Codes are dealt out so that every task has about as many rows plus codes.
    const auto first_code = [&](std::int64_t part) {
      std::int64_t low = 0, high = k;
      while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        (begin[middle] + middle) * tasks < (n + k)* part ? low = middle + 1 : high = middle;
      }
      return low;
    };
    thread_local Buffer<double> total;
    total.reserve(d);
    for (std::int64_t j = first_code(task), last = first_code(task + 1); j < last; ++j) {
      std::fill_n(total.data(), d, 0.0);
      for (std::int64_t i = begin[j]; i < begin[j + 1]; ++i) {
        const float* row = x.row(order[i]);
        if (x.channel_stride == 1) {  // on its own, so that it becomes vectors
          for (std::int64_t t = 0; t < d; ++t) total[t] += row[t];
        } else {
          for (std::int64_t t = 0; t < d; ++t) total[t] += row[t * x.channel_stride];
        }
      }
      counts[j] = static_cast<float>(begin[j + 1] - begin[j]);
      std::copy_n(total.data(), d, sums + j * d);
    }
  });
}

void total_cpu(const float* distance, std::int64_t n, double scale, float* total) {
  double sum = 0;
  for (std::int64_t r = 0; r < n; ++r) sum += distance[r];
  *total = static_cast<float>(scale * sum);
}

}  // namespace t2p::vq

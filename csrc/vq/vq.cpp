// SPDX-License-Identifier: Apache-2.0
#include "vq/vq.h"

#include <algorithm>
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

void check_index(const char* op, std::int64_t index, std::int64_t k) {
  if (index < 0 || index >= k) [[unlikely]] {
    throw std::out_of_range(concat(op, ": index ", index, " is outside [0, ", k, ")"));
  }
}

// Splits [0, count) into `parts` ranges of nearly equal length.
PanelRange part(std::int64_t count, std::int64_t parts, std::int64_t i) {
  return {count * i / parts, count * (i + 1) / parts};
}

}  // namespace

void nearest_cpu(const Rows<const float>& x, const float* codebook, std::int64_t k, int threads,
                 std::int64_t* indices, float* distance) {
  const std::int64_t n = x.count(), d = x.d;
  if (n == 0) return;
  const SearchKernels& kernels = T2P_DISPATCH(kSearch);

  const std::int64_t width = kernels.panel_codes, panels = ceil_div(k, width);
  const std::int64_t block_rows = kernels.block_rows(d), blocks = ceil_div(n, block_rows);
  const Buffer<float> center = center_of(codebook, k, d);
  Codebook prepared{.codes = codebook, .center = center.data(), .k = k, .d = d};
  Buffer<float> packed, half_norms;
  if (blocks > 1) {
    packed.reserve(panels * width * d);
    half_norms.reserve(panels * width);
    const Buffer<float> largest(panels);
    constexpr std::int64_t kPanelsPerTask = 4;
    parallel_for(threads, ceil_div(panels, kPanelsPerTask), [&](std::int64_t task) {
      const std::int64_t end = std::min((task + 1) * kPanelsPerTask, panels);
      for (std::int64_t p = task * kPanelsPerTask; p < end; ++p) {
        largest[p] = kernels.pack_panel(codebook + p * width * d, std::min(width, k - p * width), d,
                                        center.data(), packed.data() + p * width * d,
                                        half_norms.data() + p * width);
      }
    });
    prepared.panels = packed.data();
    prepared.half_norms = half_norms.data();
    prepared.largest_half_norm = *std::max_element(largest.data(), largest.data() + panels);
  }

  // Few rows do not fill the threads with blocks: the panels are then split as well.
  const std::int64_t wanted = threads > 1 ? 4 * threads : 1;
  const std::int64_t splits = std::clamp<std::int64_t>(wanted / blocks, 1, ceil_div(panels, 8));
  Buffer<double> split_distance(splits * n);
  Buffer<std::int64_t> split_index(splits * n);
  parallel_for(threads, blocks * splits, [&](std::int64_t task) {
    thread_local Buffer<float> scratch;
    scratch.reserve(kernels.scratch_size(d));
    const std::int64_t split = task / blocks, first = task % blocks * block_rows;
    kernels.search_block(prepared, x, part(panels, splits, split), first,
                         std::min(block_rows, n - first), scratch.data(),
                         split_distance.data() + split * n + first,
                         split_index.data() + split * n + first);
  });
  for (std::int64_t r = 0; r < n; ++r) {
    std::int64_t best = r;  // splits are in the order of the codes: the first of equals is lowest
    for (std::int64_t s = 1; s < splits; ++s) {
      if (split_distance[s * n + r] < split_distance[best]) best = s * n + r;
    }
    indices[r] = std::isinf(split_distance[best]) ? 0 : split_index[best];
    distance[r] = static_cast<float>(split_distance[best]);
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
        for (std::int64_t t = 0; t < d; ++t) total[t] += row[t * x.channel_stride];
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

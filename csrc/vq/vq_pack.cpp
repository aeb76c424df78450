// SPDX-License-Identifier: Apache-2.0
// Packs codebooks: centres them, chooses the format of their integers, splits off a crowd.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "common/isa.h"
#include "vq/packed.h"

namespace t2p::vq {
namespace {

// What is packed in a few microseconds, sooner than another thread has begun.
constexpr std::int64_t kLeastSharedPacking = 16 * 1024;
// With fewer channels words take no more time than bytes.
constexpr std::int64_t kLeastByteChannels = 3;

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

void pack_codes(const float* codes, std::int64_t k, std::int64_t d, Metric metric, int threads,
                std::uint8_t* packed) {
  Buffer<float> directions;
  if (metric == Metric::kCosine) directions = normalize(codes, k, d, threads);
  const float* scored = metric == Metric::kCosine ? directions.data() : codes;
  pack(T2P_AMX_DISPATCH(kSearch),
       {.metric = metric, .codes = codes, .scored = scored, .k = k, .d = d}, threads, packed);
}

}  // namespace

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
                      .size = layout.size,
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

std::int64_t packed_size(const float* codebook, std::int64_t k, std::int64_t d, Metric metric,
                         int threads) {
  const SearchKernels& kernels = T2P_AMX_DISPATCH(kSearch);
  Crowd crowd;
  return crowd.find(codebook, k, d, metric, threads)
             ? CrowdLayout(kernels, crowd.others, crowd.near, d).size
             : PackedLayout(kernels, k, d).size;
}

void pack_cpu(const float* codebook, std::int64_t k, std::int64_t d, Metric metric, int threads,
              std::uint8_t* packed, std::int64_t size) {
  const SearchKernels& kernels = T2P_AMX_DISPATCH(kSearch);
  Crowd crowd;
  const bool crowded = crowd.find(codebook, k, d, metric, threads);
  const CrowdLayout layout(kernels, crowd.others, crowd.near, d);
  if (size != (crowded ? layout.size : PackedLayout(kernels, k, d).size)) {
    throw std::invalid_argument("vq_pack: codebook changed while it was packed");
  }
  if (!crowded) return pack_codes(codebook, k, d, metric, threads, packed);
  const PackedHeader header{.isa = static_cast<std::int32_t>(chosen_isa()),
                            .metric = static_cast<std::int32_t>(metric),
                            .k = k,
                            .d = d,
                            .size = size,
                            .coarse = {},
                            .others = crowd.others,
                            .near = crowd.near,
                            .representative = crowd.representative,
                            .radius = crowd.radius};
  std::memcpy(packed, &header, sizeof header);
  const auto copy = [&](const auto& from, std::int64_t count, std::int64_t offset) {
    std::copy_n(from.data(), count, at<std::remove_cvref_t<decltype(from[0])>>(packed, offset));
  };
  copy(crowd.other_index, crowd.others, layout.other_index);
  copy(crowd.near_index, crowd.near, layout.near_index);
  copy(crowd.other_codes, crowd.others * d, layout.other_codes);
  copy(crowd.near_codes, crowd.near * d, layout.near_codes);
  pack_codes(crowd.other_codes.data(), crowd.others, d, metric, threads, packed + layout.others);
  if (crowd.near) {
    pack_codes(crowd.near_codes.data(), crowd.near, d, metric, threads, packed + layout.near);
  }
}

bool packed_for(const std::uint8_t* packed, std::int64_t size, std::int64_t k, std::int64_t d,
                Metric metric) {
  if (size < static_cast<std::int64_t>(sizeof(PackedHeader))) return false;
  const PackedHeader header = header_of(packed);
  return header.isa == static_cast<std::int32_t>(chosen_isa()) && header.k == k && header.d == d &&
         header.metric == static_cast<std::int32_t>(metric) && header.size == size;
}

}  // namespace t2p::vq

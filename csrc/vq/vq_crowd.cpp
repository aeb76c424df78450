// SPDX-License-Identifier: Apache-2.0
// Finds a crowd of codes. Codes that no row chooses stay where they began, as the +-1/k of VQ-VAE,
// or decay to zero under moving averages, while those in use become hundreds of times as large.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "common/buffer.h"
#include "common/parallel.h"
#include "vq/search.h"

namespace t2p::vq {
namespace {

// A look at so many codes tells whether there may be a crowd; it is one if it has at least this
// part of the codebook.
constexpr std::int64_t kSamples = 128, kLeastCodes = kSamples, kLeastPart = 32;
// In a gap there is no more than this part.
constexpr std::int64_t kMostInGap = 256;
// How many samples side by side have to be near each other, and how much nearer than the codes
// reach: less is what integers can tell apart.
constexpr std::int64_t kWindow = 3;
constexpr float kContrast = 16;
// Distances are counted by their exponents.
constexpr int kExponents =
    2 - std::numeric_limits<float>::min_exponent + std::numeric_limits<float>::max_exponent;

// Where it is crowded: the middle of the samples that are nearest to each other, or null. Sorted
// by their first channel, the samples of a crowd stand side by side.
const float* find_crowded(const float* codebook, std::int64_t k, std::int64_t d) {
  struct Sample {
    float channel;
    const float* code;
  };
  std::array<Sample, kSamples> samples;
  auto* last = samples.begin();
  for (std::int64_t s = 0; s < kSamples; ++s) {
    const float* code = codebook + s * k / kSamples * d;
    if (std::isfinite(*code)) *last++ = {*code, code};
  }
  std::sort(samples.begin(), last,
            [](const Sample& a, const Sample& b) { return a.channel < b.channel; });
  const float* center = nullptr;
  float nearest = std::numeric_limits<float>::infinity();
  for (auto* first = samples.begin(); last - first >= kWindow; ++first) {
    const float width = distance(first->code, first[kWindow - 1].code, d);
    if (width < nearest) {
      nearest = width;
      center = first[kWindow / 2].code;
    }
  }
  if (!center) return nullptr;

  constexpr std::int64_t kChannels = 4;
  const std::int64_t looked = std::min(k, 4 * kSamples), channels = std::min(d, kChannels);
  float reaches[kChannels] = {};
  for (std::int64_t s = 0; s < looked; ++s) {
    const float* code = codebook + s * k / looked * d;
    for (std::int64_t t = 0; t < channels; ++t) {
      const float reach = std::abs(code[t] - center[t]);
      reaches[t] = reach > reaches[t] ? reach : reaches[t];
    }
  }
  const float reach = *std::max_element(reaches, reaches + kChannels);
  return kContrast * nearest <= reach * std::sqrt(static_cast<float>(d)) ? center : nullptr;
}

int exponent(float distance) {
  if (!(distance > 0)) return 0;  // NaNs are sorted out before
  return std::ilogb(std::min(distance, std::numeric_limits<float>::max())) + 2 -
         std::numeric_limits<float>::min_exponent;
}

// The first exponent of the widest gap above a crowd, in which few codes are; kExponents if there
// is none.
int find_gap(const std::array<std::int64_t, kExponents>& counts, std::int64_t k) {
  int gap = kExponents, widest = 0, begin = 0;
  std::int64_t below = 0, below_gap = 0;
  for (int e = 0; e < kExponents; ++e) {
    const std::int64_t count = counts[static_cast<std::size_t>(e)];
    below += count;
    if (count <= k / kMostInGap) continue;
    if (e - begin > widest && below_gap * kLeastPart >= k) {
      widest = e - begin;
      gap = begin;
    }
    begin = e + 1;
    below_gap = below;
  }
  return gap;
}

}  // namespace

float distance(const float* a, const float* b, std::int64_t d) {
  constexpr std::int64_t kLanes = 8;  // so that they become vectors
  float lanes[kLanes] = {};
  std::int64_t t = 0;
  for (; t + kLanes <= d; t += kLanes) {
    for (std::int64_t i = 0; i < kLanes; ++i) {
      lanes[i] += (a[t + i] - b[t + i]) * (a[t + i] - b[t + i]);
    }
  }
  for (; t < d; ++t) lanes[0] += (a[t] - b[t]) * (a[t] - b[t]);
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return std::sqrt(sum);
}

bool Crowd::find(const float* codebook, std::int64_t k, std::int64_t d, Metric metric,
                 int threads) {
  const float* center = k < kLeastCodes ? nullptr : find_crowded(codebook, k, d);
  if (!center) return false;
  const bool by_distance = metric == Metric::kL2;
  const Buffer<float> away(k);  // from the center; for other metrics 0, or NaN if not equal
  constexpr std::int64_t kCodesPerTask = 64;
  parallel_for(threads, ceil_div(k, kCodesPerTask), [&](std::int64_t task) {
    const std::int64_t end = std::min((task + 1) * kCodesPerTask, k);
    for (std::int64_t j = task * kCodesPerTask; j < end; ++j) {
      const float* code = codebook + j * d;
      away[j] = by_distance                          ? distance(code, center, d)
                : std::equal(code, code + d, center) ? 0.0f
                                                     : std::numeric_limits<float>::quiet_NaN();
    }
  });
  int gap = kExponents;
  if (by_distance) {
    std::array<std::int64_t, kExponents> counts{};
    for (std::int64_t j = 0; j < k; ++j) {
      if (!std::isnan(away[j])) ++counts[static_cast<std::size_t>(exponent(away[j]))];
    }
    gap = find_gap(counts, k);
  }
  other_index.reserve(k);
  near_index.reserve(k);
  float farthest = 0;
  bool alike = true;
  others = near = 0;
  for (std::int64_t j = 0; j < k; ++j) {
    if (std::isnan(away[j]) || exponent(away[j]) >= gap) {
      other_index[others++] = j;
      continue;
    }
    if (near == 0) {
      representative = others;
      other_index[others++] = j;
    }
    near_index[near++] = j;
    farthest = std::max(farthest, away[j]);
    const float* first = codebook + near_index[0] * d;
    alike = alike && std::equal(first, first + d, codebook + j * d);
  }
  if (near < 2 || near * kLeastPart < k || (near == k && !alike)) return false;

  // Any two are at most twice the farthest apart; what was lost in subnormal squares comes to it.
  const float slack = 1 + static_cast<float>(d + 16) * 0x1p-23f;
  const float tiny = std::sqrt(static_cast<float>(d) * std::numeric_limits<float>::min());
  radius = alike ? 0 : 2 * slack * (farthest + tiny);
  if (alike) near = 0;
  other_codes.reserve(others * d);
  near_codes.reserve(near * d);
  parallel_for(threads, ceil_div(others + near, kCodesPerTask), [&](std::int64_t task) {
    const std::int64_t end = std::min((task + 1) * kCodesPerTask, others + near);
    for (std::int64_t i = task * kCodesPerTask; i < end; ++i) {
      const bool other = i < others;
      const std::int64_t place = other ? i : i - others;
      const std::int64_t number = (other ? other_index : near_index)[place];
      std::copy_n(codebook + number * d, d, (other ? other_codes : near_codes).data() + place * d);
    }
  });
  return true;
}

}  // namespace t2p::vq

// SPDX-License-Identifier: Apache-2.0
// Panels of codes, their scores against a tile of rows, and how far those scores may be off.
// Included by vq-inl.h, once per ISA.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "vq/search.h"
#include "vq/vq_distance-inl.h"

namespace t2p::vq::T2P_ISA_NAMESPACE {
namespace {

// Rows of a tile and vectors of a panel: kTileRows * kPanelVectors sums, one step of a panel and a
// broadcast fill the register file (32 registers in AVX-512, 16 below).
constexpr int kTileRows = kLanes == 16 ? 8 : 4;
constexpr int kPanelVectors = kLanes == 4 ? 2 : 3;
constexpr int kPanelCodes = kPanelVectors * kLanes;

constexpr float kInfinity = __builtin_inff();
constexpr float kSmallestNormal = 1.17549435e-38f;

bool all_finite(const float* p, std::int64_t d) {
  for (std::int64_t t = 0; t < d; ++t) {
    if (!__builtin_isfinite(p[t])) return false;
  }
  return true;
}

// A bound on 2 |s - S| for a row of centred norm `x` and codes of centred norm at most `radius`.
// The sum of d products errs by at most d u (|x| |c| + |c|^2 / 2), u = 2^-24, or twice that without
// FMA; the halved norm it starts from by d u |c|^2 / 2; centring by a few u more. The last term
// covers results below the normal range, whether they are flushed to zero or not. Directions were
// rounded besides, each channel by u of itself, which does not shrink with the radius.
// It is slope(radius) * (x + radius) + tiny.
struct TwiceErrorBound {
  float per_norm, least_slope, tiny;

  T2P_INLINE TwiceErrorBound(std::int64_t d, Metric metric) {
    const float steps = static_cast<float>((kFusedMultiplyAdd ? 1 : 2) * d + 16);
    const float relative = steps * 0x1p-24f;
    tiny = 4 * steps * kSmallestNormal;
    per_norm = relative > 0.25f ? kInfinity : 2.1f / (1 - relative) * relative;
    least_slope = tiny + (metric == Metric::kCosine ? 2.05f * 0x1p-24f : 0.0f);
  }
  T2P_INLINE float slope(float radius) const { return per_norm * radius + least_slope; }
  T2P_INLINE float of(float x, float radius) const { return slope(radius) * (x + radius) + tiny; }
  T2P_INLINE F32 of(F32 x, F32 radius) const {
    const F32 slope = multiply_add(broadcast(per_norm), radius, broadcast(least_slope));
    return multiply_add(slope, add(x, radius), broadcast(tiny));
  }
};

// An upper bound of the norm whose square was computed as `squares`.
float norm_bound(float squares, std::int64_t d) {
  return 1.001f * __builtin_sqrtf(squares + static_cast<float>(d) * kSmallestNormal);
}
T2P_INLINE F32 norm_bound(F32 squares, std::int64_t d) {
  const F32 tiny = broadcast(static_cast<float>(d) * kSmallestNormal);
  return mul(broadcast(1.001f), square_root(add(squares, tiny)));
}

struct Panel {
  const float* codes;       // [d, kPanelCodes], centred
  const float* half_norms;  // [kPanelCodes]
};

using Scores = F32[kTileRows][kPanelVectors];

// scores[m][v] = those of row m of the tile against the codes of vector v of the panel.
T2P_INLINE void score_tile(const float* __restrict tile,  // [kTileRows, stride]
                           std::int64_t stride, const Panel& panel, std::int64_t d,
                           Scores& scores) {
  const float* __restrict codes = panel.codes;
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) scores[m][v] = load(panel.half_norms + v * kLanes);
  }
  for (std::int64_t t = 0; t < d; ++t) {
    F32 code[kPanelVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) code[v] = load(codes + t * kPanelCodes + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m) {
      const F32 x = broadcast(tile[m * stride + t]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) {
        scores[m][v] = multiply_subtract_from(x, code[v], scores[m][v]);
      }
    }
  }
}

// The squared norms of kLanes codes of a panel.
T2P_INLINE F32 square_sums(const float* codes, std::int64_t d) {
  F32 squares = broadcast(0.f);
  for (std::int64_t t = 0; t < d; ++t) {
    const F32 c = load(codes + t * kPanelCodes);
    squares = multiply_add(c, c, squares);
  }
  return squares;
}

// Packs codes, centred and transposed; returns the largest of the half norms.
float pack_panel(const Codebook& codebook, std::int64_t first, std::int64_t count, float* panel,
                 float* half_norms) {
  const std::int64_t d = codebook.d;
  const float* codes = codebook.scored + first * d;
  const float* center = codebook.center;
  // Places past the last code are filled with it here, and made unreachable below.
  std::int64_t t = 0;
  for (; count == kPanelCodes && t + 4 <= d; t += 4) {
    for (int v = 0; v < kPanelVectors; ++v) {
      const float* corner = codes + v * kLanes * d + t;
      F32 quads[4];
      for (int i = 0; i < 4; ++i) quads[i] = load_quads(corner + i * d, 4 * d);
      transpose_quads(quads);
      for (int i = 0; i < 4; ++i) {
        store(panel + (t + i) * kPanelCodes + v * kLanes, sub(quads[i], broadcast(center[t + i])));
      }
    }
  }
  for (std::int64_t j = 0; j < kPanelCodes; ++j) {
    const float* code = codes + smaller(j, count - 1) * d;
    for (std::int64_t u = t; u < d; ++u) panel[u * kPanelCodes + j] = code[u] - center[u];
  }
  for (int v = 0; v < kPanelVectors; ++v) {
    const F32 squares = square_sums(panel + v * kLanes, d);
    store(half_norms + v * kLanes, mul(squares, broadcast(0.5f)));
  }
  float largest = 0;
  for (std::int64_t j = 0; j < kPanelCodes; ++j) {
    const bool overflow = !__builtin_isfinite(half_norms[j]);
    if (j < count && !(overflow && !all_finite(codes + j * d, d))) {
      largest = overflow ? kInfinity : (half_norms[j] > largest ? half_norms[j] : largest);
      if (codebook.metric != Metric::kL2) half_norms[j] = 0;
      continue;
    }
    // Padding, or a code with a NaN or an infinity: its score is infinite whatever the row.
    half_norms[j] = kInfinity;
    for (std::int64_t t = 0; t < d; ++t) panel[t * kPanelCodes + j] = 0;
  }
  return largest;
}

}  // namespace
}  // namespace t2p::vq::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// Codes and rows in small integers, for the coarse stage. Included by vq_coarse-inl.h, once per
// ISA.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "vq/search.h"
#include "vq/vq_panel-inl.h"

namespace t2p::vq::T2P_ISA_NAMESPACE {
namespace {

constexpr int kCoarseVectors = kLanes == 8 ? 2 : 3;
constexpr int kCoarseCodes = kCoarseVectors * kLanes;

// What a panel is made of: its ranges, how it is stored, and its dot product.
struct Bytes {
  static constexpr int kChannels = 4;  // in 32 bits
  static constexpr int kCodeZero = (kLargestByte + 1) / 2;
  static constexpr int kCodeRange = kLargestByte / 2;  // 127 or 63 either side of the zero
  static constexpr int kRowRange = 127;
  static T2P_INLINE void store_integers(std::uint8_t* p, std::int64_t i, I32 a) {
    store_bytes(p + i, a);
  }
  static T2P_INLINE I32 dot(I32 sum, I32 codes, I32 rows) { return dot_bytes(sum, codes, rows); }
};

struct Words {
  static constexpr int kChannels = 2;
  static constexpr int kCodeZero = 0;
  static constexpr int kCodeRange = 8191;
  static constexpr int kRowRange = 8191;
  static T2P_INLINE void store_integers(std::uint8_t* p, std::int64_t i, I32 a) {
    store_words(reinterpret_cast<std::int16_t*>(p) + i, a);
  }
  static T2P_INLINE I32 dot(I32 sum, I32 codes, I32 rows) { return dot_words(sum, codes, rows); }
};

// Sums stay inside 31 bits: products reach 255 * 127 * d or 2^26 d, at most 2^30, the half norm is
// kept below 2^29 and the margin below 2^28.
constexpr std::int64_t kMaxByteChannels = 32768, kMaxWordChannels = 16;
constexpr float kLargestHalfNorm = 0x1p29f, kLargestMargin = 0x1p28f;

template <class Integers>
T2P_INLINE std::int64_t coarse_steps(std::int64_t d) {
  return (d + Integers::kChannels - 1) / Integers::kChannels;
}

// Bytes between two rows: room for a vector behind each, and no power of two.
T2P_INLINE std::int64_t coarse_stride(Format format, std::int64_t d) {
  const std::int64_t bytes = format == Format::kWords ? 2 * d : d;
  return (bytes + 2 * kLanes + 63) / 64 * 64 + (d >= 64 ? 64 : 0);
}

std::int64_t coarse_panel_bytes(Format format, std::int64_t d) {
  const std::int64_t steps =
      format == Format::kWords ? coarse_steps<Words>(d) : coarse_steps<Bytes>(d);
  return steps * kCoarseCodes * 4;
}

float largest_magnitude(const Codebook& codebook, std::int64_t first, std::int64_t count) {
  const std::int64_t d = codebook.d;
  const float* codes = codebook.scored + first * d;
  const float* center = codebook.center;
  F32 largest = broadcast(0.f);
  for (std::int64_t j = 0; j < count; ++j) {
    for (std::int64_t t = 0; t < d; t += kLanes) {
      const int left = static_cast<int>(smaller(kLanes, d - t));
      const F32 value = sub(load_first(codes + j * d + t, left), load_first(center + t, left));
      // In this order a NaN gives way to the other operand.
      largest = max(magnitude(value), largest);
    }
  }
  return reduce_max(largest);
}

float coarse_scale(Format format, float magnitude, std::int64_t d) {
  // Within these limits no square or product of what follows leaves the range of float32, and no
  // sum that of its integers.
  const std::int64_t most = format == Format::kWords ? kMaxWordChannels : kMaxByteChannels;
  if (!(magnitude > 1e-13f && magnitude < 1e13f) || d > most) return 0;
  return magnitude / (format == Format::kWords ? Words::kCodeRange : Bytes::kCodeRange);
}

template <class Integers>
T2P_INLINE void pack_integers(const Codebook& codebook, std::int64_t first, std::int64_t count,
                              float scale, std::uint8_t* panel, float* half_norms,
                              float& largest_half_norm, float& largest_rounding) {
  const std::int64_t d = codebook.d;
  const float* codes = codebook.scored + first * d;
  const float* center = codebook.center;
  constexpr int kChannels = Integers::kChannels;
  const std::int64_t steps = coarse_steps<Integers>(d);
  const F32 step = broadcast(scale), per_step = broadcast(1 / scale);
  const I32 zero = broadcast(std::int32_t{Integers::kCodeZero});
  constexpr int kQuads = kLanes / 4;  // codes whose four channels share a vector
  for (std::int64_t j = 0; j < kCoarseCodes; j += kQuads) {
    F32 squares = broadcast(0.f), rounding = broadcast(0.f);
    const bool whole = j + kQuads <= count;
    for (std::int64_t t = 0; t < d; t += 4) {
      F32 value;
      if (whole && t + 4 <= d) {
        value = sub(load_quads(codes + j * d + t, d), load_quads(center + t, 0));
      } else {
        float staged[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const std::int64_t code = j + i / 4, u = t + i % 4;
          staged[i] = code < count && u < d ? codes[code * d + u] - center[u] : 0.0f;
        }
        value = load(staged);
      }
      const I32 rounded = to_i32(mul(value, per_step));
      const I32 integers = add(rounded, zero);
      if constexpr (kChannels == 4) {
        store_bytes(panel + (t * kCoarseCodes + j * 4), integers);
      } else {
        // The first two channels of each code belong to one step, the others to the next.
        std::int16_t words[2 * kLanes];
        store_words(words, integers);
        for (int i = 0; i < kLanes; i += 2) {
          const std::int64_t s = t / 2 + i / 2 % 2;
          if (s < steps) __builtin_memcpy(panel + (s * kCoarseCodes + j + i / 4) * 4, words + i, 4);
        }
      }
      const F32 off = multiply_subtract_from(step, to_f32(rounded), value);
      squares = multiply_add(value, value, squares);
      rounding = multiply_add(off, off, rounding);
    }
    float square[kLanes], off[kLanes];
    store(square, squares);
    store(off, rounding);
    for (int i = 0; i < kQuads; ++i) {
      const float* s = square + 4 * i;
      const float* r = off + 4 * i;
      const float half = 0.5f * ((s[0] + s[1]) + (s[2] + s[3]));
      const float error = (r[0] + r[1]) + (r[2] + r[3]);
      half_norms[j + i] = -half;
      if (j + i < count && __builtin_isfinite(half)) {
        if (half > largest_half_norm) largest_half_norm = half;
        if (error > largest_rounding) largest_rounding = error;
        if (codebook.metric != Metric::kL2) half_norms[j + i] = 0;
        continue;
      }
      // Padding, or a code with a NaN: converted to an integer it is the least of all.
      half_norms[j + i] = -kInfinity;
      for (std::int64_t t = 0; t < steps; ++t) {
        __builtin_memset(panel + (t * kCoarseCodes + j + i) * 4, 0, 4);
      }
    }
  }
}

void pack_coarse(Format format, const Codebook& codebook, std::int64_t first, std::int64_t count,
                 float scale, std::uint8_t* panel, float* half_norms, float& largest_half_norm,
                 float& largest_rounding) {
  const auto pack = format == Format::kWords ? pack_integers<Words> : pack_integers<Bytes>;
  pack(codebook, first, count, scale, panel, half_norms, largest_half_norm, largest_rounding);
}

}  // namespace
}  // namespace t2p::vq::T2P_ISA_NAMESPACE

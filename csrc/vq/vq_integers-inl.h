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

// What a panel is made of: its ranges, how four channels are stored, and its dot product.
struct Bytes {
  static constexpr int kChannels = 4;  // in 32 bits
  static constexpr int kCodeZero = (kLargestByte + 1) / 2;
  static constexpr int kCodeRange = kLargestByte / 2;  // 127 or 63 either side of the zero
  static constexpr int kRowRange = 127;
  static T2P_INLINE void store_channels(const I32 (&a)[4], std::uint8_t* to, std::int64_t) {
    store(reinterpret_cast<std::int32_t*>(to), join_bytes(a));
  }
  static T2P_INLINE I32 dot(I32 sum, I32 codes, I32 rows) { return dot_bytes(sum, codes, rows); }
};

struct Words {
  static constexpr int kChannels = 2;
  static constexpr int kCodeZero = 0;
  static constexpr int kCodeRange = 8191;
  static constexpr int kRowRange = 8191;
  static T2P_INLINE void store_channels(const I32 (&a)[4], std::uint8_t* to, std::int64_t stride) {
    store(reinterpret_cast<std::int32_t*>(to), join_words(a[0], a[1]));
    store(reinterpret_cast<std::int32_t*>(to + stride), join_words(a[2], a[3]));
  }
  static T2P_INLINE I32 dot(I32 sum, I32 codes, I32 rows) { return dot_words(sum, codes, rows); }
};

// Sums stay inside 31 bits: products reach 255 * 127 * d or 2^26 d, at most 2^30, the half norm is
// kept below 2^29 and the margin below 2^28.
constexpr std::int64_t kMaxByteChannels = 32768, kMaxWordChannels = 8;
constexpr float kLargestHalfNorm = 0x1p29f, kLargestMargin = 0x1p28f;

// Four channels are rounded at a time, so the last ones are filled up with zeros.
template <class Integers>
T2P_INLINE std::int64_t coarse_steps(std::int64_t d) {
  return (d + 3) / 4 * (4 / Integers::kChannels);
}

// Channels t to t + 3 of the `count` vectors at p, p + stride, ..., less those of `center`, the
// vectors side by side; what lies beyond the count or the d channels is 0.
T2P_INLINE void load_channels(const float* p, std::int64_t stride, std::int64_t count,
                              const float* center, std::int64_t t, std::int64_t d,
                              F32 (&channel)[4]) {
  if (count >= kLanes && t + 4 <= d) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) channel[i] = load_quads(p + i * stride + t, 4 * stride);
    transpose_quads(channel);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) channel[i] = sub(channel[i], broadcast(center[t + i]));
    return;
  }
  for (std::int64_t i = 0; i < 4; ++i) {
    float values[kLanes]{};
    for (std::int64_t m = 0; t + i < d && m < smaller(count, kLanes); ++m) {
      values[m] = p[m * stride + t + i] - center[t + i];
    }
    channel[i] = load(values);
  }
}

// As they lie in memory: with tiles, steps of bytes are filled up with zeros to those of whole
// tiles.
constexpr std::int64_t kTileSteps = 16;
#if defined(T2P_AMX)
constexpr std::int64_t kLeastTileChannels = 49;
#else
constexpr std::int64_t kLeastTileChannels = INT64_MAX;
#endif
template <class Integers>
T2P_INLINE std::int64_t stored_steps(std::int64_t d) {
  const std::int64_t steps = coarse_steps<Integers>(d);
  if (Integers::kChannels != 4 || d < kLeastTileChannels) return steps;
  return (steps + kTileSteps - 1) / kTileSteps * kTileSteps;
}

// Rounds kLanes vectors, and measures them and what rounding did.
struct Rounding {
  F32 step, per_step;
  F32 squares = broadcast(0.f);       // of the values
  F32 near_squares = broadcast(0.f);  // of the integers, in steps
  F32 off_squares = broadcast(0.f);   // of what is between them
  I32 sum = broadcast(0);             // of the integers

  template <class Integers>
  T2P_INLINE void round(const F32 (&channel)[4], std::int32_t zero, std::uint8_t* to,
                        std::int64_t stride) {
    I32 integers[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const I32 rounded = to_i32(mul(channel[i], per_step));
      const F32 near = mul(step, to_f32(rounded)), off = sub(channel[i], near);
      squares = multiply_add(channel[i], channel[i], squares);
      near_squares = multiply_add(near, near, near_squares);
      off_squares = multiply_add(off, off, off_squares);
      sum = add(sum, rounded);
      integers[i] = add(rounded, broadcast(zero));
    }
    Integers::store_channels(integers, to, stride);
  }
};

std::int64_t coarse_panel_bytes(Format format, std::int64_t d) {
  const std::int64_t steps =
      format == Format::kWords ? stored_steps<Words>(d) : stored_steps<Bytes>(d);
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
  const std::int64_t d = codebook.d, steps = coarse_steps<Integers>(d);
  constexpr std::int64_t kStride = 4 * kCoarseCodes;
  __builtin_memset(panel + steps * kStride, 0,
                   static_cast<std::size_t>((stored_steps<Integers>(d) - steps) * kStride));
  for (std::int64_t j = 0; j < kCoarseCodes; j += kLanes) {
    Rounding rounding{broadcast(scale), broadcast(1 / scale)};
    std::uint8_t* to = panel + 4 * j;
    for (std::int64_t t = 0; t < d; t += 4) {
      F32 channel[4];
      load_channels(codebook.scored + (first + j) * d, d, count - j, codebook.center, t, d,
                    channel);
      rounding.round<Integers>(channel, Integers::kCodeZero, to, kStride);
      to += 4 / Integers::kChannels * kStride;
    }
    float square[kLanes], off[kLanes];
    store(square, rounding.squares);
    store(off, rounding.off_squares);
    store(half_norms + j, mul(rounding.near_squares, broadcast(-0.5f)));
    for (std::int64_t i = 0; i < kLanes; ++i) {
      const float half = 0.5f * square[i];
      if (j + i < count && __builtin_isfinite(half)) {
        if (half > largest_half_norm) largest_half_norm = half;
        if (off[i] > largest_rounding) largest_rounding = off[i];
        if (codebook.metric != Metric::kL2) half_norms[j + i] = 0;
        continue;
      }
      // Padding, or a code with a NaN: converted to an integer it is the least of all.
      half_norms[j + i] = -kInfinity;
      for (std::int64_t t = 0; t < steps; ++t) {
        __builtin_memset(panel + t * kStride + 4 * (j + i), 0, 4);
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

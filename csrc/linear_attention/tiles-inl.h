// SPDX-License-Identifier: Apache-2.0
// Rows into and out of scratch, and the matrix product between. Included once per ISA.
#pragma once

#include <cstdint>

#include "common/exp-inl.h"
#include "common/half.h"
#include "common/simd.h"
#include "linear_attention/kernels.h"

namespace t2p::linear_attention::T2P_ISA_NAMESPACE {
namespace {

using namespace simd::T2P_ISA_NAMESPACE;

template <Feature feature>
T2P_INLINE F32 mapped(F32 x) {
  const F32 zero = broadcast(0.0f);
  if constexpr (feature == Feature::kRelu) return max(zero, x);
  if constexpr (feature == Feature::kElu) {
    return select(less(zero, x), add(x, broadcast(1.0f)), exp_nonpositive<true>(min(zero, x)));
  }
  return x;
}

// phi'(x) from phi(x).
T2P_INLINE F32 slope(Feature feature, F32 phi) {
  const F32 zero = broadcast(0.0f), one = broadcast(1.0f);
  if (feature == Feature::kRelu) return select(less(zero, phi), one, zero);
  if (feature == Feature::kElu) return min(one, phi);
  return one;
}

template <Format format>
T2P_INLINE F32 vector_at(const void* data, std::int64_t at) {
  if constexpr (format == Format::kF32) return load(static_cast<const float*>(data) + at);
  const std::uint16_t* words = static_cast<const std::uint16_t*>(data) + at;
  if constexpr (format == Format::kBf16) return load_bf16(words);
  return load_f16(words);
}

template <Format format>
T2P_INLINE float number_at(const void* data, std::int64_t at) {
  if constexpr (format == Format::kF32) return static_cast<const float*>(data)[at];
  const std::uint16_t word = static_cast<const std::uint16_t*>(data)[at];
  return format == Format::kBf16 ? bfloat16_to_float(word) : float16_to_float(word);
}

T2P_INLINE std::int64_t place(const Rows& rows, const Head& head, std::int64_t row) {
  return head.batch * rows.batch + head.head * rows.head + (head.first + row) * rows.row;
}

T2P_INLINE const std::uint8_t* mask_of(const Attention& attention, const Head& head) {
  return attention.mask ? attention.mask + head.batch * attention.n + head.first : nullptr;
}

T2P_INLINE std::uintptr_t address(const Rows& rows, std::int64_t at) {
  return reinterpret_cast<std::uintptr_t>(rows.data) +
         static_cast<std::uintptr_t>(at * (rows.format == Format::kF32 ? 4 : 2));
}

// The channels of keys and values, known to the compiler if `usual` is not 0: loops over them have
// no ends to look for then, and addresses no multiplications.
template <std::int64_t usual>
struct Widths {
  std::int64_t d = usual, e = usual, dp = padded(usual), ep = padded(usual);
  explicit Widths(const Attention& attention) {
    if constexpr (usual == 0) {
      d = attention.d;
      e = attention.e;
      dp = padded(d);
      ep = padded(e);
    }
  }
};
constexpr std::int64_t kUsual = 32;

// Asks for a row that will be read; past the end of a tensor this does nothing.
T2P_INLINE void prefetch_row(const Rows& rows, std::int64_t at, std::int64_t channels) {
  const std::uintptr_t begin = address(rows, at), end = address(rows, at + channels);
  for (std::uintptr_t line = begin; line < end; line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
  }
}

// How many rows ahead to ask for: `count`, or kFarBytes of rows that lie one after another. The
// processor sees for itself what comes next there, but does not look far enough ahead.
constexpr std::int64_t kFarBytes = 3072;
T2P_INLINE std::int64_t ahead(const Rows& rows, std::int64_t channels, std::int64_t count) {
  if (rows.row != channels) return count;
  return ceil_div(kFarBytes, channels * (rows.format == Format::kF32 ? 4 : 2));
}

template <Format format, Feature feature>
void read_as(const Rows& rows, const Head& head, std::int64_t begin, std::int64_t count,
             std::int64_t height, std::int64_t channels, const std::uint8_t* mask,
             std::int64_t ahead, float* to) {
  const std::int64_t width = padded(channels), whole = channels / kLanes * kLanes;
  const std::int64_t step = rows.row;
  const void* data = rows.data;
  std::int64_t at = place(rows, head, begin);
  for (std::int64_t i = 0; i < height; ++i, at += step, to += width) {
    if (i >= count || (mask && !mask[begin + i])) {
      for (std::int64_t c = 0; c < width; c += kLanes) store(to + c, broadcast(0.0f));
      continue;
    }
    prefetch_row(rows, at + ahead * step, channels);
    for (std::int64_t c = 0; c < whole; c += kLanes) {
      store(to + c, mapped<feature>(vector_at<format>(data, at + c)));
    }
    if (whole == width) continue;
    float tail[kPad + kLanes] = {};
    for (std::int64_t j = whole; j < channels; ++j) {
      tail[j - whole] = number_at<format>(data, at + j);
    }
    store(tail, mapped<feature>(load(tail)));
    for (std::int64_t j = whole; j < width; ++j) to[j] = j < channels ? tail[j - whole] : 0.0f;
  }
}

// Reads phi of the rows [begin, begin + count) into `height` rows of padded(channels) floats; the
// rest, and rows that the mask leaves out, are zeros. The rows `ahead` further on are asked
// for: the memory is read while this tile is computed with.
using Read = void (*)(const Rows& rows, const Head& head, std::int64_t begin, std::int64_t count,
                      std::int64_t height, std::int64_t channels, const std::uint8_t* mask,
                      std::int64_t ahead, float* to);

template <Format format>
Read reader_of(Feature feature) {
  return feature == Feature::kRelu  ? read_as<format, Feature::kRelu>
         : feature == Feature::kElu ? read_as<format, Feature::kElu>
                                    : read_as<format, Feature::kIdentity>;
}

Read reader(Format format, Feature feature) {
  return format == Format::kF32    ? reader_of<Format::kF32>(feature)
         : format == Format::kBf16 ? reader_of<Format::kBf16>(feature)
                                   : reader_of<Format::kF16>(feature);
}

void read_rows(const Rows& rows, const Head& head, std::int64_t begin, std::int64_t count,
               std::int64_t height, std::int64_t channels, Feature feature,
               const std::uint8_t* mask, float* to) {
  reader(rows.format, feature)(rows, head, begin, count, height, channels, mask, height, to);
}

T2P_INLINE I32 rounded_to_bf16(F32 a) {
  const I32 word = as_i32(a);
  const I32 odd = bit_and(shift_right<16>(word), broadcast(std::int32_t{1}));
  const I32 rounded = add(word, add(odd, broadcast(std::int32_t{0x7FFF})));
  const I32 magnitude = bit_and(word, broadcast(std::int32_t{0x7FFFFFFF}));
  const M32 nan = less(broadcast(std::int32_t{0x7F800000}), magnitude);
  return select(nan, broadcast(std::int32_t{0x7FC00000}), rounded);
}

// Rounds the first `count` of a vector to the format.
template <Format format>
T2P_INLINE void write_vector(void* data, std::int64_t at, std::int64_t count, F32 a) {
  if constexpr (format == Format::kF32) {
    float* to = static_cast<float*>(data) + at;
    if (count >= kLanes) return store(to, a);
    float lanes[kLanes];
    store(lanes, a);
    for (std::int64_t i = 0; i < count; ++i) to[i] = lanes[i];
    return;
  }
  std::uint16_t* to = static_cast<std::uint16_t*>(data) + at;
  if (count >= kLanes) {
#if defined(__AVX512BF16__)
    if constexpr (format == Format::kBf16) return store_bf16(to, a);
#endif
    if constexpr (format == Format::kBf16) return store_high_words(to, rounded_to_bf16(a));
    return store_f16(to, a);
  }
  float lanes[kLanes];
  store(lanes, a);
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = format == Format::kBf16 ? float_to_bfloat16(lanes[i]) : float_to_float16(lanes[i]);
  }
}

template <Format format>
T2P_INLINE void write_format(const Rows& rows, std::int64_t at, std::int64_t channels, F32 by,
                             const float* from) {
#pragma GCC unroll 2
  for (std::int64_t c = 0; c < channels; c += kLanes) {
    write_vector<format>(rows.data, at + c, channels - c, mul(by, load(from + c)));
  }
}

// Rounds a row, times `factor`, to the format.
void write_row(const Rows& rows, const Head& head, std::int64_t row, std::int64_t channels,
               float factor, const float* from) {
  const auto write = rows.format == Format::kF32    ? write_format<Format::kF32>
                     : rows.format == Format::kBf16 ? write_format<Format::kBf16>
                                                    : write_format<Format::kF16>;
  write(rows, place(rows, head, row), channels, broadcast(factor), from);
}

// A matrix in scratch; transposed by exchanging the steps.
struct Matrix {
  const float* data;
  std::int64_t row, column;
};

constexpr int kTileRows = kLanes == 16 ? 8 : 4;

// sum += the rows of a, [kTileRows, depth], times the columns of b, [depth, vectors kLanes].
template <int vectors>
T2P_INLINE void add_products(const Matrix& a, std::int64_t depth, const float* b, std::int64_t ldb,
                             F32 (&sum)[kTileRows][vectors]) {
  const float* at = a.data;
  for (std::int64_t k = 0; k < depth; ++k, at += a.column, b += ldb) {
    F32 right[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const F32 left = broadcast(at[i * a.row]);
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) sum[i][j] = multiply_add(left, right[j], sum[i][j]);
    }
  }
}

template <int vectors, bool sums>
T2P_INLINE void multiply_tile(const Matrix& a, std::int64_t depth, const float* b, std::int64_t ldb,
                              float* c, std::int64_t ldc) {
  F32 sum[kTileRows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) {
      sum[i][j] = sums ? load(c + i * ldc + j * kLanes) : broadcast(0.0f);
    }
  }
  add_products<vectors>(a, depth, b, ldb, sum);
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) store(c + i * ldc + j * kLanes, sum[i][j]);
  }
}

// c [height, width] = (c +) a [height, depth] b [depth, width]; height is a multiple of 8, width of
// kPad.
template <bool sums>
void multiply(Matrix a, std::int64_t height, std::int64_t depth, const float* b, std::int64_t ldb,
              std::int64_t width, float* c, std::int64_t ldc) {
  for (std::int64_t i = 0; i < height; i += kTileRows, a.data += kTileRows * a.row) {
    std::int64_t j = 0;
    for (; j + 2 * kLanes <= width; j += 2 * kLanes) {
      multiply_tile<2, sums>(a, depth, b + j, ldb, c + i * ldc + j, ldc);
    }
    if (j < width) multiply_tile<1, sums>(a, depth, b + j, ldb, c + i * ldc + j, ldc);
  }
}

// to [width, height] = from^T; both are multiples of kPad.
void transpose(const float* from, std::int64_t height, std::int64_t width, float* to) {
  for (std::int64_t j = 0; j < width; j += 4) {
    for (std::int64_t i = 0; i < height; i += kLanes) {
      F32 quads[4];
      for (int r = 0; r < 4; ++r) quads[r] = load_quads(from + (i + r) * width + j, 4 * width);
      transpose_quads(quads);
      for (int r = 0; r < 4; ++r) store(to + (j + r) * height + i, quads[r]);
    }
  }
}

// p [kChunk, kChunk] = a b^T where the column is not after the row, 0 elsewhere; a is
// [kChunk, width], b_t [width, kChunk].
void multiply_lower(const float* a, const float* b_t, std::int64_t width, float* p) {
  for (std::int64_t i = 0; i < kChunk; i += 8) {
    const std::int64_t reached = padded(i + 8);
    float* rows = p + i * kChunk;
    multiply<false>({a + i * width, width, 1}, 8, width, b_t, kChunk, reached, rows, kChunk);
    for (std::int64_t r = 0; r < 8; ++r) {
      for (std::int64_t j = i + r + 1; j < kChunk; ++j) rows[r * kChunk + j] = 0.0f;
    }
  }
}

T2P_INLINE float dot(const float* a, const float* b, std::int64_t width) {
  F32 sum = broadcast(0.0f);
  for (std::int64_t c = 0; c < width; c += kLanes)
    sum = multiply_add(load(a + c), load(b + c), sum);
  return reduce_add(sum);
}

// y += a x
T2P_INLINE void add_scaled(float a, const float* x, std::int64_t width, float* y) {
  for (std::int64_t c = 0; c < width; c += kLanes) {
    store(y + c, multiply_add(broadcast(a), load(x + c), load(y + c)));
  }
}

// to += sum_i weights_i x_i, or sum_i x_i; two sums, since one would wait for itself.
void sum_rows(const float* x, const float* weights, std::int64_t count, std::int64_t width,
              float* to) {
  for (std::int64_t c = 0; c < width; c += kLanes) {
    F32 even = load(to + c), odd = broadcast(0.0f);
    std::int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      const float* at = x + i * width + c;
      even = multiply_add(broadcast(weights ? weights[i] : 1.0f), load(at), even);
      odd = multiply_add(broadcast(weights ? weights[i + 1] : 1.0f), load(at + width), odd);
    }
    if (i < count) {
      const F32 weight = broadcast(weights ? weights[i] : 1.0f);
      even = multiply_add(weight, load(x + i * width + c), even);
    }
    store(to + c, add(even, odd));
  }
}

T2P_INLINE void scale_row(float a, std::int64_t width, float* x) {
  for (std::int64_t c = 0; c < width; c += kLanes) store(x + c, mul(broadcast(a), load(x + c)));
}

}  // namespace
}  // namespace t2p::linear_attention::T2P_ISA_NAMESPACE

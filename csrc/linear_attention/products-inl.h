// SPDX-License-Identifier: Apache-2.0
// Matrix products on tiles, of numbers in bfloat16 and of float32 split into such. Included once
// per ISA, by those that have tiles.
//
// A float32 is the sum of three bfloat16, each the nearest to what is left: 8 + 8 + 8 bits. Times a
// bfloat16 each is exact, so the product is as good as one in float32. So much is true of 0 and of
// magnitudes from 2^-50 to 2^50, of which no part that counts is below 2^-126, nor a product of
// two, and none overflows. Who has others multiplies in float32.
//
// With both sides split it would take six products of tiles. That was tried for float32, and at 32
// channels is slower than multiplying in float32: splitting and turning rows takes longer than
// those products themselves.
#pragma once

#include "common/tiles.h"
#include "linear_attention/tiles-inl.h"

namespace t2p::linear_attention::T2P_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kSide = tiles::kTileRows;    // of a tile of sums
constexpr std::int64_t kDepth = tiles::kTileWords;  // of the product of two tiles
constexpr int kParts = 3;

// Whether bfloat16 numbers, or the first parts of others, have magnitudes that are good for this.
class Magnitudes {
 public:
  T2P_INLINE void include(I32 pair) {
    const I32 doubled = shift_left_words<1>(pair);  // without the sign
    most_ = max_words(most_, doubled);
    least_ = min_words(least_, sub_words(doubled, broadcast(std::int32_t{0x10001})));  // of 0: most
  }
  T2P_INLINE bool all_ordinary() const {
    constexpr std::uint32_t kMost = (127 + 50) << 8, kLeast = ((127 - 50) << 8) - 1;
    return !bits_where_words_less(broadcast(static_cast<std::int32_t>(kMost * 0x10001)), most_) &&
           !bits_where_words_less(least_, broadcast(static_cast<std::int32_t>(kLeast * 0x10001)));
  }

 private:
  I32 most_ = broadcast(std::int32_t{0}), least_ = broadcast(std::int32_t{-1});
};

// The parts of two vectors in pairs, a's in the low words. The last part of a NaN is one, too.
T2P_INLINE void split(F32 a, F32 b, I32 (&pairs)[kParts]) {
  const I32 high = broadcast(std::int32_t{-0x10000}), half = broadcast(std::int32_t{0x8000});
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part) {
    const bool last = part + 1 == kParts;  // and exact
    const I32 first = bit_and(last ? as_i32(a) : add(as_i32(a), half), high);
    const I32 second = bit_and(last ? as_i32(b) : add(as_i32(b), half), high);
    pairs[part] = bit_xor(shift_right<16>(first), second);
    a = sub(a, as_f32(first));
    b = sub(b, as_f32(second));
  }
}

// One side of a product, in pairs of words, and how far it is from a tile to the next along the
// sums, from a row of it to the next, from a part to the next, and from a tile to the next along
// the depth.
struct Side {
  const std::int32_t* data;
  std::int64_t tile, row, part, block;
};

// Sums [16 rows, 16 columns] in the tiles 0 to 3, left sides in 4 and 5, right sides in 6 and 7.
template <int parts, int rows, int columns>
T2P_INLINE void add_blocks(Side a, Side b, std::int64_t blocks) {
  for (std::int64_t block = 0; block < blocks; ++block, a.data += a.block, b.data += b.block) {
    tiles::load_tile<4>(a.data, 4 * a.row);
    if constexpr (rows == 2) tiles::load_tile<5>(a.data + a.tile, 4 * a.row);
    for (int part = 0; part < parts; ++part) {
      const std::int32_t* right = b.data + part * b.part;
      tiles::load_tile<6>(right, 4 * b.row);
      if constexpr (columns == 2) tiles::load_tile<7>(right + b.tile, 4 * b.row);
      tiles::add_product_bf16<0, 4, 6>();
      if constexpr (columns == 2) tiles::add_product_bf16<1, 4, 7>();
      if constexpr (rows == 2) tiles::add_product_bf16<2, 5, 6>();
      if constexpr (rows == 2 && columns == 2) tiles::add_product_bf16<3, 5, 7>();
    }
  }
}

template <int tile, bool sums>
T2P_INLINE void begin_tile(const float* c, std::int64_t ldc) {
  if constexpr (sums) tiles::load_tile<tile>(c, 4 * ldc);
  if constexpr (!sums) tiles::zero_tile<tile>();
}

template <int parts, bool sums, int rows, int columns>
T2P_INLINE void multiply_tiles(const Side& a, const Side& b, std::int64_t blocks, float* c,
                               std::int64_t ldc) {
  float* below = c + kSide * ldc;
  begin_tile<0, sums>(c, ldc);
  if constexpr (columns == 2) begin_tile<1, sums>(c + kSide, ldc);
  if constexpr (rows == 2) begin_tile<2, sums>(below, ldc);
  if constexpr (rows == 2 && columns == 2) begin_tile<3, sums>(below + kSide, ldc);
  add_blocks<parts, rows, columns>(a, b, blocks);
  tiles::store_tile<0>(c, 4 * ldc);
  if constexpr (columns == 2) tiles::store_tile<1>(c + kSide, 4 * ldc);
  if constexpr (rows == 2) tiles::store_tile<2>(below, 4 * ldc);
  if constexpr (rows == 2 && columns == 2) tiles::store_tile<3>(below + kSide, 4 * ldc);
}

// c [height, width] = (c +) a b, where b has `parts`; both sizes are multiples of 16.
template <int parts, bool sums>
T2P_INLINE void multiply_sides(Side a, const Side& b, std::int64_t height, std::int64_t width,
                               std::int64_t blocks, float* c, std::int64_t ldc) {
  for (std::int64_t i = 0; i < height; i += 2 * kSide, a.data += 2 * a.tile, c += 2 * kSide * ldc) {
    Side at = b;
    const bool two = i + kSide < height;
    std::int64_t j = 0;
    for (; j + 2 * kSide <= width; j += 2 * kSide, at.data += 2 * b.tile) {
      two ? multiply_tiles<parts, sums, 2, 2>(a, at, blocks, c + j, ldc)
          : multiply_tiles<parts, sums, 1, 2>(a, at, blocks, c + j, ldc);
    }
    if (j == width) continue;
    two ? multiply_tiles<parts, sums, 2, 1>(a, at, blocks, c + j, ldc)
        : multiply_tiles<parts, sums, 1, 1>(a, at, blocks, c + j, ldc);
  }
}

}  // namespace
}  // namespace t2p::linear_attention::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// AMX: eight registers of 16 rows of 64 bytes, tiles, and products of two of them. Included by what
// is compiled for the level `amx` alone.
//
// A product's left side is 16 rows of 64 bytes or 32 bfloat16; its right side has, in each row, for
// 16 columns side by side what belongs to four bytes or two bfloat16 of the left rows; what it is
// added to is 16 x 16 numbers of 32 bits. Products of bfloat16 are exact, numbers below 2^-126
// count as 0, and sums are rounded to nearest even; nothing is signalled.
//
// With T2P_TILES_IN_SOFTWARE they are arrays: for sanitizers, and for processors without AMX.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace t2p::tiles {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row
constexpr int kTileWords = 32;  // bfloat16 of a row

#if defined(T2P_TILES_IN_SOFTWARE)

struct Tile {
  alignas(64) std::int32_t row[kTileRows][kTileBytes / 4];
};
inline thread_local Tile tile_file[8];
inline thread_local bool tiles_ready = false;

struct TilesInUse {
  TilesInUse() { tiles_ready = true; }
  ~TilesInUse() { tiles_ready = false; }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

template <int tile>
void load_tile(const void* from, std::int64_t stride) {
  if (!tiles_ready) __builtin_trap();
  for (int i = 0; i < kTileRows; ++i) {
    __builtin_memcpy(tile_file[tile].row[i], static_cast<const char*>(from) + i * stride,
                     kTileBytes);
  }
}
template <int tile>
void store_tile(void* to, std::int64_t stride) {
  if (!tiles_ready) __builtin_trap();
  for (int i = 0; i < kTileRows; ++i) {
    __builtin_memcpy(static_cast<char*>(to) + i * stride, tile_file[tile].row[i], kTileBytes);
  }
}
template <int tile>
void zero_tile() {
  if (!tiles_ready) __builtin_trap();
  tile_file[tile] = {};
}

template <int sum, int a, int b>
void add_product_bytes() {
  for (int i = 0; i < kTileRows; ++i) {
    for (int k = 0; k < kTileBytes; ++k) {
      const auto left = static_cast<std::int8_t>(
          static_cast<std::uint32_t>(tile_file[a].row[i][k / 4]) >> (k % 4 * 8));
      for (int j = 0; j < kTileRows; ++j) {
        const auto right = static_cast<std::uint8_t>(
            static_cast<std::uint32_t>(tile_file[b].row[k / 4][j]) >> (k % 4 * 8));
        tile_file[sum].row[i][j] += left * right;
      }
    }
  }
}

template <int sum, int a, int b>
void add_product_bf16() {
  const auto half = [](std::int32_t pair, int k) {
    const std::uint32_t word = k == 0 ? static_cast<std::uint32_t>(pair) << 16
                                      : static_cast<std::uint32_t>(pair) & 0xffff0000;
    float value;
    __builtin_memcpy(&value, &word, sizeof(value));
    return (word & 0x7f800000) == 0 ? 0.0f : value;
  };
  for (int i = 0; i < kTileRows; ++i) {
    float total[2][kTileRows] = {}, before[kTileRows];
    for (int k = 0; k < kTileWords; ++k) {
      const float left = half(tile_file[a].row[i][k / 2], k % 2);
      const std::int32_t* right = tile_file[b].row[k / 2];
      for (int j = 0; j < kTileRows; ++j) total[k % 2][j] += left * half(right[j], k % 2);
    }
    __builtin_memcpy(before, tile_file[sum].row[i], sizeof(before));
    for (int j = 0; j < kTileRows; ++j) before[j] += total[0][j] + total[1][j];
    __builtin_memcpy(tile_file[sum].row[i], before, sizeof(before));
  }
}

#else

// While one of these lives, its thread has eight whole tiles. There is one at a time.
class TilesInUse {
 public:
  TilesInUse() {
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {kTileBytes, kTileBytes, kTileBytes, kTileBytes,
                                 kTileBytes, kTileBytes, kTileBytes, kTileBytes};
      std::uint8_t rows[16] = {kTileRows, kTileRows, kTileRows, kTileRows,
                               kTileRows, kTileRows, kTileRows, kTileRows};
    } shape;
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~TilesInUse() { __asm__ volatile("tilerelease" ::: "memory"); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

// Rows that lie `stride` bytes apart, 0 for the same 16 times.
template <int tile>
T2P_INLINE void load_tile(const void* from, std::int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
T2P_INLINE void store_tile(void* to, std::int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
T2P_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// sum += a b, of signed bytes and unsigned ones, or of bfloat16.
template <int sum, int a, int b>
T2P_INLINE void add_product_bytes() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}
template <int sum, int a, int b>
T2P_INLINE void add_product_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

#endif

}  // namespace t2p::tiles

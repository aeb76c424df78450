// SPDX-License-Identifier: Apache-2.0
// Queries, keys and values in bfloat16 on AMX's tiles. Included by what is compiled for `amx`.
//
// The rows of a tile of scores are queries, its columns keys. Weights go, in bfloat16, over the
// scores they are made from, two keys of neighbouring tiles in the place of one score; values are
// paired in the order of keys that results. Behind the values stands a column of ones: what it sums
// up is the sum of the weights as they were rounded.
//
// A block of keys meets the queries 32 at a time, and tiles work while vectors do: scores of the
// next 32 are multiplied between rows of weights of these, these weights with values beside the
// search for the next ones' largest scores.
#pragma once

#include "attention/bf16-inl.h"
#include "common/tiles.h"
#include "common/transpose-inl.h"

namespace t2p::attention::T2P_ISA_NAMESPACE {
namespace {

using namespace tiles;

constexpr int kUnit = 2 * kTileRows;       // queries, and keys, of two tiles
constexpr int kTileSize = kTileRows * 16;  // in numbers of 32 bits
constexpr std::int64_t kUnitsOfKeys = kTiledKeys / kUnit;
constexpr std::int64_t kScores = kUnit * kTiledKeys;

// Scores, as exponents of 2, are known too coarsely beyond for exp2_words.
constexpr float kLargestExponent = 16384;

alignas(64) constexpr std::uint16_t kZeros[kMostChannels] = {};  // a row that is not there

// A block of prepared keys and values: keys as right sides of products, [tiles of keys, steps,
// tile]; pairs of values [kTiledKeys / 2, width]; what is added to scores [kTiledKeys], if the
// block is biased; and how it is.
enum BlockKind : std::int32_t { kPlain, kBiased, kUnfit };
struct Block {
  Block(const TileSizes& sizes, std::int32_t* at)
      : keys(at),
        values(keys + kTiledKeys * sizes.steps * 16),
        bias(reinterpret_cast<float*>(values + kTiledKeys / 2 * sizes.width)),
        kind(reinterpret_cast<std::int32_t*>(bias + kTiledKeys)) {}
  std::int32_t *keys, *values;
  float* bias;
  std::int32_t* kind;
};

const std::uint16_t* words_at(const Rows& rows, std::int64_t batch, std::int64_t head,
                              std::int64_t row) {
  return static_cast<const std::uint16_t*>(rows.data) + place(rows, batch, head, row);
}

// A row of bfloat16, with these signs turned round, and zeros behind it in whole tiles; whether all
// of it is finite.
T2P_INLINE bool copy_row(const std::uint16_t* from, std::int64_t count, std::int64_t steps,
                         std::int32_t signs, std::int32_t* to) {
  bool finite = true;
  for (std::int64_t s = 0; s < steps; ++s) {
    const std::int64_t left = count - s * kTileWords;
    const I32 words = load_words_first(from + s * kTileWords,
                                       static_cast<int>(left < kTileWords ? left : kTileWords));
    finite &= all_finite_bf16(words);
    store(to + s * 16, bit_xor(words, broadcast(signs)));
  }
  return finite;
}

void prepare(const Attention& attention, std::int64_t batch, std::int64_t head, std::int64_t first,
             std::int32_t* to) {
  alignas(64) std::int32_t rows[kTileRows * kMostChannels / 2];
  const TileSizes sizes(attention);
  const Block block(sizes, to);
  const std::int64_t left = attention.n - first, count = left < kTiledKeys ? left : kTiledKeys;
  const std::int64_t units = (count + kUnit - 1) / kUnit, words = sizes.steps * 16;
  bool finite = true;
  for (std::int64_t j = 0; j < units * kUnit; ++j) {
    const std::uint16_t* from = j < count ? words_at(attention.k, batch, head, first + j) : kZeros;
    finite &= copy_row(from, attention.d, sizes.steps, 0, rows + j % kTileRows * words);
    if (j % kTileRows != kTileRows - 1) continue;
    std::int32_t* tile = block.keys + j / kTileRows * sizes.steps * kTileSize;
    for (std::int64_t s = 0; s < sizes.steps; ++s) {
      // Rows of 32 words as the right side of a product: pairs of words become columns.
      transpose_square(rows + s * 16, words, tile + s * kTileSize, 16);
    }
  }
  const std::int64_t e = attention.e;
  for (std::int64_t i = 0; i < units * kUnit / 2; ++i) {
    // The order of exp2_words.
    const std::int64_t key =
        i / kTileRows * kUnit + i / 2 % 2 * kTileRows + i % kTileRows / 4 * 4 + i % 2 * 2;
    const auto row = [&](std::int64_t j) {
      return j < count ? words_at(attention.v, batch, head, first + j) : kZeros;
    };
    std::int32_t* values = block.values + i * sizes.width;
    pair_rows<false>(row(key), row(key + 1), e, values);
    if (e % kLanes == 0) store(values + e, broadcast(0));
    values[e] = 0x3f803f80;
  }
  const float* bias = attention.bias ? attention.bias + batch * attention.n + first : nullptr;
  for (std::int64_t j = 0; j < count; ++j) {
    block.bias[j] = bias ? bias_exponent(bias[j]) : 0;
    finite &= block.bias[j] == block.bias[j];
  }
  for (std::int64_t j = count; j < units * kUnit; ++j) block.bias[j] = -kInfinity;
  *block.kind = !finite ? kUnfit : bias || count % kUnit ? kBiased : kPlain;
}

// 32 queries and what was found of them so far.
struct Unit {
  const std::int32_t* queries;  // [kUnit, steps, 16]
  float* scores;                // [2, tiles of keys, tile]; weights lie in every other tile
  float* offsets;               // [kUnit], what exp2_words takes is added to
  float* largest;               // [kUnit], of the scores, as exponents of 2
  float* outputs;               // [2, width / 16, tile], sums of weighted values
};

// Scores of 32 keys.
T2P_INLINE void multiply_keys(const TileSizes& sizes, const Block& block, const Unit& unit,
                              std::int64_t keys) {
  const std::int32_t* left = unit.queries;
  const std::int32_t* right = block.keys + keys * 2 * sizes.steps * kTileSize;
  const std::int64_t stride = sizes.steps * kTileBytes;
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
  for (std::int64_t s = 0; s < sizes.steps; ++s) {
    load_tile<4>(left + s * 16, stride);
    load_tile<6>(right + s * kTileSize, kTileBytes);
    add_product_bf16<0, 4, 6>();
    load_tile<7>(right + (sizes.steps + s) * kTileSize, kTileBytes);
    add_product_bf16<1, 4, 7>();
    load_tile<5>(left + sizes.steps * kTileSize + s * 16, stride);
    add_product_bf16<2, 5, 6>();
    add_product_bf16<3, 5, 7>();
  }
  float* scores = unit.scores + keys * 2 * kTileSize;
  store_tile<0>(scores, kTileBytes);
  store_tile<1>(scores + kTileSize, kTileBytes);
  store_tile<2>(scores + kScores / 2, kTileBytes);
  store_tile<3>(scores + kScores / 2 + kTileSize, kTileBytes);
}

// Weights of queries [begin, end) of the unit.
T2P_INLINE void weigh_rows(const Unit& unit, std::int64_t units, float factor, int begin, int end) {
  const F32 scale = broadcast(factor);
  for (int i = begin; i < end; ++i) {
    float* scores = unit.scores + i / kTileRows * (kScores / 2) + i % kTileRows * 16;
    const F32 offset = broadcast(unit.offsets[i]);
    for (std::int64_t j = 0; j < units; ++j, scores += 2 * kTileSize) {
      const I32 words = exp2_words(multiply_add(load(scores), scale, offset),
                                   multiply_add(load(scores + kTileSize), scale, offset));
      store(scores, as_f32(words));
    }
  }
}

// The largest scores of the unit, and what follows from them.
void find_largest(const TileSizes& sizes, const Block& block, const Unit& unit, std::int64_t units,
                  float factor) {
  for (int t = 0; t < 2; ++t) {
    float* scores = unit.scores + t * (kScores / 2);
    F32 best[kTileRows];
#pragma GCC unroll 16
    for (F32& row : best) row = broadcast(kLowest);
    for (std::int64_t j = 0; j < 2 * units; ++j, scores += kTileSize) {
      if (*block.kind == kBiased) {
        const F32 bias = load(block.bias + j * 16), scale = broadcast(factor);
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; ++i) {
          const F32 score = multiply_add(load(scores + i * 16), scale, bias);
          store(scores + i * 16, score);
          best[i] = max(score, best[i]);
        }
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; ++i) best[i] = max(load(scores + i * 16), best[i]);
      }
    }
    F32 largest = reduce_max_each(best);
    if (*block.kind != kBiased) largest = mul(largest, broadcast(factor));
    float* before = unit.largest + t * kTileRows;
    const F32 old = load(before);
    largest = max(largest, old);
    store(before, largest);
    store(unit.offsets + t * kTileRows,
          multiply_add(sub(broadcast(127.0f), largest), broadcast(512.0f), broadcast(2.0f)));
    if (bits(less(old, largest)) == 0) continue;
    alignas(64) float shrink[kTileRows];
    store(shrink, exp2_coarse(sub(old, largest)));
    float* outputs = unit.outputs + t * sizes.width * kTileRows;
    for (std::int64_t c = 0; c < sizes.width; c += 16) {
      for (int i = 0; i < kTileRows; ++i, outputs += 16) {
        store(outputs, mul(load(outputs), broadcast(shrink[i])));
      }
    }
  }
}

// Adds the values of the block, weighted, to two columns of tiles of outputs, for both tiles of
// queries; or to three, or one, for one.
T2P_INLINE void multiply_two_columns(const float* weights, const std::int32_t* values,
                                     std::int64_t width, std::int64_t keys, float* outputs) {
  float* second = outputs + width * kTileRows;
  load_tile<0>(outputs, kTileBytes);
  load_tile<1>(outputs + kTileSize, kTileBytes);
  load_tile<2>(second, kTileBytes);
  load_tile<3>(second + kTileSize, kTileBytes);
  for (std::int64_t j = 0; j < keys; ++j, values += kTileRows * width, weights += 2 * kTileSize) {
    load_tile<4>(weights, kTileBytes);
    load_tile<6>(values, width * 4);
    add_product_bf16<0, 4, 6>();
    load_tile<7>(values + 16, width * 4);
    add_product_bf16<1, 4, 7>();
    load_tile<5>(weights + kScores / 2, kTileBytes);
    add_product_bf16<2, 5, 6>();
    add_product_bf16<3, 5, 7>();
  }
  store_tile<0>(outputs, kTileBytes);
  store_tile<1>(outputs + kTileSize, kTileBytes);
  store_tile<2>(second, kTileBytes);
  store_tile<3>(second + kTileSize, kTileBytes);
}

template <bool three>
T2P_INLINE void multiply_columns(const float* weights, const std::int32_t* values,
                                 std::int64_t width, std::int64_t keys, float* outputs) {
  load_tile<0>(outputs, kTileBytes);
  if (three) load_tile<1>(outputs + kTileSize, kTileBytes);
  if (three) load_tile<2>(outputs + 2 * kTileSize, kTileBytes);
  for (std::int64_t j = 0; j < keys; ++j, values += kTileRows * width, weights += 2 * kTileSize) {
    load_tile<4>(weights, kTileBytes);
    load_tile<5>(values, width * 4);
    add_product_bf16<0, 4, 5>();
    if (!three) continue;
    load_tile<6>(values + 16, width * 4);
    add_product_bf16<1, 4, 6>();
    load_tile<7>(values + 32, width * 4);
    add_product_bf16<2, 4, 7>();
  }
  store_tile<0>(outputs, kTileBytes);
  if (three) store_tile<1>(outputs + kTileSize, kTileBytes);
  if (three) store_tile<2>(outputs + 2 * kTileSize, kTileBytes);
}

void multiply_values(const TileSizes& sizes, const Block& block, const Unit& unit,
                     std::int64_t keys) {
  std::int64_t c = 0;
  for (std::int64_t left = sizes.width; left == 32 || left >= 64; left -= 32, c += 32) {
    multiply_two_columns(unit.scores, block.values + c, sizes.width, keys,
                         unit.outputs + c * kTileRows);
  }
  for (int t = 0; t < 2 && c < sizes.width; ++t) {
    const float* weights = unit.scores + t * (kScores / 2);
    float* outputs = unit.outputs + (t * sizes.width + c) * kTileRows;
    if (sizes.width - c == 16) {
      multiply_columns<false>(weights, block.values + c, sizes.width, keys, outputs);
    } else {
      multiply_columns<true>(weights, block.values + c, sizes.width, keys, outputs);
    }
  }
}

// Takes a block of keys into units of queries; `unit(u)` is the u-th.
template <class UnitAt>
void take_block_by_tiles(const TileSizes& sizes, const Block& block, std::int64_t keys,
                         std::int64_t units, float factor, UnitAt unit_at) {
  const float scale = *block.kind == kBiased ? 512 : 512 * factor;
  for (std::int64_t j = 0; j < keys; ++j) multiply_keys(sizes, block, unit_at(0), j);
  find_largest(sizes, block, unit_at(0), keys, factor);
  for (std::int64_t u = 0; u < units; ++u) {
    const bool more = u + 1 < units;
    const Unit unit = unit_at(u), next = unit_at(more ? u + 1 : u);
    for (std::int64_t j = 0; j < keys; ++j) {
      if (more) multiply_keys(sizes, block, next, j);
      weigh_rows(unit, keys, scale, static_cast<int>(j * kUnit / keys),
                 static_cast<int>((j + 1) * kUnit / keys));
    }
    multiply_values(sizes, block, unit, keys);
    if (more) find_largest(sizes, block, next, keys, factor);
  }
}

// One query's outputs [width / 16, tile], of which the last column is the sum of weights.
void write_query(const float* from, std::int64_t e, std::uint16_t* to) {
  const float total = from[e / 16 * kTileSize + e % 16];
  const F32 factor = broadcast(total == 0 ? 0.0f : 1 / total);
  std::int64_t c = 0;
  for (; c + 16 <= e; c += 16, from += kTileSize) store_bf16(to + c, mul(load(from), factor));
  if (c < e) store_bf16_first(to + c, mul(load(from), factor), static_cast<int>(e - c));
}

void attend_by_tiles(const Attention& attention, std::int64_t batch, std::int64_t head,
                     std::int64_t begin, std::int64_t end, const std::int32_t* blocks,
                     float* scratch, const Rows& out) {
  const TileSizes sizes(attention);
  const std::int64_t units = (end - begin + kUnit - 1) / kUnit;
  const float magnitude = attention.scale < 0 ? -attention.scale : attention.scale;
  const float factor = kLog2E * magnitude;
  float* const whole_scratch = scratch;
  const auto take = [&](std::int64_t count) {
    float* taken = scratch;
    scratch += count;
    return taken;
  };
  const std::int64_t words = sizes.steps * 16, unit_outputs = kUnit * sizes.width;
  auto* rows = reinterpret_cast<std::int32_t*>(take(units * kUnit * words));
  float* outputs = take(units * unit_outputs);
  float *scores = take(2 * kScores), *offsets = take(2 * kUnit), *largest = take(units * kUnit);
  std::int32_t* own_block = reinterpret_cast<std::int32_t*>(scratch);
  const auto unit_at = [&](std::int64_t u) {
    return Unit{rows + u * kUnit * words, scores + u % 2 * kScores, offsets + u % 2 * kUnit,
                largest + u * kUnit, outputs + u * unit_outputs};
  };

  // A negative scale turns the signs of the queries round.
  const std::int32_t signs = attention.scale < 0 ? static_cast<std::int32_t>(0x80008000) : 0;
  for (std::int64_t i = 0; i < units * kUnit; ++i) {
    copy_row(begin + i < end ? words_at(attention.q, batch, head, begin + i) : kZeros, attention.d,
             sizes.steps, signs, rows + i * words);
  }
  for (std::int64_t i = 0; i < units * unit_outputs; ++i) outputs[i] = 0;
  for (std::int64_t i = 0; i < units * kUnit; ++i) largest[i] = kLowest;
  bool fit = true;
  for (std::int64_t first = 0; first < attention.n && fit; first += kTiledKeys) {
    std::int32_t* at = own_block;
    if (blocks) {
      at = const_cast<std::int32_t*>(blocks) + first / kTiledKeys * sizes.block();
    } else {
      prepare(attention, batch, head, first, at);
    }
    const Block block(sizes, at);
    fit = *block.kind != kUnfit;
    const std::int64_t left = attention.n - first, count = left < kTiledKeys ? left : kTiledKeys;
    const TilesInUse in_use;
    if (fit) {
      take_block_by_tiles(sizes, block, (count + kUnit - 1) / kUnit, units, factor, unit_at);
    }
  }

  // What is not finite, or too large, is left to the other way, which is exact enough for it.
  bool good[kTiledQueries];
  for (std::int64_t i = 0; i < end - begin; ++i) {
    good[i] = fit && largest[i] < kLargestExponent && largest[i] > -kLargestExponent;
    if (!good[i]) continue;
    const std::int64_t u = i / kUnit, t = i / kTileRows % 2, r = i % kTileRows;
    write_query(outputs + u * unit_outputs + t * kTileRows * sizes.width + r * 16, attention.e,
                static_cast<std::uint16_t*>(out.data) + place(out, batch, head, begin + i));
  }
  const std::int64_t most = queries_of(attention);
  for (std::int64_t i = 0, last; i < end - begin; i = last) {
    last = i + 1;
    if (good[i]) continue;
    while (last < end - begin && last - i < most && !good[last]) ++last;
    attend_with<Pairs>(attention, batch, head, begin + i, begin + last, whole_scratch, out);
  }
}

}  // namespace
}  // namespace t2p::attention::T2P_ISA_NAMESPACE

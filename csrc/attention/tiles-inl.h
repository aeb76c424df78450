// SPDX-License-Identifier: Apache-2.0
// Attention of some queries of one head by tiles of queries and keys. Included once per ISA.
//
// The lanes of a vector are queries: their largest scores and sums of weights need no reduction
// over lanes, and keys and values enter the products as broadcast numbers. `Word` is what a lane
// multiplies at a time: a float, or (bf16-inl.h) two bfloat16.
#pragma once

#include "attention/kernels.h"
#include "common/exp-inl.h"
#include "common/half.h"
#include "common/simd.h"

namespace t2p::attention::T2P_ISA_NAMESPACE {
namespace {

using namespace simd::T2P_ISA_NAMESPACE;

// Of 16 registers, 12 hold sums, of two vectors of queries; of 32, up to 20, and operations read
// broadcast numbers from memory. Keys of a block are a multiple of those whose scores are summed
// at a time, or nearly.
constexpr bool kMany = kLanes == 16;
constexpr int kVectors = kMany ? 1 : 2, kTile = kVectors * kLanes;  // of queries
constexpr int kTogether = kMany ? 8 : 6;
constexpr std::int64_t kBlock = kMany ? kKeys : 60;
static_assert(kTile <= kMostLanes && kBlock <= kKeys && kTogether <= kMostTogether);

constexpr float kLowest = -3.402823466e38f, kInfinity = __builtin_inff();

T2P_INLINE std::int64_t place(const Rows& rows, std::int64_t batch, std::int64_t head,
                              std::int64_t row) {
  return batch * rows.batch + head * rows.head + row * rows.row;
}

// factor * row, every element `stride` after the one before.
void read_row(const Rows& rows, std::int64_t offset, std::int64_t count, float factor,
              std::int64_t stride, float* to) {
  if (rows.format == Format::kF32) {
    const float* from = static_cast<const float*>(rows.data) + offset;
    for (std::int64_t i = 0; i < count; ++i) to[i * stride] = factor * from[i];
    return;
  }
  const std::uint16_t* from = static_cast<const std::uint16_t*>(rows.data) + offset;
  if (rows.format == Format::kBf16) {
    for (std::int64_t i = 0; i < count; ++i) to[i * stride] = factor * bfloat16_to_float(from[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i * stride] = factor * float16_to_float(from[i]);
  }
}

// factor * one of the outputs [e, queries].
void write_row(const float* from, std::int64_t count, float factor, const Rows& rows,
               std::int64_t offset) {
  if (rows.format == Format::kF32) {
    float* to = static_cast<float*>(rows.data) + offset;
    for (std::int64_t i = 0; i < count; ++i) to[i] = factor * from[i * kTile];
    return;
  }
  std::uint16_t* to = static_cast<std::uint16_t*>(rows.data) + offset;
  if (rows.format == Format::kBf16) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = float_to_bfloat16(factor * from[i * kTile]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i] = float_to_float16(factor * from[i * kTile]);
  }
}

// How numbers in float32 are laid out and weighed. Queries are multiplied by the scale.
struct Floats {
  using Word = float;
  explicit Floats(const Attention&) {}
  static std::int64_t words(std::int64_t channels) { return channels; }  // of a query or key
  static std::int64_t width(std::int64_t channels) { return channels; }  // of a row of values
  static std::int64_t steps(std::int64_t keys) { return keys; }          // of a sum of values

  // Queries [begin, end), at most kTile, as [words, queries].
  static void read_queries(const Attention& attention, std::int64_t batch, std::int64_t head,
                           std::int64_t begin, std::int64_t end, float* to) {
    for (std::int64_t i = 0; i < attention.d * kTile; ++i) to[i] = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      read_row(attention.q, place(attention.q, batch, head, i), attention.d, attention.scale, kTile,
               to + i - begin);
    }
  }

  // Keys [first, first + count) as [count, words], values as [steps, width].
  static void read_keys(const Attention& attention, std::int64_t batch, std::int64_t head,
                        std::int64_t first, std::int64_t count, float* keys, float* values) {
    const std::int64_t d = attention.d, e = attention.e;
    for (std::int64_t j = 0; j < count; ++j) {
      read_row(attention.k, place(attention.k, batch, head, first + j), d, 1, 1, keys + j * d);
      read_row(attention.v, place(attention.v, batch, head, first + j), e, 1, 1, values + j * e);
    }
  }

  static F32 add_product(F32 sum, F32 a, F32 b) { return multiply_add(a, b, sum); }
  static F32 with_bias(F32 product, float bias) { return add(product, broadcast(bias)); }
  static F32 power(F32 exponent) { return exp_nonpositive<true>(exponent); }

  // The weights [steps, queries] of the scores [count, queries] under the largest, of one vector
  // of queries; returns their sum.
  static F32 weigh(const float* scores, std::int64_t count, F32 largest, float* weights) {
    F32 sum = broadcast(0.0f);
    for (std::int64_t j = 0; j < count; ++j) {
      const F32 weight = power(sub(load(scores + j * kTile), largest));
      sum = add(sum, weight);
      store(weights + j * kTile, weight);
    }
    return sum;
  }
};

// Scores [count, queries] of a tile's queries [words, queries]; `best` becomes the largest of each
// and itself. Behind the keys [count, words] there are zeros up to a multiple of kTogether.
template <class Numbers>
T2P_INLINE void score(const Numbers& numbers, const typename Numbers::Word* queries,
                      const typename Numbers::Word* keys, std::int64_t count, std::int64_t words,
                      const float* bias, F32 (&best)[kVectors], float* scores) {
  for (std::int64_t first = 0; first < count; first += kTogether) {
    F32 sums[kTogether][kVectors];
#pragma GCC unroll 8
    for (auto& sum : sums) {
#pragma GCC unroll 2
      for (F32& part : sum) part = broadcast(0.0f);
    }
    const auto* rows = keys + first * words;
    for (std::int64_t c = 0; c < words; ++c) {
      decltype(load(queries)) query[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) query[v] = load(queries + c * kTile + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kTogether; ++i) {
        const auto key = broadcast(rows[i * words + c]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          sums[i][v] = Numbers::add_product(sums[i][v], query[v], key);
        }
      }
    }
    const int left = static_cast<int>(count - first < kTogether ? count - first : kTogether);
    for (int i = 0; i < left; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        if (bias) sums[i][v] = numbers.with_bias(sums[i][v], bias[first + i]);
        store(scores + (first + i) * kTile + v * kLanes, sums[i][v]);
        best[v] = max(sums[i][v], best[v]);
      }
    }
  }
}

// outputs [kCount, queries] = shrink outputs + weights [steps, queries] values [steps, width], of
// kCount columns of values.
template <class Numbers, int kCount>
T2P_INLINE void sum_values(const typename Numbers::Word* weights,
                           const typename Numbers::Word* values, std::int64_t steps,
                           std::int64_t width, const F32 (&shrink)[kVectors], float* outputs) {
  F32 sums[kCount][kVectors];
#pragma GCC unroll 20
  for (auto& sum : sums) {
#pragma GCC unroll 2
    for (F32& part : sum) part = broadcast(0.0f);
  }
  for (std::int64_t j = 0; j < steps; ++j) {
    decltype(load(weights)) weight[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) weight[v] = load(weights + j * kTile + v * kLanes);
#pragma GCC unroll 20
    for (int c = 0; c < kCount; ++c) {
      const auto value = broadcast(values[j * width + c]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        sums[c][v] = Numbers::add_product(sums[c][v], weight[v], value);
      }
    }
  }
#pragma GCC unroll 20
  for (int c = 0; c < kCount; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* output = outputs + c * kTile + v * kLanes;
      store(output, multiply_add(load(output), shrink[v], sums[c][v]));
    }
  }
}

// What was found of a tile of queries so far.
struct Found {
  float* largest;  // [queries], of the scores
  float* total;    // [queries], of the weights
  float* outputs;  // [e, queries], sums of weighted values
};

// Takes a block of keys into it. `scores` and `weights` are scratch [kBlock, queries].
template <class Numbers>
void take_block(const Numbers& numbers, const Attention& attention,
                const typename Numbers::Word* queries, const typename Numbers::Word* keys,
                const typename Numbers::Word* values, const float* bias, std::int64_t count,
                float* scores, typename Numbers::Word* weights, const Found& found) {
  F32 best[kVectors], shrink[kVectors];
  for (int v = 0; v < kVectors; ++v) best[v] = load(found.largest + v * kLanes);
  score(numbers, queries, keys, count, Numbers::words(attention.d), bias, best, scores);
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kLanes;
    shrink[v] = numbers.power(sub(load(found.largest + at), best[v]));
    const F32 sum = numbers.weigh(scores + at, count, best[v], weights + at);
    store(found.total + at, multiply_add(load(found.total + at), shrink[v], sum));
    store(found.largest + at, best[v]);
  }
  const std::int64_t steps = Numbers::steps(count), width = Numbers::width(attention.e);
  const auto add_values = [&]<int kCount>(std::int64_t c) {
    sum_values<Numbers, kCount>(weights, values + c, steps, width, shrink,
                                found.outputs + c * kTile);
  };
  const std::int64_t e = attention.e;
  std::int64_t c = 0;
  if constexpr (kMany) {
    for (; e % 20 == 0 && c < e; c += 20) add_values.template operator()<20>(c);
    for (; c + 16 <= e; c += 16) add_values.template operator()<16>(c);
    for (; c + 8 <= e; c += 8) add_values.template operator()<8>(c);
  } else {
    // Not 6 and 2 of the last 8: few sums would wait for each other.
    for (; c + 6 <= e && e - c != 8; c += 6) add_values.template operator()<6>(c);
  }
  for (; c + 4 <= e; c += 4) add_values.template operator()<4>(c);
  for (; c < e; ++c) add_values.template operator()<1>(c);
}

template <class Numbers>
void attend_with(const Attention& attention, std::int64_t batch, std::int64_t head,
                 std::int64_t begin, std::int64_t end, float* scratch, const Rows& out) {
  using Word = typename Numbers::Word;
  static_assert(sizeof(Word) == sizeof(float));
  const Numbers numbers(attention);
  const std::int64_t words = Numbers::words(attention.d), e = attention.e;
  const std::int64_t tiles = (end - begin + kTile - 1) / kTile, queries = tiles * kTile;
  const auto take = [&](std::int64_t count) {  // on a cache line's boundary
    float* taken = scratch;
    scratch += (count + 15) / 16 * 16;
    return taken;
  };
  Word* rows = reinterpret_cast<Word*>(take(queries * words));
  float *outputs = take(queries * e), *largest = take(queries), *total = take(queries);
  float* scores = take(kBlock * kTile);
  Word* weights = reinterpret_cast<Word*>(take(kBlock * kTile));
  Word* keys = reinterpret_cast<Word*>(take((kBlock + kTogether) * words));
  Word* values = reinterpret_cast<Word*>(take(kBlock * Numbers::width(e)));

  for (std::int64_t i = 0; i < queries * e; ++i) outputs[i] = 0;
  for (std::int64_t i = 0; i < queries; ++i) largest[i] = kLowest, total[i] = 0;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t first = begin + tile * kTile;
    numbers.read_queries(attention, batch, head, first, first + kTile < end ? first + kTile : end,
                         rows + tile * kTile * words);
  }
  for (std::int64_t first = 0; first < attention.n; first += kBlock) {
    const std::int64_t count = attention.n - first < kBlock ? attention.n - first : kBlock;
    numbers.read_keys(attention, batch, head, first, count, keys, values);
    const std::int64_t whole = (count + kTogether - 1) / kTogether * kTogether;
    for (std::int64_t i = count * words; i < whole * words; ++i) keys[i] = 0;
    const float* bias = attention.bias ? attention.bias + batch * attention.n + first : nullptr;
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const std::int64_t at = tile * kTile;
      take_block(numbers, attention, rows + at * words, keys, values, bias, count, scores, weights,
                 {largest + at, total + at, outputs + at * e});
    }
  }
  for (std::int64_t i = 0; i < end - begin; ++i) {
    const std::int64_t tile = i / kTile * kTile;
    write_row(outputs + tile * e + i - tile, e, total[i] == 0 ? 0.0f : 1 / total[i], out,
              place(out, batch, head, begin + i));
  }
}

}  // namespace
}  // namespace t2p::attention::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// Queries, keys and values in bfloat16, with the instruction that multiplies two pairs of them and
// adds both products, exact, to a float32. Included once per ISA, by those that have it.
//
// Scores are sums of exact products. Weights are rounded to bfloat16 for the products with values,
// with a relative error of up to 2^-9, and not for their own sum. Numbers below 2^-126 count as 0.
#pragma once

#include "attention/tiles-inl.h"
#include "common/pairs-inl.h"

namespace t2p::attention::T2P_ISA_NAMESPACE {
namespace {

constexpr float kLog2E = 1.44269504f;

// A bias as an exponent of 2; what is finite stays it, since masks are often the lowest number.
T2P_INLINE float bias_exponent(float bias) {
  return bias >= kLowest && kLog2E * bias < kLowest ? kLowest : kLog2E * bias;
}

// Scores become exponents of 2: multiplied by scale / ln 2 when weighed, or earlier if there is a
// bias. A negative scale turns the signs of the queries round, for the largest score to stay it.
class Pairs {
 public:
  using Word = std::int32_t;
  explicit Pairs(const Attention& attention)
      : signs_(attention.scale < 0 ? 0x80008000u : 0),
        scale_(kLog2E * (attention.scale < 0 ? -attention.scale : attention.scale)),
        factor_(attention.bias ? 1 : scale_) {}
  static std::int64_t words(std::int64_t channels) { return (channels + 1) / 2; }
  static std::int64_t width(std::int64_t channels) {
    return (channels + kLanes - 1) / kLanes * kLanes;
  }
  static std::int64_t steps(std::int64_t keys) { return (keys + 1) / 2; }

  void read_queries(const Attention& attention, std::int64_t batch, std::int64_t head,
                    std::int64_t begin, std::int64_t end, std::int32_t* to) const {
    const std::int64_t d = attention.d;
    for (std::int64_t i = 0; i < words(d) * kLanes; ++i) to[i] = 0;
    for (std::int64_t i = begin; i < end; ++i, ++to) {
      const std::uint16_t* row = at(attention.q, batch, head, i);
      for (std::int64_t c = 0; c < d / 2; ++c) {
        std::uint32_t pair;
        __builtin_memcpy(&pair, row + 2 * c, sizeof(pair));
        to[c * kLanes] = static_cast<std::int32_t>(pair ^ signs_);
      }
      if (d % 2) to[d / 2 * kLanes] = static_cast<std::int32_t>(row[d - 1] ^ (signs_ & 0xffff));
    }
  }

  static void read_keys(const Attention& attention, std::int64_t batch, std::int64_t head,
                        std::int64_t first, std::int64_t count, std::int32_t* keys,
                        std::int32_t* values) {
    alignas(64) static constexpr std::uint16_t kZeros[kMostChannels] = {};
    const std::int64_t d = attention.d, e = attention.e;
    for (std::int64_t j = 0; j < count; ++j, keys += words(d)) {
      keys[words(d) - 1] = 0;
      __builtin_memcpy(keys, at(attention.k, batch, head, first + j),
                       2 * static_cast<std::size_t>(d));
    }
    for (std::int64_t j = 0; j < count; j += 2, values += width(e)) {
      const std::uint16_t* row = at(attention.v, batch, head, first + j);
      pair_rows<false>(row, j + 1 < count ? row + attention.v.row : kZeros, e, values);
    }
  }

  static F32 add_product(F32 sum, I32 a, I32 b) { return dot_bf16(sum, a, b); }
  F32 with_bias(F32 product, float bias) const {
    return multiply_add(product, broadcast(scale_), broadcast(bias_exponent(bias)));
  }
  F32 power(F32 difference) const { return exp2_coarse(mul(difference, broadcast(factor_))); }

  F32 weigh(const float* scores, std::int64_t count, F32 largest, std::int32_t* weights) const {
    const F32 factor = broadcast(factor_), offset = mul(largest, broadcast(-factor_));
    const auto weight = [&](std::int64_t j) {
      return exp2_coarse(multiply_add(load(scores + j * kLanes), factor, offset));
    };
    F32 sum = broadcast(0.0f), odd_sum = broadcast(0.0f);
    std::int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      const F32 even = weight(j), odd = weight(j + 1);
      sum = add(sum, even);
      odd_sum = add(odd_sum, odd);
      store(weights + j / 2 * kLanes, join_bf16(even, odd));
    }
    if (j < count) {
      const F32 last = weight(j);
      sum = add(sum, last);
      store(weights + j / 2 * kLanes, join_bf16(last, broadcast(0.0f)));
    }
    return add(sum, odd_sum);
  }

 private:
  static const std::uint16_t* at(const Rows& rows, std::int64_t batch, std::int64_t head,
                                 std::int64_t row) {
    return static_cast<const std::uint16_t*>(rows.data) + place(rows, batch, head, row);
  }
  std::uint32_t signs_;
  float scale_, factor_;
};

}  // namespace
}  // namespace t2p::attention::T2P_ISA_NAMESPACE

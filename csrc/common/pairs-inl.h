// SPDX-License-Identifier: Apache-2.0
// Rows of bfloat16 as the pairs that dot_bf16 takes. Included once per ISA, by those that have it.
#pragma once

#include "common/simd.h"

namespace t2p::simd::T2P_ISA_NAMESPACE {

// Two rows as pairs of words, zeros behind them up to a whole vector.
template <bool relu>
T2P_INLINE void pair_rows(const std::uint16_t* a, const std::uint16_t* b, std::int64_t channels,
                          std::int32_t* to) {
  std::int64_t c = 0;
#pragma GCC unroll 2
  for (; c + kLanes <= channels; c += kLanes) {
    const I32 pair = pair_words(a + c, b + c);
    store(to + c, relu ? relu_bf16(pair) : pair);
  }
  if (c == channels) return;
  const I32 pair = pair_words_first(a + c, b + c, static_cast<int>(channels - c));
  store(to + c, relu ? relu_bf16(pair) : pair);
}

}  // namespace t2p::simd::T2P_ISA_NAMESPACE

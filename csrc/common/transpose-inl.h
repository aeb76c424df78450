// SPDX-License-Identifier: Apache-2.0
// Squares of as many rows as a vector has lanes, transposed. Included once per ISA.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace t2p::simd::T2P_ISA_NAMESPACE {

// to [kLanes, to_stride] = from [kLanes, stride], transposed, of numbers of 32 bits.
T2P_INLINE void transpose_square(const std::int32_t* from, std::int64_t stride, std::int32_t* to,
                                 std::int64_t to_stride) {
  const auto* rows = reinterpret_cast<const float*>(from);
  for (int c = 0; c < kLanes; c += 4) {
    F32 quads[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) quads[i] = load_quads(rows + i * stride + c, 4 * stride);
    transpose_quads(quads);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store(to + (c + i) * to_stride, as_i32(quads[i]));
  }
}

}  // namespace t2p::simd::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// Between attention.cpp and the kernels for one instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/attention.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace t2p::attention {

// At most: keys of a block, those whose scores are summed at a time, and queries that are.
constexpr std::int64_t kKeys = 64, kMostTogether = 8, kMostLanes = 16;

// Of a task, a multiple of any vector: a block of keys is read and converted once for these.
inline std::int64_t queries_of(const Attention& attention) {
  return attention.d + attention.e <= 256 ? 256 : 64;
}

// In floats; 32 more for every part, so that each begins on a cache line's boundary.
inline std::int64_t scratch_size(const Attention& attention) {
  const std::int64_t queries = queries_of(attention), d = attention.d + kMostLanes,
                     e = attention.e + kMostLanes;
  return queries * (d + e + 2) + (kKeys + kMostTogether) * (d + e + 2 * kMostLanes);
}

struct Kernels {
  // The outputs of the queries [begin, end) of one head, at most queries_of(attention). `scratch`
  // lies on a cache line's boundary.
  void (*attend)(const Attention& attention, std::int64_t batch, std::int64_t head,
                 std::int64_t begin, std::int64_t end, float* scratch, const Rows& out);
};

T2P_DECLARE_FOR_ISAS(Kernels, kKernels)

}  // namespace t2p::attention

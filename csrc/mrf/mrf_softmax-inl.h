// SPDX-License-Identifier: Apache-2.0
// Exponentials of a row. Included once per ISA.
#pragma once

#include <cstdint>

#include "common/exp-inl.h"
#include "common/simd.h"

namespace t2p::mrf::T2P_ISA_NAMESPACE {
namespace {

// Replaces x by exp(x - largest) and adds up.
double exponentials_of(float* scratch, std::int64_t v, float largest) {
  const F32 offset = broadcast(largest);
  double total = 0;
  constexpr std::int64_t kBlock = 64 * kLanes;  // so that long rows lose no precision
  for (std::int64_t begin = 0; begin < v; begin += kBlock) {
    F32 sum = broadcast(0.0f);
    for (std::int64_t a = begin; a < v && a < begin + kBlock; a += kLanes) {
      const F32 e = exp_nonpositive<true>(sub(load(scratch + a), offset));
      store(scratch + a, e);
      sum = add(sum, e);
    }
    total += double{reduce_add(sum)};
  }
  return total;
}

}  // namespace
}  // namespace t2p::mrf::T2P_ISA_NAMESPACE

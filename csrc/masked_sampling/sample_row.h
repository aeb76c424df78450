// SPDX-License-Identifier: Apache-2.0
// Between masked_sampling.cpp and the kernel for one instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "masked_sampling/masked_sampling.h"

namespace t2p::masked_sampling {

// Words of a row are taken in groups: four Philox words at each of 16 counters.
constexpr std::int64_t kCounters = 16, kGroup = 4 * kCounters;

struct Choice {
  std::int64_t token;
  float log_probability;
};

struct RowLogits {
  const void* conditional;    // [v]
  const void* unconditional;  // [v], or null
  Format format;
};

// Position `row` = picture * n + position. `scratch` has room for v rounded up to kGroup.
using SampleRow = Choice (*)(const Round& round, std::int64_t row, const RowLogits& logits,
                             float* scratch);

T2P_DECLARE_FOR_ISAS(SampleRow, kSampleRow)

// Functions of masked_sampling.cpp that the kernels call.
double gumbel(std::uint32_t word);
double log_of(double a);

// The top_k-th largest of `count` numbers, NaNs aside.
float kth_largest(const float* x, std::int64_t count, std::int64_t k);

}  // namespace t2p::masked_sampling

// SPDX-License-Identifier: Apache-2.0
// What scheduler.cpp calls of scheduler-inl.h, which is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "scheduler/scheduler.h"

namespace t2p::scheduler {

// Elements that are worked on at a time: all their numbers stay in the nearest cache, and are few
// enough that the processor fetches the next ones while noise is drawn. Ranges of elements begin at
// multiples of it.
constexpr int kChunk = 256;

// What is known of a sample before its elements are looked at one by one.
struct SampleState {
  float factor = 1;   // f of the guidance
  float inverse = 1;  // 1 / s of dynamic thresholding
  float limit = 1;    // after the multiplication with `inverse`
};

// Sums over elements of the guided output m and of the conditional output c.
struct Moments {
  double guided = 0, guided_squares = 0, output = 0, output_squares = 0;
};

struct Kernels {
  // prev and x0 of the elements [begin, end) of sample b.
  void (*update)(const Step& step, const SampleState& state, std::int64_t b, std::int64_t begin,
                 std::int64_t end);

  // Adds up m (with factor 1) and c.
  void (*moments)(const Step& step, std::int64_t b, std::int64_t begin, std::int64_t end,
                  Moments& sums);

  // Writes the bits of those |x0| that are greater than 1 or NaN, side by side, and returns their
  // number; `rest` becomes the largest of the others. Needs room for a vector more.
  std::int64_t (*large)(const Step& step, const SampleState& state, std::int64_t b,
                        std::int64_t begin, std::int64_t end,
                        std::int32_t* bits,  // [end - begin + kMaxLanes]
                        float& rest);

  // Writes those of `bits` that are `prefix` after a shift by kPrefixShift, and returns their
  // number; `above` becomes the least of those with a larger prefix, if that is less.
  std::int64_t (*with_prefix)(const std::int32_t* bits, std::int64_t count, std::int32_t prefix,
                              std::int32_t* out, std::int32_t& above);

  void (*noise)(std::uint64_t seed, std::uint64_t offset, std::uint64_t index, std::int64_t begin,
                std::int64_t end, float* out);
};

constexpr int kMaxLanes = 16;
constexpr int kPrefixShift = 20, kPrefixes = 1 << (31 - kPrefixShift);

T2P_DECLARE_FOR_ISAS(Kernels, kKernels)

}  // namespace t2p::scheduler

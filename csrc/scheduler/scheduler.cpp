// SPDX-License-Identifier: Apache-2.0
#include "scheduler/scheduler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "common/buffer.h"
#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "scheduler/kernels.h"
#include "scheduler/scheduler-inl.h"

namespace t2p::scheduler {
namespace {

// What a thread takes at a time: fixed, so that sums do not depend on the number of threads. An
// update has no sums, and where it draws noise less is worth a thread's while.
constexpr std::int64_t kTask = 16 * 1024, kNoisyTask = 4 * 1024;
static_assert(kTask % kChunk == 0 && kNoisyTask % kChunk == 0);
// With fewer elements the other threads are not worth waking; noise makes an element dearer.
constexpr std::int64_t kAlone = 48 * 1024, kAloneWithNoise = 8 * 1024;

std::int64_t tasks_of(std::int64_t n) { return ceil_div(n, kTask); }

// Calls body(b, begin, end, task number) for all parts of `size` elements of all samples.
template <class Body>
void for_parts(int threads, std::int64_t batch, std::int64_t n, const Body& body,
               std::int64_t size = kTask) {
  const std::int64_t tasks = ceil_div(n, size);
  parallel_for(threads, batch * tasks, [&](std::int64_t task) {
    const std::int64_t begin = task % tasks * size;
    body(task / tasks, begin, std::min(begin + size, n), task);
  });
}

float bits_to_float(std::int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// f = phi std(c) / std(m) + 1 - phi, the spread over all elements of a sample; 1 where m is
// constant.
void set_factors(const Kernels& kernels, const Step& step, int threads,
                 std::vector<SampleState>& states) {
  const std::int64_t tasks = tasks_of(step.n);
  std::vector<Moments> parts(step.batch * tasks);
  for_parts(threads, step.batch, step.n,
            [&](std::int64_t b, std::int64_t begin, std::int64_t end, std::int64_t task) {
              kernels.moments(step, b, begin, end, parts[task]);
            });
  const auto count = static_cast<double>(step.n);
  for (std::int64_t b = 0; b < step.batch; ++b) {
    Moments sums;
    for (std::int64_t task = b * tasks; task < (b + 1) * tasks; ++task) {
      sums.guided += parts[task].guided;
      sums.guided_squares += parts[task].guided_squares;
      sums.output += parts[task].output;
      sums.output_squares += parts[task].output_squares;
    }
    const double guided = sums.guided_squares - sums.guided * sums.guided / count;
    const double output = sums.output_squares - sums.output * sums.output / count;
    const double ratio = guided > 0           ? std::sqrt(std::max(output, 0.0) / guided)
                         : std::isnan(guided) ? guided
                                              : 1.0;
    states[b].factor = static_cast<float>(step.rescale * ratio + (1.0 - step.rescale));
  }
}

// The value of rank `rank` among |x0|, and of the rank that follows, both counted from 0.
struct Ranked {
  float value, next;
};

// The large |x0| of one sample, in parts.
struct Parts {
  const std::int32_t* bits;  // part p begins at p * stride
  std::int64_t stride;
  std::vector<std::int64_t> counts;
  float rest;  // the largest of those that are not large
};

Ranked ranked(const Kernels& kernels, const Parts& parts, std::int64_t n, std::int64_t rank) {
  std::int64_t large = 0;
  for (std::int64_t count : parts.counts) large += count;
  const std::int64_t small = n - large;
  if (rank + 1 < small) return {0, 0};  // the quantile is less than 1 and does not matter
  std::vector<std::int64_t> histogram(kPrefixes);
  for (std::size_t p = 0; p < parts.counts.size(); ++p) {
    const std::int32_t* bits = parts.bits + static_cast<std::int64_t>(p) * parts.stride;
    for (std::int64_t i = 0; i < parts.counts[p]; ++i) ++histogram[bits[i] >> kPrefixShift];
  }
  // Of the large ones, the rank wanted; the one before the first is the largest of the rest.
  const std::int64_t wanted = std::max<std::int64_t>(rank - small, 0);
  std::int64_t before = 0;
  std::int32_t prefix = 0;
  while (prefix < kPrefixes && before + histogram[prefix] <= wanted) before += histogram[prefix++];
  if (prefix == kPrefixes) return {parts.rest, parts.rest};  // all are small
  std::vector<std::int32_t> bits(histogram[prefix] + kMaxLanes);
  std::int64_t count = 0;
  std::int32_t above = std::numeric_limits<std::int32_t>::max();
  for (std::size_t p = 0; p < parts.counts.size(); ++p) {
    count += kernels.with_prefix(parts.bits + static_cast<std::int64_t>(p) * parts.stride,
                                 parts.counts[p], prefix, bits.data() + count, above);
  }
  const auto nth = bits.begin() + (wanted - before), end = bits.begin() + count;
  std::nth_element(bits.begin(), nth, end);
  const float value = bits_to_float(*nth);
  if (rank < small) return {parts.rest, value};
  if (nth + 1 != end) above = *std::min_element(nth + 1, end);
  const bool last = above == std::numeric_limits<std::int32_t>::max();
  return {value, last ? value : bits_to_float(above)};
}

void set_thresholds(const Kernels& kernels, const Step& step, int threads,
                    std::vector<SampleState>& states) {
  const std::int64_t n = step.n, tasks = tasks_of(n), stride = kTask + kMaxLanes;
  const Buffer<std::int32_t> bits(step.batch * tasks * stride);
  std::vector<std::int64_t> counts(step.batch * tasks);
  std::vector<float> rests(step.batch * tasks);
  for_parts(threads, step.batch, n,
            [&](std::int64_t b, std::int64_t begin, std::int64_t end, std::int64_t task) {
              counts[task] = kernels.large(step, states[b], b, begin, end,
                                           bits.data() + task * stride, rests[task]);
            });
  const double position = step.ratio * static_cast<double>(n - 1);
  const auto rank = static_cast<std::int64_t>(position);
  parallel_for(threads, step.batch, [&](std::int64_t b) {
    const auto first = b * tasks, last = first + tasks;
    const Parts parts{bits.data() + first * stride,
                      stride,
                      {counts.begin() + first, counts.begin() + last},
                      *std::max_element(rests.begin() + first, rests.begin() + last)};
    bool finite = true;
    for (std::int64_t task = first; task < last; ++task) {
      const std::int32_t* part = bits.data() + task * stride;
      for (std::int64_t i = 0; i < counts[task]; ++i) finite &= part[i] <= 0x7F800000;
    }
    float s = std::numeric_limits<float>::quiet_NaN();
    if (finite) {
      const Ranked found = ranked(kernels, parts, n, rank);
      const double part = position - static_cast<double>(rank);
      s = part == 0 ? found.value
                    : static_cast<float>(found.value + part * (double{found.next} - found.value));
      s = std::min(std::max(s, 1.0f), step.limit);
    }
    states[b].inverse = 1.0f / s;
    states[b].limit = 1.0f;
  });
}

}  // namespace

void step_cpu(const Step& step, int threads) {
  if (step.batch == 0 || step.n == 0) return;
  for (std::int64_t b = 0; b < (step.index ? step.batch : 1); ++b) {
    const std::int64_t row = step.index ? step.index[b] : step.row;
    if (row < 0 || row >= step.rows) [[unlikely]] {
      throw std::out_of_range(
          concat("scheduler_step: index ", row, " is outside [0, ", step.rows, ")"));
    }
  }
  const Kernels& kernels = T2P_DISPATCH(kKernels);
  const bool noisy = step.source == Noise::kPhilox;
  const std::int64_t alone = noisy ? kAloneWithNoise : kAlone;
  if (step.batch * step.n <= alone) threads = 1;
  // A threshold of at most 1 is that value for every sample.
  const bool fixed = step.bound == Bound::kThreshold && step.limit <= 1;
  SampleState common;
  if (fixed) common.inverse = 1.0f / step.limit;
  if (step.bound == Bound::kClip) common.limit = step.limit;
  const bool rescaled = step.uncond.data != nullptr && step.rescale != 0;
  const bool selected = step.bound == Bound::kThreshold && !fixed;
  if (!rescaled && !selected && threads == 1) {
    for (std::int64_t b = 0; b < step.batch; ++b) kernels.update(step, common, b, 0, step.n);
    return;
  }
  std::vector<SampleState> states(step.batch, common);
  if (rescaled) set_factors(kernels, step, threads, states);
  if (selected) set_thresholds(kernels, step, threads, states);
  for_parts(
      threads, step.batch, step.n,
      [&](std::int64_t b, std::int64_t begin, std::int64_t end, std::int64_t) {
        kernels.update(step, states[b], b, begin, end);
      },
      noisy ? kNoisyTask : kTask);
}

void noise_cpu(const std::int64_t* seeds, std::uint64_t seed, std::uint64_t offset,
               std::int64_t batch, std::int64_t n, int threads, float* out) {
  const Kernels& kernels = T2P_DISPATCH(kKernels);
  for_parts(
      threads, batch, n,
      [&](std::int64_t b, std::int64_t begin, std::int64_t end, std::int64_t) {
        alignas(64) float chunk[kChunk];
        const std::uint64_t key = seeds ? static_cast<std::uint64_t>(seeds[b]) : seed;
        const std::uint64_t index = seeds ? 0 : static_cast<std::uint64_t>(b) << 32;
        for (; begin < end; begin += kChunk) {
          const std::int64_t count = std::min<std::int64_t>(kChunk, end - begin);
          kernels.noise(key, offset, index, begin, begin + count, chunk);
          std::copy_n(chunk, count, out + b * n + begin);
        }
      },
      kNoisyTask);
}

}  // namespace t2p::scheduler

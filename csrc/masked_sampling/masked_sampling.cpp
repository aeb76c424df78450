// SPDX-License-Identifier: Apache-2.0
#include "masked_sampling/masked_sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "masked_sampling/masked_sampling-inl.h"
#include "masked_sampling/sample_row.h"

namespace t2p::masked_sampling {

double gumbel(std::uint32_t word) { return -std::log(-std::log1p(-(word + 0.5) * 0x1p-32)); }

double log_of(double a) { return std::log(a); }

namespace {

// An integer that orders as the float does.
std::uint32_t ordered(float a) {
  const auto word = std::bit_cast<std::uint32_t>(a);
  return word & 0x80000000u ? ~word : word | 0x80000000u;
}

// Masks the `count` least confident of the positions that were masked; of equals, the first.
void mask_again(const Round& round, std::int64_t picture) {
  struct Position {
    double confidence;
    std::int64_t i;
    bool operator<(const Position& other) const {
      return confidence < other.confidence || (confidence == other.confidence && i < other.i);
    }
  };
  thread_local Buffer<Position> positions;
  positions.reserve(round.n);
  const std::int64_t base = picture * round.n;
  const auto seed = static_cast<std::uint64_t>(round.seeds[picture]);
  std::int64_t masked = 0;
  for (std::int64_t i = 0; i < round.n; ++i) {
    const std::int64_t at = base + i;
    if (round.tokens[at] != round.mask_token) continue;
    double confidence = round.log_probability[at];
    if (round.choice_temperature > 0) {
      const auto position = static_cast<std::uint64_t>(i);
      const double noise =
          round.confidence_noise
              ? round.confidence_noise[at]
              : gumbel(philox::words(seed, kConfidenceOffset + round.step, position << 32).v[0]);
      confidence += double{round.choice_temperature} * noise;
    }
    if (std::isnan(confidence)) confidence = -std::numeric_limits<double>::infinity();
    positions[masked++] = {confidence, i};
  }
  const std::int64_t count = std::clamp<std::int64_t>(round.mask_count[picture], 0, masked);
  Position* begin = positions.data();
  std::nth_element(begin, begin + count, begin + masked);
  for (std::int64_t i = 0; i < count; ++i) {
    round.next_tokens[base + positions[i].i] = round.mask_token;
  }
}

void put(const Round& round, std::int64_t row, const Choice& choice) {
  round.next_tokens[row] = round.sampled[row] = choice.token;
  round.log_probability[row] = choice.log_probability;
}

bool is_masked(const Round& round, std::int64_t row) {
  return round.tokens[row] == round.mask_token;
}

float* scratch_for(const Round& round) {
  thread_local Buffer<float> scratch;
  scratch.reserve(ceil_div(round.v, kGroup) * kGroup);
  return scratch.data();
}

const void* offset(const void* logits, Format format, std::int64_t at) {
  if (logits == nullptr) return nullptr;
  return static_cast<const char*>(logits) + at * (format == Format::kF32 ? 4 : 2);
}

void sample_rows(const Round& round, int threads) {
  const SampleRow sample_row = T2P_DISPATCH(kSampleRow);
  constexpr std::int64_t kWordsPerTask = 32 * 1024;
  const std::int64_t rows = round.b * round.n;
  const std::int64_t rows_per_task = std::max<std::int64_t>(1, kWordsPerTask / round.v);
  parallel_for(threads, ceil_div(rows, rows_per_task), [&](std::int64_t task) {
    float* scratch = scratch_for(round);
    const std::int64_t end = std::min(rows, (task + 1) * rows_per_task);
    for (std::int64_t row = task * rows_per_task; row < end; ++row) {
      Choice choice{round.tokens[row], 0.0f};
      if (is_masked(round, row)) {
        const RowLogits logits{offset(round.logits, round.format, row * round.v),
                               offset(round.uncond, round.format, row * round.v), round.format};
        choice = sample_row(round, row, logits, scratch);
      }
      put(round, row, choice);
    }
  });
}

float to_float(float value) { return value; }
struct Bf16 {
  std::uint16_t word;
};
struct F16 {
  std::uint16_t word;
};
float to_float(Bf16 value) { return std::bit_cast<float>(std::uint32_t{value.word} << 16); }
float to_float(F16 value) { return simd::scalar::from_f16(value.word); }

// The logits of a few positions, side by side for each word, as rows.
constexpr std::int64_t kColumns = 16;  // a cache line of float32

template <class T>
void transpose(const T* logits, std::int64_t n, std::int64_t v, std::int64_t count,
               std::int64_t stride, float* rows) {
  std::int64_t word = 0;
  for (; count == kColumns && word + kColumns <= v; word += kColumns) {
    float tile[kColumns][kColumns];
    for (std::int64_t w = 0; w < kColumns; ++w) {
      const T* from = logits + (word + w) * n;
      for (std::int64_t j = 0; j < kColumns; ++j) tile[w][j] = to_float(from[j]);
    }
    for (std::int64_t j = 0; j < kColumns; ++j) {
      float* to = rows + j * stride + word;
      for (std::int64_t w = 0; w < kColumns; ++w) to[w] = tile[w][j];
    }
  }
  for (; word < v; ++word) {
    for (std::int64_t j = 0; j < count; ++j) {
      rows[j * stride + word] = to_float(logits[word * n + j]);
    }
  }
}

void transpose(const Round& round, const void* logits, std::int64_t picture, std::int64_t first,
               std::int64_t count, std::int64_t stride, float* rows) {
  const std::int64_t n = round.n, v = round.v, at = picture * v * n + first;
  switch (round.format) {
    case Format::kF32:
      return transpose(static_cast<const float*>(logits) + at, n, v, count, stride, rows);
    case Format::kBf16:
      return transpose(static_cast<const Bf16*>(logits) + at, n, v, count, stride, rows);
    case Format::kF16:
      return transpose(static_cast<const F16*>(logits) + at, n, v, count, stride, rows);
  }
}

void sample_columns(const Round& round, int threads) {
  const SampleRow sample_row = T2P_DISPATCH(kSampleRow);
  const std::int64_t blocks = ceil_div(round.n, kColumns);
  // No power of two, whose multiples share few places of a cache.
  const std::int64_t stride = ceil_div(round.v, kColumns) * kColumns + kColumns;
  parallel_for(threads, round.b * blocks, [&](std::int64_t task) {
    const std::int64_t picture = task / blocks, first = task % blocks * kColumns;
    const std::int64_t count = std::min(kColumns, round.n - first);
    const std::int64_t row = picture * round.n + first;
    std::int64_t masked = 0;
    for (std::int64_t j = 0; j < count; ++j) {
      masked += is_masked(round, row + j);
      put(round, row + j, {round.tokens[row + j], 0.0f});
    }
    if (masked == 0) return;
    float* scratch = scratch_for(round);
    thread_local Buffer<float> conditional, unconditional;
    conditional.reserve(kColumns * stride);
    transpose(round, round.logits, picture, first, count, stride, conditional.data());
    if (round.uncond) {
      unconditional.reserve(kColumns * stride);
      transpose(round, round.uncond, picture, first, count, stride, unconditional.data());
    }
    for (std::int64_t j = 0; j < count; ++j) {
      if (!is_masked(round, row + j)) continue;
      const RowLogits logits{conditional.data() + j * stride,
                             round.uncond ? unconditional.data() + j * stride : nullptr,
                             Format::kF32};
      put(round, row + j, sample_row(round, row + j, logits, scratch));
    }
  });
}

}  // namespace

float kth_largest(const float* x, std::int64_t count, std::int64_t k) {
  // The bucket of the upper 11 bits that holds it, then a selection among the few in that bucket.
  constexpr int kShift = 21;
  std::int32_t buckets[1 << (32 - kShift)] = {};
  for (std::int64_t i = 0; i < count; ++i) ++buckets[ordered(x[i]) >> kShift];
  std::uint32_t bucket = (1u << (32 - kShift)) - 1;
  for (; buckets[bucket] < k; --bucket) k -= buckets[bucket];
  thread_local Buffer<float> rest;
  rest.reserve(buckets[bucket]);
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (ordered(x[i]) >> kShift == bucket) rest[found++] = x[i];
  }
  std::nth_element(rest.data(), rest.data() + k - 1, rest.data() + found, std::greater<float>());
  return rest[k - 1];
}

void sample_cpu(const Round& round, int threads) {
  const std::int64_t rows = round.b * round.n;
  if (rows == 0) return;
  round.transposed ? sample_columns(round, threads) : sample_rows(round, threads);
  if (round.mask_count == nullptr) return;
  parallel_for(threads, round.b, [&](std::int64_t picture) { mask_again(round, picture); });
}

}  // namespace t2p::masked_sampling

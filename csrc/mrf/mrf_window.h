// SPDX-License-Identifier: Apache-2.0
// Mean field with the weights of a small window of a grid, between labels that only care to be
// equal (Potts): all iterations of Algorithm 1 in one call.
//
// Labels are taken in strips, whose scores and probabilities for a whole picture lie side by side
// and stay with one thread. Between iterations strips have to agree on one number a position alone,
// the sum of its exponentials: these are formed without the maximum, which is safe where messages
// are bounded (kMostMessage), and are normalised when they are read next.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace t2p::mrf {

// What kh x kw weights w[dy, dx] may be. A window that is an outer product but for its middle, as a
// Gaussian without it, is cheaper: a sum over columns, then one over rows.
struct Window {
  std::int64_t height, width;  // of the grid
  std::int64_t kh, kw;         // odd
  const float* weights;        // [kh, kw], or null if separable:
  const float *down, *across;  // [kh] and [kw], w[dy, dx] = down[dy] across[dx]; the same in the
                               // mirror, and 1 in the middle of `across`
  float middle;                // and so much more for the middle
};

struct WindowField {
  const float* unary;         // [b, n, v]
  const std::int64_t* known;  // [b, n], the label of a position, or negative; or null
  std::int64_t b, v, iterations;
  float temperature;
};

// How large the weights of a window may be together, over the temperature, of whatever sign: e^41
// is about 2^60, so that neither sums overflow nor what matters underflows.
constexpr float kMostMessage = 41;

// The largest kh and kw.
constexpr std::int64_t kMostWindow = 9;

// q = the probabilities after the last iteration, [b, n, v]. Returns the first position, of all
// pictures, that is not known and whose maximum is not finite (NaN, +inf, or nothing but -inf), or
// -1. The result does not depend on the number of threads.
std::int64_t window_cpu(const Window& window, const WindowField& field, int threads, float* q);

// One strip of the labels of one picture, n positions of them: `size` labels from `first` on, those
// from v on being none.
struct Strip {
  const float* unary;         // [n, v], the picture's
  const std::int64_t* known;  // [n] or null, the picture's
  std::int64_t first, v, n;
  float* scores;   // [n, size], (unary - its maximum) log2(e) / temperature
  float* weights;  // [n, size], 2^x of what is in front of the softmax
  float* sums;     // [n], of `weights` over the labels of the strip
};

struct StripKernels {
  std::int64_t size;  // of a strip

  // Scores, weights and sums of softmax(unary).
  void (*begin)(const Strip& strip, std::int64_t width, const float* largest, float log2_scale,
                float* scratch);

  // An iteration: weights and sums from those before, whose total's inverse is `shares` [n].
  // The weights of `window` are times log2(e) / temperature here.
  void (*iterate)(const Strip& strip, const Window& window, const float* shares, float* scratch);

  // q = weights times shares; exactly one-hot where known.
  void (*finish)(const Strip& strip, const float* shares, float* q);
};

struct WindowKernels {
  // The maxima of the rows [first, last) of [n, v], 0 where known. The first row whose maximum is
  // not finite, or -1.
  std::int64_t (*find_largest)(const float* unary, const std::int64_t* known, std::int64_t first,
                               std::int64_t last, std::int64_t v, float* largest);

  // shares = 1 / sum of `sums` [strips, n].
  void (*invert)(const float* sums, std::int64_t strips, std::int64_t n, float* shares);

  StripKernels narrow, wide;
};

// Floats of `scratch`: rows of the grid that an iteration needs beside each other, one of zeros,
// and one of sums.
inline std::int64_t scratch_size(const Window& window, std::int64_t strip) {
  return (window.kh + 2) * (window.width + window.kw - 1) * strip + 16 * strip;
}

T2P_DECLARE_FOR_ISAS(WindowKernels, kWindowKernels)

}  // namespace t2p::mrf

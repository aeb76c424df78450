// SPDX-License-Identifier: Apache-2.0
// A strip of labels in mean field with a window of a grid. Included by mrf-inl.h, once per ISA.
#pragma once

#include <cstdint>

#include "common/exp-inl.h"
#include "common/simd.h"
#include "mrf/mrf_belief-inl.h"
#include "mrf/mrf_window.h"

namespace t2p::mrf::T2P_ISA_NAMESPACE {
namespace {

std::int64_t find_largest(const float* unary, const std::int64_t* known, std::int64_t first,
                          std::int64_t last, std::int64_t v, float* largest) {
  constexpr std::uint32_t kAll = (1u << kLanes) - 1;
  const F32 high = broadcast(kInfinity);
  std::int64_t bad = -1;
  for (std::int64_t row = first; row < last; ++row) {
    largest[row] = 0;
    if (known != nullptr && known[row] >= 0) continue;
    const float* scores = unary + row * v;
    F32 most[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
    std::uint32_t below = kAll;
    std::int64_t a = 0;
    for (; a + 2 * kLanes <= v; a += 2 * kLanes) {
      const F32 x = load(scores + a), y = load(scores + a + kLanes);
      below &= bits(less(x, high)) & bits(less(y, high));
      most[0] = max(x, most[0]);
      most[1] = max(y, most[1]);
    }
    float found = reduce_max(max(most[0], most[1]));
    bool finite = below == kAll;
    for (; a < v; ++a) {
      finite = finite && scores[a] < kInfinity;
      found = scores[a] > found ? scores[a] : found;
    }
    if (finite && found > -kInfinity) {
      largest[row] = found;
    } else if (bad < 0) {
      bad = row;
    }
  }
  return bad;
}

// to[i] = the sum of vector i of `sums`, for `count` of them; reads whole vectors of vectors.
void add_lanes(const float* sums, std::int64_t count, float* to) {
  for (std::int64_t i = 0; i < count; i += kLanes, sums += kLanes * kLanes) {
    F32 each[kLanes];
#pragma GCC unroll 16
    for (int p = 0; p < kLanes; ++p) each[p] = load(sums + p * kLanes);
    const F32 total = reduce_add_each(each);
    if (count - i >= kLanes) {
      store(to + i, total);
    } else {
      float last[kLanes];
      store(last, total);
      for (std::int64_t p = 0; i + p < count; ++p) to[i + p] = last[p];
    }
  }
}

// Room for the sums of a row by lanes.
constexpr std::int64_t sums_size(std::int64_t width) { return (width + kLanes) * kLanes; }

void clear(float* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = 0.0f;
}

// What is done with strips of so many vectors of labels.
template <int kStripVectors>
struct Strips {
  static constexpr std::int64_t kStripLabels = kStripVectors * kLanes;
  static constexpr int kTogether = 4 / kStripVectors;  // positions with their vectors in registers

  // How many positions of a row are taken together; their vectors are in registers at once.
  template <int kPositions>
  struct Together {
    static constexpr int kCount = kPositions, kVectors = kPositions * kStripVectors;
  };

  // Calls body(x, Together) for all positions of a row.
  template <class Body>
  static T2P_INLINE void for_positions(std::int64_t width, const Body& body) {
    std::int64_t x = 0;
    for (; x + kTogether <= width; x += kTogether) body(x, Together<kTogether>{});
    for (; x < width; ++x) body(x, Together<1>{});
  }

  // The weights 2^x of the positions from `position` on, and their sums, still by lanes, into
  // `sums`.
  template <class Group>
  static T2P_INLINE void respond(const Strip& strip, std::int64_t position, Group,
                                 F32 (&x)[Group::kVectors], float* sums) {
    float* weights = strip.weights + position * kStripLabels;
#pragma GCC unroll 4
    for (int i = 0; i < Group::kVectors; ++i) {
      x[i] = exp2_bounded(x[i]);
      store(weights + i * kLanes, x[i]);
    }
#pragma GCC unroll 4
    for (int p = 0; p < Group::kCount; ++p) {
      F32 sum = x[p * kStripVectors];
#pragma GCC unroll 4
      for (int i = 1; i < kStripVectors; ++i) sum = add(sum, x[p * kStripVectors + i]);
      store(sums + p * kLanes, sum);
    }
  }

  // The scores of a row of the grid that are not plainly those of kStripLabels labels: there is
  // none beyond the last, and a known position has one alone, whatever it hears.
  static void begin_special(const Strip& strip, std::int64_t position, float largest,
                            float log2_scale) {
    const std::int64_t label = strip.known == nullptr ? -1 : strip.known[position];
    for (std::int64_t a = 0; a < kStripLabels; ++a) {
      const std::int64_t at = strip.first + a;
      strip.scores[position * kStripLabels + a] =
          at >= strip.v ? -kInfinity
          : label < 0   ? (strip.unary[position * strip.v + at] - largest) * log2_scale
          : at == label ? 0.0f
                        : -kInfinity;
    }
  }

  static void begin(const Strip& strip, std::int64_t width, const float* largest, float log2_scale,
                    float* scratch) {
    const F32 scale = broadcast(log2_scale);
    const bool whole = strip.first + kStripLabels <= strip.v;
    for (std::int64_t row = 0; row < strip.n; row += width) {
      for_positions(width, [&](std::int64_t column, auto group) {
        F32 x[group.kVectors];
#pragma GCC unroll 4
        for (int p = 0; p < group.kCount; ++p) {
          const std::int64_t i = row + column + p;
          float* scores = strip.scores + i * kStripLabels;
          const bool plain = whole && (strip.known == nullptr || strip.known[i] < 0);
          if (!plain) begin_special(strip, i, largest[i], log2_scale);
          const F32 most = broadcast(largest[i]);
          const float* unary = strip.unary + i * strip.v + strip.first;
#pragma GCC unroll 4
          for (int k = 0; k < kStripVectors; ++k) {
            F32& score = x[p * kStripVectors + k];
            score =
                plain ? mul(sub(load(unary + k * kLanes), most), scale) : load(scores + k * kLanes);
            store(scores + k * kLanes, score);
          }
        }
        respond(strip, row + column, group, x, scratch + column * kLanes);
      });
      add_lanes(scratch, width, strip.sums + row);
    }
  }

  // A row of the grid's probabilities, summed over the columns of a symmetric window whose middle
  // weight is 1.
  template <int kSide>
  static void sum_across(const float* weights, const float* shares, std::int64_t width,
                         const float* across, float* to) {
    F32 weight[kSide + 1];
#pragma GCC unroll 8
    for (int d = 1; d <= kSide; ++d) weight[d] = broadcast(across[kSide - d]);
    for (int p = 0; p < kStripVectors; ++p, weights += kLanes, to += kLanes) {
      const auto read = [&](std::int64_t x) {
        return mul(load(weights + x * kStripLabels), broadcast(shares[x]));
      };
      // What the window sees of the row.
      F32 q[2 * kSide + 1];
#pragma GCC unroll 16
      for (int d = 0; d <= 2 * kSide; ++d) {
        q[d] = d > kSide && d - kSide - 1 < width ? read(d - kSide - 1) : broadcast(0.0f);
      }
      const auto put = [&](std::int64_t x, F32 next) {
#pragma GCC unroll 16
        for (int d = 0; d < 2 * kSide; ++d) q[d] = q[d + 1];
        q[2 * kSide] = next;
        F32 sum = q[kSide];
#pragma GCC unroll 8
        for (int d = 1; d <= kSide; ++d) {
          sum = multiply_add(weight[d], add(q[kSide - d], q[kSide + d]), sum);
        }
        store(to + x * kStripLabels, sum);
      };
      std::int64_t x = 0;
      for (; x + kSide < width; ++x) put(x, read(x + kSide));
      for (; x < width; ++x) put(x, broadcast(0.0f));
    }
  }

  // The answer of the row of the grid that begins with position `first` to sums across, of its own
  // and kUp rows to either side, and to `middle` times its own probabilities.
  template <int kUp>
  static void sum_down(const Strip& strip, const float* const* rows, const float* down,
                       float middle, const float* shares, std::int64_t first, std::int64_t width,
                       float* sums) {
    F32 weight[kUp + 1];
#pragma GCC unroll 8
    for (int d = 0; d <= kUp; ++d) weight[d] = broadcast(down[kUp - d]);
    const float* scores = strip.scores + first * kStripLabels;
    const float* weights = strip.weights + first * kStripLabels;
    for_positions(width, [&](std::int64_t x, auto group) {
      F32 e[group.kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < group.kVectors; ++i) {
        const std::int64_t at = x * kStripLabels + i * kLanes;
        const F32 share = broadcast(middle * shares[first + x + i / kStripVectors]);
        e[i] = multiply_add(share, load(weights + at), load(scores + at));
        e[i] = multiply_add(weight[0], load(rows[kUp] + at), e[i]);
#pragma GCC unroll 8
        for (int d = 1; d <= kUp; ++d) {
          e[i] = multiply_add(weight[d], add(load(rows[kUp - d] + at), load(rows[kUp + d] + at)),
                              e[i]);
        }
      }
      respond(strip, first + x, group, e, sums + x * kLanes);
    });
    add_lanes(sums, width, strip.sums + first);
  }

  static constexpr int kMostReach = 4;
  using SumAcross = void (*)(const float*, const float*, std::int64_t, const float*, float*);
  static constexpr SumAcross kSumAcross[] = {sum_across<0>, sum_across<1>, sum_across<2>,
                                             sum_across<3>, sum_across<4>};
  using SumDown = void (*)(const Strip&, const float* const*, const float*, float, const float*,
                           std::int64_t, std::int64_t, float*);
  static constexpr SumDown kSumDown[] = {sum_down<0>, sum_down<1>, sum_down<2>, sum_down<3>,
                                         sum_down<4>};

  static void iterate_separable(const Strip& strip, const Window& window, const float* shares,
                                float* scratch) {
    const std::int64_t width = window.width, height = window.height, up = window.kh / 2;
    const SumAcross sum_across = kSumAcross[window.kw / 2];
    const SumDown sum_down = kSumDown[up];
    // A ring of kh rows, behind one of zeros for those beyond the grid.
    const std::int64_t row = width * kStripLabels;
    float *sums = scratch, *zeros = sums + sums_size(width), *ring = zeros + row;
    clear(zeros, row);
    for (std::int64_t y = 0; y < height + up; ++y) {
      if (y < height) {
        sum_across(strip.weights + y * row, shares + y * width, width, window.across,
                   ring + y % window.kh * row);
      }
      const std::int64_t here = y - up;
      if (here < 0) continue;
      const float* rows[2 * kMostReach + 1];
      for (std::int64_t d = 0; d <= 2 * up; ++d) {
        const std::int64_t at = here + d - up;
        rows[d] = at < 0 || at >= height ? zeros : ring + at % window.kh * row;
      }
      sum_down(strip, rows, window.down, window.middle, shares, here * width, width, sums);
    }
  }

  // The same for weights of no structure: a sum over all places that have one.
  static void iterate_full(const Strip& strip, const Window& window, const float* shares,
                           float* scratch) {
    const std::int64_t width = window.width, height = window.height;
    const std::int64_t up = window.kh / 2, side = window.kw / 2;
    const std::int64_t row = width * kStripLabels, padded = row + 2 * side * kStripLabels;
    // A ring of kh rows of probabilities, between zeros for those beyond the grid.
    float *sums = scratch, *ring = sums + sums_size(width);
    clear(ring, window.kh * padded);
    struct {
      const float* from;
      float weight;
    } taps[kMostWindow * kMostWindow];
    for (std::int64_t y = 0; y < height + up; ++y) {
      if (y < height) {
        const float* weights = strip.weights + y * row;
        float* to = ring + y % window.kh * padded + side * kStripLabels;
        for_positions(width, [&](std::int64_t x, auto group) {
#pragma GCC unroll 4
          for (int i = 0; i < group.kVectors; ++i) {
            const F32 share = broadcast(shares[y * width + x + i / kStripVectors]);
            const std::int64_t at = x * kStripLabels + i * kLanes;
            store(to + at, mul(share, load(weights + at)));
          }
        });
      }
      const std::int64_t here = y - up;
      if (here < 0) continue;
      int count = 0;
      for (std::int64_t d = 0; d < window.kh; ++d) {
        const std::int64_t at = here + d - up;
        if (at < 0 || at >= height) continue;
        for (std::int64_t e = 0; e < window.kw; ++e) {
          const float weight = window.weights[d * window.kw + e];
          if (weight == 0) continue;
          taps[count++] = {ring + at % window.kh * padded + e * kStripLabels, weight};
        }
      }
      const float* scores = strip.scores + here * row;
      for_positions(width, [&](std::int64_t x, auto group) {
        const std::int64_t at = x * kStripLabels;
        F32 e[group.kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < group.kVectors; ++i) e[i] = load(scores + at + i * kLanes);
        for (int t = 0; t < count; ++t) {
          const F32 weight = broadcast(taps[t].weight);
          const float* from = taps[t].from + at;
#pragma GCC unroll 4
          for (int i = 0; i < group.kVectors; ++i) {
            e[i] = multiply_add(weight, load(from + i * kLanes), e[i]);
          }
        }
        respond(strip, here * width + x, group, e, sums + x * kLanes);
      });
      add_lanes(sums, width, strip.sums + here * width);
    }
  }

  static void iterate(const Strip& strip, const Window& window, const float* shares,
                      float* scratch) {
    (window.weights == nullptr ? iterate_separable : iterate_full)(strip, window, shares, scratch);
  }

  static void finish(const Strip& strip, const float* shares, float* q) {
    const std::int64_t left = strip.v - strip.first;
    for (std::int64_t i = 0; i < strip.n; ++i) {
      const float* weights = strip.weights + i * kStripLabels;
      float* to = q + i * strip.v + strip.first;
      const std::int64_t label = strip.known == nullptr ? -1 : strip.known[i];
      if (label < 0 && left >= kStripLabels) {
        const F32 share = broadcast(shares[i]);
#pragma GCC unroll 4
        for (int p = 0; p < kStripVectors; ++p) {
          store(to + p * kLanes, mul(share, load(weights + p * kLanes)));
        }
      } else {
        for (std::int64_t a = 0; a < kStripLabels && a < left; ++a) {
          to[a] = label < 0 ? weights[a] * shares[i] : strip.first + a == label ? 1.0f : 0.0f;
        }
      }
    }
  }

  static constexpr StripKernels kKernels{
      .size = kStripLabels, .begin = begin, .iterate = iterate, .finish = finish};
};

void invert(const float* sums, std::int64_t strips, std::int64_t n, float* shares) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    F32 total = load(sums + i);
    for (std::int64_t s = 1; s < strips; ++s) total = add(total, load(sums + s * n + i));
    store(shares + i, divide(broadcast(1.0f), total));
  }
  for (; i < n; ++i) {
    float total = sums[i];
    for (std::int64_t s = 1; s < strips; ++s) total += sums[s * n + i];
    shares[i] = 1.0f / total;
  }
}

}  // namespace

const WindowKernels kWindowKernels{.find_largest = find_largest,
                                   .invert = invert,
                                   .narrow = Strips<2>::kKernels,
                                   .wide = Strips<4>::kKernels};

}  // namespace t2p::mrf::T2P_ISA_NAMESPACE

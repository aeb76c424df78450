// SPDX-License-Identifier: Apache-2.0
// Distances in float64, and the nearest of the codes compared by them. Included once per ISA.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "vq/search.h"

namespace t2p::vq::T2P_ISA_NAMESPACE {
namespace {

using namespace simd::T2P_ISA_NAMESPACE;

T2P_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

struct Nearest {
  double distance;
  std::int64_t index;

  T2P_INLINE void offer(double other, std::int64_t code) {
    const bool better = (other < distance) | ((other == distance) & (code < index));
    distance = better ? other : distance;
    index = better ? code : index;
  }
};

// What a metric adds up, channel by channel, in float64.
template <Metric kMetric>
struct Sums {
  F64 product, squares;

  T2P_INLINE void start() { product = squares = broadcast(0.0); }
  T2P_INLINE void add_channels(F64 x, F64 c) {
    if constexpr (kMetric == Metric::kL2) {
      const F64 difference = sub(x, c);
      squares = multiply_add(difference, difference, squares);
    } else {
      product = multiply_add(x, c, product);
      if constexpr (kMetric == Metric::kCosine) squares = multiply_add(c, c, squares);
    }
  }
  T2P_INLINE void add_all(const float* x, const float* c, std::int64_t d) {
    constexpr int kStep = kLanes / 2;
    start();
    std::int64_t t = 0;
    for (; t + kStep <= d; t += kStep) add_channels(load_f64(x + t), load_f64(c + t));
    if (const int left = static_cast<int>(d - t)) {
      add_channels(load_f64_first(x + t, left), load_f64_first(c + t, left));
    }
  }
};

// That of a code that is not finite, a NaN or an infinity of any sign, becomes infinite.
template <Metric kMetric>
T2P_INLINE F64 distances_from(const F64 (&squares)[kLanes / 2], const F64 (&products)[kLanes / 2]) {
  F64 distance;
  if constexpr (kMetric == Metric::kL2) {
    distance = reduce_add_each(squares);
  } else {
    distance = sub(broadcast(0.0), reduce_add_each(products));
    if constexpr (kMetric == Metric::kCosine) {
      // A code of length 0 has the product 0; the smallest number keeps the quotient 0.
      const F64 norm = square_root(reduce_add_each(squares));
      distance = divide(distance, max(norm, broadcast(1e-300)));
    }
  }
  distance = add(distance, sub(distance, distance));
  return min(distance, broadcast(double{__builtin_inff()}));
}

// Offers code[count], count <= kCodes; all kCodes are read. Numbers past the last code stand for
// it, which changes nothing. For kCosine the distances are -x.c / |c|.
template <Metric kMetric, int kCodes>
T2P_INLINE void offer_batch(const Codebook& codebook, const float* row, const std::int32_t* code,
                            int count, Nearest& nearest) {
  constexpr int kStep = kLanes / 2;
  const std::int64_t d = codebook.d, last = codebook.k - 1;
  const float* codes[kCodes];
  Sums<kMetric> sums[kCodes];
#pragma GCC unroll 8
  for (int v = 0; v < kCodes; ++v) {
    codes[v] = codebook.codes + smaller(code[v], last) * d;
    sums[v].start();
  }
  std::int64_t t = 0;
  for (; t + kStep <= d; t += kStep) {
    const F64 x = load_f64(row + t);
#pragma GCC unroll 8
    for (int v = 0; v < kCodes; ++v) sums[v].add_channels(x, load_f64(codes[v] + t));
  }
  if (const int left = static_cast<int>(d - t)) {
    const F64 x = load_f64_first(row + t, left);
#pragma GCC unroll 8
    for (int v = 0; v < kCodes; ++v) sums[v].add_channels(x, load_f64_first(codes[v] + t, left));
  }
  F64 squares[kStep], products[kStep];
#pragma GCC unroll 8
  for (int v = 0; v < kStep; ++v) {
    squares[v] = sums[v % kCodes].squares;
    products[v] = sums[v % kCodes].product;
  }
  const F64 infinity = broadcast(double{__builtin_inff()});
  const F64 distance = keep_first(distances_from<kMetric>(squares, products), count, infinity);
  const double least = reduce_min(distance);
  auto equal = bits_where_equal(distance, broadcast(least));
  for (; equal; equal &= equal - 1) {  // hardly ever of two codes
    nearest.offer(least, smaller(code[__builtin_ctz(equal) % kCodes], last));
  }
}

template <Metric kMetric>
T2P_INLINE void offer_batches(const Codebook& codebook, const float* row, std::int32_t* code,
                              std::int64_t count, Nearest& nearest) {
  constexpr int kBatch = kLanes / 2, kHalf = kBatch == 8 ? 4 : kBatch;
  for (int i = 0; i < kBatch; ++i) code[count + i] = code[count - 1];
  if (count <= kHalf) {
    return offer_batch<kMetric, kHalf>(codebook, row, code, static_cast<int>(count), nearest);
  }
  for (std::int64_t i = 0; i < count; i += kBatch) {
    offer_batch<kMetric, kBatch>(codebook, row, code + i,
                                 static_cast<int>(smaller(kBatch, count - i)), nearest);
  }
}

// Codes that are offered at once, at most, and the room behind them in their list.
constexpr int kMaxOffered = 256, kOfferRoom = 16;

// Leaves of code[count] those that may be nearest by |x - c|^2 in float32, a sum of d positive
// terms which errs by less than (d + 4) u of itself, u = 2^-24; underflow is covered by the last
// term.
T2P_INLINE std::int64_t keep_near(const Codebook& codebook, const float* row, std::int32_t* code,
                                  std::int64_t count) {
  constexpr int kBatch = 8;
  const std::int64_t d = codebook.d, last = codebook.k - 1;
  float distance[kMaxOffered + kBatch];
  float least = __builtin_inff();
  for (int i = 0; i < kBatch; ++i) code[count + i] = code[count - 1];
  for (std::int64_t first = 0; first < count; first += kBatch) {
    const float* codes[kBatch];
    F32 sums[kBatch];
#pragma GCC unroll 8
    for (int v = 0; v < kBatch; ++v) {
      codes[v] = codebook.codes + smaller(code[first + v], last) * d;
      sums[v] = broadcast(0.f);
    }
    for (std::int64_t t = 0; t < d; t += kLanes) {
      const int left = static_cast<int>(smaller(kLanes, d - t));
      const F32 x = load_first(row + t, left);
#pragma GCC unroll 8
      for (int v = 0; v < kBatch; ++v) {
        const F32 difference = sub(x, load_first(codes[v] + t, left));
        sums[v] = multiply_add(difference, difference, sums[v]);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kBatch; ++v) {
      distance[first + v] = reduce_add(sums[v]);
      least = distance[first + v] < least ? distance[first + v] : least;
    }
  }
  const float unit = static_cast<float>(d + 4) * 0x1p-24f;
  const float limit = least * (1 + 3 * unit) + static_cast<float>(d) * 0x1p-120f;
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    code[kept] = code[i];
    kept += !(distance[i] > limit);
  }
  return kept;
}

// Offers code[count], count <= kMaxOffered; the kOfferRoom places behind it are overwritten.
inline void offer_codes(const Codebook& codebook, const float* row, std::int32_t* code,
                        std::int64_t count, Nearest& nearest) {
  if (codebook.metric == Metric::kL2) {
    if (count > kLanes / 2 && codebook.d <= 1 << 20) count = keep_near(codebook, row, code, count);
    offer_batches<Metric::kL2>(codebook, row, code, count, nearest);
  } else if (codebook.metric == Metric::kDot) {
    offer_batches<Metric::kDot>(codebook, row, code, count, nearest);
  } else {
    offer_batches<Metric::kCosine>(codebook, row, code, count, nearest);
  }
}

template <Metric kMetric>
T2P_INLINE double distance_of(const Codebook& codebook, const float* row, std::int64_t index) {
  Sums<kMetric> sums;
  sums.add_all(row, codebook.codes + index * codebook.d, codebook.d);
  if constexpr (kMetric == Metric::kL2) return reduce_add(sums.squares);
  const double product = -reduce_add(sums.product);
  if constexpr (kMetric == Metric::kDot) return product;
  const double norm = __builtin_sqrt(reduce_add(sums.squares));
  return product / (norm > 1e-300 ? norm : 1e-300);
}

// The distances of kLanes / 2 rows, `stride` apart, each to one code. Rows from `count` on are
// taken for the last one.
template <Metric kMetric>
T2P_INLINE F64 distance_each(const Codebook& codebook, const float* rows, std::int64_t stride,
                             std::int64_t count, const std::int32_t* code) {
  constexpr int kStep = kLanes / 2;
  const std::int64_t d = codebook.d, last = codebook.k - 1;
  F64 squares[kStep], products[kStep];
#pragma GCC unroll 8
  for (int v = 0; v < kStep; ++v) {
    const float* row = rows + smaller(v, count - 1) * stride;
    const float* other = codebook.codes + smaller(code[v], last) * d;
    Sums<kMetric> sums;
    sums.add_all(row, other, d);
    squares[v] = sums.squares;
    products[v] = sums.product;
  }
  return distances_from<kMetric>(squares, products);
}

template <Metric kMetric>
T2P_INLINE void offer_each(const Codebook& codebook, const float* rows, std::int64_t stride,
                           const std::int32_t* row, const std::int32_t* code, int count,
                           Nearest* nearest) {
  for (int c = 0; c < count; ++c) {
    const double distance = distance_of<kMetric>(codebook, rows + row[c] * stride, code[c]);
    if (__builtin_isfinite(distance)) nearest[row[c]].offer(distance, code[c]);
  }
}

// Offers code[c] to row row[c], for all c < count.
inline void offer_each(const Codebook& codebook, const float* rows, std::int64_t stride,
                       const std::int32_t* row, const std::int32_t* code, int count,
                       Nearest* nearest) {
  if (codebook.metric == Metric::kL2) {
    offer_each<Metric::kL2>(codebook, rows, stride, row, code, count, nearest);
  } else if (codebook.metric == Metric::kDot) {
    offer_each<Metric::kDot>(codebook, rows, stride, row, code, count, nearest);
  } else {
    offer_each<Metric::kCosine>(codebook, rows, stride, row, code, count, nearest);
  }
}

}  // namespace
}  // namespace t2p::vq::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// Statistics, normalisation and gradients of ranges of elements, for one instruction set. Included
// once per ISA.
//
// A block's mean and variance come from the deviations x - m from a guess m, the mean of its first
// elements, which sum (x - m) corrects. If m turns out to be far off, measured in standard
// deviations, the block is gone over again from a better one while it lies in the nearest cache.
// x - m is exact where x is within a factor of two of m, so a mean far from zero costs no accuracy.
#include <cstdint>

#include "group_norm/group_norm_elements-inl.h"
#include "group_norm/group_norm_gradient-inl.h"
#include "group_norm/kernels.h"

namespace t2p::group_norm::T2P_ISA_NAMESPACE {
namespace {

constexpr int kVectors = kTile / kLanes;
constexpr int kSums = 4;  // chains of additions side by side
constexpr int kAttempts = 4;

// Statistics --------------------------------------------------------------------------------------

// Whether deviations from a guess, by their sum and the sum of their squares, tell the variance
// without loss: if the guess is within two standard deviations of the mean.
T2P_INLINE bool is_near(double sum, double squares, double count) {
  return !(sum * sum > 0.8 * count * squares);
}

template <Dtype kDtype>
T2P_INLINE void add_deviations(const void* x, std::int64_t at, int count, float centre, double& sum,
                               double& square) {
  constexpr int kStep = kSums * kLanes;
  const int whole = count / kLanes * kLanes, most = whole / kStep * kStep;
  const F32 m = broadcast(centre), zero = broadcast(0.0f);
  F32 all = zero, all_squares = zero;
  for (int begin = 0; begin < most; begin += kRun) {
    F32 sums[kSums], squares[kSums];
    for (int s = 0; s < kSums; ++s) sums[s] = squares[s] = zero;
    const int end = most - begin < kRun ? most : begin + kRun;
    for (int i = begin; i < end; i += kStep) {
      for (int s = 0; s < kSums; ++s) {
        const F32 d = sub(get<kDtype, true>(x, at + i + s * kLanes, 0), m);
        sums[s] = add(sums[s], d);
        squares[s] = multiply_add(d, d, squares[s]);
      }
    }
    all = add(all, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    all_squares = add(all_squares, add(add(squares[0], squares[1]), add(squares[2], squares[3])));
  }
  for (int i = most; i < whole; i += kLanes) {
    const F32 d = sub(get<kDtype, true>(x, at + i, 0), m);
    all = add(all, d);
    all_squares = multiply_add(d, d, all_squares);
  }
  sum = reduce_add(all);
  square = reduce_add(all_squares);
  const auto* rest = static_cast<const typename Element<kDtype>::Type*>(x) + at;
  for (int i = whole; i < count; ++i) {
    const double d = to_float<kDtype>(rest[i]) - centre;
    sum += d;
    square += d * d;
  }
}

template <Dtype kDtype>
Moments block_of(const void* x, std::int64_t at, int count) {
  float centre;
  if (count >= 4 * kLanes) {
    F32 first[4];
    for (int i = 0; i < 4; ++i) first[i] = get<kDtype, true>(x, at + i * kLanes, 0);
    centre = reduce_add(add(add(first[0], first[1]), add(first[2], first[3]))) / (4 * kLanes);
  } else {
    centre = to_float<kDtype>(static_cast<const typename Element<kDtype>::Type*>(x)[at]);
  }
  double sum, square;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    add_deviations<kDtype>(x, at, count, centre, sum, square);
    if (is_near(sum, square, count) || attempt + 1 == kAttempts) break;
    centre = static_cast<float>(centre + sum / count);
  }
  return {centre + sum / count, square - sum * sum / count};
}

// Brings `kCount` elements from x[at] on nearer, where there are any: no address is wrong here.
template <Dtype kDtype, int kCount>
T2P_INLINE void prefetch(const void* x, std::int64_t at) {
  constexpr std::int64_t kBytes = sizeof(typename Element<kDtype>::Type);
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(x) + at * kBytes;
  for (std::int64_t byte = 0; byte < kCount * kBytes; byte += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(begin + byte), 0, 2);
  }
}

template <Dtype kDtype, bool kWhole>
T2P_INLINE void tile_of(const void* x, std::int64_t at, std::int64_t c, int rows, int channels,
                        Moments* moments) {
  F32 m[kVectors];
  const auto vector_at = [&](int row, int v) {
    const int rest = channels - v * kLanes;
    return get<kDtype, kWhole>(x, at + row * c + v * kLanes,
                               rest < 0        ? 0
                               : rest < kLanes ? rest
                                               : kLanes);
  };
  for (int v = 0; v < kVectors; ++v) {
    m[v] = vector_at(0, v);
    if (rows < 4) continue;
    const F32 four = add(add(m[v], vector_at(1, v)), add(vector_at(2, v), vector_at(3, v)));
    m[v] = mul(four, broadcast(0.25f));
  }
  float centres[kTile], sum[kTile], square[kTile];
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    F32 sums[kVectors], squares[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = squares[v] = broadcast(0.0f);
    for (int row = 0; row < rows; ++row) {
      // The next block's: rows of a tile are too far apart for the processor to guess it.
      prefetch<kDtype, kTile>(x, at + (row + kRows) * c);
      for (int v = 0; v < kVectors; ++v) {
        const F32 d = sub(vector_at(row, v), m[v]);
        sums[v] = add(sums[v], d);
        squares[v] = multiply_add(d, d, squares[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store(centres + v * kLanes, m[v]);
      store(sum + v * kLanes, sums[v]);
      store(square + v * kLanes, squares[v]);
      m[v] = add(m[v], mul(sums[v], broadcast(1.0f / static_cast<float>(rows))));
    }
    std::uint32_t far = 0;  // as is_near, for a vector; lanes without a channel are zeros
    const F32 most = broadcast(0.8f * static_cast<float>(rows));
    for (int v = 0; v < kVectors; ++v) {
      far |= bits(less(mul(most, squares[v]), mul(sums[v], sums[v])));
    }
    if (far == 0) break;
  }
  const double inverse = 1.0 / rows;
  for (int i = 0; i < channels; ++i) {
    const double s = sum[i];
    moments[i] = {centres[i] + s * inverse, square[i] - s * s * inverse};
  }
}

// Normalisation -----------------------------------------------------------------------------------

template <bool kEach>
struct AffineOf {
  Coefficients<kEach> centre, factor, offset;
};

template <int kVectors, Dtype kDtype, bool kEach, bool kSilu, bool kWhole, bool kStream>
T2P_INLINE void apply_vectors(const Norm& norm, const AffineOf<kEach>& a, std::int64_t at,
                              std::int64_t i, std::int64_t left, void* y) {
  F32 z[kVectors];
  for (int k = 0; k < kVectors; ++k) {
    const std::int64_t j = i + k * kLanes;
    const F32 d =
        sub(get<kDtype, kWhole>(norm.x, at + j, left), a.centre.template at<kWhole>(j, left));
    z[k] = multiply_add(d, a.factor.template at<kWhole>(j, left),
                        a.offset.template at<kWhole>(j, left));
  }
  if constexpr (kSilu) {
    F32 divisor[kVectors];
    one_plus_power(z, divisor);
    for (int k = 0; k < kVectors; ++k) z[k] = divide(z[k], divisor[k]);
  }
  for (int k = 0; k < kVectors; ++k) {
    const std::int64_t j = at + i + k * kLanes;
    if (norm.residual != nullptr) z[k] = add(z[k], get<kDtype, kWhole>(norm.residual, j, left));
    if constexpr (kStream) {
      stream(static_cast<float*>(y) + j, z[k]);
    } else {
      put<kDtype, kWhole>(y, j, left, z[k]);
    }
  }
}

template <Dtype kDtype, bool kEach, bool kSilu, bool kStream>
T2P_INLINE void apply_span(const Norm& norm_in, const Affine& affine, std::int64_t at,
                           std::int64_t count, std::int64_t ahead, void* y) {
  const Norm norm = norm_in;  // out of reach of what the loop writes
  const AffineOf<kEach> a{Coefficients<kEach>(affine.centre), Coefficients<kEach>(affine.factor),
                          Coefficients<kEach>(affine.offset)};
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    if constexpr (!kEach) prefetch<kDtype, 2 * kLanes>(norm.x, at + i + ahead);
    apply_vectors<2, kDtype, kEach, kSilu, true, kStream>(norm, a, at, i, 0, y);
  }
  if (i + kLanes <= count) {
    apply_vectors<1, kDtype, kEach, kSilu, true, kStream>(norm, a, at, i, 0, y);
    i += kLanes;
  }
  if (i < count) {
    apply_vectors<1, kDtype, kEach, kSilu, false, false>(norm, a, at, i, count - i, y);
  }
}

// Choice of the dtype and of the activation -------------------------------------------------------

template <Dtype kDtype>
struct Typed {
  static constexpr Dtype kValue = kDtype;
};

template <class Body>
T2P_INLINE auto with_dtype(const Norm& norm, Body body) {
  switch (norm.dtype) {
    case Dtype::kBfloat16:
      return body(Typed<Dtype::kBfloat16>{});
    case Dtype::kFloat16:
      return body(Typed<Dtype::kFloat16>{});
    default:
      return body(Typed<Dtype::kFloat32>{});
  }
}

Moments block(const Norm& norm, std::int64_t at, int count) {
  return with_dtype(norm, [&](auto t) { return block_of<t.kValue>(norm.x, at, count); });
}

void tile(const Norm& norm, std::int64_t at, int rows, int channels, Moments* moments) {
  with_dtype(norm, [&](auto t) {
    channels == kTile ? tile_of<t.kValue, true>(norm.x, at, norm.c, rows, channels, moments)
                      : tile_of<t.kValue, false>(norm.x, at, norm.c, rows, channels, moments);
  });
}

// Calls body.operator()<kDtype, kSilu, kStream>() and sees to the fence.
template <class Body>
T2P_INLINE void with_kind(const Norm& norm, bool streamed, Body body) {
  with_dtype(norm, [&](auto t) {
    if constexpr (t.kValue == Dtype::kFloat32) {
      if (streamed) {
        norm.silu ? body.template operator()<t.kValue, true, true>()
                  : body.template operator()<t.kValue, false, true>();
        return stream_fence();
      }
    }
    norm.silu ? body.template operator()<t.kValue, true, false>()
              : body.template operator()<t.kValue, false, false>();
  });
}

// Whether all vectors of rows of `count` floats from y[at] on are where they can be streamed.
T2P_INLINE bool is_aligned(const void* y, std::int64_t at, std::int64_t count) {
  constexpr std::uintptr_t kBytes = kLanes * sizeof(float);
  return reinterpret_cast<std::uintptr_t>(static_cast<const float*>(y) + at) % kBytes == 0 &&
         count % kLanes == 0;
}

void apply_one(const Norm& norm, const Affine& a, std::int64_t at, std::int64_t count,
               std::int64_t ahead, bool large, void* y) {
  with_kind(norm, large && is_aligned(y, at, count), [&]<Dtype kDtype, bool kSilu, bool kStream>() {
    apply_span<kDtype, false, kSilu, kStream>(norm, a, at, count, ahead, y);
  });
}

void apply_each(const Norm& norm, const Affine& a, std::int64_t at, int rows, bool large, void* y) {
  with_kind(norm, large && is_aligned(y, at, norm.c),
            [&]<Dtype kDtype, bool kSilu, bool kStream>() {
              for (std::int64_t row = at; row < at + rows * norm.c; row += norm.c) {
                apply_span<kDtype, true, kSilu, kStream>(norm, a, row, norm.c, 0, y);
              }
            });
}

void sums_one(const Norm& norm, const Slopes& s, const void* grad, std::int64_t at, int count,
              float* dz, float* sums) {
  with_dtype(norm, [&](auto t) {
    norm.silu ? sums_of_one<t.kValue, true>(norm, s, grad, at, count, dz, sums)
              : sums_of_one<t.kValue, false>(norm, s, grad, at, count, dz, sums);
  });
}

void sums_each(const Norm& norm, const Slopes& s, const void* grad, std::int64_t at, int rows,
               float* dz, float* sums) {
  const int c = static_cast<int>(norm.c);
  with_dtype(norm, [&](auto t) {
    for (std::int64_t row = at; row < at + rows * norm.c; row += norm.c) {
      norm.silu ? sums_of_each<t.kValue, true>(norm, s, grad, row, c, dz, sums)
                : sums_of_each<t.kValue, false>(norm, s, grad, row, c, dz, sums);
    }
  });
}

void gradient_one(const Norm& norm, const Slopes& s, const void* grad, std::int64_t at,
                  std::int64_t count, void* grad_x) {
  with_dtype(norm, [&](auto t) {
    norm.silu ? gradient_span<t.kValue, false, true>(norm, s, grad, at, count, grad_x)
              : gradient_span<t.kValue, false, false>(norm, s, grad, at, count, grad_x);
  });
}

void gradient_each(const Norm& norm, const Slopes& s, const void* grad, std::int64_t at, int rows,
                   void* grad_x) {
  with_dtype(norm, [&](auto t) {
    for (std::int64_t row = at; row < at + rows * norm.c; row += norm.c) {
      norm.silu ? gradient_span<t.kValue, true, true>(norm, s, grad, row, norm.c, grad_x)
                : gradient_span<t.kValue, true, false>(norm, s, grad, row, norm.c, grad_x);
    }
  });
}

}  // namespace

const Kernels kKernels{
    .block = block,
    .tile = tile,
    .apply_one = apply_one,
    .apply_each = apply_each,
    .sums_one = sums_one,
    .sums_each = sums_each,
    .gradient_one = gradient_one,
    .gradient_each = gradient_each,
};

}  // namespace t2p::group_norm::T2P_ISA_NAMESPACE

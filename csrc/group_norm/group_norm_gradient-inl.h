// SPDX-License-Identifier: Apache-2.0
// The gradient of normalisation and SiLU, for one instruction set. Included by group_norm-inl.h.
//
// silu'(z) = p (1 + z (1 - p)) with p = sigmoid(z). With dz the gradient of z = xhat gain + bias,
// that of x is (gain dz - mean(gain dz) - xhat mean(gain dz xhat)) / sqrt(var + eps), the means
// over the group.
#pragma once

#include "group_norm/group_norm_elements-inl.h"

namespace t2p::group_norm::T2P_ISA_NAMESPACE {
namespace {

template <bool kEach>
struct SlopesOf {
  explicit SlopesOf(const Slopes& s)
      : centre(s.centre),
        inverse(s.inverse),
        nudge(s.nudge),
        gain(s.gain),
        bias(s.bias),
        mean(s.mean),
        slope(s.slope) {}
  Coefficients<kEach> centre, inverse, nudge, gain, bias, mean, slope;
};

struct Derivative {
  F32 xhat, dz;
};

template <Dtype kDtype, bool kEach, bool kSilu, bool kWhole>
T2P_INLINE Derivative derivative(const Norm& norm, const SlopesOf<kEach>& s, const void* grad,
                                 std::int64_t at, std::int64_t i, std::int64_t left) {
  const F32 d =
      sub(get<kDtype, kWhole>(norm.x, at + i, left), s.centre.template at<kWhole>(i, left));
  const F32 xhat =
      multiply_add(d, s.inverse.template at<kWhole>(i, left), s.nudge.template at<kWhole>(i, left));
  F32 dz = get<kDtype, kWhole>(grad, at + i, left);
  if constexpr (kSilu) {
    const F32 z = multiply_add(xhat, s.gain.template at<kWhole>(i, left),
                               s.bias.template at<kWhole>(i, left));
    const F32 one = broadcast(1.0f), p = sigmoid(z);
    dz = mul(dz, mul(p, multiply_add(z, sub(one, p), one)));
  }
  return {xhat, dz};
}

template <Dtype kDtype, bool kEach, bool kSilu, bool kWhole>
T2P_INLINE Derivative kept_derivative(const Norm& norm, const SlopesOf<kEach>& s, const void* grad,
                                      std::int64_t at, std::int64_t i, std::int64_t left,
                                      float* dz) {
  const Derivative d = derivative<kDtype, kEach, kSilu, kWhole>(norm, s, grad, at, i, left);
  if (dz != nullptr) put<Dtype::kFloat32, kWhole>(dz, at + i, left, d.dz);
  return d;
}

template <Dtype kDtype, bool kSilu>
T2P_INLINE void sums_of_one(const Norm& norm, const Slopes& slopes, const void* grad,
                            std::int64_t at, int count, float* dz, float* sums) {
  const SlopesOf<false> s(slopes);
  F32 plain = broadcast(0.0f), weighted = plain;
  const auto add_up = [&](const Derivative& d) {
    plain = add(plain, d.dz);
    weighted = multiply_add(d.dz, d.xhat, weighted);
  };
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    add_up(kept_derivative<kDtype, false, kSilu, true>(norm, s, grad, at, i, 0, dz));
  }
  if (i < count) {  // dz is zero in the lanes behind the end
    add_up(kept_derivative<kDtype, false, kSilu, false>(norm, s, grad, at, i, count - i, dz));
  }
  sums[0] = reduce_add(plain);
  sums[1] = reduce_add(weighted);
}

template <Dtype kDtype, bool kSilu, bool kWhole>
T2P_INLINE void sums_of_vector(const Norm& norm, const SlopesOf<true>& s, const void* grad,
                               std::int64_t at, int i, int count, float* dz, float* sums) {
  const int left = count - i;
  const Derivative d = kept_derivative<kDtype, true, kSilu, kWhole>(norm, s, grad, at, i, left, dz);
  constexpr Dtype kF32 = Dtype::kFloat32;
  const F32 plain = add(get<kF32, kWhole>(sums, i, left), d.dz);
  const F32 weighted = multiply_add(d.dz, d.xhat, get<kF32, kWhole>(sums, count + i, left));
  put<kF32, kWhole>(sums, i, left, plain);
  put<kF32, kWhole>(sums, count + i, left, weighted);
}

template <Dtype kDtype, bool kSilu>
T2P_INLINE void sums_of_each(const Norm& norm, const Slopes& slopes, const void* grad,
                             std::int64_t at, int count, float* dz, float* sums) {
  const SlopesOf<true> s(slopes);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    sums_of_vector<kDtype, kSilu, true>(norm, s, grad, at, i, count, dz, sums);
  }
  if (i < count) sums_of_vector<kDtype, kSilu, false>(norm, s, grad, at, i, count, dz, sums);
}

template <Dtype kDtype, bool kEach, bool kSilu, bool kWhole>
T2P_INLINE void gradient_vector(const Norm& norm, const SlopesOf<kEach>& s, const void* grad,
                                std::int64_t at, std::int64_t i, std::int64_t left, void* grad_x) {
  const Derivative d = derivative<kDtype, kEach, kSilu, kWhole>(norm, s, grad, at, i, left);
  const F32 mean = s.mean.template at<kWhole>(i, left);
  const F32 own = sub(mul(d.dz, s.gain.template at<kWhole>(i, left)), mean);
  const F32 whole = multiply_subtract_from(d.xhat, s.slope.template at<kWhole>(i, left), own);
  put<kDtype, kWhole>(grad_x, at + i, left, mul(whole, s.inverse.template at<kWhole>(i, left)));
}

template <Dtype kDtype, bool kEach, bool kSilu>
T2P_INLINE void gradient_span(const Norm& norm_in, const Slopes& slopes, const void* grad,
                              std::int64_t at, std::int64_t count, void* grad_x) {
  const Norm norm = norm_in;
  const SlopesOf<kEach> s(slopes);
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    gradient_vector<kDtype, kEach, kSilu, true>(norm, s, grad, at, i, 0, grad_x);
  }
  if (i < count) {
    gradient_vector<kDtype, kEach, kSilu, false>(norm, s, grad, at, i, count - i, grad_x);
  }
}

}  // namespace
}  // namespace t2p::group_norm::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// The exponential function on the vectors of simd.h. Included once per ISA.
#pragma once

#include "common/simd.h"

namespace t2p::simd::T2P_ISA_NAMESPACE {

// a * b + c, rounded after the product unless `fused`.
template <bool fused>
T2P_INLINE F32 product_sum(F32 a, F32 b, F32 c) {
  return fused ? multiply_add(a, b, c) : add(mul(a, b), c);
}

// e^a for a <= 0 with a relative error below 9e-8, 1.5 units in the last place, as tried for all
// floats from -87 to -1e-9; 0 below -87, NaN for NaN. e^a = 2^n e^r with |r| <= ln(2) / 2, and e^r
// = 1 + r + r^2 q(r) with a minimax polynomial q. Unless `fused` no product is fused with a sum,
// and the bits are the same on every instruction set.
template <bool fused = false>
T2P_INLINE F32 exp_nonpositive(F32 a) {
  const F32 magic = broadcast(12582912.0f);  // 1.5 * 2^23: the sum's low bits are n
  const F32 shifted = product_sum<fused>(a, broadcast(1.44269504f), magic);
  const F32 n = sub(shifted, magic);
  // ln(2) in two parts, the first short enough for n times it to be exact.
  F32 r = product_sum<fused>(n, broadcast(-0.693359375f), a);
  r = product_sum<fused>(n, broadcast(2.12194440e-4f), r);
  F32 q = broadcast(1.3814539e-3f);
  q = product_sum<fused>(q, r, broadcast(8.3687454e-3f));
  q = product_sum<fused>(q, r, broadcast(4.1668389e-2f));
  q = product_sum<fused>(q, r, broadcast(1.66665211e-1f));
  q = product_sum<fused>(q, r, broadcast(4.9999994e-1f));
  const F32 e = add(product_sum<fused>(mul(r, r), q, r), broadcast(1.0f));
  const F32 power = as_f32(add(as_i32(e), shift_left<23>(as_i32(shifted))));
  return select(less(a, broadcast(-87.0f)), broadcast(0.0f), power);
}

// 2^a for a < 127 with a relative error below 2e-7, as tried for all floats from -126 on; 0 from
// -127 down, and for NaN. It has half as many steps as e^a: 2^a = 2^n 2^r with |r| <= 1 / 2, and a
// minimax polynomial that is 1 at 0.
T2P_INLINE F32 exp2_bounded(F32 a) {
  const F32 magic = broadcast(12582912.0f);
  // At -127 the polynomial is exactly 1, and 1 less 127 in the exponent is 0.
  a = max(a, broadcast(-127.0f));
  const F32 shifted = add(a, magic);
  const F32 r = sub(a, sub(shifted, magic));
  F32 p = broadcast(1.3264727e-3f);
  p = multiply_add(p, r, broadcast(9.6715130e-3f));
  p = multiply_add(p, r, broadcast(5.5507336e-2f));
  p = multiply_add(p, r, broadcast(2.4022242e-1f));
  p = multiply_add(p, r, broadcast(6.9314700e-1f));
  p = multiply_add(p, r, broadcast(1.0f));
  return as_f32(add(as_i32(p), shift_left<23>(as_i32(shifted))));
}

}  // namespace t2p::simd::T2P_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// The exponential function on the vectors of simd.h. Included once per ISA.
#pragma once

#include "common/simd.h"

namespace t2p::simd::T2P_ISA_NAMESPACE {

// e^a for a <= 0 with a relative error below 1.4e-7 (2^-22.7, over all floats down to -87); 0 below
// -87, NaN for NaN. No product is fused with a sum, so the bits are the same on every instruction
// set. e^a = 2^n e^r with |r| <= ln(2) / 2, and e^r = 1 + r + r^2 q(r) with a minimax polynomial q.
T2P_INLINE F32 exp_nonpositive(F32 a) {
  const F32 shifted = add(mul(a, broadcast(1.44269504f)), broadcast(12582912.0f));  // 1.5 * 2^23
  const F32 n = sub(shifted, broadcast(12582912.0f));
  // ln(2) in two parts, the first short enough for n times it to be exact.
  F32 r = sub(a, mul(n, broadcast(0.693359375f)));
  r = sub(r, mul(n, broadcast(-2.12194440e-4f)));
  F32 q = broadcast(1.3814539e-3f);
  q = add(mul(q, r), broadcast(8.3687454e-3f));
  q = add(mul(q, r), broadcast(4.1668389e-2f));
  q = add(mul(q, r), broadcast(1.66665211e-1f));
  q = add(mul(q, r), broadcast(4.9999994e-1f));
  const F32 e = add(add(mul(mul(r, r), q), r), broadcast(1.0f));
  // The low bits of `shifted` are n: they go to the exponent.
  const F32 power = as_f32(add(as_i32(e), shift_left<23>(as_i32(shifted))));
  return select(less(a, broadcast(-87.0f)), broadcast(0.0f), power);
}

}  // namespace t2p::simd::T2P_ISA_NAMESPACE

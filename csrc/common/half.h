// SPDX-License-Identifier: Apache-2.0
// bfloat16 and float16 to float and back, rounding to nearest even, on their bits and without
// branches, so that a loop over them becomes vectors of any instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace t2p {

T2P_INLINE std::uint32_t half_bits(float a) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &a, sizeof(bits));
  return bits;
}
T2P_INLINE float half_float(std::uint32_t bits) {
  float a;
  __builtin_memcpy(&a, &bits, sizeof(a));
  return a;
}

T2P_INLINE float bfloat16_to_float(std::uint16_t a) { return half_float(std::uint32_t{a} << 16); }

T2P_INLINE std::uint16_t float_to_bfloat16(float a) {
  const std::uint32_t bits = half_bits(a);
  const std::uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const std::uint32_t nan = (bits >> 16) | 0x40;
  return static_cast<std::uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
}

T2P_INLINE float float16_to_float(std::uint16_t a) {
  // The exponent's bias differs by 112. Infinity and NaN come out at 2^16 and more.
  const float scaled = half_float((std::uint32_t{a} & 0x7FFF) << 13) * half_float(0x77800000);
  const std::uint32_t bits = half_bits(scaled);
  const std::uint32_t whole = bits >= 0x47800000 ? bits | 0x7F800000 : bits;
  return half_float(whole | (std::uint32_t{a} & 0x8000) << 16);
}

T2P_INLINE std::uint16_t float_to_float16(float a) {
  const std::uint32_t bits = half_bits(a), magnitude = bits & 0x7FFFFFFF;
  const std::uint32_t special = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
  // Added to 1/2, a subnormal float16 is rounded in a float's last bit.
  const std::uint32_t subnormal = half_bits(half_float(magnitude) + 0.5f) - 0x3F000000;
  const std::uint32_t normal = (magnitude + 0xC8000FFF + ((magnitude >> 13) & 1)) >> 13;
  const std::uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  const std::uint32_t result = magnitude >= 0x47800000 ? special : finite;
  return static_cast<std::uint16_t>(result | (bits >> 16 & 0x8000));
}

}  // namespace t2p

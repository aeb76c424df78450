// SPDX-License-Identifier: Apache-2.0
// Counter-based random numbers, the same bits on every device: Philox4x32-10 of Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), keyed by a seed, counting by an offset
// (the draw: a step, a call) and an index (the place: a block of four elements). No state, so that
// any thread computes the numbers of any element.
//
// What is made of the words (uniform, normal) multiplies and adds one by one, never fused: every
// processor then rounds alike. philox-inl.h has the same in vectors.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define T2P_HOST_DEVICE __host__ __device__ __forceinline__
#else
#include "common/isa.h"
#define T2P_HOST_DEVICE T2P_INLINE
#endif

namespace t2p::philox {

constexpr int kRounds = 10;
constexpr std::uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

// log(1 + f) = f - f^2 / 2 + f^3 P(f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], and for |t| <= pi / 4
// sin t = t + t^3 S(t^2), cos t = 1 - t^2 / 2 + t^4 C(t^2); fitted in Chebyshev nodes, to 3e-7.
// Scalars, not arrays: those device code would not see.
constexpr float kLog0 = 0.333334088f, kLog1 = -0.250009209f, kLog2 = 0.199851274f,
                kLog3 = -0.165928558f, kLog4 = 0.146763965f, kLog5 = -0.141184255f,
                kLog6 = 0.0927221403f;
constexpr float kSin0 = -0.166666642f, kSin1 = 0.0083327489f, kSin2 = -0.000195879504f;
constexpr float kCos0 = 0.0416666642f, kCos1 = -0.00138883037f, kCos2 = 2.45479914e-05f;
constexpr float kLn2 = 0.693147182f, kHalfPiPer2To30 = 1.46291807926715969e-9f;
constexpr std::int32_t kSqrtHalfBits = 0x3F3504F3;

struct Words {
  std::uint32_t v[4];
};

struct Normals {
  float v[4];
};

// The four words at (offset, index) of the stream `seed`.
T2P_HOST_DEVICE Words words(Words counter, std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t product0 = std::uint64_t{kMultiplier0} * counter.v[0];
    const std::uint64_t product1 = std::uint64_t{kMultiplier1} * counter.v[2];
    counter = {{static_cast<std::uint32_t>(product1 >> 32) ^ counter.v[1] ^ key0,
                static_cast<std::uint32_t>(product1),
                static_cast<std::uint32_t>(product0 >> 32) ^ counter.v[3] ^ key1,
                static_cast<std::uint32_t>(product0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

T2P_HOST_DEVICE Words words(std::uint64_t seed, std::uint64_t offset, std::uint64_t index) {
  return words({{static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(index >> 32),
                 static_cast<std::uint32_t>(offset), static_cast<std::uint32_t>(offset >> 32)}},
               static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
}

#if defined(__CUDA_ARCH__)
T2P_HOST_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
T2P_HOST_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
T2P_HOST_DEVICE float square_root(float a) { return __fsqrt_rn(a); }
T2P_HOST_DEVICE std::int32_t bits_of(float a) { return __float_as_int(a); }
T2P_HOST_DEVICE float float_of(std::int32_t a) { return __int_as_float(a); }
#else
T2P_HOST_DEVICE float multiply(float a, float b) { return a * b; }
T2P_HOST_DEVICE float add(float a, float b) { return a + b; }
T2P_HOST_DEVICE float square_root(float a) { return __builtin_sqrtf(a); }
T2P_HOST_DEVICE std::int32_t bits_of(float a) {
  std::int32_t bits;
  __builtin_memcpy(&bits, &a, sizeof(bits));
  return bits;
}
T2P_HOST_DEVICE float float_of(std::int32_t a) {
  float value;
  __builtin_memcpy(&value, &a, sizeof(value));
  return value;
}
#endif

// A uniform number in (0, 1]: a multiple of 2^-31, rounded to a float.
T2P_HOST_DEVICE float uniform(std::uint32_t word) {
  return multiply(add(static_cast<float>(static_cast<std::int32_t>(word >> 1)), 1.0f),
                  4.656612873077392578125e-10f);
}

// The natural logarithm of a normal float in (0, 1].
T2P_HOST_DEVICE float log_of_uniform(float u) {
  const std::int32_t bits = bits_of(u), exponent = (bits - kSqrtHalfBits) >> 23;
  const float f = add(float_of(bits - (exponent << 23)), -1.0f), square = multiply(f, f);
  float p = add(multiply(kLog6, f), kLog5);
  p = add(multiply(p, f), kLog4);
  p = add(multiply(p, f), kLog3);
  p = add(multiply(p, f), kLog2);
  p = add(multiply(p, f), kLog1);
  p = add(multiply(p, f), kLog0);
  const float log1p = add(add(f, multiply(-0.5f, square)), multiply(multiply(square, f), p));
  return add(multiply(static_cast<float>(exponent), kLn2), log1p);
}

// Two standard normal numbers from two words (Box and Muller 1958). The second word's top bits
// choose a quarter of the circle, the others an angle of at most pi / 4 about its middle.
T2P_HOST_DEVICE void normal_pair(std::uint32_t radius_word, std::uint32_t angle_word, float* a,
                                 float* b) {
  const float radius = square_root(multiply(-2.0f, log_of_uniform(uniform(radius_word))));
  const auto within = static_cast<std::int32_t>(angle_word & 0x3FFFFFFFu) - 0x20000000;
  const float t = multiply(static_cast<float>(within), kHalfPiPer2To30), square = multiply(t, t);
  const float s = add(multiply(add(multiply(kSin2, square), kSin1), square), kSin0);
  const float c = add(multiply(add(multiply(kCos2, square), kCos1), square), kCos0);
  const float sine = add(t, multiply(multiply(square, t), s));
  const float cosine =
      add(add(1.0f, multiply(-0.5f, square)), multiply(multiply(square, square), c));
  const bool odd = (angle_word >> 30) & 1;
  const float x = multiply(radius, odd ? sine : cosine);
  const float y = multiply(radius, odd ? cosine : sine);
  const bool left = ((angle_word >> 31) ^ (angle_word >> 30)) & 1, below = angle_word >> 31;
  *a = left ? -x : x;
  *b = below ? -y : y;
}

T2P_HOST_DEVICE Normals normals(const Words& w) {
  Normals n;
  normal_pair(w.v[0], w.v[1], &n.v[0], &n.v[1]);
  normal_pair(w.v[2], w.v[3], &n.v[2], &n.v[3]);
  return n;
}

}  // namespace t2p::philox

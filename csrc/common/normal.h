// SPDX-License-Identifier: Apache-2.0
// Standard normal numbers of random words, the same bits on every device: the inverse of the normal
// distribution function, by polynomials (Wichura's AS 241, 1988, is the classic of the kind).
// normal-inl.h has the same in vectors.
//
// The top bit of a word is the sign of its number; the others, with the lowest set, are an odd
// m < 2^31, and the number is z > 0 with a probability of m / 2^32 above it: at most 6.23. m as a
// float, times kSpread, is x = 2^34 of that probability, a trifle below; one polynomial of degree 5
// for each of the 32 powers of two below x, in s = x / 2^floor(log2 x) - 3/2, gives z to 4e-6; all
// but 2^-8 of the numbers need the last 8 of them.
// Multiplications and additions are fused everywhere, so that every processor rounds alike.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace t2p::normal {

constexpr int kTerms = 6, kOctaves = 32;
// 4 - 2^-22: nothing reaches 2^33, to which the largest m would be rounded.
constexpr float kSpread = 3.99999976f;
constexpr std::int32_t kMagnitude = 0x7fffffff, kMantissa = 0x007fffff, kOne = 0x3f800000;

struct Quantile {
  // Of s^0, s^1, ...: [kTerms][octave], an octave where the exponent of x is, modulo kOctaves.
  alignas(64) float terms[kTerms][kOctaves];
};

// Fitted to the least largest error, with z = 0 at a probability of 1/2.
constexpr Quantile kQuantile = {{
    {6.27517414f, 6.16643095f, 6.05582809f,  5.9432683f,  5.82864618f, 5.71184492f, 5.59273863f,
     5.47118711f, 5.34703588f, 5.22011471f,  5.09023237f, 4.95717621f, 4.82070732f, 4.68055439f,
     4.53640938f, 4.38791943f, 4.23467731f,  4.07620811f, 3.91195488f, 3.74125433f, 3.56330967f,
     3.37714791f, 3.18156171f, 2.97502279f,  2.7555511f,  2.52050447f, 2.26622915f, 1.98743045f,
     1.67594254f, 1.31801391f, 0.887149751f, 0.318643063f},
    {-0.103728622f, -0.105472915f, -0.107306898f, -0.109238468f, -0.1112765f,   -0.113431066f,
     -0.115713589f, -0.118137136f, -0.120716684f, -0.123469539f, -0.126415789f, -0.129578903f,
     -0.132986531f, -0.136671469f, -0.140672758f, -0.145038173f, -0.149825409f, -0.155105963f,
     -0.160969302f, -0.167529166f, -0.17493251f,  -0.183373153f, -0.193112567f, -0.204513341f,
     -0.218094885f, -0.234631777f, -0.255338371f, -0.282245785f, -0.319058865f, -0.373422176f,
     -0.464420855f, -0.659299672f},
    {0.0336690396f, 0.0342077576f, 0.0347727314f, 0.0353661478f, 0.0359904356f, 0.0366483442f,
     0.0373429544f, 0.0380777642f, 0.0388567485f, 0.0396844447f, 0.0405660607f, 0.0415076166f,
     0.0425160863f, 0.0435996279f, 0.044767905f,  0.0460321195f, 0.0474059023f, 0.0489055663f,
     0.0505509339f, 0.05236632f,   0.0543818548f, 0.0566352867f, 0.0591744222f, 0.0620603561f,
     0.0653716475f, 0.0692088977f, 0.0736969039f, 0.0789717287f, 0.0851019174f, 0.0916781202f,
     0.0954401419f, 0.0689977705f},
    {-0.014723557f,  -0.0149538098f, -0.0151950233f, -0.0154480841f, -0.0157139823f, -0.0159938261f,
     -0.0162888654f, -0.0166005008f, -0.0169303305f, -0.0172801651f, -0.0176520757f, -0.0180484429f,
     -0.0184720214f, -0.0189260021f, -0.0194158163f, -0.019942522f,  -0.0205129869f, -0.0211334452f,
     -0.0218114108f, -0.0225560218f, -0.0233785026f, -0.0242927857f, -0.0253163595f, -0.0264714099f,
     -0.0277864113f, -0.0292982422f, -0.0310550109f, -0.0331195444f, -0.0355768651f, -0.0385678448f,
     -0.0426906683f, -0.0572322533f},
    {0.00826039445f, 0.00838733651f, 0.00852021389f, 0.00865949877f, 0.00880571641f, 0.00895945355f,
     0.00912136957f, 0.0092922058f,  0.00947279856f, 0.00966409966f, 0.00986719225f, 0.0100833168f,
     0.0103139039f,  0.0105606075f,  0.0108255045f,  0.0111105591f,  0.0114185829f,  0.011752747f,
     0.0121168541f,  0.0125155002f,  0.0129542993f,  0.0134401722f,  0.0139817428f,  0.0145898825f,
     0.0152784465f,  0.0160652865f,  0.0169736035f,  0.0180349499f,  0.0192861706f,  0.020776201f,
     0.0225034691f,  0.0216078479f},
    {-0.00460969191f, -0.00467973622f, -0.00475301594f, -0.00482978811f, -0.00491033448f,
     -0.00499497121f, -0.00508405175f, -0.0051779733f,  -0.00527718477f, -0.00538219279f,
     -0.00549357617f, -0.00561199617f, -0.00573820993f, -0.00587309571f, -0.00601386745f,
     -0.00616923161f, -0.00633687247f, -0.00651845103f, -0.00671595288f, -0.00693176873f,
     -0.00716880849f, -0.00743064284f, -0.00772170257f, -0.00804754812f, -0.00841523241f,
     -0.00883380789f, -0.00931500085f, -0.00987463258f, -0.0105317077f,  -0.0113126636f,
     -0.012257644f,   -0.0140516264f},
}};

#if defined(__CUDACC__)
// Device code does not see arrays of the host.
static __device__ const Quantile kDeviceQuantile = kQuantile;
#endif

// The standard normal number of a word.
T2P_HOST_DEVICE float of_word(std::uint32_t word) {
  const auto m = static_cast<std::int32_t>((word & static_cast<std::uint32_t>(kMagnitude)) | 1u);
#if defined(__CUDA_ARCH__)
  const Quantile& quantile = kDeviceQuantile;
  const std::int32_t bits = __float_as_int(__fmul_rn(__int2float_rn(m), kSpread));
  const float s = __fadd_rn(__int_as_float((bits & kMantissa) | kOne), -1.5f);
#else
  const Quantile& quantile = kQuantile;
  const float x = static_cast<float>(m) * kSpread;
  std::int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const std::int32_t scaled = (bits & kMantissa) | kOne;
  float s;
  __builtin_memcpy(&s, &scaled, sizeof(s));
  s -= 1.5f;
#endif
  const std::int32_t octave = (bits >> 23) & (kOctaves - 1);
  float z = quantile.terms[kTerms - 1][octave];
  for (int k = kTerms - 2; k >= 0; --k) {
#if defined(__CUDA_ARCH__)
    z = __fmaf_rn(z, s, quantile.terms[k][octave]);
#else
    z = __builtin_fmaf(z, s, quantile.terms[k][octave]);
#endif
  }
  return word >> 31 ? -z : z;
}

}  // namespace t2p::normal

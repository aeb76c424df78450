// SPDX-License-Identifier: Apache-2.0
// What group_norm.cpp calls of group_norm-inl.h, which is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "group_norm/group_norm.h"

namespace t2p::group_norm {

constexpr int kBlock = 8192;  // elements of a block of statistics that stays in a near cache
constexpr int kRun = 2048;    // of those in one chain of additions, at most
constexpr int kTile = 32;     // channels taken together where they lie side by side
constexpr int kRows = 64;     // positions of a block with channels last

// Of a block: the mean, and the sum of the squared deviations from it.
struct Moments {
  double mean, squares;
};

// SiLU takes its argument in this unit, -log2(e) / 2: silu(z) = u / (kSiluUnit (1 + 4^u)) with
// u = kSiluUnit z, which is finite where z is.
constexpr double kSiluUnit = -0.7213475204444817;

// Coefficients of the elements, an array each: one number where all elements are of one channel,
// else one for each channel.
struct Affine {
  const float* centre;  // y = act((x - centre) factor + offset), in kSiluUnit where act is SiLU
  const float* factor;
  const float* offset;
};

// z = xhat gain + bias with xhat = (x - centre) inverse + nudge, and the gradient of x is
// inverse (gain dz - mean - xhat slope).
struct Slopes {
  const float *centre, *inverse, *nudge, *gain, *bias, *mean, *slope;
};
constexpr int kSlopes = 7;

struct Kernels {
  // Of `count` elements from x[at] on, at most kBlock.
  Moments (*block)(const Norm& norm, std::int64_t at, int count);

  // Of each of `channels` channels, at most kTile, over `rows` positions, at most kRows.
  void (*tile)(const Norm& norm, std::int64_t at, int rows, int channels, Moments* moments);

  // y[at, at + count) of one channel; and all channels of `rows` positions. A large y, one of which
  // the caches hold little when all of it is written, is written past them if it is of floats. Of a
  // channel x is fetched `ahead` elements ahead, which is where the next statistics are taken:
  // they wait for memory, this does not.
  void (*apply_one)(const Norm& norm, const Affine& affine, std::int64_t at, std::int64_t count,
                    std::int64_t ahead, bool large, void* y);
  void (*apply_each)(const Norm& norm, const Affine& affine, std::int64_t at, int rows, bool large,
                     void* y);

  // The sums of dz and of dz xhat over `count` elements of one channel, at most kRun, to sums[0]
  // and sums[1]; and over `rows` positions, added to sums[i] and sums[c + i]. Writes dz, too,
  // unless that is null.
  void (*sums_one)(const Norm& norm, const Slopes& slopes, const void* grad, std::int64_t at,
                   int count, float* dz, float* sums);
  void (*sums_each)(const Norm& norm, const Slopes& slopes, const void* grad, std::int64_t at,
                    int rows, float* dz, float* sums);

  // The gradient of x.
  void (*gradient_one)(const Norm& norm, const Slopes& slopes, const void* grad, std::int64_t at,
                       std::int64_t count, void* grad_x);
  void (*gradient_each)(const Norm& norm, const Slopes& slopes, const void* grad, std::int64_t at,
                        int rows, void* grad_x);
};

T2P_DECLARE_FOR_ISAS(Kernels, kKernels)

}  // namespace t2p::group_norm

// SPDX-License-Identifier: Apache-2.0
// One step of a diffusion sampler. Every sampler (DDPM, DDIM, DPM-Solver++, Euler, ancestral, flow
// matching) and every kind of prediction is, with scalars worked out on the host in float64, the
// same two linear combinations with a bound between them:
//
//   m    = f (u + s (c - u))                 guidance; f from the spread of both, see Guidance
//   x0   = bound(a0 x + a1 m + a2 g + a3 z)
//   prev = b0 x + b1 m + b2 x0 + b3 g + b4 h1 + b5 h2 + b6 z
//
// with sample x, outputs c and u of the network, an added gradient g, earlier results h, noise z.
// Without a bound the host has folded b2 x0 into the other terms. A learned variance is
// exp(w0 + w1 v) per element, v what the network says of it; z is then multiplied by its root.
#pragma once

#include <cstdint>

namespace t2p::scheduler {

enum class Dtype { kFloat32, kBfloat16, kFloat16 };

// The columns of a row of coefficients.
enum Column {
  kX0Sample,           // a0
  kX0Output,           // a1
  kX0Shift,            // a2
  kX0Noise,            // a3
  kPrevSample,         // b0
  kPrevOutput,         // b1
  kPrevX0,             // b2
  kPrevShift,          // b3
  kPrevHistory1,       // b4
  kPrevHistory2,       // b5
  kLogVariance,        // w0
  kLogVarianceOf,      // w1
  kPrevShiftVariance,  // of the shift times the learned variance, added to b3
  kPrevNoise,          // b6
  kColumns = 16
};

// How x0 is bounded: not at all, to [-limit, limit], or by dynamic thresholding (Saharia et al.
// 2205.11487, section 2.3): to [-s, s] and divided by s, the quantile `ratio` of |x0| over a
// sample, at least 1 and at most `limit`. A sample with a NaN is then NaN.
enum class Bound { kNone, kClip, kThreshold };

// A tensor [batch, n] of the step's dtype whose samples are contiguous; null where absent.
struct Stream {
  const void* data = nullptr;
  std::int64_t batch_stride = 0;  // in elements
};

// Where noise comes from: nowhere, from the stream `noise`, or from Philox. Sample b then draws
// from seed `seeds[b]`, blocks 0, 1, ...; or, without seeds, from `seed`, blocks b 2^32 + 0, 1,
// ....
enum class Noise { kNone, kGiven, kPhilox };

struct Step {
  Dtype dtype;
  std::int64_t batch, n;  // n < 2^34
  Stream sample, output, uncond, variance, shift, history1, history2, noise;
  const float* coefficients;  // [rows, kColumns]
  std::int64_t rows;
  const std::int64_t* index;  // [batch], the row of each sample; or null
  std::int64_t row;           // the row of all, where index is null
  float guidance, rescale;    // rescale: phi of Lin et al. 2305.08891, equation 16
  Bound bound;
  float limit;
  double ratio;
  Noise source;
  const std::int64_t* seeds;  // [batch], or null
  std::uint64_t seed, offset;
  void* prev;  // [batch, n]; may be the sample
  void* x0;    // [batch, n] after the bound; or null
};

// An index outside [0, rows) throws std::out_of_range on the CPU and gives NaN on CUDA, where
// finding out would mean to wait for the device.
void step_cpu(const Step& step, int threads);
void step_cuda(const Step& step, int device, void* stream, float* workspace);

// Floats of memory that step_cuda needs besides its arguments.
std::int64_t workspace_size(std::int64_t batch, std::int64_t n, bool threshold, bool rescale);

// The noise that a step with these seeds and this offset adds, times its coefficient.
void noise_cpu(const std::int64_t* seeds,  // [batch], or null
               std::uint64_t seed, std::uint64_t offset, std::int64_t batch, std::int64_t n,
               int threads,
               float* out);  // [batch, n]
void noise_cuda(const std::int64_t* seeds, std::uint64_t seed, std::uint64_t offset,
                std::int64_t batch, std::int64_t n, int device, void* stream, float* out);

}  // namespace t2p::scheduler

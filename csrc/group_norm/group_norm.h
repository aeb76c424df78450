// SPDX-License-Identifier: Apache-2.0
// Group normalisation with what follows it in a U-Net or an autoencoder, on raw pointers:
//
//   y = silu(((x - mean) / sqrt(var + eps) weight + bias) (1 + scale) + shift) + residual
//
// mean and var are those of the c / g channels of a group at all n positions of a sample (Wu and
// He, "Group Normalization", 2018, equation 6). scale and shift are what a time embedding makes
// (Dhariwal and Nichol, "Diffusion Models Beat GANs", 2021, section 3, AdaGN).
#pragma once

#include <cstdint>

namespace t2p::group_norm {

enum class Dtype { kFloat32, kBfloat16, kFloat16 };

struct Norm {
  const void* x;         // [b, c, n], or [b, n, c] with channels last
  const void* residual;  // as x, or null
  const float* weight;   // [c], or null for ones
  const float* bias;     // [c], or null for zeros
  const float* scale;    // [b, c], or null for zeros
  const float* shift;    // [b, c], or null for zeros
  Dtype dtype;           // of x, residual, their gradients and the result
  bool channels_last;
  std::int64_t b, c, n;
  std::int64_t groups;  // g, divides c
  double eps;
  bool silu;
};

// `y` may be x or residual. The bits of the results do not depend on the number of threads.
void forward_cpu(const Norm& norm, int threads,
                 void* y,              // as x
                 double* statistics);  // [b, g, 2]: mean, 1 / sqrt(var + eps)

void backward_cpu(const Norm& norm,
                  const void* grad,          // of y, as x
                  const double* statistics,  // [b, g, 2]
                  int threads,
                  void* grad_x,  // as x
                  float* sums);  // [2, b, c]: over n of the gradient before silu, and of it times
                                 // the normalised x

// How many doubles of scratch memory the passes on a GPU want, of no alignment but their own.
std::int64_t forward_workspace(const Norm& norm);
std::int64_t backward_workspace(const Norm& norm);

// The same on a GPU, queued on a stream of `device`.
void forward_cuda(const Norm& norm, int device, void* stream, double* workspace,
                  void* y,              // as x
                  double* statistics);  // [b, g, 2]

void backward_cuda(const Norm& norm, const void* grad, const double* statistics, int device,
                   void* stream, double* workspace,
                   void* grad_x,  // as x
                   float* sums);  // [2, b, c]

}  // namespace t2p::group_norm

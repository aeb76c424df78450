// SPDX-License-Identifier: Apache-2.0
// Linear attention (A. Katharopoulos et al., "Transformers are RNNs", ICML 2020, eq. 5 to 12): with
// a feature map phi,
//
//   S = S_0 + sum_j phi(k_j) v_j^T,  z = z_0 + sum_j phi(k_j)
//   o_i = scale phi(q_i)^T S / (scale phi(q_i)^T z + eps)
//
// where j runs over all keys or, if causal, over those up to i. Sums are in float32, their order
// depends on the shapes alone: the bits are the same for any number of threads.
//
// Sizes: s sequences, h heads, m queries, n keys, d channels of q and k, e channels of v.
#pragma once

#include <cstdint>

#include "common/rows.h"

namespace t2p::linear_attention {

enum class Feature { kRelu, kElu, kIdentity };  // kElu is elu(x) + 1

struct Attention {
  Rows q, k, v;                 // [b, h, m, d], [b, h, n, d], [b, h, n, e]
  const std::uint8_t* mask;     // [b, n], 0 where a key is left out, or null
  const std::int64_t* offsets;  // [s + 1] where sequences begin if b = 1 holds them all, or null
  const float* initial_state;   // [s, h, d, e + 1]: S and, in the last column, z; or null
  std::int64_t s, h, m, n, d, e;
  Feature feature;
  bool causal, normalize;  // causal: m = n; not normalized: o_i is the numerator
  float eps, scale;
};

// out is [b, h, m, e], state [s, h, d, e + 1] or null.
void forward_cpu(const Attention& attention, int threads, const Rows& out, float* state);

struct Gradients {
  Rows out;              // [b, h, m, e] given
  const float* state;    // [s, h, d, e + 1] given, or null
  Rows q, k, v;          // of the shapes of q, k and v
  float* initial_state;  // [s, h, d, e + 1] or null
};

void backward_cpu(const Attention& attention, int threads, const Gradients& gradients);

// How many floats of scratch memory the passes on a GPU want; 8 bytes are alignment enough.
std::int64_t forward_workspace(const Attention& attention);
std::int64_t backward_workspace(const Attention& attention);

// The same on a GPU, queued on a stream of `device`. Offsets are read there, and not checked.
void forward_cuda(const Attention& attention, int device, void* stream, float* workspace,
                  const Rows& out, float* state);
void backward_cuda(const Attention& attention, int device, void* stream, float* workspace,
                   const Gradients& gradients);

}  // namespace t2p::linear_attention

// SPDX-License-Identifier: Apache-2.0
// Attention (A. Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation 1) without the
// matrix of its weights:
//
//   o_i = sum_j w_ij v_j / sum_j w_ij,  w_ij = exp(scale q_i . k_j + bias_j)
//
// Keys are taken in blocks with a running maximum (M. Milakov and N. Gimelshein, "Online normalizer
// calculation for softmax", 2018, algorithm 3; T. Dao et al., "FlashAttention", NeurIPS 2022). Sums
// are in float32, their order depends on the shapes alone: the bits are the same for any number of
// threads.
//
// Sizes: b batch, h heads, m queries, n keys, d channels of q and k, e channels of v.
#pragma once

#include <cstdint>

#include "common/rows.h"

namespace t2p::attention {

constexpr std::int64_t kMostChannels = 512;  // that d and e may be

struct Attention {
  Rows q, k, v;       // [b, h, m, d], [b, h, n, d], [b, h, n, e], all of one format
  const float* bias;  // [b, n] or null
  std::int64_t b, h, m, n, d, e;
  float scale;
};

// out is [b, h, m, e]; zeros where every weight is zero, or there is no key.
void forward_cpu(const Attention& attention, int threads, const Rows& out);

}  // namespace t2p::attention

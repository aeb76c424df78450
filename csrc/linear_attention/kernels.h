// SPDX-License-Identifier: Apache-2.0
// Between linear_attention.cpp and the kernels for one instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/isa.h"
#include "common/parallel.h"
#include "linear_attention/linear_attention.h"

namespace t2p::linear_attention {

constexpr std::int64_t kPad = 16;    // channels in scratch are padded with zeros to these
constexpr std::int64_t kRows = 64;   // taken at a time
constexpr std::int64_t kChunk = 32;  // of a causal product

inline std::int64_t padded(std::int64_t channels) { return ceil_div(channels, kPad) * kPad; }

// One head of one sequence, and sizes padded.
struct Head {
  std::int64_t batch, head, m, n;  //
  std::int64_t first;              // row where the sequence begins
  std::int64_t dp, ep;             // d and e, padded
};

// A state in scratch: S [dp, ep], then z [dp].
inline std::int64_t state_size(const Head& head) { return head.dp * head.ep + head.dp; }
inline std::int64_t scratch_size(std::int64_t dp, std::int64_t ep) {
  return kRows * (4 * dp + 4 * ep) + kChunk * (2 * kChunk + dp + ep) + 4 * (dp * ep + dp + ep);
}

struct Kernels {
  // state += the keys [begin, end).
  void (*accumulate)(const Attention& attention, const Head& head, std::int64_t begin,
                     std::int64_t end, float* scratch, float* state);

  // The outputs of the queries [begin, end), all of which see `state`.
  void (*apply)(const Attention& attention, const Head& head, std::int64_t begin, std::int64_t end,
                const float* state, float* scratch, const Rows& out);

  // The same where each sees also the keys from `begin` up to itself; they are added to `state`.
  void (*scan)(const Attention& attention, const Head& head, std::int64_t begin, std::int64_t end,
               float* state, float* scratch, const Rows& out);

  // backward_cpu for one head; `initial` and `grad` are states, `grad` that of the last one and
  // then of the initial one. `factors` has 2 m floats.
  void (*backward)(const Attention& attention, const Head& head, const Gradients& gradients,
                   const float* initial, float* scratch, float* factors, float* grad);
};

T2P_DECLARE_FOR_ISAS(Kernels, kKernels)

}  // namespace t2p::linear_attention

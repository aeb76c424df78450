// SPDX-License-Identifier: Apache-2.0
// The forward pass on a GPU: states of parts of the keys, their sums in the order of the parts, and
// the outputs. If causal, the parts are chunks, and an output adds to the state before its chunk
// the keys of the chunk up to itself. No block waits for another, so that one long sequence fills a
// GPU as many short ones do.
//
//   reference:  o_i = scale phi(q_i)^T S / (scale phi(q_i)^T z + eps)
#include <cuda_runtime.h>

#include "linear_attention/linear_attention_cuda_product.cuh"

namespace t2p::linear_attention {
namespace {

struct Workspace {
  float *parts, *totals;  // of states; totals are null if causal
  int64_t floats;
};

Workspace carve(float* base, const Attention& attention) {
  const int64_t size = attention.h * state_size(attention);
  Carver carver(base);
  Workspace w;
  w.parts = carver.take<float>(keys_of(attention).slots() * size, "parts");
  w.totals = attention.causal ? nullptr : carver.take<float>(attention.s * size, "totals");
  w.floats = carver.size<float>();
  return w;
}

template <class T>
void launch(const Attention& attention, bool on_tensor_cores, cudaStream_t stream, float* memory,
            const Rows& out, float* state) {
  const Sources sources(attention);
  const Cut keys = keys_of(attention);
  const int64_t heads = attention.h;
  const Workspace workspace = carve(memory, attention);
  const Combination sum{.cut = keys,
                        .heads = heads,
                        .d = attention.d,
                        .e = attention.e,
                        .initial = attention.initial_state,
                        .parts = workspace.parts,
                        .totals = workspace.totals,
                        .state = state,
                        .backwards = false};
  if (on_tensor_cores) {
    states_mma(attention, stream, workspace.parts);
  } else {
    launch_states<T>(sources.keys, sources.values, sum, stream);
  }
  launch_combination(sum, stream);
  if (on_tensor_cores && !attention.causal && fits_vectors(out)) {
    outputs_mma(attention, workspace.totals, stream, out);
    return;
  }
  Product product{};
  product.a = sources.queries;
  product.b = sources.keys;
  product.c = sources.values;
  product.pairs = attention.causal ? Pairs::kBefore : Pairs::kNone;
  product.states = attention.causal ? workspace.parts : workspace.totals;
  product.cut = tiles_of(attention, attention.m);
  product.heads = heads;
  product.d = static_cast<int>(attention.d);
  product.e = static_cast<int>(attention.e);
  product.normalize = attention.normalize;
  product.eps = attention.eps;
  product.scale = attention.scale;
  product.out = out;
  launch_product<T, Result::kOut>(product, stream);
}

}  // namespace

std::int64_t forward_workspace(const Attention& attention) {
  return carve(nullptr, attention).floats;
}

void forward_cuda(const Attention& attention, int device, void* stream, float* workspace,
                  const Rows& out, float* state) {
  if (attention.s * attention.h == 0) return;
  const DeviceGuard guard(device, kOp);
  const auto s = static_cast<cudaStream_t>(stream);
  switch (attention.q.format) {
    case Format::kF32:
      launch<float>(attention, false, s, workspace, out, state);
      break;
    case Format::kBf16:
      launch<__nv_bfloat16>(attention, fits_tensor_cores(attention, device), s, workspace, out,
                            state);
      break;
    case Format::kF16:
      launch<__half>(attention, false, s, workspace, out, state);
      break;
  }
}

}  // namespace t2p::linear_attention

// SPDX-License-Identifier: Apache-2.0
// The backward pass on a GPU, by the equations of backward-inl.h. Nothing of the forward pass is
// kept: its states are summed again. With G_i = (N_i g_i, u_i), V_j = (v_j, 1) and the states with
// z as their last column,
//
//   dq'_i = S_i G_i, dk'_j = dS_j V_j, dv_j = dS_j^T k'_j,  dS = sum_i q'_i G_i^T,
//
// all of which are states and products as in the forward pass.
#include <cuda_runtime.h>

#include "linear_attention/linear_attention_cuda_product.cuh"

namespace t2p::linear_attention {
namespace {

// What lies where in the workspace.
struct Layout {
  int64_t factors, parts, totals, grad_parts, grad_totals, all;  // in floats
  explicit Layout(const Attention& a) {
    const int64_t size = a.h * state_size(a), batch = a.offsets ? 1 : a.s;
    factors = 0;
    parts = factors + 2 * batch * a.h * a.m;
    totals = parts + keys_of(a).slots() * size;
    grad_parts = totals + (a.causal ? 0 : a.s * size);
    grad_totals = grad_parts + queries_of(a).slots() * size;
    all = grad_totals + (a.causal ? 0 : a.s * size);
  }
};

template <class T>
void launch(const Attention& attention, bool on_tensor_cores, cudaStream_t stream, float* workspace,
            const Gradients& gradients) {
  const Sources sources(attention);
  const Layout layout(attention);
  const bool causal = attention.causal;
  auto* const factors = reinterpret_cast<float2*>(workspace + layout.factors);
  Source grads = sources.values;
  grads.rows = gradients.out;
  grads.mask = nullptr;
  grads.extra = Extra::kNone;
  Source scaled = grads;  // G
  scaled.factors = factors;
  scaled.extra = Extra::kFactor;

  Combination sum{.cut = keys_of(attention),
                  .heads = attention.h,
                  .d = attention.d,
                  .e = attention.e,
                  .initial = attention.initial_state,
                  .parts = workspace + layout.parts,
                  .totals = causal ? nullptr : workspace + layout.totals,
                  .state = nullptr,
                  .backwards = false};
  if (on_tensor_cores) {
    states_mma(attention, stream, sum.parts);
  } else {
    launch_states<T>(sources.keys, sources.values, sum, stream);
  }
  launch_combination(sum, stream);

  Product product{};
  product.a = sources.queries;
  product.b = sources.keys;
  product.c = sources.values;
  product.pairs = causal ? Pairs::kBefore : Pairs::kNone;
  product.states = causal ? sum.parts : sum.totals;
  product.cut = tiles_of(attention, attention.m);
  product.heads = attention.h;
  product.d = static_cast<int>(attention.d);
  product.e = static_cast<int>(attention.e);
  product.normalize = attention.normalize;
  product.eps = attention.eps;
  product.scale = attention.scale;
  product.grads = grads;
  product.factors = factors;
  launch_product<T, Result::kFactors>(product, stream);

  product.a = scaled;
  product.b = sources.values;
  product.c = sources.keys;
  product.transposed = true;
  product.own = sources.queries;
  product.out = gradients.q;
  launch_product<T, Result::kGradient>(product, stream);

  sum.cut = queries_of(attention);
  sum.initial = gradients.state;
  sum.parts = workspace + layout.grad_parts;
  sum.totals = causal ? nullptr : workspace + layout.grad_totals;
  sum.state = gradients.initial_state;
  sum.backwards = true;
  launch_states<T>(sources.queries, scaled, sum, stream);
  launch_combination(sum, stream);

  product.a = sources.values;
  product.b = scaled;
  product.c = sources.queries;
  product.pairs = causal ? Pairs::kAfter : Pairs::kNone;
  product.states = causal ? sum.parts : sum.totals;
  product.cut = tiles_of(attention, attention.n);
  product.own = sources.keys;
  product.out = gradients.k;
  launch_product<T, Result::kGradient>(product, stream);

  product.a = sources.keys;
  product.b = sources.queries;
  product.c = scaled;
  product.transposed = false;
  product.own = sources.values;
  product.out = gradients.v;
  launch_product<T, Result::kGradient>(product, stream);
}

}  // namespace

std::int64_t backward_workspace(const Attention& attention) { return Layout(attention).all; }

void backward_cuda(const Attention& attention, int device, void* stream, float* workspace,
                   const Gradients& gradients) {
  if (attention.s * attention.h == 0) return;
  const DeviceGuard guard(device, kOp);
  const auto s = static_cast<cudaStream_t>(stream);
  switch (attention.q.format) {
    case Format::kF32:
      launch<float>(attention, false, s, workspace, gradients);
      break;
    case Format::kBf16:
      launch<__nv_bfloat16>(attention, fits_tensor_cores(attention, device), s, workspace,
                            gradients);
      break;
    case Format::kF16:
      launch<__half>(attention, false, s, workspace, gradients);
      break;
  }
}

}  // namespace t2p::linear_attention

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
struct Workspace {
  float2* factors;        // [batch, h, m]
  float *parts, *totals;  // of states; totals are null if causal
  float *grad_parts, *grad_totals;
  int64_t floats;
};

Workspace carve(float* base, const Attention& a) {
  const int64_t size = a.h * state_size(a), batch = a.offsets ? 1 : a.s;
  Carver carver(base);
  const auto take_totals = [&](const char* name) {
    return a.causal ? nullptr : carver.take<float>(a.s * size, name);
  };
  Workspace w;
  w.factors = carver.take<float2>(batch * a.h * a.m, "factors");
  w.parts = carver.take<float>(keys_of(a).slots() * size, "parts");
  w.totals = take_totals("totals");
  w.grad_parts = carver.take<float>(queries_of(a).slots() * size, "grad_parts");
  w.grad_totals = take_totals("grad_totals");
  w.floats = carver.size<float>();
  return w;
}

template <class T>
void launch(const Attention& attention, bool on_tensor_cores, cudaStream_t stream, float* memory,
            const Gradients& gradients) {
  const Sources sources(attention);
  const Workspace workspace = carve(memory, attention);
  const bool causal = attention.causal;
  Source grads = sources.values;
  grads.rows = gradients.out;
  grads.mask = nullptr;
  grads.extra = Extra::kNone;
  Source scaled = grads;  // G
  scaled.factors = workspace.factors;
  scaled.extra = Extra::kFactor;

  Combination sum{.cut = keys_of(attention),
                  .heads = attention.h,
                  .d = attention.d,
                  .e = attention.e,
                  .initial = attention.initial_state,
                  .parts = workspace.parts,
                  .totals = workspace.totals,
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
  product.factors = workspace.factors;
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
  sum.parts = workspace.grad_parts;
  sum.totals = workspace.grad_totals;
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

std::int64_t backward_workspace(const Attention& attention) {
  return carve(nullptr, attention).floats;
}

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

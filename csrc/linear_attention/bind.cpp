// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bindings/rows.h"
#include "bindings/tensor_view.h"
#include "linear_attention/linear_attention.h"

namespace py = pybind11;

namespace t2p::linear_attention {
namespace {

constexpr const char* kOp = "linear_attention";

float* floats(const char* name, const std::optional<TensorView>& tensor, const TensorView& q,
              const Attention& sizes) {
  if (!tensor) return nullptr;
  check_float32(kOp, name, *tensor);
  check_same_device(kOp, name, *tensor, "q", q);
  check_contiguous(kOp, name, *tensor);
  T2P_CHECK(tensor->ndim() == 4 && tensor->size(0) == sizes.s && tensor->size(1) == sizes.h &&
                tensor->size(2) == sizes.d && tensor->size(3) == sizes.e + 1,
            kOp, ": ", name, " must be [", sizes.s, ", ", sizes.h, ", ", sizes.d, ", ", sizes.e + 1,
            "], got ", tensor->shape_text());
  return tensor->data<float>();
}

Attention attention_of(const TensorView& q, const TensorView& k, const TensorView& v,
                       const std::optional<TensorView>& mask,
                       const std::optional<TensorView>& offsets,
                       const std::optional<TensorView>& initial_state, const std::string& feature,
                       bool causal, bool normalize, double eps, double scale) {
  T2P_CHECK_TYPE(q.is_float32() || q.is_bfloat16() || q.is_float16(), kOp,
                 ": q must be float32, bfloat16 or float16, got ", q.dtype_text());
  T2P_CHECK(q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4, kOp,
            ": q, k and v must have 4 dimensions, got ", q.shape_text(), ", ", k.shape_text(),
            " and ", v.shape_text());
  const std::int64_t b = q.size(0), h = q.size(1), m = q.size(2), d = q.size(3), n = k.size(2),
                     e = v.size(3);
  T2P_CHECK(d > 0 && d <= 256 && e > 0 && e <= 256, kOp,
            ": q and v must have 1 to 256 channels, got ", d, " and ", e);
  T2P_CHECK(!causal || m == n, kOp, ": causal attention wants as many keys as queries, got ", n,
            " and ", m);
  Attention attention{.q = rows_of(kOp, "q", q, q, b, h, m, d),
                      .k = rows_of(kOp, "k", k, q, b, h, n, d),
                      .v = rows_of(kOp, "v", v, q, b, h, n, e),
                      .mask = nullptr,
                      .offsets = nullptr,
                      .initial_state = nullptr,
                      .s = b,
                      .h = h,
                      .m = m,
                      .n = n,
                      .d = d,
                      .e = e,
                      .feature = feature == "relu"    ? Feature::kRelu
                                 : feature == "elu+1" ? Feature::kElu
                                                      : Feature::kIdentity,
                      .causal = causal,
                      .normalize = normalize,
                      .eps = static_cast<float>(eps),
                      .scale = static_cast<float>(scale)};
  if (mask) {
    T2P_CHECK_TYPE(mask->is_uint8(), kOp, ": key_mask must be bool, got ", mask->dtype_text());
    check_contiguous(kOp, "key_mask", *mask);
    check_same_device(kOp, "key_mask", *mask, "q", q);
    T2P_CHECK(mask->ndim() == 2 && mask->size(0) == b && mask->size(1) == n, kOp,
              ": key_mask must be [", b, ", ", n, "], got ", mask->shape_text());
    attention.mask = mask->data<std::uint8_t>();
  }
  if (offsets) {
    check_int64(kOp, "cu_seqlens", *offsets);
    check_contiguous(kOp, "cu_seqlens", *offsets);
    check_same_device(kOp, "cu_seqlens", *offsets, "q", q);
    T2P_CHECK(offsets->ndim() == 1 && offsets->size(0) >= 1 && b == 1 && m == n, kOp,
              ": cu_seqlens must be [s + 1], with b = 1 and as many keys as queries, got ",
              offsets->shape_text());
    attention.s = offsets->size(0) - 1;
    attention.offsets = offsets->data<std::int64_t>();
  }
  if (offsets && !q.on_cuda()) {  // on a GPU it would have to wait for them
    T2P_CHECK(attention.offsets[0] == 0 && attention.offsets[attention.s] == n, kOp,
              ": cu_seqlens must begin with 0 and end with ", n, ", got ", attention.offsets[0],
              " and ", attention.offsets[attention.s]);
    for (std::int64_t i = 0; i < attention.s; ++i) {
      T2P_CHECK(attention.offsets[i] <= attention.offsets[i + 1], kOp,
                ": cu_seqlens must not fall, got ", attention.offsets[i], " before ",
                attention.offsets[i + 1]);
    }
  }
  attention.initial_state = floats("initial_state", initial_state, q, attention);
  return attention;
}

// Scratch memory for a GPU, allocated by the caller.
float* workspace_of(const std::optional<TensorView>& tensor, const TensorView& q,
                    std::int64_t needed) {
  T2P_CHECK(needed == 0 || (tensor && tensor->count() >= needed), kOp, ": workspace must have ",
            needed, " elements");
  if (!tensor) return nullptr;
  check_float32(kOp, "workspace", *tensor);
  check_contiguous(kOp, "workspace", *tensor);
  check_same_device(kOp, "workspace", *tensor, "q", q);
  return tensor->data<float>();
}

std::int64_t workspace_size(const TensorView& q, const TensorView& k, const TensorView& v,
                            const std::optional<TensorView>& offsets, bool causal, bool backward) {
  const Attention attention =
      attention_of(q, k, v, {}, offsets, {}, "identity", causal, true, 0, 1);
  return backward ? backward_workspace(attention) : forward_workspace(attention);
}

void forward(const TensorView& q, const TensorView& k, const TensorView& v,
             const std::optional<TensorView>& mask, const std::optional<TensorView>& offsets,
             const std::optional<TensorView>& initial_state, const std::string& feature,
             bool causal, bool normalize, double eps, double scale,
             const std::optional<TensorView>& workspace, const TensorView& out,
             const std::optional<TensorView>& state, int threads) {
  const Attention attention =
      attention_of(q, k, v, mask, offsets, initial_state, feature, causal, normalize, eps, scale);
  const Rows rows = rows_of(kOp, "out", out, q, q.size(0), attention.h, attention.m, attention.e);
  float* last = floats("state", state, q, attention);
  if (q.on_cuda()) {
    forward_cuda(attention, q.device().id, current_stream(q),
                 workspace_of(workspace, q, forward_workspace(attention)), rows, last);
    return;
  }
  py::gil_scoped_release nogil;
  forward_cpu(attention, threads, rows, last);
}

void backward(const TensorView& q, const TensorView& k, const TensorView& v,
              const std::optional<TensorView>& mask, const std::optional<TensorView>& offsets,
              const std::optional<TensorView>& initial_state, const std::string& feature,
              bool causal, bool normalize, double eps, double scale,
              const std::optional<TensorView>& workspace, const TensorView& grad_out,
              const std::optional<TensorView>& grad_state, const TensorView& grad_q,
              const TensorView& grad_k, const TensorView& grad_v,
              const std::optional<TensorView>& grad_initial_state, int threads) {
  const Attention attention =
      attention_of(q, k, v, mask, offsets, initial_state, feature, causal, normalize, eps, scale);
  const std::int64_t b = q.size(0), h = attention.h, m = attention.m, n = attention.n;
  const Gradients gradients{
      .out = rows_of(kOp, "grad_out", grad_out, q, b, h, m, attention.e),
      .state = floats("grad_state", grad_state, q, attention),
      .q = rows_of(kOp, "grad_q", grad_q, q, b, h, m, attention.d),
      .k = rows_of(kOp, "grad_k", grad_k, q, b, h, n, attention.d),
      .v = rows_of(kOp, "grad_v", grad_v, q, b, h, n, attention.e),
      .initial_state = floats("grad_initial_state", grad_initial_state, q, attention)};
  if (q.on_cuda()) {
    backward_cuda(attention, q.device().id, current_stream(q),
                  workspace_of(workspace, q, backward_workspace(attention)), gradients);
    return;
  }
  py::gil_scoped_release nogil;
  backward_cpu(attention, threads, gradients);
}

}  // namespace

void bind(py::module_& m) {
  m.def("linear_attention_workspace_size", &workspace_size, py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("offsets").none(true), py::arg("causal"), py::arg("backward"));
  m.def("linear_attention", &forward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("mask").none(true), py::arg("offsets").none(true),
        py::arg("initial_state").none(true), py::arg("feature"), py::arg("causal"),
        py::arg("normalize"), py::arg("eps"), py::arg("scale"), py::arg("workspace").none(true),
        py::arg("out"), py::arg("state").none(true), py::arg("threads"));
  m.def("linear_attention_backward", &backward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("mask").none(true), py::arg("offsets").none(true),
        py::arg("initial_state").none(true), py::arg("feature"), py::arg("causal"),
        py::arg("normalize"), py::arg("eps"), py::arg("scale"), py::arg("workspace").none(true),
        py::arg("grad_out"), py::arg("grad_state").none(true), py::arg("grad_q"), py::arg("grad_k"),
        py::arg("grad_v"), py::arg("grad_initial_state").none(true), py::arg("threads"));
}

}  // namespace t2p::linear_attention

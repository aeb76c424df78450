// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/tensor_view.h"
#include "group_norm/group_norm.h"

namespace py = pybind11;

namespace t2p::group_norm {
namespace {

constexpr const char* kOp = "group_norm_silu";

using Optional = std::optional<TensorView>;

Dtype dtype_of(const char* name, const TensorView& tensor) {
  if (tensor.is_float32()) return Dtype::kFloat32;
  if (tensor.is_bfloat16()) return Dtype::kBfloat16;
  T2P_CHECK_TYPE(tensor.is_float16(), kOp, ": ", name,
                 " must be float32, bfloat16 or float16, got ", tensor.dtype_text());
  return Dtype::kFloat16;
}

// Whether the channels, dimension 1, lie side by side, and the rest in order behind them.
bool channels_last(const TensorView& x) {
  if (x.count() == 0) return true;
  if (x.size(1) != 1 && x.stride(1) != 1) return false;
  std::int64_t expected = x.size(1);
  for (int i = x.ndim() - 1; i >= 0; --i) {
    if (i == 1) continue;
    if (x.size(i) != 1 && x.stride(i) != expected) return false;
    expected *= x.size(i);
  }
  return true;
}

void check_like(const char* name, const TensorView& tensor, const TensorView& x, bool last) {
  bool same = tensor.ndim() == x.ndim();
  for (int i = 0; same && i < x.ndim(); ++i) same = tensor.size(i) == x.size(i);
  T2P_CHECK(same, kOp, ": ", name, " is ", tensor.shape_text(), " but x is ", x.shape_text());
  T2P_CHECK_TYPE(dtype_of(name, tensor) == dtype_of("x", x), kOp, ": ", name, " is ",
                 tensor.dtype_text(), " but x is ", x.dtype_text());
  check_same_device(kOp, name, tensor, "x", x);
  T2P_CHECK(last ? channels_last(tensor) : tensor.contiguous(), kOp, ": ", name,
            " is not laid out as x");
}

const float* floats(const char* name, const Optional& tensor, std::int64_t count,
                    const TensorView& x) {
  if (!tensor) return nullptr;
  check_float32(kOp, name, *tensor);
  check_contiguous(kOp, name, *tensor);
  check_same_device(kOp, name, *tensor, "x", x);
  T2P_CHECK(tensor->count() == count, kOp, ": ", name, " must have ", count,
            " elements, got a shape of ", tensor->shape_text());
  return tensor->data<float>();
}

double* statistics_of(const TensorView& tensor, const TensorView& x, std::int64_t groups) {
  check_contiguous(kOp, "statistics", tensor);
  check_same_device(kOp, "statistics", tensor, "x", x);
  T2P_CHECK_TYPE(tensor.dtype_text() == "float64", kOp, ": statistics must be float64, got ",
                 tensor.dtype_text());
  T2P_CHECK(tensor.count() == 2 * x.size(0) * groups, kOp, ": statistics are ", tensor.shape_text(),
            ", expected [b, g, 2]");
  return tensor.data<double>();
}

Norm norm_of(const TensorView& x, std::int64_t groups, const Optional& weight, const Optional& bias,
             const Optional& scale, const Optional& shift, double eps, bool silu) {
  T2P_CHECK(x.ndim() >= 2, kOp, ": x must be [b, c, ...], got ", x.shape_text());
  const std::int64_t b = x.size(0), c = x.size(1);
  T2P_CHECK(groups > 0 && c > 0 && c % groups == 0, kOp, ": num_groups=", groups,
            " does not divide the ", c, " channels of x");
  const bool contiguous = x.contiguous();
  T2P_CHECK(contiguous || channels_last(x), kOp,
            ": x must be contiguous or have its channels last");
  std::int64_t n = 1;
  for (int i = 2; i < x.ndim(); ++i) n *= x.size(i);
  return {.x = x.data<void>(),
          .residual = nullptr,
          .weight = floats("weight", weight, c, x),
          .bias = floats("bias", bias, c, x),
          .scale = floats("scale", scale, b * c, x),
          .shift = floats("shift", shift, b * c, x),
          .dtype = dtype_of("x", x),
          // With one position both layouts are the same; this one then has no loops of one element.
          .channels_last = !contiguous || n == 1,
          .b = b,
          .c = c,
          .n = n,
          .groups = groups,
          .eps = eps,
          .silu = silu};
}

double* workspace_of(const Optional& tensor, const TensorView& x, std::int64_t needed) {
  T2P_CHECK(needed == 0 || (tensor && tensor->count() >= needed), kOp, ": workspace must have ",
            needed, " elements");
  if (!tensor) return nullptr;
  T2P_CHECK_TYPE(tensor->dtype_text() == "float64", kOp, ": workspace must be float64, got ",
                 tensor->dtype_text());
  check_contiguous(kOp, "workspace", *tensor);
  check_same_device(kOp, "workspace", *tensor, "x", x);
  return tensor->data<double>();
}

std::int64_t workspace_size(const TensorView& x, std::int64_t groups, bool backward) {
  const Norm norm = norm_of(x, groups, {}, {}, {}, {}, 0, false);
  return backward ? backward_workspace(norm) : forward_workspace(norm);
}

void forward(const TensorView& x, std::int64_t groups, const Optional& weight, const Optional& bias,
             const Optional& residual, const Optional& scale, const Optional& shift, double eps,
             bool silu, const Optional& workspace, const TensorView& y,
             const TensorView& statistics, int threads) {
  Norm norm = norm_of(x, groups, weight, bias, scale, shift, eps, silu);
  const bool last = !x.contiguous();
  check_like("y", y, x, last);
  if (residual) {
    check_like("residual", *residual, x, last);
    norm.residual = residual->data<void>();
  }
  double* const s = statistics_of(statistics, x, groups);
  if (x.on_cuda()) {
    forward_cuda(norm, x.device().id, current_stream(x),
                 workspace_of(workspace, x, forward_workspace(norm)), y.data<void>(), s);
    return;
  }
  py::gil_scoped_release nogil;
  forward_cpu(norm, threads, y.data<void>(), s);
}

void backward(const TensorView& grad, const TensorView& x, const TensorView& statistics,
              std::int64_t groups, const Optional& weight, const Optional& bias,
              const Optional& scale, const Optional& shift, bool silu, const Optional& workspace,
              const TensorView& grad_x, const TensorView& sums, int threads) {
  const Norm norm = norm_of(x, groups, weight, bias, scale, shift, 0, silu);
  const bool last = !x.contiguous();
  check_like("the gradient", grad, x, last);
  check_like("the gradient of x", grad_x, x, last);
  check_float32(kOp, "sums", sums);
  check_contiguous(kOp, "sums", sums);
  check_same_device(kOp, "sums", sums, "x", x);
  T2P_CHECK(sums.count() == 2 * norm.b * norm.c, kOp, ": sums are ", sums.shape_text(),
            ", expected [2, b, c]");
  const double* const s = statistics_of(statistics, x, groups);
  if (x.on_cuda()) {
    backward_cuda(norm, grad.data<void>(), s, x.device().id, current_stream(x),
                  workspace_of(workspace, x, backward_workspace(norm)), grad_x.data<void>(),
                  sums.data<float>());
    return;
  }
  py::gil_scoped_release nogil;
  backward_cpu(norm, grad.data<void>(), s, threads, grad_x.data<void>(), sums.data<float>());
}

}  // namespace

void bind(py::module_& m) {
  m.def("group_norm_workspace_size", &workspace_size, py::arg("x"), py::arg("groups"),
        py::arg("backward"));
  m.def("group_norm", &forward, py::arg("x"), py::arg("groups"), py::arg("weight").none(true),
        py::arg("bias").none(true), py::arg("residual").none(true), py::arg("scale").none(true),
        py::arg("shift").none(true), py::arg("eps"), py::arg("silu"),
        py::arg("workspace").none(true), py::arg("y"), py::arg("statistics"), py::arg("threads"));
  m.def("group_norm_backward", &backward, py::arg("grad"), py::arg("x"), py::arg("statistics"),
        py::arg("groups"), py::arg("weight").none(true), py::arg("bias").none(true),
        py::arg("scale").none(true), py::arg("shift").none(true), py::arg("silu"),
        py::arg("workspace").none(true), py::arg("grad_x"), py::arg("sums"), py::arg("threads"));
}

}  // namespace t2p::group_norm

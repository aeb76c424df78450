// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "attention/attention.h"
#include "bindings/rows.h"
#include "bindings/tensor_view.h"

namespace py = pybind11;

namespace t2p::attention {
namespace {

constexpr const char* kOp = "attention";

void forward(const TensorView& q, const TensorView& k, const TensorView& v,
             const std::optional<TensorView>& bias, double scale, const TensorView& out,
             int threads) {
  T2P_CHECK_TYPE(q.is_float32() || q.is_bfloat16() || q.is_float16(), kOp,
                 ": q must be float32, bfloat16 or float16, got ", q.dtype_text());
  T2P_CHECK(q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4, kOp,
            ": q, k and v must have 4 dimensions, got ", q.shape_text(), ", ", k.shape_text(),
            " and ", v.shape_text());
  T2P_CHECK(!q.on_cuda(), kOp, ": q must be on the CPU");
  const std::int64_t b = q.size(0), h = q.size(1), m = q.size(2), d = q.size(3), n = k.size(2),
                     e = v.size(3);
  T2P_CHECK(d > 0 && d <= kMostChannels && e > 0 && e <= kMostChannels, kOp,
            ": q and v must have 1 to ", kMostChannels, " channels, got ", d, " and ", e);
  Attention attention{.q = rows_of(kOp, "q", q, q, b, h, m, d),
                      .k = rows_of(kOp, "k", k, q, b, h, n, d),
                      .v = rows_of(kOp, "v", v, q, b, h, n, e),
                      .bias = nullptr,
                      .b = b,
                      .h = h,
                      .m = m,
                      .n = n,
                      .d = d,
                      .e = e,
                      .scale = static_cast<float>(scale)};
  if (bias) {
    check_same_device(kOp, "bias", *bias, "q", q);
    check_float32(kOp, "bias", *bias);
    check_contiguous(kOp, "bias", *bias);
    T2P_CHECK(bias->ndim() == 2 && bias->size(0) == b && bias->size(1) == n, kOp,
              ": bias must be [", b, ", ", n, "], got ", bias->shape_text());
    attention.bias = bias->data<float>();
  }
  const Rows rows = rows_of(kOp, "out", out, q, b, h, m, e);
  py::gil_scoped_release nogil;
  forward_cpu(attention, threads, rows);
}

}  // namespace

void bind(py::module_& m) {
  m.def("attention", &forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("bias").none(true),
        py::arg("scale"), py::arg("out"), py::arg("threads"));
}

}  // namespace t2p::attention

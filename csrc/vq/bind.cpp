// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "bindings/tensor_view.h"
#include "vq/vq.h"

namespace py = pybind11;

namespace t2p::vq {
namespace {

template <class T>
Rows<T> rows(const char* op, const char* name, const TensorView& tensor) {
  check_float32(op, name, tensor);
  T2P_CHECK(tensor.ndim() == 3, op, ": ", name, " must be [outer, d, inner], got ",
            tensor.shape_text());
  return {.data = tensor.data<T>(),
          .outer = tensor.size(0),
          .d = tensor.size(1),
          .inner = tensor.size(2),
          .outer_stride = tensor.stride(0),
          .channel_stride = tensor.stride(1),
          .inner_stride = tensor.stride(2)};
}

void check_codebook(const char* op, const TensorView& codebook, std::int64_t d) {
  check_float32(op, "codebook", codebook);
  check_contiguous(op, "codebook", codebook);
  T2P_CHECK(codebook.ndim() == 2 && codebook.size(0) > 0 && codebook.size(1) == d, op,
            ": codebook is ", codebook.shape_text(), " but [k >= 1, ", d, "] is wanted");
}

void check_indices(const char* op, const TensorView& indices, std::int64_t n) {
  check_int64(op, "indices", indices);
  check_contiguous(op, "indices", indices);
  T2P_CHECK(indices.count() == n, op, ": ", n, " rows but indices of shape ", indices.shape_text());
}

void nearest(const TensorView& x, const TensorView& codebook, const TensorView& indices,
             const TensorView& distance, int threads) {
  constexpr const char* kOp = "vq_nearest";
  const auto from = rows<const float>(kOp, "x", x);
  check_codebook(kOp, codebook, from.d);
  check_same_device(kOp, "codebook", codebook, "x", x);
  check_indices(kOp, indices, from.count());
  check_float32(kOp, "distance", distance);
  check_contiguous(kOp, "distance", distance);
  py::gil_scoped_release nogil;
  nearest_cpu(from, codebook.data<const float>(), codebook.size(0), threads,
              indices.data<std::int64_t>(), distance.data<float>());
}

void lookup(const TensorView& indices, const TensorView& codebook, const TensorView& out,
            int threads) {
  constexpr const char* kOp = "vq_lookup";
  const auto to = rows<float>(kOp, "out", out);
  check_codebook(kOp, codebook, to.d);
  check_indices(kOp, indices, to.count());
  check_same_device(kOp, "codebook", codebook, "indices", indices);
  py::gil_scoped_release nogil;
  lookup_cpu(indices.data<const std::int64_t>(), codebook.data<const float>(), codebook.size(0),
             threads, to);
}

void accumulate(const TensorView& x, const TensorView& indices, const TensorView& counts,
                const TensorView& sums, int threads) {
  constexpr const char* kOp = "vq_accumulate";
  const auto from = rows<const float>(kOp, "x", x);
  check_indices(kOp, indices, from.count());
  py::gil_scoped_release nogil;
  accumulate_cpu(from, indices.data<const std::int64_t>(), counts.size(0), threads,
                 counts.data<float>(), sums.data<float>());
}

}  // namespace

void bind(py::module_& m) {
  m.def("vq_nearest", &nearest, py::arg("x"), py::arg("codebook"), py::arg("indices"),
        py::arg("distance"), py::arg("threads"));
  m.def("vq_lookup", &lookup, py::arg("indices"), py::arg("codebook"), py::arg("out"),
        py::arg("threads"));
  m.def("vq_accumulate", &accumulate, py::arg("x"), py::arg("indices"), py::arg("counts"),
        py::arg("sums"), py::arg("threads"));
}

}  // namespace t2p::vq

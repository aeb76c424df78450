// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string_view>

#include "bindings/tensor_view.h"
#include "vq/vq.h"

namespace py = pybind11;

namespace t2p::vq {
namespace {

template <class T>
Rows<T> rows_of(const char* op, const char* name, const TensorView& tensor) {
  T2P_CHECK(tensor.ndim() == 3 && tensor.size(1) > 0, op, ": ", name,
            " must be [outer, d >= 1, inner], got ", tensor.shape_text());
  return {.data = tensor.data<T>(),
          .outer = tensor.size(0),
          .d = tensor.size(1),
          .inner = tensor.size(2),
          .outer_stride = tensor.stride(0),
          .channel_stride = tensor.stride(1),
          .inner_stride = tensor.stride(2)};
}

template <class T>
Rows<T> rows(const char* op, const char* name, const TensorView& tensor) {
  check_float32(op, name, tensor);
  return rows_of<T>(op, name, tensor);
}

Dtype dtype_of(const char* op, const char* name, const TensorView& tensor) {
  T2P_CHECK_TYPE(tensor.is_float32() || tensor.is_bfloat16() || tensor.is_float16(), op, ": ", name,
                 " must be float32, bfloat16 or float16, got ", tensor.dtype_text());
  if (tensor.is_float32()) return Dtype::kFloat32;
  return tensor.is_bfloat16() ? Dtype::kBfloat16 : Dtype::kFloat16;
}

// Of x on CUDA.
AnyRows any_rows(const char* op, const TensorView& x) {
  return {rows_of<const void>(op, "x", x), dtype_of(op, "x", x)};
}

void check_codebook(const char* op, const TensorView& codebook, std::int64_t d) {
  check_float32(op, "codebook", codebook);
  check_contiguous(op, "codebook", codebook);
  T2P_CHECK(codebook.ndim() == 2, op, ": codebook must be [k, d], got ", codebook.shape_text());
  T2P_CHECK(codebook.size(0) > 0, op, ": codebook is ", codebook.shape_text(), ", it has no codes");
  T2P_CHECK(codebook.size(1) == d, op, ": x has ", d, " channels but codebook is ",
            codebook.shape_text());
}

// A contiguous tensor of `count` elements.
template <class T>
T* array(const char* op, const char* name, const TensorView& tensor, std::int64_t count) {
  std::is_same_v<std::remove_const_t<T>, float> ? check_float32(op, name, tensor)
                                                : check_int64(op, name, tensor);
  check_contiguous(op, name, tensor);
  T2P_CHECK(tensor.count() == count, op, ": ", name, " must have ", count,
            " elements, got a shape of ", tensor.shape_text());
  return tensor.data<T>();
}

// The bytes of a packed codebook.
std::uint8_t* bytes_of(const char* op, const TensorView& packed) {
  T2P_CHECK(packed.is_uint8() && packed.ndim() == 1 && packed.contiguous() && !packed.on_cuda(), op,
            ": packed must be uint8 [bytes] on the CPU, as vq_pack returns it, got ",
            packed.dtype_text(), " ", packed.shape_text(), " on ", packed.device_text());
  auto* bytes = packed.data<std::uint8_t>();
  T2P_CHECK(reinterpret_cast<std::uintptr_t>(bytes) % 8 == 0, op,
            ": packed does not begin on an 8-byte boundary, as what vq_pack returns does");
  return bytes;
}

Metric metric_of(const char* op, std::string_view name) {
  if (name == "l2") return Metric::kL2;
  if (name == "dot") return Metric::kDot;
  T2P_CHECK(name == "cosine", op, ": metric is '", name, "', expected 'l2', 'dot' or 'cosine'");
  return Metric::kCosine;
}

std::int64_t needed_workspace(std::int64_t n, std::int64_t k, std::int64_t d,
                              std::string_view metric) {
  return workspace_size(n, k, d, metric_of("vq_workspace_size", metric));
}

void nearest(const TensorView& x, const TensorView& codebook, std::string_view metric_name,
             const std::optional<TensorView>& packed, const TensorView& workspace,
             const TensorView& indices, const TensorView& distance, int threads) {
  constexpr const char* kOp = "vq_nearest";
  const Metric metric = metric_of(kOp, metric_name);
  T2P_CHECK(x.ndim() == 3, kOp, ": x must be [outer, d >= 1, inner], got ", x.shape_text());
  const std::int64_t n = x.size(0) * x.size(2), d = x.size(1);
  check_codebook(kOp, codebook, d);
  check_same_device(kOp, "codebook", codebook, "x", x);
  const std::int64_t k = codebook.size(0);
  const auto* codes = codebook.data<const float>();
  auto* index = array<std::int64_t>(kOp, "indices", indices, n);
  auto* to = array<float>(kOp, "distance", distance, n);
  if (x.on_cuda()) {
    const AnyRows from = any_rows(kOp, x);
    auto* work = array<float>(kOp, "workspace", workspace, workspace_size(n, k, d, metric));
    nearest_cuda(from, codes, k, metric, x.device().id, current_stream(x), work, index, to);
    return;
  }
  const auto from = rows<const float>(kOp, "x", x);
  const std::uint8_t* bytes = nullptr;
  if (packed) {
    bytes = bytes_of(kOp, *packed);
    T2P_CHECK(packed_for(bytes, packed->size(0), k, d, metric), kOp,
              ": packed is not of a codebook [k, d] = ", codebook.shape_text(), " for metric '",
              metric_name, "', packed for the instruction set in use");
  }
  py::gil_scoped_release nogil;
  nearest_cpu(from, codes, k, metric, bytes, threads, index, to);
}

// The codes of a codebook that is to be packed.
const float* codes_to_pack(const TensorView& codebook) {
  constexpr const char* kOp = "vq_pack";
  T2P_CHECK(codebook.ndim() == 2 && codebook.size(1) > 0, kOp,
            ": codebook must be [k, d >= 1], got ", codebook.shape_text());
  check_codebook(kOp, codebook, codebook.size(1));
  T2P_CHECK(!codebook.on_cuda(), kOp, ": codebook is on ", codebook.device_text(),
            ", packing is for the CPU");
  return codebook.data<const float>();
}

std::int64_t needed_for_packing(const TensorView& codebook, std::string_view metric_name,
                                int threads) {
  const Metric metric = metric_of("vq_pack", metric_name);
  const float* codes = codes_to_pack(codebook);
  const std::int64_t k = codebook.size(0), d = codebook.size(1);
  py::gil_scoped_release nogil;
  return packed_size(codes, k, d, metric, threads);
}

void pack(const TensorView& codebook, std::string_view metric_name, const TensorView& packed,
          int threads) {
  const Metric metric = metric_of("vq_pack", metric_name);
  const float* codes = codes_to_pack(codebook);
  std::uint8_t* bytes = bytes_of("vq_pack", packed);
  const std::int64_t k = codebook.size(0), d = codebook.size(1), size = packed.size(0);
  py::gil_scoped_release nogil;
  pack_cpu(codes, k, d, metric, threads, bytes, size);
}

void lookup(const TensorView& indices, const TensorView& codebook, const TensorView& out,
            int threads) {
  constexpr const char* kOp = "vq_lookup";
  const auto any = rows_of<void>(kOp, "out", out);
  check_codebook(kOp, codebook, any.d);
  check_same_device(kOp, "codebook", codebook, "indices", indices);
  const auto* index = array<const std::int64_t>(kOp, "indices", indices, any.count());
  const auto* codes = codebook.data<const float>();
  const std::int64_t k = codebook.size(0);
  if (indices.on_cuda()) {
    lookup_cuda(index, codes, k, indices.device().id, current_stream(indices),
                {any, dtype_of(kOp, "out", out)});
    return;
  }
  const auto to = rows<float>(kOp, "out", out);
  py::gil_scoped_release nogil;
  lookup_cpu(index, codes, k, threads, to);
}

void accumulate(const TensorView& x, const TensorView& indices, const TensorView& workspace,
                const TensorView& counts, const TensorView& sums, int threads) {
  constexpr const char* kOp = "vq_accumulate";
  const auto any = rows_of<const void>(kOp, "x", x);
  const std::int64_t n = any.count(), k = counts.count();
  check_same_device(kOp, "indices", indices, "x", x);
  const auto* index = array<const std::int64_t>(kOp, "indices", indices, n);
  auto* count = array<float>(kOp, "counts", counts, k);
  auto* sum = array<float>(kOp, "sums", sums, k * any.d);
  if (x.on_cuda()) {
    auto* work = array<float>(kOp, "workspace", workspace, accumulate_workspace_size(n, k));
    accumulate_cuda(any_rows(kOp, x), index, k, x.device().id, current_stream(x), work, count, sum);
    return;
  }
  const auto from = rows<const float>(kOp, "x", x);
  py::gil_scoped_release nogil;
  accumulate_cpu(from, index, k, threads, count, sum);
}

// On CUDA; elsewhere a search, a lookup and a total do it.
void quantize(const TensorView& x, const TensorView& codebook, std::string_view metric_name,
              double scale, const TensorView& workspace, const TensorView& indices,
              const TensorView& distance, const TensorView& quantized, const TensorView& total) {
  constexpr const char* kOp = "vq_quantize";
  const Metric metric = metric_of(kOp, metric_name);
  const AnyRows from = any_rows(kOp, x);
  const std::int64_t n = from.rows.count(), d = from.rows.d;
  check_codebook(kOp, codebook, d);
  check_same_device(kOp, "codebook", codebook, "x", x);
  const std::int64_t k = codebook.size(0);
  const auto to = rows_of<void>(kOp, "quantized", quantized);
  T2P_CHECK(to.count() == n && to.d == d, kOp, ": x is ", x.shape_text(), " but quantized is ",
            quantized.shape_text());
  T2P_CHECK_TYPE(dtype_of(kOp, "quantized", quantized) == from.dtype, kOp, ": x is ",
                 x.dtype_text(), " but quantized is ", quantized.dtype_text());
  quantize_cuda(
      from, codebook.data<const float>(), k, metric, scale, x.device().id, current_stream(x),
      array<float>(kOp, "workspace", workspace, workspace_size(n, k, d, metric)),
      array<std::int64_t>(kOp, "indices", indices, n), array<float>(kOp, "distance", distance, n),
      to, array<float>(kOp, "total", total, 1));
}

void total(const TensorView& distance, double scale, const TensorView& total) {
  constexpr const char* kOp = "vq_quantize";
  T2P_CHECK(!distance.on_cuda(), kOp, ": distance is on ", distance.device_text(),
            ", where vq_quantize does all at once");
  const std::int64_t n = distance.count();
  const auto* from = array<const float>(kOp, "distance", distance, n);
  auto* to = array<float>(kOp, "total", total, 1);
  py::gil_scoped_release nogil;
  total_cpu(from, n, scale, to);
}

}  // namespace

void bind(py::module_& m) {
  m.def("vq_workspace_size", &needed_workspace, py::arg("n"), py::arg("k"), py::arg("d"),
        py::arg("metric"));
  m.def("vq_nearest", &nearest, py::arg("x"), py::arg("codebook"), py::arg("metric"),
        py::arg("packed"), py::arg("workspace"), py::arg("indices"), py::arg("distance"),
        py::arg("threads"));
  m.def("vq_packed_size", &needed_for_packing, py::arg("codebook"), py::arg("metric"),
        py::arg("threads"));
  m.def("vq_pack", &pack, py::arg("codebook"), py::arg("metric"), py::arg("packed"),
        py::arg("threads"));
  m.def("vq_lookup", &lookup, py::arg("indices"), py::arg("codebook"), py::arg("out"),
        py::arg("threads"));
  m.def("vq_accumulate_workspace_size", &accumulate_workspace_size, py::arg("n"), py::arg("k"));
  m.def("vq_accumulate", &accumulate, py::arg("x"), py::arg("indices"), py::arg("workspace"),
        py::arg("counts"), py::arg("sums"), py::arg("threads"));
  m.def("vq_quantize", &quantize, py::arg("x"), py::arg("codebook"), py::arg("metric"),
        py::arg("scale"), py::arg("workspace"), py::arg("indices"), py::arg("distance"),
        py::arg("quantized"), py::arg("total"));
  m.def("vq_total", &total, py::arg("distance"), py::arg("scale"), py::arg("total"));
}

}  // namespace t2p::vq

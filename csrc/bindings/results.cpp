// SPDX-License-Identifier: Apache-2.0
#include "bindings/results.h"

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "common/block_cache.h"
#include "common/check.h"
#include "common/dlpack_abi.h"

namespace py = pybind11;

namespace t2p {
namespace {

// Results of so many bytes and more are in memory of common/block_cache.h.
constexpr std::int64_t kLarge = std::int64_t{1} << 20;

struct Large : dlpack::ManagedTensor {
  std::vector<std::int64_t> shape, strides;
  std::int64_t bytes;
};

// torch calls it when nothing has the memory any more, with or without the interpreter's lock.
void end(dlpack::ManagedTensor* managed) {
  auto* result = static_cast<Large*>(managed);
  give_block(result->tensor.data, result->bytes);
  delete result;
}

// A capsule "dltensor"; its consumer renames it, and from then on owns what it holds.
void end_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  end(static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

// Uninitialised; strides are in elements and without gaps.
py::object empty(std::vector<std::int64_t> shape, std::vector<std::int64_t> strides, int code,
                 int bits) {
  std::int64_t bytes = bits / 8;
  for (const std::int64_t size : shape) bytes *= size;
  T2P_CHECK(shape.size() == strides.size() && bytes > 0, "empty: wanted ", bytes, " bytes in ",
            shape.size(), " sizes and ", strides.size(), " strides");
  auto result = std::make_unique<Large>();
  result->shape = std::move(shape);
  result->strides = std::move(strides);
  result->bytes = bytes;
  result->context = nullptr;
  result->deleter = end;
  result->tensor = {take_block(bytes),
                    {dlpack::kCpu, 0},
                    static_cast<std::int32_t>(result->shape.size()),
                    {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1},
                    result->shape.data(),
                    result->strides.data(),
                    0};
  PyObject* capsule =
      PyCapsule_New(static_cast<dlpack::ManagedTensor*>(result.get()), "dltensor", end_capsule);
  if (capsule == nullptr) {
    end(result.release());
    throw py::error_already_set();
  }
  result.release();
  return py::reinterpret_steal<py::object>(capsule);
}

// A small result in one allocation: what torch has to know of it, then its elements.
struct Small {
  dlpack::ManagedTensorVersioned managed;
  std::int64_t shape[TensorView::kMaxDims], strides[TensorView::kMaxDims];
};

void end_small(dlpack::ManagedTensorVersioned* managed) { std::free(managed); }

// Contiguous and of the shape, dtype and device of `like`.
Result small_like(const TensorView& like, std::int64_t bytes) {
  constexpr std::uintptr_t kAlignment = 64;
  auto* small = static_cast<Small*>(std::malloc(sizeof(Small) + kAlignment + bytes));
  if (small == nullptr) throw std::bad_alloc();
  const auto end = reinterpret_cast<std::uintptr_t>(small + 1);
  auto* data = reinterpret_cast<void*>((end + kAlignment - 1) / kAlignment * kAlignment);
  const TensorView view = like.elsewhere(data);
  for (int i = 0; i < view.ndim(); ++i) {
    small->shape[i] = view.size(i);
    small->strides[i] = view.stride(i);
  }
  small->managed = {
      {1, 0},
      nullptr,
      end_small,
      0,
      {data, view.device(), view.ndim(), view.dtype(), small->shape, small->strides, 0}};
  return {tensor_of(&small->managed), view};
}

}  // namespace

Result empty_like(py::handle tensor, const TensorView& view) {
  const std::int64_t bytes = view.count() * view.element_size();
  const bool small = bytes > 0 && bytes < kLarge;
  if (small && !view.on_cuda() && view.contiguous() && makes_tensors()) {
    return small_like(view, bytes);
  }
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> stored;
  const auto find = [] { return py::module_::import("t2p_fast.memory").attr("empty_like"); };
  py::object result = stored.call_once_and_store_result(find).get_stored()(tensor);
  const TensorView made(result);
  return {std::move(result), made};
}

void bind_results(py::module_& m) {
  m.attr("LARGE") = kLarge;
  m.def("empty", &empty, py::arg("shape"), py::arg("strides"), py::arg("code"), py::arg("bits"));
  m.def("kept_bytes", &kept_bytes);
  m.def("kept_limit", &kept_limit);
  m.def("set_kept_limit", &set_kept_limit, py::arg("bytes"));
  m.def("drop_blocks", &drop_blocks);
}

}  // namespace t2p

// SPDX-License-Identifier: Apache-2.0
// Large results of the CPU kernels, in memory of common/block_cache.h: t2p_fast/memory.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "common/block_cache.h"
#include "common/check.h"
#include "common/dlpack_abi.h"

namespace py = pybind11;

namespace t2p {
namespace {

struct Result : dlpack::ManagedTensor {
  std::vector<std::int64_t> shape, strides;
  std::int64_t bytes;
};

// torch calls it when nothing has the memory any more, with or without the interpreter's lock.
void end(dlpack::ManagedTensor* managed) {
  auto* result = static_cast<Result*>(managed);
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
  auto result = std::make_unique<Result>();
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

}  // namespace

void bind_results(py::module_& m) {
  m.def("empty", &empty, py::arg("shape"), py::arg("strides"), py::arg("code"), py::arg("bits"));
  m.def("kept_bytes", &kept_bytes);
  m.def("kept_limit", &kept_limit);
  m.def("set_kept_limit", &set_kept_limit, py::arg("bytes"));
  m.def("drop_blocks", &drop_blocks);
}

}  // namespace t2p

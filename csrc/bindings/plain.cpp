// SPDX-License-Identifier: Apache-2.0
#include "bindings/plain.h"

#include <pybind11/gil_safe_call_once.h>

#include <vector>

namespace py = pybind11;

namespace t2p {
namespace {

// Functions and names of torch, looked up once.
struct Torch {
  py::object tensor, parameter, is_neg, count_modes, transform, is_grad_enabled;
  py::object forward_ad;
  py::str requires_grad{"requires_grad"}, current_level{"_current_level"};
};

const Torch& torch_of_process() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> stored;
  return stored
      .call_once_and_store_result([] {
        const py::module_ torch = py::module_::import("torch");
        const py::object own = torch.attr("_C");
        return Torch{torch.attr("Tensor"),
                     torch.attr("nn").attr("Parameter"),
                     torch.attr("Tensor").attr("is_neg"),
                     own.attr("_len_torch_dispatch_stack"),
                     own.attr("_functorch").attr("peek_interpreter_stack"),
                     torch.attr("is_grad_enabled"),
                     py::module_::import("torch.autograd.forward_ad")};
      })
      .get_stored();
}

py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object call(const py::object& function) { return owned(PyObject_CallNoArgs(function.ptr())); }

py::object call(const py::object& function, py::handle argument) {
  return owned(PyObject_CallOneArg(function.ptr(), argument.ptr()));
}

bool has_modes(const Torch& torch) {
  if (PyLong_AsLong(call(torch.count_modes).ptr()) != 0) return true;
  if (!call(torch.transform).is_none()) return true;
  const py::object level = py::getattr(torch.forward_ad, torch.current_level, py::none());
  return !level.is_none() && PyLong_AsLong(level.ptr()) >= 0;
}

}  // namespace

bool has_modes() { return has_modes(torch_of_process()); }

bool is_plain(std::span<const py::handle> tensors) {
  const Torch& torch = torch_of_process();
  if (has_modes(torch)) return false;
  const bool grad = call(torch.is_grad_enabled).ptr() == Py_True;
  for (const py::handle tensor : tensors) {
    if (tensor.is_none()) continue;
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    if (type != torch.tensor.ptr() && type != torch.parameter.ptr()) return false;
    // A view that the dispatcher would negate first.
    if (call(torch.is_neg, tensor).ptr() == Py_True) return false;
    if (!grad) continue;
    const py::object wanted = owned(PyObject_GetAttr(tensor.ptr(), torch.requires_grad.ptr()));
    if (wanted.ptr() == Py_True) return false;
  }
  return true;
}

void bind_plain(py::module_& m) {
  m.def("has_modes", py::overload_cast<>(&has_modes));
  m.def("is_plain", [](const py::args& tensors) {
    const std::vector<py::handle> handles(tensors.begin(), tensors.end());
    return is_plain(handles);
  });
}

}  // namespace t2p

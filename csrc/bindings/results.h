// SPDX-License-Identifier: Apache-2.0
// Tensors that C++ makes, for results.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/tensor_view.h"

namespace t2p {

struct Result {
  pybind11::object tensor;
  TensorView view;
};

// torch.empty_like of a plain tensor, of which `view` is one; from t2p_fast.memory if it is large.
// A small one on the CPU is made here where torch lets us: in half the time, without its dispatcher
// and its parser of arguments.
Result empty_like(pybind11::handle tensor, const TensorView& view);

void bind_results(pybind11::module_& m);

}  // namespace t2p

// SPDX-License-Identifier: Apache-2.0
// Calls that go past torch's dispatcher, which costs more than a small op itself.
#pragma once

#include <pybind11/pybind11.h>

#include <span>

namespace t2p {

// Whether a mode of torch (of dispatch, of functorch, forward-mode differentiation) sees every
// call.
bool has_modes();

// Whether no gradient is wanted and no mode of torch would do more than run an op on `tensors`,
// None among them or not. While torch compiles a function there is no asking from C++.
bool is_plain(std::span<const pybind11::handle> tensors);

void bind_plain(pybind11::module_& m);

}  // namespace t2p

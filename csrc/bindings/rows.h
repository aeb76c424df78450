// SPDX-License-Identifier: Apache-2.0
// How tensors become the Rows of kernels.
#pragma once

#include "bindings/tensor_view.h"
#include "common/rows.h"

namespace t2p {

// `tensor`, which must be [b, h, count, channels] with channels side by side, in any other order,
// and of the dtype and on the device of `q`.
Rows rows_of(const char* op, const char* name, const TensorView& tensor, const TensorView& q,
             std::int64_t b, std::int64_t h, std::int64_t count, std::int64_t channels);

}  // namespace t2p

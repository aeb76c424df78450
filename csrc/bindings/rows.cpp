// SPDX-License-Identifier: Apache-2.0
#include "bindings/rows.h"

#include "common/check.h"

namespace t2p {

Rows rows_of(const char* op, const char* name, const TensorView& tensor, const TensorView& q,
             std::int64_t b, std::int64_t h, std::int64_t count, std::int64_t channels) {
  check_same_device(op, name, tensor, "q", q);
  T2P_CHECK_TYPE(tensor.dtype_text() == q.dtype_text(), op, ": ", name, " is ", tensor.dtype_text(),
                 " but q is ", q.dtype_text());
  T2P_CHECK(tensor.ndim() == 4 && tensor.size(0) == b && tensor.size(1) == h &&
                tensor.size(2) == count && tensor.size(3) == channels,
            op, ": ", name, " must be [", b, ", ", h, ", ", count, ", ", channels, "], got ",
            tensor.shape_text());
  T2P_CHECK(channels <= 1 || tensor.count() == 0 || tensor.stride(3) == 1, op, ": ", name,
            " must have channels side by side, got a stride of ", tensor.stride(3));
  const Format format = tensor.is_float32()    ? Format::kF32
                        : tensor.is_bfloat16() ? Format::kBf16
                                               : Format::kF16;
  return {tensor.data<void>(), format, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

}  // namespace t2p

// SPDX-License-Identifier: Apache-2.0
// Checked tensors as what the functions of mrf.h take.
#pragma once

#include <optional>

#include "bindings/tensor_view.h"
#include "mrf/mrf.h"

namespace t2p::mrf {

using Optional = std::optional<TensorView>;

inline void check_array(const char* op, const char* name, const TensorView& tensor,
                        std::int64_t count) {
  check_contiguous(op, name, tensor);
  T2P_CHECK(tensor.count() == count, op, ": ", name, " must have ", count,
            " elements, got a shape of ", tensor.shape_text());
}

inline float* floats(const char* op, const char* name, const TensorView& tensor,
                     std::int64_t count) {
  check_float32(op, name, tensor);
  check_array(op, name, tensor, count);
  return tensor.data<float>();
}

inline std::int64_t* integers(const char* op, const char* name, const TensorView& tensor,
                              std::int64_t count) {
  check_int64(op, name, tensor);
  check_array(op, name, tensor, count);
  return tensor.data<std::int64_t>();
}

inline MutableValues values(const char* op, const char* name, const TensorView& tensor,
                            std::int64_t count) {
  T2P_CHECK_TYPE(tensor.is_float32() || tensor.is_bfloat16(), op, ": ", name,
                 " must be float32 or bfloat16, got ", tensor.dtype_text());
  check_array(op, name, tensor, count);
  return {tensor.data<void>(), tensor.is_float32() ? Format::kF32 : Format::kBf16};
}

inline Values values_or_null(const char* op, const char* name, const Optional& tensor,
                             std::int64_t count) {
  if (!tensor) return {nullptr, Format::kF32};
  const MutableValues found = values(op, name, *tensor, count);
  return {found.data, found.format};
}

// `node` comes from Python, which made it: every entry is in [0, n).
inline Edges edges_of(const char* op, const TensorView& begin, const TensorView& node,
                      const TensorView& weight) {
  const std::int64_t e = node.count();
  return {integers(op, "begin", begin, begin.count()), integers(op, "node", node, e),
          floats(op, "weight", weight, e)};
}

inline Positions positions_of(const char* op, const TensorView& begin, const TensorView& slot,
                              const TensorView& row) {
  const std::int64_t n = begin.count() - 1;
  return {.slot = integers(op, "slot", slot, slot.count()),
          .row = integers(op, "row", row, row.count()),
          .b = n > 0 ? slot.count() / n : 0,
          .n = n,
          .r = row.count()};
}

}  // namespace t2p::mrf

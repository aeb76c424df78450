// SPDX-License-Identifier: Apache-2.0
// Rows of numbers in any of the formats that kernels read, as attention has them.
#pragma once

#include <cstdint>

namespace t2p {

enum class Format { kF32, kBf16, kF16 };

// A tensor [b, h, rows, channels] whose channels lie side by side; strides in elements.
struct Rows {
  void* data = nullptr;
  Format format = Format::kF32;
  std::int64_t batch = 0, head = 0, row = 0;
};

}  // namespace t2p

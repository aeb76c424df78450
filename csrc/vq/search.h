// SPDX-License-Identifier: Apache-2.0
// What vq.cpp and the kernel of one instruction set tell each other.
#pragma once

#include <cstdint>

#include "vq/vq.h"

namespace t2p::vq {

constexpr std::int64_t kMaxBlockRows = 256;

// A codebook prepared for the search. A panel is `panel_codes` codes, centred and transposed. With
// no panels given, search_block packs each as it comes to it: right for a single block of rows.
struct Codebook {
  const float* codes;   // [k, d]
  const float* center;  // [d], about the mean of the codes
  std::int64_t k, d;
  const float* panels = nullptr;      // [ceil(k / panel_codes), d, panel_codes]
  const float* half_norms = nullptr;  // [ceil(k / panel_codes), panel_codes], |c - center|^2 / 2
  float largest_half_norm = 0;
};

struct PanelRange {
  std::int64_t begin, end;
};

struct SearchKernels {
  std::int64_t panel_codes;

  // Rows that one task searches at a time, at most kMaxBlockRows. They depend on d alone, so that
  // results do not depend on the number of threads.
  std::int64_t (*block_rows)(std::int64_t d);

  // Floats of scratch memory that search_block wants.
  std::int64_t (*scratch_size)(std::int64_t d);

  // Packs codes[count, d] into one panel; returns the largest of the half norms.
  float (*pack_panel)(const float* codes, std::int64_t count, std::int64_t d, const float* center,
                      float* panel,        // [d, panel_codes]
                      float* half_norms);  // [panel_codes]

  // The nearest code within `panels` for the rows [first, first + count), count <= block_rows(d).
  void (*search_block)(const Codebook& codebook, const Rows<const float>& x, PanelRange panels,
                       std::int64_t first, std::int64_t count,
                       float* scratch,          // [scratch_size(d)], 64-byte aligned
                       double* distance,        // [count]
                       std::int64_t* indices);  // [count]
};

namespace scalar {
extern const SearchKernels kSearch;
}
namespace avx2 {
extern const SearchKernels kSearch;
}
namespace avx512 {
extern const SearchKernels kSearch;
}

}  // namespace t2p::vq

// SPDX-License-Identifier: Apache-2.0
// What vq.cpp and the kernel of one instruction set tell each other.
#pragma once

#include <cstdint>

#include "vq/vq.h"

namespace t2p::vq {

// Rows that one task searches at a time: their running minima stay in the L1 cache.
constexpr std::int64_t kBlockRows = 64;

// A codebook prepared for the search. A panel is `panel_codes` codes, centred and transposed.
struct Codebook {
  const float* codes;       // [k, d]
  const float* center;      // [d], about the mean of the codes
  const float* panels;      // [ceil(k / panel_codes), d, panel_codes]
  const float* half_norms;  // [ceil(k / panel_codes), panel_codes], |c - center|^2 / 2
  float radius;             // at least the largest |c - center|
  std::int64_t k, d;
};

struct PanelRange {
  std::int64_t begin, end;
};

struct SearchKernels {
  std::int64_t panel_codes;
  std::int64_t tile_rows;

  // An upper bound of the norm whose square was computed as `squares`.
  float (*norm_from_squares)(float squares, std::int64_t d);

  // Packs codes[count, d] into one panel; returns the largest of the half norms.
  float (*pack_panel)(const float* codes, std::int64_t count, std::int64_t d, const float* center,
                      float* panel, float* half_norms);

  // The nearest code within `panels` for the rows [first, first + count), count <= kBlockRows.
  void (*search_block)(const Codebook& codebook, const Rows<const float>& x, PanelRange panels,
                       std::int64_t first, std::int64_t count,
                       float* scratch,          // [(kBlockRows + 1 + tile_rows) * d]
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

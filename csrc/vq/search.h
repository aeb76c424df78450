// SPDX-License-Identifier: Apache-2.0
// What vq.cpp and the kernel of one instruction set tell each other.
//
// The search has two stages. The coarse one scores all codes in small integers and compares by
// float64 distance the few that its error bound leaves; where too many are left it gives the row
// up. The fine one does the same with float32 scores for the rows that are left. Both are exact.
#pragma once

#include <cstdint>

#include "common/buffer.h"
#include "common/isa.h"
#include "vq/vq.h"

namespace t2p::vq {

constexpr std::int64_t kMaxBlockRows = 256;
// What coarse_block gives as the index of a row that it could not decide.
constexpr std::int64_t kUndecided = -1;

// A codebook prepared for the search. A panel is `panel_codes` codes, centred and transposed. With
// no panels given, search_block packs each as it comes to it: right for a single block of rows.
//
// Rows and codes are scored by |c|^2/2 - x.c, which orders codes as |x - c|^2 does, or without the
// norms by -x.c. Subtracting a vector from all codes changes neither order, if for the former it is
// subtracted from the rows as well.
struct Codebook {
  Metric metric;
  const float* codes;   // [k, d], as they came
  const float* scored;  // [k, d], the same or, for kCosine, of length 1
  std::int64_t k, d;
  const float* center = nullptr;      // [d], about the mean of `scored`
  const float* row_center = nullptr;  // [d], `center` for kL2, else 0
  const float* panels = nullptr;      // [ceil(k / panel_codes), d, panel_codes]
  const float* half_norms = nullptr;  // [ceil(k / panel_codes), panel_codes], or 0
  float largest_half_norm = 0;
};

// The same in small integers: value = scale * (integer - zero). They are bytes, four channels of a
// code side by side, or 16-bit words, two by two; the last ones are filled up with zeros. Words are
// more exact, take longer, and are for few channels.
enum class Format { kBytes, kWords };
// With no more channels words may pay for themselves.
constexpr std::int64_t kMostWordChannels = 8;

struct CoarseCodebook {
  Format format;
  float scale;
  const std::uint8_t* panels = nullptr;  // [ceil(k / coarse_codes), coarse_panel_bytes(format, d)]
  const float* half_norms = nullptr;     // [ceil(k / coarse_codes), coarse_codes], negated
  float largest_half_norm = 0;
  float largest_rounding = 0;  // of all |c - its value in integers|^2
};

// |a - b| in float32, a sum of d squares in an order of its own.
float distance(const float* a, const float* b, std::int64_t d);

// Many codes that lie close together, apart from the others: a bound that is about the whole
// codebook cannot choose between them. The others, and the crowd's first code in its place, are a
// codebook that can be searched, and so is the crowd alone.
struct Crowd {
  Buffer<float> other_codes, near_codes;         // [others, d], [near, d], in the codebook's order
  Buffer<std::int64_t> other_index, near_index;  // their numbers in the codebook
  std::int64_t others = 0;
  std::int64_t near = 0;  // 0 if all in the crowd are equal: its first code stands for them
  std::int64_t representative = 0;  // the place of the crowd's first code among the others
  float radius = 0;                 // no code of the crowd is farther from its first one

  // False if there is none, as a look at a few codes nearly always tells; else O(k d). For other
  // metrics than L2 it finds equal codes only.
  bool find(const float* codebook, std::int64_t k, std::int64_t d, Metric metric, int threads);
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

  // Packs `count` codes from number `first` on into one panel; returns the largest |c - center|^2
  // / 2.
  float (*pack_panel)(const Codebook& codebook, std::int64_t first, std::int64_t count,
                      float* panel,        // [d, panel_codes]
                      float* half_norms);  // [panel_codes]

  // The nearest code within `panels` for `count` rows, at most block_rows(d).
  void (*search_block)(const Codebook& codebook, const Rows<const float>& x,
                       const std::int64_t* rows,  // [count]
                       std::int64_t count, PanelRange panels,
                       float* scratch,          // [scratch_size(d)], 64-byte aligned
                       double* distance,        // [count]
                       std::int64_t* indices);  // [count]

  std::int64_t coarse_codes;
  std::int64_t coarse_block_rows;
  bool coarse_pays;  // whether it is faster than the fine stage

  std::int64_t (*coarse_panel_bytes)(Format format, std::int64_t d);

  // The largest |c - center| of any channel of `count` codes from number `first` on; NaNs do not
  // count.
  float (*largest_magnitude)(const Codebook& codebook, std::int64_t first, std::int64_t count);

  // The step between integers for values up to `magnitude`; 0 if the coarse stage cannot be used.
  float (*coarse_scale)(Format format, float magnitude, std::int64_t d);

  // Packs `count` codes from number `first` on into one panel; raises the two maxima.
  void (*pack_coarse)(Format format, const Codebook& codebook, std::int64_t first,
                      std::int64_t count, float scale,
                      std::uint8_t* panel,       // [coarse_panel_bytes(format, d)]
                      float* half_norms,         // [coarse_codes]
                      float& largest_half_norm,  //
                      float& largest_rounding);

  // Bytes of scratch memory that coarse_block wants.
  std::int64_t (*coarse_scratch_size)(std::int64_t d);

  // The nearest code within `panels` for the rows [first, first + count), count at most
  // coarse_block_rows, or kUndecided.
  void (*coarse_block)(const Codebook& codebook, const CoarseCodebook& coarse,
                       const Rows<const float>& x, std::int64_t first, std::int64_t count,
                       PanelRange panels,
                       std::uint8_t* scratch,   // [coarse_scratch_size(d)], 64-byte aligned
                       double* distance,        // [count]
                       std::int64_t* indices);  // [count]
};

T2P_DECLARE_FOR_ISAS(SearchKernels, kSearch)

}  // namespace t2p::vq

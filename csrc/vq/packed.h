// SPDX-License-Identifier: Apache-2.0
// Packed codebooks: the bytes that vq_pack makes, which every search begins with otherwise.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/buffer.h"
#include "common/parallel.h"
#include "vq/search.h"
#include "vq/vq.h"

namespace t2p::vq {

// What vq_pack makes of a codebook, at the beginning of its bytes. The center [d], the panels and
// the half norms follow, each on a cache line's boundary; or, where there is a crowd, its arrays
// and what is made of the others and of the crowd.
struct PackedHeader {
  std::int32_t isa, metric;
  std::int64_t k, d, size;
  CoarseCodebook coarse;  // its pointers are not used; a scale of 0: the stage cannot be used
  std::int64_t others = 0, near = 0, representative = 0;  // as in Crowd; no others: there is none
  float radius = 0;
};

inline std::int64_t aligned(std::int64_t bytes) { return ceil_div(bytes, 64) * 64; }

struct PackedLayout {
  std::int64_t center, panels, half_norms, size;

  PackedLayout(const SearchKernels& kernels, std::int64_t k, std::int64_t d) {
    // Words are the larger of the formats, and used for few channels alone.
    const Format largest = d > kMostWordChannels ? Format::kBytes : Format::kWords;
    const std::int64_t count = ceil_div(k, kernels.coarse_codes);
    center = aligned(sizeof(PackedHeader));
    panels = center + aligned(d * sizeof(float));
    half_norms = panels + aligned(count * kernels.coarse_panel_bytes(largest, d));
    size = half_norms + aligned(count * kernels.coarse_codes * sizeof(float));
  }
};

struct CrowdLayout {
  std::int64_t other_index, near_index, other_codes, near_codes, others, near, size;

  CrowdLayout(const SearchKernels& kernels, std::int64_t other, std::int64_t crowd,
              std::int64_t d) {
    constexpr std::int64_t kIndex = sizeof(std::int64_t), kFloat = sizeof(float);
    other_index = aligned(sizeof(PackedHeader));
    near_index = other_index + aligned(other * kIndex);
    other_codes = near_index + aligned(crowd * kIndex);
    near_codes = other_codes + aligned(other * d * kFloat);
    others = near_codes + aligned(crowd * d * kFloat);
    near = others + PackedLayout(kernels, other, d).size;
    size = near + (crowd ? PackedLayout(kernels, crowd, d).size : 0);
  }
};

template <class T>
T* at(std::uint8_t* bytes, std::int64_t offset) {
  return reinterpret_cast<T*>(bytes + offset);
}
template <class T>
const T* at(const std::uint8_t* bytes, std::int64_t offset) {
  return reinterpret_cast<const T*>(bytes + offset);
}

inline PackedHeader header_of(const std::uint8_t* packed) {
  PackedHeader header;
  std::memcpy(&header, packed, sizeof header);
  return header;
}

// The mean of up to 256 codes. The search is exact about any finite centre; the mean makes its
// rounding small where the data are far from the origin.
void find_center(const float* codebook, std::int64_t k, std::int64_t d, float* center);

// The codes at length 1, in float64 and then rounded; a code of length 0 stays.
Buffer<float> normalize(const float* codebook, std::int64_t k, std::int64_t d, int threads);

// Packs `codebook` without a crowd; its center is found here.
void pack(const SearchKernels& kernels, Codebook codebook, int threads, std::uint8_t* packed);

}  // namespace t2p::vq

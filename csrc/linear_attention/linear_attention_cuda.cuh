// SPDX-License-Identifier: Apache-2.0
// What all kernels share: elements, how sequences are cut, and rows as matrices.
#pragma once

#include <cstdint>

#include "common/carver.h"
#include "common/cuda_check.cuh"
#include "common/half.cuh"
#include "linear_attention/linear_attention.h"

namespace t2p::linear_attention {
namespace {

using std::int64_t;

constexpr const char* kOp = "linear_attention";
constexpr int kTile = 64;  // rows of a tile, and of a chunk of a causal product
constexpr unsigned kAllLanes = 0xffffffffu;

// phi(x); a NaN stays one.
__device__ float mapped(Feature feature, float x) {
  if (feature == Feature::kRelu) return x < 0 ? 0.0f : x;
  if (feature == Feature::kElu) return x > 0 ? x + 1.0f : expf(x);
  return x;
}
// phi'(x) from phi(x).
__device__ float slope(Feature feature, float phi) {
  if (feature == Feature::kRelu) return phi > 0 ? 1.0f : 0.0f;
  if (feature == Feature::kElu) return phi < 1 ? phi : 1.0f;
  return 1.0f;
}

__host__ __device__ inline int64_t blocks_for(int64_t count, int64_t each) {
  return (count + each - 1) / each;
}

// Rows [begin, end) of one sequence.
struct Part {
  int64_t sequence, batch, begin, end;
};

// Sequences cut into parts of `length` rows. Every part has a slot; with offsets, which only the
// device knows, some slots stay empty. Offsets that are no offsets stay within bounds.
struct Cut {
  const int64_t* offsets;
  int64_t sequences, rows, length;  // rows of one sequence or, with offsets, of all

  int64_t slots() const {
    return offsets ? rows / length + sequences : sequences * blocks_for(rows, length);
  }
  __device__ int64_t offset(int64_t sequence) const {
    const int64_t at = offsets[sequence];
    return at < 0 ? 0 : at > rows ? rows : at;
  }
  __device__ int64_t first(int64_t sequence) const { return offsets ? offset(sequence) : 0; }
  __device__ int64_t last(int64_t sequence) const { return offsets ? offset(sequence + 1) : rows; }
  // No two sequences share a slot: floor(a) + ceil(b) <= floor(a + b) + 1.
  __device__ int64_t base(int64_t sequence) const {
    return offsets ? offset(sequence) / length + sequence : sequence * blocks_for(rows, length);
  }
  __device__ int64_t parts(int64_t sequence) const {
    const int64_t count = last(sequence) - first(sequence);
    return count > 0 ? blocks_for(count, length) : 0;
  }
  __device__ bool locate(int64_t slot, Part& part) const {
    int64_t low = 0, high = sequences;  // the sequence is in [low, high)
    if (!offsets) {
      low = slot / blocks_for(rows, length);
    } else {
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (base(middle) <= slot) {
          low = middle;
        } else {
          high = middle;
        }
      }
    }
    const int64_t index = slot - base(low);
    if (index < 0 || index >= parts(low)) return false;
    const int64_t begin = first(low) + index * length, end = last(low);
    part = {low, offsets ? 0 : low, begin, begin + length < end ? begin + length : end};
    return true;
  }
};

// What stands for another channel behind the last one.
enum class Extra { kNone, kOnes, kFactor };

// The rows of a tensor as a product sees them: phi of the channels, 0 where a key is left out,
// times the row's factor if there are any.
struct Source {
  Rows rows;
  int channels;
  Feature feature;
  const std::uint8_t* mask;  // [b, n] or null
  const float2* factors;     // [b, h, m]: {N, u} or null
  int64_t mask_rows, factor_rows;
  Extra extra;
};

template <class T>
struct View {
  const Source& source;
  int64_t head, heads;

  __device__ float at(const Part& part, int64_t row, int channel) const {
    if (row >= part.end || channel >= source.channels || !kept(part, row)) return 0.0f;
    const T* data = static_cast<const T*>(source.rows.data) + place(part, row);
    const float value = mapped(source.feature, to_float(data[channel]));
    return source.factors ? value * factors(part, row).x : value;
  }
  __device__ float extra(const Part& part, int64_t row) const {
    if (row >= part.end || source.extra == Extra::kNone) return 0.0f;
    return source.extra == Extra::kOnes ? 1.0f : factors(part, row).y;
  }
  __device__ bool kept(const Part& part, int64_t row) const {
    return source.mask == nullptr || source.mask[part.batch * source.mask_rows + row] != 0;
  }
  __device__ int64_t place(const Part& part, int64_t row) const {
    return part.batch * source.rows.batch + head * source.rows.head + row * source.rows.row;
  }
  __device__ float2 factors(const Part& part, int64_t row) const {
    return source.factors[(part.batch * heads + head) * source.factor_rows + row];
  }
};

// How many rows a state is summed over. Where all rows see the same, enough parts for any GPU.
inline int64_t part_length(const Attention& attention, int64_t rows) {
  if (attention.causal) return kTile;
  constexpr int64_t kEnough = 1024, kLeast = 256;
  const int64_t all = attention.offsets ? rows : rows * attention.s;
  const int64_t length = blocks_for(all * attention.h, kEnough);
  return blocks_for(length > kLeast ? length : kLeast, kTile) * kTile;
}

inline Cut keys_of(const Attention& a) { return {a.offsets, a.s, a.n, part_length(a, a.n)}; }
inline Cut queries_of(const Attention& a) { return {a.offsets, a.s, a.m, part_length(a, a.m)}; }
inline Cut tiles_of(const Attention& a, int64_t rows) { return {a.offsets, a.s, rows, kTile}; }

// The sources of a call: the names are those of the equations in backward-inl.h.
struct Sources {
  Source queries, keys, values;
  explicit Sources(const Attention& a) {
    queries = {a.q, static_cast<int>(a.d), a.feature, nullptr, nullptr, a.n, a.m, Extra::kNone};
    keys = {a.k, static_cast<int>(a.d), a.feature, a.mask, nullptr, a.n, a.m, Extra::kNone};
    values = {a.v, static_cast<int>(a.e), Feature::kIdentity, a.mask, nullptr, a.n,
              a.m, Extra::kOnes};
  }
};

}  // namespace

// The road through tensor cores, linear_attention_cuda_mma.cu: bfloat16 and few channels.
bool fits_tensor_cores(const Attention& attention, int device);

// Whether rows begin on 16 bytes.
bool fits_vectors(const Rows& rows);

// The states of the parts of keys_of.
void states_mma(const Attention& attention, cudaStream_t stream, float* states);

// Where nothing is causal: from the states [s, h] of whole sequences.
void outputs_mma(const Attention& attention, const float* states, cudaStream_t stream,
                 const Rows& out);

}  // namespace t2p::linear_attention

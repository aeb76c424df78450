// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward kernels share: how sequences are cut, rows as matrices in
// shared memory, and products of tiles on the plain float32 units of any architecture.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/cuda_check.cuh"
#include "linear_attention/linear_attention.h"

namespace t2p::linear_attention {
namespace {

using std::int64_t;

constexpr const char* kOp = "linear_attention";
constexpr int kThreads = 256, kSide = 16;  // a block is kSide by kSide threads
constexpr int kTile = 64;                  // rows of a tile, and of a chunk of a causal product
constexpr int kDepth = 16;                 // of a product, between two barriers
constexpr int kPitch = kTile + 4;          // of shared matrices: rows begin on 16 bytes
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ float to_float(float a) { return a; }
__device__ float to_float(__nv_bfloat16 a) { return __bfloat162float(a); }
__device__ float to_float(__half a) { return __half2float(a); }
template <class T>
__device__ T from_float(float a);
template <>
__device__ float from_float<float>(float a) {
  return a;
}
template <>
__device__ __nv_bfloat16 from_float<__nv_bfloat16>(float a) {
  return __float2bfloat16_rn(a);
}
template <>
__device__ __half from_float<__half>(float a) {
  return __float2half_rn(a);
}

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

// kDepth channels of kTile rows, as to[channel][row].
template <class T>
__device__ void stage_columns(const View<T>& view, const Part& part, int64_t row, int channel,
                              float* to) {
  const int column = threadIdx.x % kDepth;
  for (int i = threadIdx.x / kDepth; i < kTile; i += kThreads / kDepth) {
    to[column * kPitch + i] = view.at(part, row + i, channel + column);
  }
}

// kWidth channels of kDepth rows, as to[row][channel].
template <int kWidth, class T>
__device__ void stage_rows(const View<T>& view, const Part& part, int64_t row, int channel,
                           float* to) {
  const int column = threadIdx.x % kWidth;
  for (int i = threadIdx.x / kWidth; i < kDepth; i += kThreads / kWidth) {
    to[i * kPitch + column] = view.at(part, row + i, channel + column);
  }
}

template <int kCount>
struct alignas(kCount * sizeof(float)) Floats {
  float v[kCount];
};

// sums += a^T b, where a [kDepth, kM kSide] and b [kDepth, kN kSide] are shared.
template <int kM, int kN>
__device__ void multiply(const float* a, const float* b, float (&sums)[kM][kN]) {
  a += threadIdx.x / kSide * kM;
  b += threadIdx.x % kSide * kN;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    const auto left = *reinterpret_cast<const Floats<kM>*>(a + k * kPitch);
    const auto right = *reinterpret_cast<const Floats<kN>*>(b + k * kPitch);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) sums[i][j] = fmaf(left.v[i], right.v[j], sums[i][j]);
    }
  }
}

// States are S [d, e] and z [d], one after another.
inline int64_t state_size(const Attention& attention) {
  return attention.d * attention.e + attention.d;
}

// The state of every part alone: S = sum_j a_j b_j^T, and z = sum_j a_j times b_j's extra channel.
template <class T, int kM, int kN>
__global__ void __launch_bounds__(kThreads, 2)
    accumulate_kernel(const Source a, const Source b, const Cut cut, int64_t heads, float* states) {
  __shared__ float left[kDepth * kPitch], right[kDepth * kPitch], extra[kDepth];
  const int d = a.channels, e = b.channels;
  const int across = (e + kN * kSide - 1) / (kN * kSide);
  const int tiles = (d + kM * kSide - 1) / (kM * kSide) * across;
  const int tile = static_cast<int>(blockIdx.x % tiles), thread = static_cast<int>(threadIdx.x);
  const int64_t head = blockIdx.x / tiles % heads, slot = blockIdx.x / tiles / heads;
  const int first = tile / across * kM * kSide, column = tile % across * kN * kSide;
  Part part;
  if (!cut.locate(slot, part)) return;
  const View<T> rows_a{a, head, heads}, rows_b{b, head, heads};
  float sums[kM][kN] = {}, z = 0;
  for (int64_t row = part.begin; row < part.end; row += kDepth) {
    stage_rows<kM * kSide>(rows_a, part, row, first, left);
    stage_rows<kN * kSide>(rows_b, part, row, column, right);
    if (thread < kDepth) extra[thread] = rows_b.extra(part, row + thread);
    __syncthreads();
    multiply(left, right, sums);
    if (column == 0 && thread < kM * kSide) {
      for (int k = 0; k < kDepth; ++k) z = fmaf(left[k * kPitch + thread], extra[k], z);
    }
    __syncthreads();
  }
  float* state = states + (slot * heads + head) * (static_cast<int64_t>(d) * e + d);
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const int r = first + thread / kSide * kM + i, c = column + thread % kSide * kN + j;
      if (r < d && c < e) state[static_cast<int64_t>(r) * e + c] = sums[i][j];
    }
  }
  if (column == 0 && thread < kM * kSide && first + thread < d) {
    state[static_cast<int64_t>(d) * e + first + thread] = z;
  }
}

// From the state of every part alone to what comes before it (or, `backwards`, after it), or, with
// `totals`, only to the sum of them all.
struct Combination {
  Cut cut;
  int64_t heads, d, e;
  const float* initial;  // [s, h, d, e + 1] or null
  float* parts;
  float* totals;  // or null
  float* state;   // [s, h, d, e + 1] or null: the sum for the user
  bool backwards;
};

__global__ void __launch_bounds__(kThreads, 2) combine_kernel(const Combination all) {
  const int64_t size = all.d * all.e + all.d, blocks = (size + kThreads - 1) / kThreads;
  const int64_t task = blockIdx.x / blocks, i = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (i >= size) return;
  const int64_t sequence = task / all.heads, head = task % all.heads;
  const int64_t row = i < all.d * all.e ? i / all.e : i - all.d * all.e;
  const int64_t column = i < all.d * all.e ? i % all.e : all.e;
  const int64_t outside = (task * all.d + row) * (all.e + 1) + column;
  const int64_t base = all.cut.base(sequence), count = all.cut.parts(sequence);
  float sum = all.initial ? all.initial[outside] : 0.0f;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t slot = base + (all.backwards ? count - 1 - k : k);
    float* part = all.parts + (slot * all.heads + head) * size + i;
    const float own = *part;
    if (all.totals == nullptr) *part = sum;
    sum += own;
  }
  if (all.totals) all.totals[task * size + i] = sum;
  if (all.state) all.state[outside] = sum;
}

enum class Pairs { kNone, kBefore, kAfter };  // which rows of its chunk a row sees
enum class Result { kOut, kFactors, kGradient };

// out_r = a_r M + sum_c (a_r . b_c) c_c over the rows c of r's chunk that r sees; extra channels
// take part on the left. M is the state or, transposed, the state of which z is the extra row.
struct Product {
  Source a, b, c;
  Pairs pairs;
  const float* states;  // of every part if there are pairs, else of every sequence
  bool transposed;
  Cut cut;
  int64_t heads;
  int d, e;
  // kOut and kFactors: also the normaliser, which makes the factors N and u.
  bool normalize;
  float eps, scale;
  Source grads;     // kFactors
  float2* factors;  // kFactors: [b, h, m]
  // kGradient: times phi' of these rows, and 0 where they are left out.
  Source own;
  Rows out;  // kOut, kGradient
};

}  // namespace
}  // namespace t2p::linear_attention

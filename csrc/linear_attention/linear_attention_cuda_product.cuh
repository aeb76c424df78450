// SPDX-License-Identifier: Apache-2.0
// States of rows on the plain float32 units of any architecture, and the product that outputs,
// factors and all gradients are made of.
#pragma once

#include "linear_attention/linear_attention_cuda.cuh"

namespace t2p::linear_attention {
namespace {

constexpr int kThreads = 256, kSide = 16;  // a block is kSide by kSide threads
constexpr int kDepth = 16;                 // of a product, between two barriers
constexpr int kPitch = kTile + 4;          // of shared matrices: rows begin on 16 bytes

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

template <class T, int kN, Result kResult>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(const Product p) {
  constexpr int kRows = kTile / kSide, kWidth = kN * kSide;
  constexpr bool kNormalizes = kResult != Result::kGradient;
  __shared__ float left[kDepth * kPitch], right[kDepth * kPitch];
  __shared__ float pairs[kTile * kPitch];  // [c][r]
  __shared__ float by[kTile];              // the factors of rows
  const int64_t head = blockIdx.x % p.heads, slot = blockIdx.x / p.heads;
  Part part;
  if (!p.cut.locate(slot, part)) return;
  const int thread = static_cast<int>(threadIdx.x), tx = thread % kSide, ty = thread / kSide;
  const int depth = p.transposed ? p.e : p.d, width = p.transposed ? p.d : p.e;
  const int64_t d = p.d, e = p.e, row = part.begin + ty * kRows;
  const float* state =
      p.states + ((p.pairs == Pairs::kNone ? part.sequence : slot) * p.heads + head) * (d * e + d);
  const View<T> a{p.a, head, p.heads}, b{p.b, head, p.heads}, c{p.c, head, p.heads};

  if (p.pairs != Pairs::kNone) {
    float sums[kRows][4] = {};
    for (int k = 0; k < depth; k += kDepth) {
      stage_columns(a, part, part.begin, k, left);
      stage_columns(b, part, part.begin, k, right);
      __syncthreads();
      multiply(left, right, sums);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int r = ty * kRows + i, column = tx * 4 + j;
        const bool seen = p.pairs == Pairs::kBefore ? column <= r : column >= r;
        const float with_extra =
            fmaf(a.extra(part, part.begin + r), b.extra(part, part.begin + column), sums[i][j]);
        pairs[column * kPitch + r] = seen ? with_extra : 0.0f;
      }
    }
    __syncthreads();
  }

  float normalizer = 0, dots[kRows] = {};
  if (kNormalizes && p.pairs != Pairs::kNone && thread < kTile) {
    for (int j = 0; j < kTile; ++j) normalizer += pairs[j * kPitch + thread];
  }
  for (int column = 0; column < width; column += kWidth) {
    float sums[kRows][kN] = {};
    if (p.transposed) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int at = column + tx * kN + j;
        const float z = at < width ? state[d * e + at] : 0.0f;
#pragma unroll
        for (int i = 0; i < kRows; ++i) sums[i][j] = a.extra(part, row + i) * z;
      }
    }
    for (int k = 0; k < depth; k += kDepth) {
      stage_columns(a, part, part.begin, k, left);
      // Lanes follow the memory of the state.
      for (int i = thread; i < kDepth * kWidth; i += kThreads) {
        const int inner = p.transposed ? i % kDepth : i / kWidth;
        const int outer = p.transposed ? i / kDepth : i % kWidth;
        const int from = k + inner, to = column + outer;
        const int64_t at = p.transposed ? to * e + from : from * e + to;
        right[inner * kPitch + outer] = from < depth && to < width ? state[at] : 0.0f;
      }
      __syncthreads();
      multiply(left, right, sums);
      if (kNormalizes && column == 0 && thread < kTile) {
        for (int i = 0; i < kDepth && k + i < depth; ++i) {
          normalizer = fmaf(left[i * kPitch + thread], state[d * e + k + i], normalizer);
        }
      }
      __syncthreads();
    }
    if (p.pairs != Pairs::kNone) {
      for (int k = 0; k < kTile && part.begin + k < part.end; k += kDepth) {
        stage_rows<kWidth>(c, part, part.begin + k, column, right);
        __syncthreads();
        multiply(pairs + k * kPitch, right, sums);
        __syncthreads();
      }
    }
    if (kNormalizes && column == 0) {
      if (thread < kTile) {
        by[thread] = p.normalize ? p.scale / fmaf(p.scale, normalizer, p.eps) : p.scale;
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row + i >= part.end) continue;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int at = column + tx * kN + j;
        if (at >= width) continue;
        if constexpr (kResult == Result::kFactors) {
          const View<T> grads{p.grads, head, p.heads};
          dots[i] = fmaf(sums[i][j], grads.at(part, row + i, at), dots[i]);
        } else {
          float value = sums[i][j];
          if constexpr (kResult == Result::kOut) {
            value *= by[ty * kRows + i];
          } else {
            const View<T> own{p.own, head, p.heads};
            value = own.kept(part, row + i)
                        ? value * slope(p.own.feature, own.at(part, row + i, at))
                        : 0.0f;
          }
          T* out = static_cast<T*>(p.out.data) + part.batch * p.out.batch + head * p.out.head +
                   (row + i) * p.out.row;
          out[at] = from_float<T>(value);
        }
      }
    }
  }
  if constexpr (kResult == Result::kFactors) {
    // t = o . g = N sum, and u = -N t, or 0 without normalisation.
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float sum = dots[i];
#pragma unroll
      for (int step = 1; step < kSide; step *= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, step);
      }
      if (tx == 0 && row + i < part.end) {
        const float n = by[ty * kRows + i], u = p.normalize ? -n * n * sum : 0.0f;
        p.factors[(part.batch * p.heads + head) * p.a.factor_rows + row + i] = {n, u};
      }
    }
  }
}

// Launches ----------------------------------------------------------------------------------------

template <class T, Result kResult>
void launch_product(const Product& p, cudaStream_t stream) {
  const unsigned blocks = grid_size(p.cut.slots() * p.heads, kOp);
  if (blocks == 0) return;
  if ((p.transposed ? p.d : p.e) <= 2 * kSide) {
    product_kernel<T, 2, kResult><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    product_kernel<T, 4, kResult><<<blocks, kThreads, 0, stream>>>(p);
  }
  check_launch(kOp);
}

template <class T>
void launch_states(const Source& a, const Source& b, const Combination& all, cudaStream_t stream) {
  const int64_t slots = all.cut.slots() * all.heads;
  if (slots == 0) return;
  constexpr int64_t kSmall = 2 * kSide, kLarge = 4 * kSide;
  if (a.channels <= kSmall && b.channels <= kSmall) {
    accumulate_kernel<T, 2, 2>
        <<<grid_size(slots, kOp), kThreads, 0, stream>>>(a, b, all.cut, all.heads, all.parts);
  } else {
    const int64_t tiles = blocks_for(a.channels, kLarge) * blocks_for(b.channels, kLarge);
    accumulate_kernel<T, 4, 4><<<grid_size(slots * tiles, kOp), kThreads, 0, stream>>>(
        a, b, all.cut, all.heads, all.parts);
  }
  check_launch(kOp);
}

inline void launch_combination(const Combination& all, cudaStream_t stream) {
  const int64_t blocks = blocks_for(all.d * all.e + all.d, kThreads);
  combine_kernel<<<grid_size(all.cut.sequences * all.heads * blocks, kOp), kThreads, 0, stream>>>(
      all);
  check_launch(kOp);
}

}  // namespace
}  // namespace t2p::linear_attention

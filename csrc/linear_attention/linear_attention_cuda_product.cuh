// SPDX-License-Identifier: Apache-2.0
// The product that outputs, factors and all gradients are made of.
#pragma once

#include "linear_attention/linear_attention_cuda.cuh"

namespace t2p::linear_attention {
namespace {

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
  const auto blocks = static_cast<unsigned>(p.cut.slots() * p.heads);
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
  const auto slots = all.cut.slots() * all.heads;
  if (slots > 0) {
    const int64_t small = 2 * kSide, large = 4 * kSide;
    if (a.channels <= small && b.channels <= small) {
      accumulate_kernel<T, 2, 2><<<static_cast<unsigned>(slots), kThreads, 0, stream>>>(
          a, b, all.cut, all.heads, all.parts);
    } else {
      const int64_t tiles = blocks_for(a.channels, large) * blocks_for(b.channels, large);
      accumulate_kernel<T, 4, 4><<<static_cast<unsigned>(slots * tiles), kThreads, 0, stream>>>(
          a, b, all.cut, all.heads, all.parts);
    }
    check_launch(kOp);
  }
  const int64_t blocks = blocks_for(all.d * all.e + all.d, kThreads);
  combine_kernel<<<static_cast<unsigned>(all.cut.sequences * all.heads * blocks), kThreads, 0,
                   stream>>>(all);
  check_launch(kOp);
}

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
}  // namespace t2p::linear_attention

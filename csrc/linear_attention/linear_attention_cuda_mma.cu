// SPDX-License-Identifier: Apache-2.0
// The road through tensor cores, for compute capability 8.0 and newer, bfloat16 and up to 64
// channels, with a feature map whose values are bfloat16 numbers again (ReLU, identity): states,
// and outputs where all queries see the same state. Products are exact, sums float32; the float32
// state is split into three bfloat16 numbers, which hold all of its digits.
//
// Fragments are those of common/mma.cuh.
#include <cuda_runtime.h>

#include "common/mma.cuh"
#include "linear_attention/linear_attention_cuda.cuh"

namespace t2p::linear_attention {
namespace {

constexpr int kWarp = 32, kWarps = 4, kMmaThreads = kWarps * kWarp;
constexpr int kGroup = 16;                   // rows that a warp takes at a time
constexpr int kSplits = 3;                   // of a float32
constexpr int kQueries = 256;                // of a block
constexpr std::uint32_t kOnes = 0x3f803f80;  // two bfloat16

__device__ std::uint32_t mapped_pair(Feature feature, std::uint32_t pair) {
  return feature == Feature::kRelu ? max_of_pairs(pair, 0) : pair;
}

// Rows of keys or values on their way to a warp's own part of shared memory.
template <int kC>
struct Ring {
  static constexpr int kStages = kC == 32 ? 3 : 2, kPitch = kC + 8;
  std::uint16_t rows[kStages][2][kGroup][kPitch];
};

template <int kC>
__device__ void request(const View<__nv_bfloat16>& view, const Part& part, int64_t row,
                        std::uint16_t (&to)[kGroup][Ring<kC>::kPitch]) {
  constexpr int kVectors = kC / 8;
  const auto* data = static_cast<const __nv_bfloat16*>(view.source.rows.data);
  for (int i = threadIdx.x % kWarp; i < kGroup * kVectors; i += kWarp) {
    const int64_t at = row + i / kVectors;
    const int channel = i % kVectors * 8;
    const bool there = at < part.end && channel < view.source.channels && view.kept(part, at);
    const __nv_bfloat16* from = there ? data + view.place(part, at) + channel : data;
    copy_async(shared_address(&to[i / kVectors][channel]), from, there ? 16 : 0);
  }
}

// States of parts, as accumulate_kernel; each warp takes every fourth group of rows.
template <int kC>
__global__ void __launch_bounds__(kMmaThreads, 2)
    states_mma_kernel(const Source a, const Source b, const Cut cut, int64_t heads, float* states) {
  using Own = Ring<kC>;
  constexpr int kRowTiles = kC / 16, kColumnTiles = kC / 8, kSumPitch = kC + 1;
  constexpr int kStages = Own::kStages;
  __shared__ alignas(16) Own rings[kWarps];
  static_assert(sizeof(rings) >= kC * kSumPitch * sizeof(float));
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t head = blockIdx.x % heads, slot = blockIdx.x / heads;
  Part part;
  if (!cut.locate(slot, part)) return;
  const View<__nv_bfloat16> keys{a, head, heads}, values{b, head, heads};
  Own& ring = rings[warp];
  const int64_t first = part.begin + warp * kGroup, step = kWarps * kGroup;
  // A copy past the end brings zeros, so that every group has its copies.
  const auto fetch = [&](int stage, int64_t row) {
    if (row < part.end) {
      request<kC>(keys, part, row, ring.rows[stage][0]);
      request<kC>(values, part, row, ring.rows[stage][1]);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i, first + i * step);
  float sums[kRowTiles][kColumnTiles + 1][4] = {};
  int stage = 0;
  for (int64_t row = first; row < part.end; row += step) {
    wait_for_copies<kStages - 2>();
    __syncwarp();
    fetch(stage == 0 ? kStages - 1 : stage - 1, row + (kStages - 1) * step);
    // Transposed, channels of keys are the rows of a, and of values the columns of b.
    std::uint32_t left[kRowTiles][4];
    const int from = lane % 8, matrix = lane / 8;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      load_transposed(
          left[i],
          shared_address(&ring.rows[stage][0][from + matrix / 2 * 8][i * 16 + matrix % 2 * 8]));
#pragma unroll
      for (int k = 0; k < 4; ++k) left[i][k] = mapped_pair(a.feature, left[i][k]);
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      std::uint32_t right[4];
      load_transposed(
          right,
          shared_address(&ring.rows[stage][1][from + matrix % 2 * 8][j * 8 + matrix / 2 * 8]));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        multiply_add(sums[i][j], left[i], right[0], right[1]);
        multiply_add(sums[i][j + 1], left[i], right[2], right[3]);
      }
    }
    const std::uint32_t ones = lane / 4 == 0 ? kOnes : 0;  // column 0 sums the keys
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) multiply_add(sums[i][kColumnTiles], left[i], ones, ones);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  wait_for_copies<0>();
  __syncthreads();
  // The sums of the warps, one after another.
  auto* const total = reinterpret_cast<float*>(rings);
  for (int turn = 0; turn < kWarps; ++turn) {
    if (turn == warp) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnTiles + 1; ++j) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int r = i * 16 + lane / 4 + k / 2 * 8, c = j * 8 + lane % 4 * 2 + k % 2;
            if (c > kC) continue;
            float* const to = total + r * kSumPitch + c;
            *to = turn == 0 ? sums[i][j][k] : *to + sums[i][j][k];
          }
        }
      }
    }
    __syncthreads();
  }
  const int d = a.channels, e = b.channels;
  float* const state = states + (slot * heads + head) * (static_cast<int64_t>(d) * e + d);
  for (int i = threadIdx.x; i < d * e; i += kMmaThreads)
    state[i] = total[i / e * kSumPitch + i % e];
  for (int i = threadIdx.x; i < d; i += kMmaThreads) state[d * e + i] = total[i * kSumPitch + kC];
}

// A float32 as three bfloat16; the first alone if it is not finite.
struct Split {
  std::uint16_t part[kSplits];
};
__device__ Split split(float a) {
  Split result;
#pragma unroll
  for (int i = 0; i < kSplits; ++i) {
    const __nv_bfloat16 near = __float2bfloat16_rn(a);
    result.part[i] = __bfloat16_as_ushort(near);
    const float value = __bfloat162float(near);
    a = isfinite(value) ? a - value : 0.0f;
  }
  return result;
}

struct Outputs {
  Source queries;
  Cut cut;
  int64_t heads;
  const float* states;  // of whole sequences
  int d, e;
  bool normalize;
  float eps, scale;
  Rows out;
};

// The outputs of up to kQueries queries. Both sums and columns are taken in an order in which what
// a lane holds of a row lies side by side in memory: of 32 channels, lane t of the four that share
// a row has 8 t to 8 t + 7.
template <int kC>
__global__ void __launch_bounds__(kMmaThreads, 2) outputs_mma_kernel(const Outputs p) {
  constexpr int kBlocks = kC / 32, kDepthTiles = kC / 16, kColumnTiles = kC / 8;
  __shared__ uint2 state[kSplits][kDepthTiles][kColumnTiles + 1][kWarp];  // fragments of b
  const int64_t head = blockIdx.x % p.heads, slot = blockIdx.x / p.heads;
  Part part;
  if (!p.cut.locate(slot, part)) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, d = p.d, e = p.e;
  const float* s = p.states + (part.sequence * p.heads + head) * (static_cast<int64_t>(d) * e + d);
  for (int i = warp; i < kDepthTiles * (kColumnTiles + 1); i += kWarps) {
    const int depth = i / (kColumnTiles + 1), tile = i % (kColumnTiles + 1);
    const int q = lane / 4, t = lane % 4;
    // Tiles 4 i to 4 i + 3 hold the columns from 32 i on; the last tile, z in column 0.
    const int column = tile / 4 * 32 + q / 2 * 8 + tile % 4 * 2 + q % 2;
    const bool is_z = tile == kColumnTiles;
    std::uint16_t parts[kSplits][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int channel = depth / 2 * 32 + t * 8 + depth % 2 * 4 + k;
      float value = 0;
      if (channel < d && is_z && q == 0) value = s[d * e + channel];
      if (channel < d && !is_z && column < e) value = s[channel * e + column];
      const Split own = split(value);
#pragma unroll
      for (int m = 0; m < kSplits; ++m) parts[m][k] = own.part[m];
    }
#pragma unroll
    for (int m = 0; m < kSplits; ++m) {
      state[m][depth][tile][lane] = {parts[m][0] | static_cast<std::uint32_t>(parts[m][1]) << 16,
                                     parts[m][2] | static_cast<std::uint32_t>(parts[m][3]) << 16};
    }
  }
  __syncthreads();
  const View<__nv_bfloat16> queries{p.queries, head, p.heads};
  const auto* data = static_cast<const __nv_bfloat16*>(p.queries.rows.data);
  auto* const out =
      static_cast<__nv_bfloat16*>(p.out.data) + part.batch * p.out.batch + head * p.out.head;
  const int t = lane % 4;
  for (int64_t row = part.begin + warp * kGroup; row < part.end; row += kWarps * kGroup) {
    uint4 loaded[2][kBlocks];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = row + lane / 4 + half * 8;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int channel = i * 32 + t * 8;
        loaded[half][i] = {0, 0, 0, 0};
        if (at < part.end && channel < d) {
          loaded[half][i] =
              *reinterpret_cast<const uint4*>(data + queries.place(part, at) + channel);
        }
      }
    }
    float sums[kColumnTiles + 1][4] = {};
#pragma unroll
    for (int depth = 0; depth < kDepthTiles; ++depth) {
      const uint4 low = loaded[0][depth / 2], high = loaded[1][depth / 2];
      std::uint32_t left[4];
      left[0] = mapped_pair(p.queries.feature, depth % 2 == 0 ? low.x : low.z);
      left[1] = mapped_pair(p.queries.feature, depth % 2 == 0 ? high.x : high.z);
      left[2] = mapped_pair(p.queries.feature, depth % 2 == 0 ? low.y : low.w);
      left[3] = mapped_pair(p.queries.feature, depth % 2 == 0 ? high.y : high.w);
#pragma unroll
      for (int j = 0; j < kColumnTiles + 1; ++j) {
#pragma unroll
        for (int m = kSplits - 1; m >= 0; --m) {
          const uint2 right = state[m][depth][j][lane];
          multiply_add(sums[j], left, right.x, right.y);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // z is in column 0, which the first of the four lanes holds.
      const float normalizer = __shfl_sync(kAllLanes, sums[kColumnTiles][half * 2], lane / 4 * 4);
      const float by = p.normalize ? p.scale / fmaf(p.scale, normalizer, p.eps) : p.scale;
      const int64_t at = row + lane / 4 + half * 8;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int column = i * 32 + t * 8;
        if (at >= part.end || column >= e) continue;
        __nv_bfloat162 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          pairs[j] = __floats2bfloat162_rn(by * sums[4 * i + j][half * 2],
                                           by * sums[4 * i + j][half * 2 + 1]);
        }
        uint4 packed;
        packed.x = *reinterpret_cast<std::uint32_t*>(&pairs[0]);
        packed.y = *reinterpret_cast<std::uint32_t*>(&pairs[1]);
        packed.z = *reinterpret_cast<std::uint32_t*>(&pairs[2]);
        packed.w = *reinterpret_cast<std::uint32_t*>(&pairs[3]);
        *reinterpret_cast<uint4*>(out + at * p.out.row + column) = packed;
      }
    }
  }
}

}  // namespace

bool fits_vectors(const Rows& rows) {
  return reinterpret_cast<std::uintptr_t>(rows.data) % 16 == 0 && rows.batch % 8 == 0 &&
         rows.head % 8 == 0 && rows.row % 8 == 0;
}

bool fits_tensor_cores(const Attention& a, int device) {
  if (a.q.format != Format::kBf16 || a.feature == Feature::kElu) return false;
  if (a.d > 64 || a.e > 64 || a.d % 8 != 0 || a.e % 8 != 0) return false;
  if (!fits_vectors(a.q) || !fits_vectors(a.k) || !fits_vectors(a.v)) return false;
  int major = 0;
  cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp);
  return major >= 8;
}

void states_mma(const Attention& attention, cudaStream_t stream, float* states) {
  const Sources sources(attention);
  const Cut cut = keys_of(attention);
  const unsigned blocks = grid_size(cut.slots() * attention.h, kOp);
  if (blocks == 0) return;
  const auto kernel =
      attention.d <= 32 && attention.e <= 32 ? states_mma_kernel<32> : states_mma_kernel<64>;
  kernel<<<blocks, kMmaThreads, 0, stream>>>(sources.keys, sources.values, cut, attention.h,
                                             states);
  check_launch(kOp);
}

void outputs_mma(const Attention& attention, const float* states, cudaStream_t stream,
                 const Rows& out) {
  const Cut cut{attention.offsets, attention.s, attention.m, kQueries};
  const unsigned blocks = grid_size(cut.slots() * attention.h, kOp);
  if (blocks == 0) return;
  const Outputs outputs{Sources(attention).queries,
                        cut,
                        attention.h,
                        states,
                        static_cast<int>(attention.d),
                        static_cast<int>(attention.e),
                        attention.normalize,
                        attention.eps,
                        attention.scale,
                        out};
  const auto kernel =
      attention.d <= 32 && attention.e <= 32 ? outputs_mma_kernel<32> : outputs_mma_kernel<64>;
  kernel<<<blocks, kMmaThreads, 0, stream>>>(outputs);
  check_launch(kOp);
}

}  // namespace t2p::linear_attention

// SPDX-License-Identifier: Apache-2.0
// Belief propagation and iterated conditional modes on CUDA, for any architecture.
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/cuda_check.cuh"
#include "mrf/mrf.h"
#include "mrf/mrf_cuda.cuh"

namespace t2p::mrf {
namespace {

using std::int64_t;

constexpr int kMostEdges = 4;  // that read W_c together

// A number for each of the edges that are at work together.
template <int kEdges>
struct alignas(4 * kEdges) Group {
  float of[kEdges];
};

// beliefs[i, a], summed in the order of the edges.
__device__ float belief_of(const Edges& edges, const BeliefStep& step, const float* unary,
                           const float* messages, int64_t i, int64_t a) {
  float sum = unary[i * step.v + a];
  for (int64_t e = edges.begin[i]; e < edges.begin[i + 1]; ++e) {
    sum += messages[step.reverse[e] * step.v + a];
  }
  return sum;
}

// A block sends what a position of `order` has to say, along kEdges edges at a time: a thread makes
// every so-manieth label of the messages. `shared` holds h, then the messages, [v] each.
template <int kEdges>
__global__ void __launch_bounds__(kThreads)
    belief_kernel(const Edges edges, const BeliefStep step, const float* from, float* to) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float maxima[kEdges][kWarps];
  using Few = Group<kEdges>;
  Few* const h = reinterpret_cast<Few*>(shared);
  const int64_t v = step.v, picture = blockIdx.x / step.count;
  Few* const message = h + v;
  const int64_t i = step.order[blockIdx.x % step.count];
  const float* const unary = step.unary + picture * step.n * v;
  from += picture * step.e * v;
  to += picture * step.e * v;
  const float inverse = step.temperature > 0 ? 1 / step.temperature : 0;
  const int warps = blockDim.x / kWarp;
  const int64_t end = edges.begin[i + 1];
  for (int64_t first = edges.begin[i]; first < end; first += kEdges) {
    // Where fewer edges are left the last one is repeated, and not written again.
    int64_t edge[kEdges];
    float weight[kEdges], largest[kEdges];
#pragma unroll
    for (int k = 0; k < kEdges; ++k) {
      edge[k] = first + k < end ? first + k : end - 1;
      weight[k] = edges.weight[edge[k]];
      largest[k] = -infinity();
    }
    __syncthreads();
    for (int64_t a = threadIdx.x; a < v; a += blockDim.x) {
      const float belief = belief_of(edges, step, unary, from, i, a);
#pragma unroll
      for (int k = 0; k < kEdges; ++k) {
        // Without -inf - -inf: a label that a message rules out stays ruled out.
        const float back = from[step.reverse[edge[k]] * v + a];
        h[a].of[k] = belief > -infinity() ? belief - back : belief;
      }
    }
    __syncthreads();
    for (int64_t c = threadIdx.x; c < v; c += blockDim.x) {
      Few most;
#pragma unroll
      for (int k = 0; k < kEdges; ++k) most.of[k] = -infinity();
#pragma unroll 4
      for (int64_t a = 0; a < v; ++a) {
        const float pair = step.w_c[a * v + c];
        const Few score = h[a];
#pragma unroll
        for (int k = 0; k < kEdges; ++k) {
          most.of[k] = fmaxf(most.of[k], fmaf(weight[k], pair, score.of[k]));
        }
      }
      if (step.temperature > 0) {
        float sum[kEdges] = {};
#pragma unroll 2
        for (int64_t a = 0; a < v; ++a) {
          const float pair = step.w_c[a * v + c];
          const Few score = h[a];
#pragma unroll
          for (int k = 0; k < kEdges; ++k) {
            sum[k] += expf((fmaf(weight[k], pair, score.of[k]) - most.of[k]) * inverse);
          }
        }
#pragma unroll
        for (int k = 0; k < kEdges; ++k) {
          most.of[k] = fmaf(step.temperature, logf(sum[k]), most.of[k]);
        }
      }
      message[c] = most;
#pragma unroll
      for (int k = 0; k < kEdges; ++k) largest[k] = fmaxf(largest[k], most.of[k]);
    }
#pragma unroll
    for (int k = 0; k < kEdges; ++k) {
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        largest[k] = fmaxf(largest[k], __shfl_xor_sync(kAllLanes, largest[k], lanes));
      }
      if (threadIdx.x % kWarp == 0) maxima[k][threadIdx.x / kWarp] = largest[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kEdges; ++k) {
      if (first + k >= end) break;
      float most = maxima[k][0];
      for (int warp = 1; warp < warps; ++warp) most = fmaxf(most, maxima[k][warp]);
      const float* const before = from + edge[k] * v;
      float* const after = to + edge[k] * v;
      const float kept = step.damping;
      for (int64_t c = threadIdx.x; c < v; c += blockDim.x) {
        const float fresh = message[c].of[k] - most;
        after[c] = kept != 0 ? (1 - kept) * fresh + kept * before[c] : fresh;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) beliefs_kernel(const Edges edges, const BeliefStep step,
                                                           const float* messages, float* beliefs) {
  const int64_t picture = blockIdx.x / step.n, i = blockIdx.x % step.n, v = step.v;
  for (int64_t a = threadIdx.x; a < v; a += blockDim.x) {
    beliefs[blockIdx.x * v + a] = belief_of(edges, step, step.unary + picture * step.n * v,
                                            messages + picture * step.e * v, i, a);
  }
}

struct Icm {
  Edges edges;
  const float *unary, *w_c;
  const int64_t* known;
  int64_t n, v, sweeps;
  int64_t* labels;
};

struct Best {
  float score;
  int64_t label;
};
// The larger score, of equals the first label.
__device__ Best better(const Best& a, const Best& b) {
  return b.score > a.score || (b.score == a.score && b.label < a.label) ? b : a;
}

__device__ double score_of(const Icm& icm, const float* unary, const int64_t* x, int64_t i,
                           int64_t a) {
  double score = unary[i * icm.v + a];
  for (int64_t e = icm.edges.begin[i]; e < icm.edges.begin[i + 1]; ++e) {
    score += double{icm.edges.weight[e]} * icm.w_c[x[icm.edges.node[e]] * icm.v + a];
  }
  return score;
}

// A block per picture, a position after the other, and all labels of one side by side.
__global__ void __launch_bounds__(kThreads) icm_kernel(const Icm icm) {
  __shared__ Best bests[kWarps];
  const int64_t v = icm.v, base = blockIdx.x * icm.n;
  const float* const unary = icm.unary + base * v;
  int64_t* const x = icm.labels + base;
  const int warps = blockDim.x / kWarp;
  bool changed = true;
  for (int64_t sweep = 0; changed && sweep < icm.sweeps; ++sweep) {
    changed = false;
    for (int64_t i = 0; i < icm.n; ++i) {
      if (icm.known[base + i] >= 0) continue;
      const int64_t present = x[i];
      Best best{-infinity(), v};
      for (int64_t a = threadIdx.x; a < v; a += blockDim.x) {
        float score = unary[i * v + a];
        for (int64_t e = icm.edges.begin[i]; e < icm.edges.begin[i + 1]; ++e) {
          score = fmaf(icm.edges.weight[e], icm.w_c[x[icm.edges.node[e]] * v + a], score);
        }
        best = better(best, {score, a});
      }
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        best = better(best, {__shfl_xor_sync(kAllLanes, best.score, lanes),
                             __shfl_xor_sync(kAllLanes, best.label, lanes)});
      }
      if (threadIdx.x % kWarp == 0) bests[threadIdx.x / kWarp] = best;
      __syncthreads();
      for (int warp = 0; warp < warps; ++warp) best = better(best, bests[warp]);
      // All threads come to the same decision, from the same numbers.
      const bool moves = best.label != present && score_of(icm, unary, x, i, best.label) >
                                                      score_of(icm, unary, x, i, present);
      __syncthreads();
      if (!moves) continue;
      if (threadIdx.x == 0) x[i] = best.label;
      changed = true;
      __syncthreads();
    }
  }
}

template <int kEdges>
void launch_belief(const Edges& edges, const BeliefStep& step, unsigned blocks, int threads,
                   const float* from, cudaStream_t stream, float* to) {
  constexpr const char* kOp = "mrf_bp";
  const std::size_t shared = 2 * step.v * sizeof(Group<kEdges>);
  cuda_check(
      cudaFuncSetAttribute(belief_kernel<kEdges>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared)),
      kOp);
  belief_kernel<kEdges><<<blocks, threads, shared, stream>>>(edges, step, from, to);
  check_launch(kOp);
}

// Whole warps, as many as v labels have work for.
int threads_for(int64_t v) {
  return v < kThreads ? static_cast<int>((v + kWarp - 1) / kWarp * kWarp) : kThreads;
}

}  // namespace

// The floor for 16 pictures of 16 x 16 positions with 4 neighbours and 1024 labels on an H200: b e
// v^2 = 16 G maxima, 1.1 ms at 64 a clock and processor; W_c is read once for four edges, from the
// L2 cache. Not yet run on a GPU.
void belief_step_cuda(const Edges& edges, const BeliefStep& step, const float* from, int device,
                      void* stream, float* to) {
  constexpr const char* kOp = "mrf_bp";
  if (step.b * step.count == 0) return;
  const DeviceGuard guard(device, kOp);
  const unsigned blocks = grid_size(step.b * step.count, kOp);
  int most = 0;
  cuda_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp);
  const std::int64_t room = most - (1 << 10);  // for what the kernel has of its own
  const auto fits = [&](std::size_t each) {
    return 2 * step.v * static_cast<std::int64_t>(each) <= room;
  };
  const auto launch =
      fits(sizeof(Group<kMostEdges>)) ? launch_belief<kMostEdges> : launch_belief<1>;
  if (!fits(sizeof(Group<1>))) {
    throw std::runtime_error(std::string(kOp) + ": on this device v is at most " +
                             std::to_string(room / 8) + ", got " + std::to_string(step.v));
  }
  launch(edges, step, blocks, threads_for(step.v), from, static_cast<cudaStream_t>(stream), to);
}

void beliefs_cuda(const Edges& edges, const BeliefStep& step, const float* messages, int device,
                  void* stream, float* beliefs) {
  constexpr const char* kOp = "mrf_bp";
  if (step.b * step.n == 0) return;
  const DeviceGuard guard(device, kOp);
  beliefs_kernel<<<grid_size(step.b * step.n, kOp), threads_for(step.v), 0,
                   static_cast<cudaStream_t>(stream)>>>(edges, step, messages, beliefs);
  check_launch(kOp);
}

void icm_cuda(const Edges& edges, const float* unary, const float* w_c, const std::int64_t* known,
              std::int64_t b, std::int64_t n, std::int64_t v, std::int64_t sweeps, int device,
              void* stream, std::int64_t* labels) {
  constexpr const char* kOp = "mrf_icm";
  if (b * n == 0) return;
  const DeviceGuard guard(device, kOp);
  icm_kernel<<<grid_size(b, kOp), threads_for(v), 0, static_cast<cudaStream_t>(stream)>>>(
      {edges, unary, w_c, known, n, v, sweeps, labels});
  check_launch(kOp);
}

}  // namespace t2p::mrf

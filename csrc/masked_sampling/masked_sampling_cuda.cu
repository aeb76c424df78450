// SPDX-License-Identifier: Apache-2.0
// The plain CUDA road, for any architecture. The method is that of masked_sampling-inl.h:
//
//   x_v    = c_v + guidance (c_v - u_v), -inf where min_p or top_k take the word out
//   token  = argmax_v x_v + temperature g_v           a block per position
//   log p  = x_token - max x - log sum_v exp(x_v - max x)
//   then the mask_count least confident positions are masked again     a block per picture
//
// The logits are read from memory once; the passes after the first find them in the cache.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_check.cuh"
#include "common/philox.h"
#include "common/reduce.cuh"
#include "masked_sampling/masked_sampling.h"

namespace t2p::masked_sampling {
namespace {

using std::int64_t;
using std::uint32_t;
using std::uint64_t;

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kCounters = 16, kGroup = 4 * kCounters;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ float infinity() { return __int_as_float(0x7f800000); }
__device__ float not_a_number() { return __int_as_float(0x7fffffff); }

__device__ float logit(const float* p, int64_t i) { return p[i]; }
__device__ float logit(const __nv_bfloat16* p, int64_t i) { return __bfloat162float(p[i]); }
__device__ float logit(const __half* p, int64_t i) { return __half2float(p[i]); }

__device__ float block_max(float value, float* shared) {
  return block_reduce<kWarps>(value, shared, [](float a, float b) { return fmaxf(a, b); });
}

// Not inlined: few words need it, and its registers would weigh on all.
__device__ __noinline__ double gumbel(uint32_t word) {
  return -log(-log1p(-(word + 0.5) * 0x1p-32));
}

template <class T>
struct Row {
  const T* c;
  const T* u;  // or null
  float guidance;
  float limit;     // of c
  uint32_t least;  // of x, by `ordered`

  // Rounded after every operation, as on the CPU.
  __device__ float combined(int64_t v) const {
    const float conditional = logit(c, v);
    if (u == nullptr || conditional == -infinity()) return conditional;
    return __fadd_rn(conditional, __fmul_rn(guidance, __fsub_rn(conditional, logit(u, v))));
  }
  __device__ float above_limit(int64_t v) const {
    return logit(c, v) < limit ? -infinity() : combined(v);
  }
  __device__ float x(int64_t v) const {
    const float value = above_limit(v);
    return ordered(value) < least ? -infinity() : value;
  }
};

// The k-th largest `ordered` x of a row, eight bits at a time.
template <class T>
__device__ uint32_t kth_largest(const Row<T>& row, int64_t v, int64_t k, int* counts) {
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    counts[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < v; i += kThreads) {
      const uint32_t word = ordered(row.above_limit(i));
      const bool here = shift == 24 || word >> (shift + 8) == prefix >> (shift + 8);
      if (here) atomicAdd(&counts[word >> shift & 255], 1);
    }
    __syncthreads();
    uint32_t digit = 255;
    for (; digit > 0 && counts[digit] < k; --digit) k -= counts[digit];
    prefix |= digit << shift;
  }
  return prefix;
}

struct Best {
  double score;
  int64_t token;

  __device__ void offer(double other, int64_t other_token) {
    const bool better = other > score || (other == score && other_token < token);
    score = better ? other : score;
    token = better ? other_token : token;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 3) sample_kernel(Round round) {
  __shared__ float floats[kWarps];
  __shared__ int bad[kWarps], counts[kThreads];
  __shared__ double sums[kWarps];
  __shared__ Best bests[kWarps];
  static_assert(kThreads == 256, "a count for each digit of kth_largest");

  const int64_t at = blockIdx.x, v = round.v;
  if (round.tokens[at] != round.mask_token) {
    if (threadIdx.x == 0) {
      round.next_tokens[at] = round.sampled[at] = round.tokens[at];
      round.log_probability[at] = 0;
    }
    return;
  }
  Row<T> row{static_cast<const T*>(round.logits) + at * v,
             round.uncond ? static_cast<const T*>(round.uncond) + at * v : nullptr, round.guidance,
             -infinity(), 0};
  if (round.log_min_p > -infinity()) {
    float most = -infinity();
    for (int64_t i = threadIdx.x; i < v; i += kThreads) most = fmaxf(most, logit(row.c, i));
    row.limit = block_max(most, floats) + round.log_min_p;
  }
  float most = -infinity();
  int not_finite = 0;
  for (int64_t i = threadIdx.x; i < v; i += kThreads) {
    const float x = row.above_limit(i);
    not_finite |= !(x < infinity());
    most = fmaxf(most, x);
  }
  most = block_max(most, floats);
  not_finite = block_reduce<kWarps>(not_finite, bad, [](int a, int b) { return a | b; });
  if (not_finite || most == -infinity()) {
    if (threadIdx.x == 0) {
      round.next_tokens[at] = round.sampled[at] = 0;
      round.log_probability[at] = not_a_number();
    }
    return;
  }
  if (round.top_k > 0 && round.top_k < v) row.least = kth_largest(row, v, round.top_k, counts);

  const uint64_t seed = static_cast<uint64_t>(round.seeds[at / round.n]);
  const uint64_t place = static_cast<uint64_t>(at % round.n) << 32;
  const bool drawn = round.temperature > 0 && round.token_noise == nullptr;
  double sum = 0;
  Best best{-static_cast<double>(infinity()), v};
#pragma unroll 1
  for (int64_t counter = threadIdx.x; counter < (v + kGroup - 1) / kGroup * kCounters;
       counter += kThreads) {
    philox::Words words{};
    if (drawn) words = philox::words(seed, round.step, place + static_cast<uint64_t>(counter));
    float partial = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t i = counter / kCounters * kGroup + w * kCounters + counter % kCounters;
      const float x = i < v ? row.x(i) : -infinity();
      partial += expf(x - most);
      if (x == -infinity()) continue;
      double noise = 0;
      if (drawn) {
        // -log(r) bounds the noise from above; in float32, with something to spare.
        const float bound = -logf(static_cast<float>(words.v[w]) * 0x1p-32f + 0x1p-34f);
        const float reach = x + round.temperature * (bound + 1e-3f);
        if (static_cast<double>(reach) + 1e-6 * fabs(best.score) < best.score) continue;
        noise = gumbel(words.v[w]);
      } else if (round.temperature > 0) {
        noise = round.token_noise[at * v + i];
      }
      best.offer(static_cast<double>(x) + static_cast<double>(round.temperature) * noise, i);
    }
    sum += partial;
  }
  sum = block_reduce<kWarps>(sum, sums, [](double a, double b) { return a + b; });
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double score = __shfl_xor_sync(kAllLanes, best.score, step);
    best.offer(score, __shfl_xor_sync(kAllLanes, best.token, step));
  }
  if (threadIdx.x % kWarp == 0) bests[threadIdx.x / kWarp] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) best.offer(bests[warp].score, bests[warp].token);
  round.next_tokens[at] = round.sampled[at] = best.token;
  round.log_probability[at] =
      static_cast<float>(static_cast<double>(row.x(best.token)) - most - log(sum));
}

// Counts for every masked position how many come before it, by confidence and then by number.
__global__ void __launch_bounds__(kThreads) mask_kernel(Round round) {
  __shared__ double tile[kThreads];
  const int64_t base = blockIdx.y * round.n, i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const uint64_t seed = static_cast<uint64_t>(round.seeds[blockIdx.y]);
  const double high = static_cast<double>(infinity());
  const auto confidence = [&](int64_t p) {
    if (p >= round.n || round.tokens[base + p] != round.mask_token) return high;
    double value = static_cast<double>(round.log_probability[base + p]);
    if (round.choice_temperature > 0) {
      const double noise = round.confidence_noise
                               ? static_cast<double>(round.confidence_noise[base + p])
                               : gumbel(philox::words(seed, kConfidenceOffset + round.step,
                                                      static_cast<uint64_t>(p) << 32)
                                            .v[0]);
      value += static_cast<double>(round.choice_temperature) * noise;
    }
    return isnan(value) ? -high : value;
  };
  const double mine = confidence(i);
  int64_t before = 0;
  for (int64_t first = 0; first < round.n; first += kThreads) {
    __syncthreads();
    tile[threadIdx.x] = confidence(first + threadIdx.x);
    __syncthreads();
    for (int j = 0; j < kThreads; ++j) {
      before += tile[j] < mine || (tile[j] == mine && first + j < i);
    }
  }
  const bool masked = i < round.n && round.tokens[base + i] == round.mask_token;
  if (masked && before < round.mask_count[blockIdx.y]) {
    round.next_tokens[base + i] = round.mask_token;
  }
}

}  // namespace

void sample_cuda(const Round& round, int device, void* stream) {
  constexpr const char* kOp = "masked_sample";
  if (round.b * round.n == 0) return;
  const DeviceGuard guard(device, kOp);
  const auto rows = static_cast<unsigned>(round.b * round.n);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (round.format) {
    case Format::kF32:
      sample_kernel<float><<<rows, kThreads, 0, queue>>>(round);
      break;
    case Format::kBf16:
      sample_kernel<__nv_bfloat16><<<rows, kThreads, 0, queue>>>(round);
      break;
    case Format::kF16:
      sample_kernel<__half><<<rows, kThreads, 0, queue>>>(round);
      break;
  }
  check_launch(kOp);
  if (round.mask_count == nullptr) return;
  const dim3 blocks(static_cast<unsigned>((round.n + kThreads - 1) / kThreads),
                    static_cast<unsigned>(round.b));
  mask_kernel<<<blocks, kThreads, 0, queue>>>(round);
  check_launch(kOp);
}

}  // namespace t2p::masked_sampling

// SPDX-License-Identifier: Apache-2.0
// The step on a GPU: one launch that reads every input once, in groups of four elements, which
// share a block of Philox. Rescaled guidance and dynamic thresholding look at whole samples first,
// in a launch of one block per sample. Nothing is allocated and nothing waits, so that a step can
// be captured in a graph; index and seeds are read on the device.
//
//   reference, per element:  m = f (u + s (c - u));  x0 = bound(a0 x + a1 m + a2 g + a3 z)
//                            prev = b0 x + b1 m + b2 x0 + b3 g + b4 h1 + b5 h2 + b6 z

#include <cstdint>

#include "common/carver.h"
#include "common/cuda_check.cuh"
#include "common/half.cuh"
#include "common/normal.h"
#include "common/philox.h"
#include "scheduler/scheduler.h"

namespace t2p::scheduler {
namespace {

constexpr int kThreads = 256, kPrepareThreads = 512, kGroup = 4, kWarp = 32;
// Of step_kernel on a multiprocessor: of more, some would keep registers in memory.
constexpr int kStepBlocks = 3;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kDigits = 256;  // of the radix selection
constexpr unsigned kInfinityBits = 0x7f800000u;

// What the first launch leaves for the second, per sample.
struct State {
  float factor, inverse;
};

// Four elements as they lie in memory, moved in one instruction.
template <class T>
struct alignas(kGroup * sizeof(T)) Group {
  T v[kGroup];
};

template <class T, bool kAligned>
__device__ Group<T> read(const Stream& stream, int64_t b, int64_t first, int count) {
  const T* from = static_cast<const T*>(stream.data) + b * stream.batch_stride + first;
  Group<T> group{};
  if (kAligned && count == kGroup) return *reinterpret_cast<const Group<T>*>(from);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i < count) group.v[i] = from[i];
  }
  return group;
}

template <class T, bool kAligned>
__device__ void write(void* to_data, int64_t at, int count, const Group<T>& group) {
  T* to = static_cast<T*>(to_data) + at;
  if (kAligned && count == kGroup) {
    *reinterpret_cast<Group<T>*>(to) = group;
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i < count) to[i] = group.v[i];
  }
}

__device__ const float* row_of(const Step& step, int64_t b) {
  const int64_t row = step.index != nullptr ? step.index[b] : step.row;
  return row >= 0 && row < step.rows ? step.coefficients + row * kColumns : nullptr;
}

// The words that the noise of a group is made of.
__device__ philox::Words draw(const Step& step, int64_t b, int64_t group) {
  const uint64_t seed = step.seeds ? static_cast<uint64_t>(step.seeds[b]) : step.seed;
  const uint64_t index = (step.seeds ? 0 : static_cast<uint64_t>(b) << 32) + group;
  return philox::words(seed, step.offset, index);
}

__device__ float guided(float output, float uncond, float scale) {
  return fmaf(scale, output - uncond, uncond);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kStepBlocks)
    step_kernel(const Step step, const State* __restrict__ states) {
  const int64_t groups = (step.n + kGroup - 1) / kGroup;
  for (int64_t b = blockIdx.y; b < step.batch; b += gridDim.y) {
    const float* c = row_of(step, b);
    const State state = states != nullptr ? states[b] : State{1.0f, 1.0f};
    float inverse = state.inverse, limit = 1.0f;
    if (step.bound == Bound::kClip) limit = step.limit;
    if (step.bound == Bound::kThreshold && step.limit <= 1) inverse = 1.0f / step.limit;
    for (int64_t g = blockIdx.x * int64_t{kThreads} + threadIdx.x; g < groups;
         g += int64_t{gridDim.x} * kThreads) {
      const int64_t first = g * kGroup, at = b * step.n + first;
      const int count = step.n - first < kGroup ? static_cast<int>(step.n - first) : kGroup;
      Group<T> prev, x0;
      if (c == nullptr) {
        for (int i = 0; i < kGroup; ++i) prev.v[i] = from_float<T>(__int_as_float(0x7fc00000));
        write<T, kAligned>(step.prev, at, count, prev);
        if (step.x0 != nullptr) write<T, kAligned>(step.x0, at, count, prev);
        continue;
      }
      // All reads before the first use, so that they are under way together.
      const Group<T> x = read<T, kAligned>(step.sample, b, first, count);
      const Group<T> output = read<T, kAligned>(step.output, b, first, count);
      Group<T> uncond{}, variance{}, shift{}, history1{}, history2{}, given{};
      if (step.uncond.data) uncond = read<T, kAligned>(step.uncond, b, first, count);
      if (step.variance.data) variance = read<T, kAligned>(step.variance, b, first, count);
      if (step.shift.data) shift = read<T, kAligned>(step.shift, b, first, count);
      if (step.history1.data) history1 = read<T, kAligned>(step.history1, b, first, count);
      if (step.history2.data) history2 = read<T, kAligned>(step.history2, b, first, count);
      if (step.source == Noise::kGiven) given = read<T, kAligned>(step.noise, b, first, count);
      philox::Words words{};
      bool drawn = false;
      if (step.source == Noise::kPhilox && (c[kPrevNoise] != 0 || c[kX0Noise] != 0)) {
        words = draw(step, b, g);
        drawn = true;
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float sample = to_float(x.v[i]);
        float m = to_float(output.v[i]);
        if (step.uncond.data) {
          m = state.factor * guided(m, to_float(uncond.v[i]), step.guidance);
        }
        float z = drawn ? normal::of_word(words.v[i]) : to_float(given.v[i]);
        float of_shift = c[kPrevShift];
        if (step.variance.data) {
          const float log_variance =
              fmaf(c[kLogVarianceOf], to_float(variance.v[i]), c[kLogVariance]);
          z *= expf(0.5f * log_variance);
          if (c[kPrevShiftVariance] != 0) {
            of_shift = fmaf(c[kPrevShiftVariance], expf(log_variance), of_shift);
          }
        }
        float a = fmaf(c[kX0Output], m, c[kX0Sample] * sample);
        float p = fmaf(c[kPrevOutput], m, c[kPrevSample] * sample);
        if (step.shift.data) {
          a = fmaf(c[kX0Shift], to_float(shift.v[i]), a);
          p = fmaf(of_shift, to_float(shift.v[i]), p);
        }
        if (step.history1.data) p = fmaf(c[kPrevHistory1], to_float(history1.v[i]), p);
        if (step.history2.data) p = fmaf(c[kPrevHistory2], to_float(history2.v[i]), p);
        if (step.source != Noise::kNone) {
          a = fmaf(c[kX0Noise], z, a);
          p = fmaf(c[kPrevNoise], z, p);
        }
        if (step.bound != Bound::kNone) {
          // fminf and fmaxf would make a number of a NaN.
          a *= inverse;
          a = a > limit ? limit : a < -limit ? -limit : a;
          p = fmaf(c[kPrevX0], a, p);
        }
        prev.v[i] = from_float<T>(p);
        x0.v[i] = from_float<T>(a);
      }
      write<T, kAligned>(step.prev, at, count, prev);
      if (step.x0 != nullptr) write<T, kAligned>(step.x0, at, count, x0);
    }
  }
}

template <class Value>
__device__ Value warp_sum(Value value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

// The sum over a block, in a fixed order, for every thread.
__device__ double block_sum(double value, double* shared) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarp;
  return warp_sum(lane < blockDim.x / kWarp ? shared[lane] : 0.0);
}

template <class T>
__device__ float element(const Stream& stream, int64_t b, int64_t i) {
  return to_float(static_cast<const T*>(stream.data)[b * stream.batch_stride + i]);
}

// x0 before the bound.
template <class T>
__device__ float raw_x0(const Step& step, const float* c, float factor, int64_t b, int64_t i) {
  float m = element<T>(step.output, b, i);
  if (step.uncond.data) m = factor * guided(m, element<T>(step.uncond, b, i), step.guidance);
  float a = fmaf(c[kX0Output], m, c[kX0Sample] * element<T>(step.sample, b, i));
  if (step.shift.data) a = fmaf(c[kX0Shift], element<T>(step.shift, b, i), a);
  if (step.source != Noise::kNone && c[kX0Noise] != 0) {
    float z = step.source == Noise::kGiven ? element<T>(step.noise, b, i)
                                           : draw(step, b, i / kGroup).v[i % kGroup];
    if (step.variance.data) {
      z *= expf(0.5f * fmaf(c[kLogVarianceOf], element<T>(step.variance, b, i), c[kLogVariance]));
    }
    a = fmaf(c[kX0Noise], z, a);
  }
  return a;
}

// f = phi std(c) / std(m) + 1 - phi over a sample.
template <class T>
__device__ float factor_of(const Step& step, int64_t b, double* shared) {
  double m_sum = 0, m_squares = 0, c_sum = 0, c_squares = 0;
  for (int64_t i = threadIdx.x; i < step.n; i += blockDim.x) {
    const float output = element<T>(step.output, b, i);
    const double m = guided(output, element<T>(step.uncond, b, i), step.guidance);
    m_sum += m;
    m_squares = fma(m, m, m_squares);
    c_sum += output;
    c_squares = fma(static_cast<double>(output), static_cast<double>(output), c_squares);
  }
  m_sum = block_sum(m_sum, shared);
  m_squares = block_sum(m_squares, shared);
  c_sum = block_sum(c_sum, shared);
  c_squares = block_sum(c_squares, shared);
  const auto n = static_cast<double>(step.n);
  const double own = m_squares - m_sum * m_sum / n, wanted = c_squares - c_sum * c_sum / n;
  const double ratio = own > 0 ? sqrt((wanted > 0 ? wanted : 0) / own) : own == own ? 1.0 : own;
  return static_cast<float>(step.rescale * ratio + (1.0 - step.rescale));
}

// The value of rank `rank` among numbers >= 0 given by their bits, which order as integers do, and
// the value that follows it.
__device__ float2 ranked(const unsigned* __restrict__ bits, int64_t n, int64_t rank,
                         unsigned* histogram, unsigned* found) {
  unsigned prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kDigits; i += blockDim.x) histogram[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      if ((bits[i] & mask) == prefix) atomicAdd(&histogram[(bits[i] >> shift) % kDigits], 1u);
    }
    __syncthreads();
    // Every thread walks the digits: they are few, and all need the result.
    int digit = 0;
    while (rank >= histogram[digit]) rank -= histogram[digit++];
    prefix |= static_cast<unsigned>(digit) << shift;
    mask |= 0xffu << shift;
    if (shift > 0) __syncthreads();
  }
  const bool repeated = rank + 1 < histogram[prefix % kDigits];
  __syncthreads();
  if (threadIdx.x == 0) *found = 0xffffffffu;
  __syncthreads();
  unsigned least = 0xffffffffu;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    if (bits[i] > prefix && bits[i] < least) least = bits[i];
  }
  atomicMin(found, least);
  __syncthreads();
  const unsigned next = repeated || *found == 0xffffffffu ? prefix : *found;
  return {__uint_as_float(prefix), __uint_as_float(next)};
}

// One block per sample.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const Step step, bool select, bool rescale, State* __restrict__ states,
                   unsigned* __restrict__ magnitudes) {
  __shared__ double sums[kWarp];
  __shared__ unsigned histogram[kDigits];
  __shared__ unsigned found;
  for (int64_t b = blockIdx.x; b < step.batch; b += gridDim.x) {
    const float* c = row_of(step, b);
    if (c == nullptr) continue;
    State state{1.0f, 1.0f};
    if (rescale) state.factor = factor_of<T>(step, b, sums);
    if (select) {
      unsigned* bits = magnitudes + b * step.n;
      double nans = 0;
      for (int64_t i = threadIdx.x; i < step.n; i += blockDim.x) {
        bits[i] = __float_as_uint(raw_x0<T>(step, c, state.factor, b, i)) & 0x7fffffffu;
        nans += bits[i] > kInfinityBits;
      }
      // The sum is also the barrier before others read what was written.
      nans = block_sum(nans, sums);
      const double position = step.ratio * static_cast<double>(step.n - 1);
      const auto rank = static_cast<int64_t>(position);
      const double part = position - static_cast<double>(rank);
      const float2 pair = ranked(bits, step.n, rank, histogram, &found);
      float s = part == 0
                    ? pair.x
                    : static_cast<float>(pair.x + part * (static_cast<double>(pair.y) - pair.x));
      s = s > step.limit ? step.limit : s < 1.0f ? 1.0f : s;
      state.inverse = nans > 0 ? __int_as_float(0x7fc00000) : 1.0f / s;
    }
    if (threadIdx.x == 0) states[b] = state;
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) noise_kernel(const Step step, float* __restrict__ out) {
  const int64_t groups = (step.n + kGroup - 1) / kGroup;
  for (int64_t b = blockIdx.y; b < step.batch; b += gridDim.y) {
    for (int64_t g = blockIdx.x * int64_t{kThreads} + threadIdx.x; g < groups;
         g += int64_t{gridDim.x} * kThreads) {
      const philox::Words words = draw(step, b, g);
      for (int i = 0; i < kGroup; ++i) {
        if (g * kGroup + i < step.n) out[b * step.n + g * kGroup + i] = normal::of_word(words.v[i]);
      }
    }
  }
}

dim3 grid_of(const Step& step) {
  constexpr int64_t kMostBlocks = 1 << 20, kMostBatch = 65535;
  const int64_t blocks = (step.n + kGroup * kThreads - 1) / (kGroup * kThreads);
  return {static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks),
          static_cast<unsigned>(step.batch < kMostBatch ? step.batch : kMostBatch)};
}

bool needs_selection(const Step& step) { return step.bound == Bound::kThreshold && step.limit > 1; }

// Whether all groups of four can be moved in one instruction.
bool aligned(const Step& step, int64_t element_bytes) {
  const auto fits = [&](const void* data, int64_t batch_stride) {
    return reinterpret_cast<uintptr_t>(data) % (kGroup * element_bytes) == 0 &&
           (step.batch == 1 || batch_stride % kGroup == 0);
  };
  for (const Stream* stream : {&step.sample, &step.output, &step.uncond, &step.variance,
                               &step.shift, &step.history1, &step.history2, &step.noise}) {
    if (stream->data != nullptr && !fits(stream->data, stream->batch_stride)) return false;
  }
  return fits(step.prev, step.n) && fits(step.x0, step.n);
}

struct Workspace {
  State* states;         // [b]
  unsigned* magnitudes;  // [b, n], the bits of |x0|, for a threshold
  int64_t floats;
};

Workspace carve(float* base, int64_t batch, int64_t n, bool select) {
  Carver carver(base);
  Workspace w;
  w.states = carver.take<State>(batch, "states");
  w.magnitudes = select ? carver.take<unsigned>(batch * n, "magnitudes") : nullptr;
  w.floats = carver.size<float>();
  return w;
}

template <class T>
void launch(const Step& step, cudaStream_t stream, float* memory) {
  const bool select = needs_selection(step);
  const bool rescale = step.uncond.data != nullptr && step.rescale != 0;
  State* states = nullptr;
  if (select || rescale) {
    const Workspace workspace = carve(memory, step.batch, step.n, select);
    states = workspace.states;
    const auto blocks = static_cast<unsigned>(step.batch < 65535 ? step.batch : 65535);
    prepare_kernel<T><<<blocks, kPrepareThreads, 0, stream>>>(step, select, rescale, states,
                                                              workspace.magnitudes);
  }
  const dim3 grid = grid_of(step);
  aligned(step, sizeof(T)) ? step_kernel<T, true><<<grid, kThreads, 0, stream>>>(step, states)
                           : step_kernel<T, false><<<grid, kThreads, 0, stream>>>(step, states);
}

}  // namespace

std::int64_t workspace_size(std::int64_t batch, std::int64_t n, bool threshold, bool rescale) {
  return threshold || rescale ? carve(nullptr, batch, n, threshold).floats : 0;
}

void step_cuda(const Step& step, int device, void* stream, float* workspace) {
  if (step.batch == 0 || step.n == 0) return;
  const DeviceGuard guard(device, "scheduler_step");
  const auto s = static_cast<cudaStream_t>(stream);
  switch (step.dtype) {
    case Dtype::kFloat32:
      launch<float>(step, s, workspace);
      break;
    case Dtype::kBfloat16:
      launch<__nv_bfloat16>(step, s, workspace);
      break;
    case Dtype::kFloat16:
      launch<__half>(step, s, workspace);
      break;
  }
  check_launch("scheduler_step");
}

void noise_cuda(const std::int64_t* seeds, std::uint64_t seed, std::uint64_t offset,
                std::int64_t batch, std::int64_t n, int device, void* stream, float* out) {
  if (batch == 0 || n == 0) return;
  const DeviceGuard guard(device, "scheduler_noise");
  Step step{};
  step.batch = batch;
  step.n = n;
  step.seeds = seeds;
  step.seed = seed;
  step.offset = offset;
  noise_kernel<<<grid_of(step), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(step, out);
  check_launch("scheduler_noise");
}

}  // namespace t2p::scheduler

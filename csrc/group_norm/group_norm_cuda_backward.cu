// SPDX-License-Identifier: Apache-2.0
// The backward pass on a GPU, in three launches: sums over parts of every channel, their totals in
// the order of the parts and a group's means of them, and the gradient of x.
//
//   reference:  dz = grad silu'(z), the gradient of x is
//               (gain dz - mean(gain dz) - xhat mean(gain dz xhat)) / sqrt(var + eps)
#include <cuda_runtime.h>

#include "group_norm/group_norm_cuda.cuh"

namespace t2p::group_norm {
namespace {

constexpr int64_t kPartLeast = 4096;  // elements of a part of a channel, at least
constexpr int64_t kRowsLeast = 256;   // rows of a part with channels last, at least

struct Workspace {
  float2* means;  // [b, g]: of gain dz and of gain dz xhat
  float2* parts;  // [b, c, parts]: sums of dz and of dz xhat
  int64_t doubles;
};

Workspace carve(double* base, const Norm& norm, int64_t parts) {
  Carver carver(base);
  Workspace w;
  w.means = carver.take<float2>(norm.b * norm.groups, "means");
  w.parts = carver.take<float2>(norm.b * norm.c * parts, "parts");
  w.doubles = carver.size<double>();
  return w;
}

// z = d factor + offset and xhat = d inverse + nudge, with d = x - centre.
struct Slope {
  float centre, factor, offset, inverse, nudge;
};
__device__ Slope slope_of(const Norm& norm, const double* statistics, int64_t b, int64_t c) {
  const Group group = group_of(statistics, b * norm.groups + c / (norm.c / norm.groups));
  const Affine a = affine_of(group, gain_of(norm, b, c));
  return {a.centre, a.factor, a.offset, group.inverse, -group.rest * group.inverse};
}

struct Derivative {
  float xhat, dz;
};
__device__ Derivative derivative(const Slope& s, float x, float grad, bool silu) {
  const float d = x - s.centre;
  if (silu) {
    const float z = fmaf(d, s.factor, s.offset), p = sigmoid(z);
    grad *= p * fmaf(z, 1.0f - p, 1.0f);
  }
  return {fmaf(d, s.inverse, s.nudge), grad};
}

// The gradient of x, without and with what depends on the group's means.
struct Gradient {
  Slope slope;
  float constant, linear;
};
__device__ Gradient gradient_of(const Norm& norm, const double* statistics, const float2* means,
                                int64_t b, int64_t c) {
  const Slope s = slope_of(norm, statistics, b, c);
  const float2 mean = means[b * norm.groups + c / (norm.c / norm.groups)];
  return {s, -s.inverse * mean.x, -s.inverse * mean.y};
}
template <class T>
__device__ T value(const Gradient& g, float x, float grad, bool silu) {
  const Derivative d = derivative(g.slope, x, grad, silu);
  return from_float<T>(fmaf(g.slope.factor, d.dz, fmaf(d.xhat, g.linear, g.constant)));
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    sums_kernel(const Norm norm, int64_t parts, const void* grad, const double* statistics,
                Workspace workspace) {
  __shared__ Pair shared[kWarps];
  const int64_t channel = blockIdx.x / parts, part = blockIdx.x % parts;
  const Slope slope = slope_of(norm, statistics, channel / norm.c, channel % norm.c);
  const int64_t vectors = norm.n / kWidth, end = vectors * (part + 1) / parts;
  float plain = 0, weighted = 0;
  for (int64_t i = vectors * part / parts + threadIdx.x; i < end; i += blockDim.x) {
    const int64_t at = channel * norm.n + i * kWidth;
    const Vector<T, kWidth> x = read<T, kWidth>(norm.x, at), g = read<T, kWidth>(grad, at);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const Derivative d = derivative(slope, to_float(x.v[j]), to_float(g.v[j]), norm.silu);
      plain += d.dz;
      weighted = fmaf(d.dz, d.xhat, weighted);
    }
  }
  const Pair sum = block_sum({plain, weighted}, shared);
  if (threadIdx.x == 0) {
    workspace.parts[blockIdx.x] = {static_cast<float>(sum.first), static_cast<float>(sum.second)};
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    sums_strips_kernel(const Norm norm, int64_t strips, int64_t parts, const void* grad,
                       const double* statistics, Workspace workspace) {
  __shared__ float2 shared[kWarps][kStripChannels<kWidth>];
  const Strip<kWidth> own(norm, strips, parts);
  float plain[kWidth] = {}, weighted[kWidth] = {};
  if (own.c < own.last) {
    Slope slope[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) slope[j] = slope_of(norm, statistics, own.b, own.c + j);
    for (int64_t row = own.begin + own.row; row < own.end; row += kStripRows<kWidth>) {
      const int64_t at = (own.b * norm.n + row) * norm.c + own.c;
      const Vector<T, kWidth> x = read<T, kWidth>(norm.x, at), g = read<T, kWidth>(grad, at);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const Derivative d = derivative(slope[j], to_float(x.v[j]), to_float(g.v[j]), norm.silu);
        plain[j] += d.dz;
        weighted[j] = fmaf(d.dz, d.xhat, weighted[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
#pragma unroll
    for (int step = kStrip<kWidth>; step < kWarp; step *= 2) {
      plain[j] += __shfl_xor_sync(kAllLanes, plain[j], step);
      weighted[j] += __shfl_xor_sync(kAllLanes, weighted[j], step);
    }
    if (threadIdx.x % kWarp < kStrip<kWidth>) {
      shared[threadIdx.x / kWarp][threadIdx.x % kWarp * kWidth + j] = {plain[j], weighted[j]};
    }
  }
  __syncthreads();
  const int64_t c = own.first + threadIdx.x;
  if (c >= own.last) return;
  float2 sum = shared[0][threadIdx.x];
  for (int warp = 1; warp < kWarps; ++warp) {
    sum.x += shared[warp][threadIdx.x].x;
    sum.y += shared[warp][threadIdx.x].y;
  }
  workspace.parts[(own.b * norm.c + c) * parts + own.slice] = sum;
}

// One block per group, a warp per channel: `sums` and the group's means.
__global__ void __launch_bounds__(kThreads, 2)
    totals_kernel(const Norm norm, int64_t parts, Workspace workspace, float* sums) {
  __shared__ Pair shared[kWarps];
  const int64_t channels = norm.c / norm.groups, b = blockIdx.x / norm.groups;
  const int64_t first = blockIdx.x % norm.groups * channels;
  const unsigned lane = threadIdx.x % kWarp;
  Pair group{0, 0};
  for (int64_t i = threadIdx.x / kWarp; i < channels; i += kWarps) {
    const int64_t c = first + i, at = b * norm.c + c;
    Pair sum{0, 0};
    for (int64_t k = lane; k < parts; k += kWarp) {
      const float2 part = workspace.parts[at * parts + k];
      sum.first += part.x;
      sum.second += part.y;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      const auto plain = static_cast<float>(sum.first), weighted = static_cast<float>(sum.second);
      sums[at] = plain;
      sums[norm.b * norm.c + at] = weighted;
      const double gain = gain_of(norm, b, c).factor;
      group.first = fma(gain, static_cast<double>(plain), group.first);
      group.second = fma(gain, static_cast<double>(weighted), group.second);
    }
  }
  group = block_sum(group, shared);
  if (threadIdx.x == 0) {
    const double inverse = 1 / static_cast<double>(channels * norm.n);
    workspace.means[blockIdx.x] = {static_cast<float>(group.first * inverse),
                                   static_cast<float>(group.second * inverse)};
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_kernel(const Norm norm, int64_t parts, const void* grad, const double* statistics,
                    const float2* means, void* grad_x) {
  const int64_t channel = blockIdx.x / parts, part = blockIdx.x % parts;
  const Gradient own = gradient_of(norm, statistics, means, channel / norm.c, channel % norm.c);
  const int64_t vectors = norm.n / kWidth, end = vectors * (part + 1) / parts;
  for (int64_t i = vectors * part / parts + threadIdx.x; i < end; i += blockDim.x) {
    const int64_t at = channel * norm.n + i * kWidth;
    const Vector<T, kWidth> x = read<T, kWidth>(norm.x, at), g = read<T, kWidth>(grad, at);
    Vector<T, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      out.v[j] = value<T>(own, to_float(x.v[j]), to_float(g.v[j]), norm.silu);
    }
    write<T, kWidth>(grad_x, at, out);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_strips_kernel(const Norm norm, int64_t strips, int64_t parts, const void* grad,
                           const double* statistics, const float2* means, void* grad_x) {
  const Strip<kWidth> own(norm, strips, parts);
  if (own.c >= own.last) return;
  Gradient gradient[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    gradient[j] = gradient_of(norm, statistics, means, own.b, own.c + j);
  }
  for (int64_t row = own.begin + own.row; row < own.end; row += kStripRows<kWidth>) {
    const int64_t at = (own.b * norm.n + row) * norm.c + own.c;
    const Vector<T, kWidth> x = read<T, kWidth>(norm.x, at), g = read<T, kWidth>(grad, at);
    Vector<T, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      out.v[j] = value<T>(gradient[j], to_float(x.v[j]), to_float(g.v[j]), norm.silu);
    }
    write<T, kWidth>(grad_x, at, out);
  }
}

int64_t strips_of(const Norm& norm, int width) {
  return blocks_for(norm.c, width == 8 ? kStripChannels<8> : kStripChannels<1>);
}

int64_t parts_for(const Norm& norm, int width) {
  return norm.channels_last ? parts_of(norm.n, kRowsLeast, norm.b * strips_of(norm, width))
                            : parts_of(norm.n, kPartLeast, norm.b * norm.c);
}

template <class T, int kWidth>
void launch(const Norm& norm, cudaStream_t stream, const void* grad, const double* statistics,
            double* memory, void* grad_x, float* sums) {
  const int64_t groups = norm.b * norm.groups, parts = parts_for(norm, kWidth);
  const int64_t strips = strips_of(norm, kWidth), warps = blocks_for(norm.n / kWidth, kWarp);
  const Workspace workspace = carve(memory, norm, parts);
  const unsigned blocks = grid_size(norm.b * (norm.channels_last ? strips : norm.c) * parts, kOp);
  const auto threads = static_cast<unsigned>(warps < kWarps ? warps * kWarp : kThreads);
  if (norm.channels_last) {
    sums_strips_kernel<T, kWidth>
        <<<blocks, kThreads, 0, stream>>>(norm, strips, parts, grad, statistics, workspace);
  } else {
    sums_kernel<T, kWidth>
        <<<blocks, threads, 0, stream>>>(norm, parts, grad, statistics, workspace);
  }
  check_launch(kOp);
  totals_kernel<<<grid_size(groups, kOp), kThreads, 0, stream>>>(norm, parts, workspace, sums);
  check_launch(kOp);
  if (norm.channels_last) {
    gradient_strips_kernel<T, kWidth><<<blocks, kThreads, 0, stream>>>(
        norm, strips, parts, grad, statistics, workspace.means, grad_x);
  } else {
    gradient_kernel<T, kWidth>
        <<<blocks, threads, 0, stream>>>(norm, parts, grad, statistics, workspace.means, grad_x);
  }
  check_launch(kOp);
}

template <class T>
void launch_widest(const Norm& norm, cudaStream_t stream, const void* grad,
                   const double* statistics, double* workspace, void* grad_x, float* sums) {
  constexpr int kWidth = 16 / sizeof(T);
  width_of(norm, grad, grad_x) == 1
      ? launch<T, 1>(norm, stream, grad, statistics, workspace, grad_x, sums)
      : launch<T, kWidth>(norm, stream, grad, statistics, workspace, grad_x, sums);
}

}  // namespace

std::int64_t backward_workspace(const Norm& norm) {
  if (norm.b == 0 || norm.n == 0) return 0;
  const int64_t narrow = parts_for(norm, 1), wide = parts_for(norm, 8);
  return carve(nullptr, norm, narrow > wide ? narrow : wide).doubles;
}

void backward_cuda(const Norm& norm, const void* grad, const double* statistics, int device,
                   void* stream, double* workspace, void* grad_x, float* sums) {
  const DeviceGuard guard(device, kOp);
  const auto s = static_cast<cudaStream_t>(stream);
  if (norm.b == 0) return;
  if (norm.n == 0) {
    cuda_check(cudaMemsetAsync(sums, 0, 2 * norm.b * norm.c * sizeof(float), s), kOp);
    return;
  }
  switch (norm.dtype) {
    case Dtype::kFloat32:
      launch_widest<float>(norm, s, grad, statistics, workspace, grad_x, sums);
      break;
    case Dtype::kBfloat16:
      launch_widest<__nv_bfloat16>(norm, s, grad, statistics, workspace, grad_x, sums);
      break;
    case Dtype::kFloat16:
      launch_widest<__half>(norm, s, grad, statistics, workspace, grad_x, sums);
      break;
  }
}

}  // namespace t2p::group_norm

// SPDX-License-Identifier: Apache-2.0
// The scalar form, and how the work is cut. Statistics are those of blocks of fixed size, put
// together in a fixed order: what a group's bits are does not depend on the threads.
#include "group_norm/group_norm.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "group_norm/group_norm-inl.h"
#include "group_norm/kernels.h"

namespace t2p::group_norm {
namespace {

constexpr std::int64_t kAlone = 1 << 14;        // up to so many elements one thread is faster
constexpr std::int64_t kPiece = 4 * kBlock;     // elements of a task where a group has several
constexpr std::int64_t kNearBytes = 1 << 20;    // up to so many a near cache holds
constexpr std::int64_t kLargeBytes = 16 << 20;  // from here on one outgrows the usual last cache

std::int64_t element_bytes(const Norm& norm) { return norm.dtype == Dtype::kFloat32 ? 4 : 2; }

// Chan, Golub and LeVeque, "Updating Formulae", 1979, equation 2.1, for many parts at once: their
// means first, then what they lie apart.
// `moments` has for every block of `block` positions out of `n` those of `channels` channels.
void combine(const Moments* moments, std::int64_t stride, std::int64_t channels, std::int64_t block,
             std::int64_t n, double eps, double* statistics) {
  const double origin = moments[0].mean, total = static_cast<double>(channels * n);
  double mean = 0, squares = 0;
  for (std::int64_t first = 0; first < n; first += block) {
    const Moments* parts = moments + first / block * stride;
    double sum = 0;
    for (std::int64_t i = 0; i < channels; ++i) sum += parts[i].mean - origin;
    mean += sum * static_cast<double>(std::min(block, n - first));
  }
  mean = origin + mean / total;
  for (std::int64_t first = 0; first < n; first += block) {
    const Moments* parts = moments + first / block * stride;
    double inside = 0, between = 0;
    for (std::int64_t i = 0; i < channels; ++i) {
      inside += parts[i].squares;
      between += (parts[i].mean - mean) * (parts[i].mean - mean);
    }
    squares += inside + between * static_cast<double>(std::min(block, n - first));
  }
  statistics[0] = mean;
  statistics[1] = 1 / std::sqrt(std::max(squares, 0.0) / total + eps);
}

// What a channel is multiplied by and what is added, before anything is normalised.
struct Gain {
  double factor, bias;
};
Gain gain_of(const Norm& norm, std::int64_t b, std::int64_t c) {
  const double weight = norm.weight ? norm.weight[c] : 1.0, bias = norm.bias ? norm.bias[c] : 0.0;
  const double scale = norm.scale ? 1.0 + norm.scale[b * norm.c + c] : 1.0;
  const double shift = norm.shift ? norm.shift[b * norm.c + c] : 0.0;
  return {weight * scale, bias * scale + shift};
}

const double* statistics_of(const Norm& norm, const double* statistics, std::int64_t b,
                            std::int64_t c) {
  return statistics + 2 * (b * norm.groups + c / (norm.c / norm.groups));
}

// The mean is split into a float and a rest that goes into the offset.
void set_affine(const Norm& norm, const double* statistics, std::int64_t b, std::int64_t c,
                float& centre, float& factor, float& offset) {
  const double* s = statistics_of(norm, statistics, b, c);
  const Gain gain = gain_of(norm, b, c);
  const double unit = norm.silu ? kSiluUnit : 1;
  centre = static_cast<float>(s[0]);
  factor = static_cast<float>(unit * gain.factor * s[1]);
  offset = static_cast<float>(unit * (gain.bias - (s[0] - centre) * s[1] * gain.factor));
}

// Calls body(b * blocks + block, b, first position, positions) for all blocks of positions. A task
// is several neighbours, so that kernels can fetch the next one ahead.
template <class Body>
void for_row_blocks(const Norm& norm, int threads, const Body& body) {
  const std::int64_t blocks = ceil_div(norm.n, kRows), all = norm.b * blocks;
  const std::int64_t run = std::clamp<std::int64_t>(all / (8 * threads), 1, 16);
  parallel_for(threads, ceil_div(all, run), [&](std::int64_t task) {
    for (std::int64_t block = task * run; block < std::min(all, (task + 1) * run); ++block) {
      const std::int64_t first = block % blocks * kRows;
      body(block, block / blocks, first,
           static_cast<int>(std::min<std::int64_t>(kRows, norm.n - first)));
    }
  });
}

// Calls body(b * c + channel, begin, end) for parts of all channels.
template <class Body>
void for_channel_pieces(const Norm& norm, int threads, const Body& body) {
  const std::int64_t pieces = ceil_div(norm.n, kPiece);
  parallel_for(threads, norm.b * norm.groups * pieces, [&](std::int64_t task) {
    const std::int64_t begin = task % pieces * kPiece, end = std::min(begin + kPiece, norm.n);
    const std::int64_t channels = norm.c / norm.groups, first = task / pieces * channels;
    for (std::int64_t i = first; i < first + channels; ++i) body(i, begin, end);
  });
}

Moments block_at(const Kernels& kernels, const Norm& norm, std::int64_t first, std::int64_t count,
                 std::int64_t i) {
  const std::int64_t begin = i * kBlock;
  return kernels.block(norm, first + begin,
                       static_cast<int>(std::min<std::int64_t>(kBlock, count - begin)));
}

void contiguous_forward(const Kernels& kernels, const Norm& norm, int threads, bool large, void* y,
                        double* statistics) {
  const std::int64_t count = norm.c / norm.groups * norm.n, blocks = ceil_div(count, kBlock);
  const auto finish = [&](const Moments* moments, std::int64_t group) {
    combine(moments, 1, 1, kBlock, count, norm.eps, statistics + 2 * group);
  };
  const auto normalise = [&](std::int64_t channel, std::int64_t begin, std::int64_t end,
                             std::int64_t ahead) {
    float centre, factor, offset;
    set_affine(norm, statistics, channel / norm.c, channel % norm.c, centre, factor, offset);
    kernels.apply_one(norm, {&centre, &factor, &offset}, channel * norm.n + begin, end - begin,
                      ahead, large, y);
  };
  const std::int64_t groups = norm.b * norm.groups, channels = norm.c / norm.groups;
  if (threads == 1 || groups >= 2 * threads) {  // a group's second pass finds it in the cache
    const std::int64_t run = std::max<std::int64_t>(groups / (4 * threads), 1);
    const std::int64_t bytes = count * element_bytes(norm);
    // Small groups are asked for ahead of time only where their places in the cache are not needed
    // for results.
    const bool asks = bytes <= kNearBytes && (large || bytes > kNearBytes / 4);
    const std::int64_t step = asks ? count : 0;
    parallel_for(threads, ceil_div(groups, run), [&](std::int64_t task) {
      std::vector<Moments> moments(blocks);
      const std::int64_t end = std::min(groups, (task + 1) * run);
      for (std::int64_t group = task * run; group < end; ++group) {
        for (std::int64_t i = 0; i < blocks; ++i) {
          moments[i] = block_at(kernels, norm, group * count, count, i);
        }
        finish(moments.data(), group);
        // Backwards: of a group that is larger than the cache the end is in it. Results of one that
        // is not follow those of the group before, so that the processor sees them coming.
        for (std::int64_t i = 0; i < channels; ++i) {
          const std::int64_t channel = bytes <= kNearBytes / 2 ? i : channels - 1 - i;
          normalise(group * channels + channel, 0, norm.n, group + 1 < end ? step : 0);
        }
      }
    });
    return;
  }
  std::vector<Moments> moments(groups * blocks);
  parallel_for(threads, groups * blocks, [&](std::int64_t task) {
    moments[task] = block_at(kernels, norm, task / blocks * count, count, task % blocks);
  });
  for (std::int64_t group = 0; group < groups; ++group) {
    finish(moments.data() + group * blocks, group);
  }
  for_channel_pieces(norm, threads,
                     [&](std::int64_t channel, std::int64_t begin, std::int64_t end) {
                       normalise(channel, begin, end, 0);
                     });
}

void channels_last_forward(const Kernels& kernels, const Norm& norm, int threads, bool large,
                           void* y, double* statistics) {
  const std::int64_t blocks = ceil_div(norm.n, kRows), channels = norm.c / norm.groups;
  std::vector<Moments> moments(norm.b * blocks * norm.c);
  for_row_blocks(norm, threads, [&](std::int64_t task, std::int64_t b, std::int64_t first, int n) {
    for (std::int64_t c = 0; c < norm.c; c += kTile) {
      kernels.tile(norm, (b * norm.n + first) * norm.c + c, n,
                   static_cast<int>(std::min<std::int64_t>(kTile, norm.c - c)),
                   moments.data() + task * norm.c + c);
    }
  });
  const Buffer<float> coefficients(3 * norm.b * norm.c);
  parallel_for(threads, norm.b * norm.groups, [&](std::int64_t group) {
    const std::int64_t b = group / norm.groups, first = group % norm.groups * channels;
    combine(moments.data() + b * blocks * norm.c + first, norm.c, channels, kRows, norm.n, norm.eps,
            statistics + 2 * group);
    float* own = coefficients.data() + 3 * b * norm.c;
    for (std::int64_t c = first; c < first + channels; ++c) {
      set_affine(norm, statistics, b, c, own[c], own[norm.c + c], own[2 * norm.c + c]);
    }
  });
  for_row_blocks(norm, threads, [&](std::int64_t, std::int64_t b, std::int64_t first, int n) {
    const float* own = coefficients.data() + 3 * b * norm.c;
    kernels.apply_each(norm, {own, own + norm.c, own + 2 * norm.c}, (b * norm.n + first) * norm.c,
                       n, large, y);
  });
}

// The coefficients of a channel's gradient, of which the group's sums are not known at first.
struct Slope {
  float of[kSlopes];
};
Slope slope_of(const Norm& norm, const double* statistics, std::int64_t b, std::int64_t c) {
  const double* s = statistics_of(norm, statistics, b, c);
  const Gain gain = gain_of(norm, b, c);
  const auto centre = static_cast<float>(s[0]);
  return {{centre, static_cast<float>(s[1]), static_cast<float>(-(s[0] - centre) * s[1]),
           static_cast<float>(gain.factor), static_cast<float>(gain.bias), 0, 0}};
}
Slopes view(const float* p, std::int64_t stride) {
  return {p,
          p + stride,
          p + 2 * stride,
          p + 3 * stride,
          p + 4 * stride,
          p + 5 * stride,
          p + 6 * stride};
}

// Means over a group of dz gain and of dz gain xhat, for all its channels. `sums` is [2, b, c].
void set_group_means(const Norm& norm, const float* sums, std::int64_t group, float* slopes,
                     std::int64_t stride, std::int64_t step) {
  const std::int64_t channels = norm.c / norm.groups, b = group / norm.groups;
  const std::int64_t first = group % norm.groups * channels;
  double plain = 0, weighted = 0;
  for (std::int64_t c = first; c < first + channels; ++c) {
    const double gain = gain_of(norm, b, c).factor;
    plain += gain * sums[b * norm.c + c];
    weighted += gain * sums[(norm.b + b) * norm.c + c];
  }
  const double inverse = 1.0 / static_cast<double>(channels * norm.n);
  for (std::int64_t i = 0; i < channels; ++i) {
    slopes[i * step + 5 * stride] = static_cast<float>(plain * inverse);
    slopes[i * step + 6 * stride] = static_cast<float>(weighted * inverse);
  }
}

// Where dz is a float32, the gradient of x keeps it for the second pass, which then needs no
// sigmoid.
struct SecondPass {
  Norm norm;
  const void* grad;
  float* dz;
};
SecondPass second_pass(const Norm& norm, const void* grad, void* grad_x) {
  SecondPass second{norm, grad, nullptr};
  if (norm.silu && norm.dtype == Dtype::kFloat32) {
    second.norm.silu = false;
    second.grad = grad_x;
    second.dz = static_cast<float*>(grad_x);
  }
  return second;
}

void contiguous_backward(const Kernels& kernels, const Norm& norm, const void* grad,
                         const double* statistics, int threads, void* grad_x, float* sums) {
  const std::int64_t all = norm.b * norm.c, channels = norm.c / norm.groups;
  const SecondPass second = second_pass(norm, grad, grad_x);
  const Buffer<Slope> slopes(all);
  const auto add_up = [&](std::int64_t i) {
    slopes[i] = slope_of(norm, statistics, i / norm.c, i % norm.c);
    double plain = 0, weighted = 0;
    for (std::int64_t begin = 0; begin < norm.n; begin += kRun) {
      const auto count = static_cast<int>(std::min<std::int64_t>(kRun, norm.n - begin));
      float part[2];
      kernels.sums_one(norm, view(slopes[i].of, 1), grad, i * norm.n + begin, count, second.dz,
                       part);
      plain += part[0];
      weighted += part[1];
    }
    sums[i] = static_cast<float>(plain);
    sums[all + i] = static_cast<float>(weighted);
  };
  const auto finish = [&](std::int64_t group) {
    set_group_means(norm, sums, group, slopes[group * channels].of, 1, kSlopes);
  };
  const auto differentiate = [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
    kernels.gradient_one(second.norm, view(slopes[i].of, 1), second.grad, i * norm.n + begin,
                         end - begin, grad_x);
  };
  const std::int64_t groups = norm.b * norm.groups;
  if (threads == 1 || groups >= 2 * threads) {
    parallel_for(threads, groups, [&](std::int64_t group) {
      const std::int64_t first = group * channels, last = first + channels;
      for (std::int64_t i = first; i < last; ++i) add_up(i);
      finish(group);
      for (std::int64_t i = first; i < last; ++i) differentiate(i, 0, norm.n);
    });
    return;
  }
  parallel_for(threads, all, add_up);
  for (std::int64_t group = 0; group < groups; ++group) finish(group);
  for_channel_pieces(norm, threads, differentiate);
}

void channels_last_backward(const Kernels& kernels, const Norm& norm, const void* grad,
                            const double* statistics, int threads, void* grad_x, float* sums) {
  const std::int64_t c = norm.c, blocks = ceil_div(norm.n, kRows);
  const SecondPass second = second_pass(norm, grad, grad_x);
  const Buffer<float> slopes(norm.b * kSlopes * c), parts(norm.b * blocks * 2 * c);
  for (std::int64_t i = 0; i < norm.b * c; ++i) {
    const Slope slope = slope_of(norm, statistics, i / c, i % c);
    for (int k = 0; k < kSlopes; ++k) slopes[(i / c * kSlopes + k) * c + i % c] = slope.of[k];
  }
  for_row_blocks(norm, threads, [&](std::int64_t task, std::int64_t b, std::int64_t first, int n) {
    float* own = parts.data() + task * 2 * c;
    std::fill_n(own, 2 * c, 0.0f);
    const Slopes slope = view(slopes.data() + b * kSlopes * c, c);
    kernels.sums_each(norm, slope, grad, (b * norm.n + first) * norm.c, n, second.dz, own);
  });
  parallel_for(threads, norm.b * norm.groups, [&](std::int64_t group) {
    const std::int64_t b = group / norm.groups, channels = c / norm.groups;
    const std::int64_t first = group % norm.groups * channels;
    for (std::int64_t i = first; i < first + channels; ++i) {
      double plain = 0, weighted = 0;
      for (std::int64_t block = b * blocks; block < (b + 1) * blocks; ++block) {
        plain += parts[block * 2 * c + i];
        weighted += parts[block * 2 * c + c + i];
      }
      sums[b * c + i] = static_cast<float>(plain);
      sums[(norm.b + b) * c + i] = static_cast<float>(weighted);
    }
    set_group_means(norm, sums, group, slopes.data() + b * kSlopes * c + first, c, 1);
  });
  for_row_blocks(norm, threads, [&](std::int64_t, std::int64_t b, std::int64_t first, int n) {
    const Slopes slope = view(slopes.data() + b * kSlopes * c, c);
    kernels.gradient_each(second.norm, slope, second.grad, (b * norm.n + first) * norm.c, n,
                          grad_x);
  });
}

}  // namespace

void forward_cpu(const Norm& norm, int threads, void* y, double* statistics) {
  const std::int64_t count = norm.b * norm.c * norm.n;
  if (count == 0) {
    std::fill_n(statistics, 2 * norm.b * norm.groups, std::numeric_limits<double>::quiet_NaN());
    return;
  }
  if (count <= kAlone) threads = 1;
  const std::int64_t bytes = count * element_bytes(norm);
  const bool fresh = y != norm.x && y != norm.residual, large = fresh && bytes >= kLargeBytes;
  const Kernels& kernels = T2P_DISPATCH_BF16(kKernels);
  norm.channels_last ? channels_last_forward(kernels, norm, threads, large, y, statistics)
                     : contiguous_forward(kernels, norm, threads, large, y, statistics);
}

void backward_cpu(const Norm& norm, const void* grad, const double* statistics, int threads,
                  void* grad_x, float* sums) {
  const std::int64_t count = norm.b * norm.c * norm.n;
  if (count == 0) {
    std::fill_n(sums, 2 * norm.b * norm.c, 0.0f);
    return;
  }
  if (count <= kAlone) threads = 1;
  const Kernels& kernels = T2P_DISPATCH_BF16(kKernels);
  norm.channels_last
      ? channels_last_backward(kernels, norm, grad, statistics, threads, grad_x, sums)
      : contiguous_backward(kernels, norm, grad, statistics, threads, grad_x, sums);
}

}  // namespace t2p::group_norm

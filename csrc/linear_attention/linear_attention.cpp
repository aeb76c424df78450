// SPDX-License-Identifier: Apache-2.0
#include "linear_attention/linear_attention.h"

#include <algorithm>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "linear_attention/kernels.h"
#include "linear_attention/linear_attention-inl.h"

namespace t2p::linear_attention {
namespace {

// With this many heads there is work for all cores; fewer are split along the sequence.
constexpr std::int64_t kEnoughHeads = 16;
// Heads side by side are taken together if their states fit in a near cache.
constexpr std::int64_t kGroupStates = 320 << 10;
constexpr std::int64_t kShortestPart = 512, kMostParts = 16;

std::int64_t part_length(std::int64_t heads, std::int64_t rows) {
  if (heads >= kEnoughHeads) return std::max<std::int64_t>(rows, 1);
  return ceil_div(std::max(kShortestPart, ceil_div(rows, kMostParts)), kRows) * kRows;
}

Head head_of(const Attention& attention, std::int64_t task) {
  const std::int64_t sequence = task / attention.h;
  Head head{.batch = sequence,
            .head = task % attention.h,
            .m = attention.m,
            .n = attention.n,
            .first = 0,
            .dp = padded(attention.d),
            .ep = padded(attention.e)};
  if (attention.offsets) {
    head.batch = 0;
    head.first = attention.offsets[sequence];
    head.m = head.n = attention.offsets[sequence + 1] - head.first;
  }
  return head;
}

float* scratch_for(const Attention& attention) {
  thread_local Buffer<float> scratch;
  scratch.reserve(scratch_size(padded(attention.d), padded(attention.e)));
  return scratch.data();
}

// Between a state in scratch and one as users see it, [d, e + 1].
void read_state(const Attention& attention, const float* states, std::int64_t task, float* to) {
  const std::int64_t d = attention.d, e = attention.e, dp = padded(d), ep = padded(e);
  std::fill_n(to, dp * ep + dp, 0.0f);
  if (states == nullptr) return;
  const float* from = states + task * d * (e + 1);
  for (std::int64_t i = 0; i < d; ++i, from += e + 1) {
    std::copy_n(from, e, to + i * ep);
    to[dp * ep + i] = from[e];
  }
}

void write_state(const Attention& attention, const float* from, std::int64_t task, float* states) {
  if (states == nullptr) return;
  const std::int64_t d = attention.d, e = attention.e, dp = padded(d), ep = padded(e);
  float* to = states + task * d * (e + 1);
  for (std::int64_t i = 0; i < d; ++i, to += e + 1) {
    std::copy_n(from + i * ep, e, to);
    to[e] = from[dp * ep + i];
  }
}

// How many heads of a sequence a thread takes at once. Where their rows lie side by side, many are
// read in the order of memory: as many as leave no thread with a tenth more of them than its share.
// The bits do not depend on it.
std::int64_t heads_at_once(const Attention& attention, int threads) {
  if (attention.k.head >= attention.k.row) return 1;
  const std::int64_t state = 4 * state_size(head_of(attention, 0));
  const std::int64_t most = std::max<std::int64_t>(1, kGroupStates / state), h = attention.h;
  const std::int64_t even = ceil_div(attention.s * h, threads);
  std::int64_t groups = ceil_div(h, most);
  // The most heads of a thread.
  const auto most_of_one = [&] {
    return ceil_div(attention.s * groups, threads) * ceil_div(h, groups);
  };
  while (groups < h && 10 * most_of_one() > 11 * even) ++groups;
  return ceil_div(h, groups);
}

// And how many rows of each in turn: few, for which the processor sees all that comes next; of
// bfloat16 what the tiles want. Causal ones are taken in whole chunks.
std::int64_t rows_in_turn(const Attention& attention) {
  return attention.causal || attention.k.format == Format::kBf16 ? 64 : 16;
}

// Each head by one thread, from its first key to its last query.
void forward_heads(const Kernels& kernels, const Attention& attention, int threads, const Rows& out,
                   float* last) {
  const std::int64_t width = heads_at_once(attention, threads);
  const std::int64_t groups = ceil_div(attention.h, width), turn = rows_in_turn(attention);
  const std::int64_t size = state_size(head_of(attention, 0));
  parallel_for(threads, attention.s * groups, [&](std::int64_t task) {
    const std::int64_t begin = task / groups * attention.h + task % groups * width;
    const std::int64_t end = std::min(begin + width, (task / groups + 1) * attention.h);
    const Head first = head_of(attention, begin);
    thread_local Buffer<float> states;
    states.reserve(width * size);
    const auto for_each_head = [&](const auto& call) {
      for (std::int64_t head = begin; head < end; ++head) {
        call(head_of(attention, head), states.data() + (head - begin) * size);
      }
    };
    // Calls with the rows [from, to) of each head.
    const auto for_each_block = [&](std::int64_t rows, const auto& call) {
      const std::int64_t step = width == 1 ? std::max<std::int64_t>(rows, 1) : turn;
      for (std::int64_t row = 0; row < rows; row += step) {
        for_each_head([&](const Head& head, float* state) {
          call(head, row, std::min(row + step, rows), state);
        });
      }
    };
    float* scratch = scratch_for(attention);
    for (std::int64_t head = begin; head < end; ++head) {
      read_state(attention, attention.initial_state, head, states.data() + (head - begin) * size);
    }
    if (attention.causal) {
      for_each_block(first.n, [&](const Head& head, std::int64_t from, std::int64_t to, float* s) {
        kernels.scan(attention, head, from, to, s, scratch, out);
      });
    } else {
      for_each_block(first.n, [&](const Head& head, std::int64_t from, std::int64_t to, float* s) {
        kernels.accumulate(attention, head, from, to, scratch, s);
      });
      for_each_block(first.m, [&](const Head& head, std::int64_t from, std::int64_t to, float* s) {
        kernels.apply(attention, head, from, to, s, scratch, out);
      });
    }
    for (std::int64_t head = begin; head < end; ++head) {
      write_state(attention, states.data() + (head - begin) * size, head, last);
    }
  });
}

void add(const float* from, std::int64_t count, float* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] += from[i];
}

}  // namespace

void forward_cpu(const Attention& attention, int threads, const Rows& out, float* state) {
  const Kernels& kernels = T2P_AMX_DISPATCH_BF16(kKernels);
  const std::int64_t heads = attention.s * attention.h;
  if (heads == 0) return;
  const std::int64_t dp = padded(attention.d), ep = padded(attention.e), size = dp * ep + dp;
  const std::int64_t length = part_length(heads, attention.n);
  const std::int64_t parts = std::max<std::int64_t>(1, ceil_div(attention.n, length));
  const std::int64_t reach = part_length(heads, attention.m);
  const std::int64_t blocks = std::max<std::int64_t>(1, ceil_div(attention.m, reach));
  if (parts == 1 && blocks == 1) return forward_heads(kernels, attention, threads, out, state);
  const Buffer<float> states(heads * parts * size);

  // Every part's own sum; in place of the last one's, if causal, only what comes before it counts.
  parallel_for(threads, heads * parts, [&](std::int64_t task) {
    const std::int64_t part = task % parts;
    const Head head = head_of(attention, task / parts);
    float* sum = states.data() + task * size;
    std::fill_n(sum, size, 0.0f);
    if (attention.causal && part == parts - 1) return;
    kernels.accumulate(attention, head, std::min(head.n, part * length),
                       std::min(head.n, (part + 1) * length), scratch_for(attention), sum);
  });
  parallel_for(threads, heads, [&](std::int64_t task) {
    float* sums = states.data() + task * parts * size;
    thread_local Buffer<float> running, own;
    running.reserve(size);
    own.reserve(size);
    read_state(attention, attention.initial_state, task, running.data());
    for (std::int64_t part = 0; part < parts; ++part) {
      float* sum = sums + part * size;
      if (attention.causal) {
        std::copy_n(sum, size, own.data());
        std::copy_n(running.data(), size, sum);
        add(own.data(), size, running.data());
      } else {
        add(sum, size, running.data());
      }
    }
    if (attention.causal) return;
    std::copy_n(running.data(), size, sums);
    write_state(attention, sums, task, state);
  });

  if (attention.causal) {
    parallel_for(threads, heads * parts, [&](std::int64_t task) {
      const std::int64_t part = task % parts;
      const Head head = head_of(attention, task / parts);
      float* before = states.data() + task * size;
      kernels.scan(attention, head, std::min(head.n, part * length),
                   std::min(head.n, (part + 1) * length), before, scratch_for(attention), out);
      if (part == parts - 1) write_state(attention, before, task / parts, state);
    });
    return;
  }
  parallel_for(threads, heads * blocks, [&](std::int64_t task) {
    const std::int64_t block = task % blocks;
    const Head head = head_of(attention, task / blocks);
    kernels.apply(attention, head, std::min(head.m, block * reach),
                  std::min(head.m, (block + 1) * reach),
                  states.data() + task / blocks * parts * size, scratch_for(attention), out);
  });
}

void backward_cpu(const Attention& attention, int threads, const Gradients& gradients) {
  const Kernels& kernels = T2P_AMX_DISPATCH_BF16(kKernels);
  parallel_for(threads, attention.s * attention.h, [&](std::int64_t task) {
    const Head head = head_of(attention, task);
    thread_local Buffer<float> initial, grad, factors;
    initial.reserve(state_size(head));
    grad.reserve(state_size(head));
    factors.reserve(2 * head.m);
    read_state(attention, attention.initial_state, task, initial.data());
    read_state(attention, gradients.state, task, grad.data());
    kernels.backward(attention, head, gradients, initial.data(), scratch_for(attention),
                     factors.data(), grad.data());
    write_state(attention, grad.data(), task, gradients.initial_state);
  });
}

}  // namespace t2p::linear_attention

// SPDX-License-Identifier: Apache-2.0
#include "mrf/mrf.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "mrf/kernels.h"
#include "mrf/mrf-inl.h"

namespace t2p::mrf {

float log_of(float a) { return std::log(a); }

namespace {

constexpr std::int64_t kMostLanes = 16;

// Calls body(row, scratch) for all rows, in tasks of about equal work.
template <class Body>
void for_each_row(int threads, std::int64_t r, std::int64_t v, const Body& body) {
  constexpr std::int64_t kLabelsPerTask = 16 * 1024;
  const std::int64_t rows = std::max<std::int64_t>(1, kLabelsPerTask / v);
  parallel_for(threads, ceil_div(r, rows), [&](std::int64_t task) {
    thread_local Buffer<float> scratch;
    scratch.reserve(4 * (v + kMostLanes));
    const std::int64_t end = std::min(r, (task + 1) * rows);
    for (std::int64_t row = task * rows; row < end; ++row) body(row, scratch.data());
  });
}

// Keeps the first of the rows that are noted; a negative one is none.
void note(std::atomic<std::int64_t>& least, std::int64_t row) {
  std::int64_t before = least;
  while (row >= 0 && row < before && !least.compare_exchange_weak(before, row)) {
  }
}

// Strips of labels pay where there are several for each thread.
bool by_strips(const Kernels& kernels, const Positions& positions, std::int64_t v, int threads) {
  return positions.b * v >= 2 * threads * kernels.strip;
}

void message_by_strips(const Kernels& kernels, const Edges& edges, const Positions& positions,
                       Values q, std::int64_t v, int threads, MutableValues message) {
  const std::int64_t strips = ceil_div(v, kernels.strip);
  parallel_for(threads, positions.b * strips, [&](std::int64_t task) {
    thread_local Buffer<float> columns;
    columns.reserve(positions.n * kernels.strip);
    kernels.gather_strip(edges, positions, q, task / strips, v, task % strips, columns.data(),
                         message);
  });
}

}  // namespace

std::int64_t update_cpu(Values message, const float* unary, Values previous, std::int64_t r,
                        std::int64_t v, float scale, float damping, float temperature, int threads,
                        MutableValues next) {
  const Kernels& kernels = T2P_DISPATCH_BF16(kKernels);
  std::atomic<std::int64_t> bad{r};
  for_each_row(threads, r, v, [&](std::int64_t row, float* scratch) {
    const std::int64_t at = row * v;
    if (kernels.update_row(from(message, at), unary + at, from(previous, at), v, scale, damping,
                           temperature, scratch, from(next, at))) {
      return;
    }
    note(bad, row);
  });
  return bad < r ? bad.load() : -1;
}

std::int64_t low_rank_step_cpu(const LowRankStep& step, int threads, const LowRankResult& result) {
  const Kernels& kernels = T2P_DISPATCH(kKernels);
  std::atomic<std::int64_t> bad{step.r};
  parallel_for(threads, ceil_div(step.r, kLowRankRows), [&](std::int64_t task) {
    thread_local Buffer<float> scratch;
    scratch.reserve(kLowRankRows * (step.v + kMostLanes));
    const std::int64_t first = task * kLowRankRows;
    const std::int64_t count = std::min<std::int64_t>(kLowRankRows, step.r - first);
    note(bad, kernels.low_rank_rows(step, first, count, scratch.data(), result));
  });
  return bad < step.r ? bad.load() : -1;
}

bool find_candidates_cpu(const float* unary, const std::int64_t* row, std::int64_t r,
                         std::int64_t v, std::int64_t most, int threads, std::int64_t* candidate,
                         std::int64_t* candidates) {
  constexpr std::int64_t kTogether = 16;
  const Kernels& kernels = T2P_DISPATCH(kKernels);
  std::atomic<bool> few{true};
  parallel_for(threads, ceil_div(r, kTogether), [&](std::int64_t task) {
    for (std::int64_t i = task * kTogether; i < r && i < (task + 1) * kTogether && few; ++i) {
      const std::int64_t count =
          kernels.find_candidates(unary + row[i] * v, v, most, candidate + i * most);
      candidates[i] = count;
      if (count == 0) few = false;
    }
  });
  return few;
}

void message_cpu(const Edges& edges, const Positions& positions, Values q, std::int64_t v,
                 int threads, MutableValues message) {
  const Kernels& kernels = T2P_DISPATCH_BF16(kKernels);
  if (by_strips(kernels, positions, v, threads)) {
    return message_by_strips(kernels, edges, positions, q, v, threads, message);
  }
  for_each_row(threads, positions.r, v, [&](std::int64_t row, float* scratch) {
    kernels.gather(edges, positions, q, row, v, scratch);
    kernels.put_row(scratch, v, from(message, row * v));
  });
}

void local_step_cpu(const Edges& edges, const Positions& positions, Values q, const float* unary,
                    std::int64_t v, float scale, float damping, float temperature, int threads,
                    MutableValues next) {
  const Kernels& kernels = T2P_DISPATCH_BF16(kKernels);
  const Values previous = damping != 0 ? q : Values{nullptr, q.format};
  const bool strips = next.format == Format::kF32 && by_strips(kernels, positions, v, threads);
  if (strips) message_by_strips(kernels, edges, positions, q, v, threads, next);
  for_each_row(threads, positions.r, v, [&](std::int64_t row, float* scratch) {
    const std::int64_t at = row * v;
    // A row's message has been read in full before its place is written to.
    const float* message = strips ? static_cast<const float*>(next.data) + at : scratch;
    if (!strips) kernels.gather(edges, positions, q, row, v, scratch);
    kernels.update_row({message, Format::kF32}, unary + at, from(previous, at), v, scale, damping,
                       temperature, scratch + v + kMostLanes, from(next, at));
  });
}

void belief_step_cpu(const Edges& edges, const BeliefStep& step, const float* from, int threads,
                     float* to) {
  const Kernels& kernels = T2P_DISPATCH_BF16(kKernels);
  // A position's work is some v x v per edge: so many positions are worth a task.
  const std::int64_t size = step.v * std::max<std::int64_t>(step.v / 64, 1);
  for_each_row(threads, step.b * step.count, size, [&](std::int64_t task, float* scratch) {
    const std::int64_t picture = task / step.count, i = step.order[task % step.count];
    const std::int64_t messages = picture * step.e * step.v;
    kernels.send(edges, step, step.unary + (picture * step.n + i) * step.v, i, from + messages,
                 scratch, to + messages);
  });
}

void beliefs_cpu(const Edges& edges, const BeliefStep& step, const float* messages, int threads,
                 float* beliefs) {
  const Kernels& kernels = T2P_DISPATCH_BF16(kKernels);
  for_each_row(threads, step.b * step.n, step.v, [&](std::int64_t row, float*) {
    const std::int64_t picture = row / step.n, i = row % step.n;
    float* belief = beliefs + row * step.v;
    std::copy_n(step.unary + row * step.v, step.v, belief);
    for (std::int64_t e = edges.begin[i]; e < edges.begin[i + 1]; ++e) {
      kernels.accumulate(messages + (picture * step.e + step.reverse[e]) * step.v, 1.0f, step.v,
                         belief);
    }
  });
}

std::int64_t icm_cpu(const Edges& edges, const float* unary, const float* w_c,
                     const std::int64_t* known, std::int64_t b, std::int64_t n, std::int64_t v,
                     std::int64_t sweeps, int threads, std::int64_t* labels) {
  const Kernels& kernels = T2P_DISPATCH_BF16(kKernels);
  std::atomic<std::int64_t> needed{0};
  parallel_for(threads, b, [&](std::int64_t picture) {
    const Buffer<float> scores(v);
    std::int64_t* x = labels + picture * n;
    const auto score_of = [&](std::int64_t i, std::int64_t a) {
      double score = unary[(picture * n + i) * v + a];
      for (std::int64_t e = edges.begin[i]; e < edges.begin[i + 1]; ++e) {
        score += double{edges.weight[e]} * w_c[x[edges.node[e]] * v + a];
      }
      return score;
    };
    bool changed = true;
    std::int64_t sweep = 0;
    for (; changed && sweep < sweeps; ++sweep) {
      changed = false;
      for (std::int64_t i = 0; i < n; ++i) {
        if (known[picture * n + i] >= 0) continue;
        std::copy_n(unary + (picture * n + i) * v, v, scores.data());
        for (std::int64_t e = edges.begin[i]; e < edges.begin[i + 1]; ++e) {
          kernels.accumulate(w_c + x[edges.node[e]] * v, edges.weight[e], v, scores.data());
        }
        const std::int64_t best =
            std::max_element(scores.data(), scores.data() + v) - scores.data();
        if (best != x[i] && score_of(i, best) > score_of(i, x[i])) {
          x[i] = best;
          changed = true;
        }
      }
    }
    std::int64_t most = needed;
    while (sweep > most && !needed.compare_exchange_weak(most, sweep)) {
    }
  });
  return needed;
}

}  // namespace t2p::mrf

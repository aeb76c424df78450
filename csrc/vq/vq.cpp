// SPDX-License-Identifier: Apache-2.0
#include "vq/vq.h"

#include <algorithm>
#include <stdexcept>

#include "common/buffer.h"
#include "common/check.h"
#include "common/parallel.h"

namespace t2p::vq {
namespace {

void check_index(const char* op, std::int64_t index, std::int64_t k) {
  if (index < 0 || index >= k) [[unlikely]] {
    throw std::out_of_range(concat(op, ": index ", index, " is outside [0, ", k, ")"));
  }
}

}  // namespace

void lookup_cpu(const std::int64_t* indices, const float* codebook, std::int64_t k, int threads,
                const Rows<float>& out) {
  const std::int64_t n = out.count(), d = out.d;
  constexpr std::int64_t kRows = 64;
  parallel_for(threads, ceil_div(n, kRows), [&](std::int64_t block) {
    const std::int64_t begin = block * kRows, end = std::min(begin + kRows, n);
    for (std::int64_t r = begin; r < end; ++r) check_index("vq_lookup", indices[r], k);
    if (out.channel_stride == 1) {
      for (std::int64_t r = begin; r < end; ++r) {
        std::copy_n(codebook + indices[r] * d, d, out.row(r));
      }
      return;
    }
    constexpr std::int64_t kChannels = 16;  // a cache line of each code at a time
    for (std::int64_t t0 = 0; t0 < d; t0 += kChannels) {
      const std::int64_t t1 = std::min(t0 + kChannels, d);
      for (std::int64_t r = begin; r < end; ++r) {
        const float* code = codebook + indices[r] * d;
        float* row = out.row(r);
        for (std::int64_t t = t0; t < t1; ++t) row[t * out.channel_stride] = code[t];
      }
    }
  });
}

void accumulate_cpu(const Rows<const float>& x, const std::int64_t* indices, std::int64_t k,
                    int threads, float* counts, float* sums) {
  const std::int64_t n = x.count(), d = x.d;
  // A stable counting sort: the rows of code j are order[begin[j]], ..., order[begin[j + 1] - 1].
  Buffer<std::int64_t> begin(k + 1), order(n);
  std::fill_n(begin.data(), k + 1, 0);
  for (std::int64_t r = 0; r < n; ++r) {
    check_index("vq_accumulate", indices[r], k);
    ++begin[indices[r] + 1];
  }
  for (std::int64_t j = 0; j < k; ++j) begin[j + 1] += begin[j];
  for (std::int64_t r = 0; r < n; ++r) order[begin[indices[r]]++] = r;
  for (std::int64_t j = k; j > 0; --j) begin[j] = begin[j - 1];
  begin[0] = 0;

  const std::int64_t tasks = std::min<std::int64_t>(k, 8 * threads);
  parallel_for(threads, tasks, [&](std::int64_t task) {
    // Codes are dealt out so that every task has about as many rows plus codes.
    const auto first_code = [&](std::int64_t part) {
      std::int64_t low = 0, high = k;
      while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        (begin[middle] + middle) * tasks < (n + k)* part ? low = middle + 1 : high = middle;
      }
      return low;
    };
    thread_local Buffer<double> total;
    total.reserve(d);
    for (std::int64_t j = first_code(task), last = first_code(task + 1); j < last; ++j) {
      std::fill_n(total.data(), d, 0.0);
      for (std::int64_t i = begin[j]; i < begin[j + 1]; ++i) {
        const float* row = x.row(order[i]);
        if (x.channel_stride == 1) {  // on its own, so that it becomes vectors
          for (std::int64_t t = 0; t < d; ++t) total[t] += row[t];
        } else {
          for (std::int64_t t = 0; t < d; ++t) total[t] += row[t * x.channel_stride];
        }
      }
      counts[j] = static_cast<float>(begin[j + 1] - begin[j]);
      std::copy_n(total.data(), d, sums + j * d);
    }
  });
}

void total_cpu(const float* distance, std::int64_t n, double scale, float* total) {
  double sum = 0;
  for (std::int64_t r = 0; r < n; ++r) sum += distance[r];
  *total = static_cast<float>(scale * sum);
}

}  // namespace t2p::vq

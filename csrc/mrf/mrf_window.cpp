// SPDX-License-Identifier: Apache-2.0
#include "mrf/mrf_window.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "common/block_cache.h"
#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace t2p::mrf {
namespace {

constexpr float kLog2E = 1.44269504f;

void pause() {
#if T2P_X86
  __builtin_ia32_pause();
#endif
}

// Phases of equally many tasks, each of which waits for all tasks of the phase before. Every thread
// begins with tasks of its own, the same in each phase, whose data its cache then has, and goes on
// to those that others have not begun: so that it does not matter how many threads take part, nor
// when they come.
class Phases {
 public:
  explicit Phases(std::int64_t tasks) : begun_(static_cast<std::size_t>(tasks)) {
    for (auto& phase : begun_) phase.store(-1, std::memory_order_relaxed);
  }

  // Calls body(task) for those of this phase that the member-th thread of `members` takes.
  template <class Body>
  void run(std::int64_t phase, std::int64_t member, std::int64_t members, const Body& body) {
    const auto tasks = static_cast<std::int64_t>(begun_.size());
    wait_for(phase * tasks);
    // Back and forth: what a phase had last, and the cache still has, the next begins with.
    const std::int64_t own = member * tasks / members, end = (member + 1) * tasks / members;
    for (std::int64_t i = 0; i < tasks; ++i) {
      const std::int64_t at = phase % 2 == 0 ? own + i : end - 1 - i + tasks;
      const std::int64_t task = at % tasks;
      std::int64_t before = phase - 1;
      std::atomic<std::int64_t>& begun = begun_[static_cast<std::size_t>(task)];
      if (begun.load(std::memory_order_relaxed) != before ||
          !begun.compare_exchange_strong(before, phase, std::memory_order_relaxed)) {
        continue;
      }
      body(task);
      done_.fetch_add(1, std::memory_order_release);
    }
  }
  void wait_for(std::int64_t count) const {
    constexpr int kSpins = 2000;  // some ten times as long as neighbours are apart
    for (int spin = 0; done_.load(std::memory_order_acquire) < count; ++spin) {
      spin < kSpins ? pause() : std::this_thread::yield();
    }
  }

 private:
  std::vector<std::atomic<std::int64_t>> begun_;  // the last phase in which it was
  alignas(64) std::atomic<std::int64_t> done_{0};
};

// Wide strips take fewer steps to read and write rows in pieces, where there are enough of them for
// the threads that a machine may have. Whatever their number now: it must not matter.
const StripKernels& strips_for(const WindowKernels& kernels, std::int64_t v) {
  return v < 16 * kernels.wide.size ? kernels.narrow : kernels.wide;
}

// Mean field of one picture, by `members` threads that each call `take_part`.
class Picture {
 public:
  Picture(const WindowKernels& kernels, const Window& window, const WindowField& field,
          std::int64_t picture, float* q)
      : kernels_(kernels),
        window_(window),
        n_(window.height * window.width),
        by_strip_(strips_for(kernels, field.v)),
        size_(by_strip_.size),
        strips_(ceil_div(field.v, size_)),
        v_(field.v),
        iterations_(field.iterations),
        scale_(kLog2E / field.temperature),
        unary_(field.unary + picture * n_ * v_),
        known_(field.known == nullptr ? nullptr : field.known + picture * n_),
        q_(q + picture * n_ * v_),
        memory_(2 * strips_ * n_ * size_ + (2 * strips_ + 1) * n_),
        largest_(memory_.data() + 2 * strips_ * n_ * size_),
        phases_(strips_),
        bad_(n_) {}

  void take_part(std::int64_t member, std::int64_t members) {
    thread_local Buffer<float> scratch;
    const std::int64_t room = scratch_size(window_, size_);
    scratch.reserve(room + n_);
    float* shares = scratch.data() + room;
    phases_.run(0, member, members, [&](std::int64_t task) {
      const std::int64_t row = kernels_.find_largest(unary_, known_, task * n_ / strips_,
                                                     (task + 1) * n_ / strips_, v_, largest_);
      std::int64_t before = bad_;
      while (row >= 0 && row < before && !bad_.compare_exchange_weak(before, row)) {
      }
    });
    phases_.run(1, member, members, [&](std::int64_t task) {
      by_strip_.begin(strip(task, 0), window_.width, largest_, scale_, scratch.data());
    });
    for (std::int64_t step = 1; step <= iterations_ + 1; ++step) {
      // Who comes too late to take a task may not read sums, which others write by then.
      bool ready = false;
      phases_.run(step + 1, member, members, [&](std::int64_t task) {
        if (!ready) kernels_.invert(sums(0, step - 1), strips_, n_, shares);
        ready = true;
        step <= iterations_ ? by_strip_.iterate(strip(task, step), window_, shares, scratch.data())
                            : by_strip_.finish(strip(task, step), shares, q_);
      });
    }
  }

  // After all have taken part: the first row with no finite maximum, or -1.
  std::int64_t bad() const { return bad_ < n_ ? bad_.load() : -1; }

 private:
  float* sums(std::int64_t task, std::int64_t step) const {
    return largest_ + (1 + step % 2 * strips_ + task) * n_;
  }
  Strip strip(std::int64_t task, std::int64_t step) const {
    float* scores = memory_.data() + 2 * task * n_ * size_;
    return {.unary = unary_,
            .known = known_,
            .first = task * size_,
            .v = v_,
            .n = n_,
            .scores = scores,
            .weights = scores + n_ * size_,
            .sums = sums(task, step)};
  }

  const WindowKernels& kernels_;
  const Window& window_;
  const std::int64_t n_;
  const StripKernels& by_strip_;
  const std::int64_t size_, strips_, v_, iterations_;
  const float scale_;
  const float* const unary_;
  const std::int64_t* const known_;
  float* const q_;
  const CachedArray<float> memory_;
  float* const largest_;
  Phases phases_;
  std::atomic<std::int64_t> bad_;
};

}  // namespace

std::int64_t window_cpu(const Window& window, const WindowField& field, int threads, float* q) {
  const WindowKernels& kernels = T2P_DISPATCH_BF16(kWindowKernels);
  const std::int64_t n = window.height * window.width;
  // The kernels' weights, for 2^x instead of e^x.
  const double scale = double{kLog2E} / field.temperature;
  std::vector<float> weights;
  const auto scaled = [&](const float* from, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      weights.push_back(static_cast<float>(from[i] * scale));
    }
    return weights.data();
  };
  Window own = window;
  if (window.weights != nullptr) {
    own.weights = scaled(window.weights, window.kh * window.kw);
  } else {
    own.down = scaled(window.down, window.kh);
    own.middle = static_cast<float>(window.middle * scale);
  }
  const auto position_of = [&](std::int64_t picture, std::int64_t bad) {
    return bad < 0 ? field.b * n : picture * n + bad;
  };
  std::int64_t least = field.b * n;
  if (field.b >= threads) {
    std::atomic<std::int64_t> first{least};
    parallel_for(threads, field.b, [&](std::int64_t number) {
      Picture picture(kernels, own, field, number, q);
      picture.take_part(0, 1);
      const std::int64_t bad = position_of(number, picture.bad());
      std::int64_t before = first;
      while (bad < before && !first.compare_exchange_weak(before, bad)) {
      }
    });
    least = first;
  } else {
    for (std::int64_t number = 0; number < field.b; ++number) {
      Picture picture(kernels, own, field, number, q);
      const std::int64_t members =
          std::min<std::int64_t>(threads, ceil_div(field.v, strips_for(kernels, field.v).size));
      parallel_for(threads, members,
                   [&](std::int64_t member) { picture.take_part(member, members); });
      least = std::min(least, position_of(number, picture.bad()));
    }
  }
  return least < field.b * n ? least : -1;
}

}  // namespace t2p::mrf

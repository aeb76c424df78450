// SPDX-License-Identifier: Apache-2.0
// Parallel loops on the threads that torch uses: on its OpenMP runtime, found at run time, so that
// its idle threads take the work at once instead of spinning beside ours. Where there is none, and
// in a forked child (DataLoader workers), where OpenMP may hang, on a pool of our own. The thread
// count is an argument (Python passes torch.get_num_threads()).
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace t2p {

// Into how many tasks of b the work a is cut: a / b, rounded up.
inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// A borrowed callable `void(std::int64_t task)`; must not outlive the callable it was made from.
class TaskRef {
 public:
  template <class F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, TaskRef>)
  TaskRef(F&& f)  // NOLINT(google-explicit-constructor): a view, as std::string_view
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, std::int64_t task) {
          (*static_cast<std::remove_reference_t<F>*>(object))(task);
        }) {}
  void operator()(std::int64_t task) const { call_(object_, task); }

 private:
  void* object_;
  void (*call_)(void*, std::int64_t);
};

// Calls body(0), ..., body(tasks - 1), each once, in no fixed order, on at most `threads` threads,
// the caller among them. Returns when all are done. The first exception a task throws is rethrown
// here and the tasks not yet begun are dropped. A call from inside a task runs in that thread.
// Concurrent callers share the workers. The caller must not hold the GIL.
void parallel_for(int threads, std::int64_t tasks, TaskRef body);

}  // namespace t2p

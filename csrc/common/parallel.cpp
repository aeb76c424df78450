// SPDX-License-Identifier: Apache-2.0
#include "common/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <list>
#include <mutex>
#include <system_error>
#include <thread>

namespace t2p {
namespace {

thread_local bool inside_task = false;

struct Job {
  Job(TaskRef body, std::int64_t tasks, std::int64_t seats)
      : body(body), tasks(tasks), seats(seats) {}

  TaskRef body;
  std::int64_t tasks;
  std::int64_t seats;       // workers that may still join; guarded by the pool's mutex
  std::int64_t active = 0;  // workers inside; guarded by the pool's mutex
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // written once, by whoever sets `failed`
  std::condition_variable left;

  void run() {
    inside_task = true;
    try {
      for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        body(task);
      }
    } catch (...) {
      next.store(tasks, std::memory_order_relaxed);
      if (!failed.exchange(true)) error = std::current_exception();
    }
    inside_task = false;
  }
};

class Pool {
 public:
  void run(std::int64_t helpers, std::int64_t tasks, TaskRef body) {
    Job job(body, tasks, helpers);
    std::unique_lock lock(mutex_);
    grow(helpers);
    jobs_.push_back(&job);
    lock.unlock();
    if (helpers == 1) {
      work_.notify_one();
    } else {
      work_.notify_all();
    }

    job.run();

    lock.lock();
    jobs_.remove(&job);  // nobody joins from here on
    job.left.wait(lock, [&] { return job.active == 0; });
    lock.unlock();
    if (job.error) std::rethrow_exception(job.error);
  }

 private:
  // Workers are detached and the pool is never destroyed: joining threads while the process exits,
  // or after a fork that did not copy them, has no safe order.
  void grow(std::int64_t workers) {
    try {
      for (; workers_ < workers; ++workers_) std::thread(&Pool::work, this).detach();
    } catch (const std::system_error&) {
      // The system gives no more threads. The caller does the work with those there are.
    }
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      const auto open =
          std::find_if(jobs_.begin(), jobs_.end(), [](Job* j) { return j->seats > 0; });
      if (open == jobs_.end()) {
        work_.wait(lock);
        continue;
      }
      Job& job = **open;
      --job.seats;
      ++job.active;
      lock.unlock();
      job.run();
      lock.lock();
      if (--job.active == 0) job.left.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_;
  std::list<Job*> jobs_;
  std::int64_t workers_ = 0;
};

// The entry of an OpenMP parallel region: GCC's libgomp has it, and LLVM's and Intel's runtimes for
// compatibility.
using Region = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// What the process runs loops on. A forked child has none of its parent's threads and may have
// inherited a locked mutex: it leaves OpenMP and the old pool alone and starts with a new one.
struct Threads {
  Region region = nullptr;
  Pool* pool = nullptr;
};

Threads& threads_of_process() {
  static Threads threads = [] {
    void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (symbol == nullptr) {
      // Loaded by a module of Python, it may be out of the sight of others.
      if (void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD)) {
        symbol = dlsym(library, "GOMP_parallel");
      }
    }
    pthread_atfork(nullptr, nullptr, [] {
      threads_of_process() = {nullptr, new Pool};
      inside_task = false;
    });
    return Threads{reinterpret_cast<Region>(symbol), new Pool};
  }();
  return threads;
}

}  // namespace

void parallel_for(int threads, std::int64_t tasks, TaskRef body) {
  const std::int64_t helpers = std::min<std::int64_t>(threads, tasks) - 1;
  if (helpers <= 0 || inside_task) {
    for (std::int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  const Threads& process = threads_of_process();
  if (process.region == nullptr) return process.pool->run(helpers, tasks, body);
  Job job(body, tasks, helpers);
  // Always a team of the same size: a runtime makes a smaller one by ending threads.
  process.region([](void* data) { static_cast<Job*>(data)->run(); }, &job,
                 static_cast<unsigned>(threads), 0);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace t2p

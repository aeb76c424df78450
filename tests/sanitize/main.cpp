// SPDX-License-Identifier: Apache-2.0
// Runs the thread pool and the CPU kernels for a sanitizer to watch; see .ci/sanitize. Results are
// only checked against one thread: what they should be is the business of the Python tests.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "masked_sampling/masked_sampling.h"
#include "sanitize/checks.h"
#include "scheduler/scheduler.h"
#include "vq/vq.h"

namespace {

void pool_runs_every_task_once() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([] {
      for (int round = 0; round < 50; ++round) {
        std::vector<int> seen(97);
        t2p::parallel_for(1 + round % 5, 97, [&](std::int64_t task) {
          std::atomic<int> nested{0};
          t2p::parallel_for(4, 3, [&](std::int64_t) { ++nested; });
          seen[task] += nested == 3;
        });
        for (int count : seen) require(count == 1, "every task once");
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void pool_passes_exceptions_on() {
  for (int round = 0; round < 50; ++round) {
    bool caught = false;
    try {
      t2p::parallel_for(4, 100, [](std::int64_t task) {
        if (task % 7 == 3) throw std::runtime_error("task");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    require(caught, "the exception of a task");
  }
}

void pool_survives_fork() {
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> done{0};
    t2p::parallel_for(3, 20, [&](std::int64_t) { ++done; });
    _exit(done == 20 ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  require(status == 0, "a pool in the child");
}

// Leaves the largest integer below the stack's end, where a kernel would find what it never wrote.
__attribute__((noinline)) void fill_stack() {
  volatile std::int32_t places[1 << 17];
  for (auto& place : places) place = std::numeric_limits<std::int32_t>::max();
}

// `image` lays the rows out as [2, d, n / 2], else as [n, d, 1]; `crowd` makes half the codes
// small.
void vq(std::int64_t n, std::int64_t k, std::int64_t d, bool image, float scale,
        t2p::vq::Metric metric = t2p::vq::Metric::kL2, bool crowd = false) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> x(n * d), codebook(k * d), quantized(n * d), distance(n), first(n);
  for (float& value : x) value = normal(random);
  for (float& value : codebook) value = normal(random);
  if (k > 3) std::copy_n(codebook.begin(), d, codebook.begin() + (k - 1) * d);
  if (crowd) {
    for (std::int64_t i = 0; i < k * d / 2; ++i) codebook[i] *= 1e-5f;
  }
  std::vector<float> counts(k), sums(k * d);
  std::vector<std::int64_t> indices(n);
  const auto rows = [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    return image ? t2p::vq::Rows<T>{data, 2, d, n / 2, d * (n / 2), n / 2, 1}
                 : t2p::vq::Rows<T>{data, n, d, 1, d, 1, 1};
  };
  for (int threads : {1, 2, 5}) {
    const auto from = rows(static_cast<const float*>(x.data()));
    const std::int64_t size = t2p::vq::packed_size(codebook.data(), k, d, metric, threads);
    const t2p::Buffer<std::uint8_t> packed(size);
    t2p::vq::pack_cpu(codebook.data(), k, d, metric, threads, packed.data(), size);
    require(t2p::vq::packed_for(packed.data(), size, k, d, metric),
            "what was packed is for its codebook");
    fill_stack();
    t2p::vq::nearest_cpu(from, codebook.data(), k, metric, packed.data(), threads, indices.data(),
                         distance.data());
    std::vector<float> unpacked(n);
    t2p::vq::nearest_cpu(from, codebook.data(), k, metric, nullptr, threads, indices.data(),
                         unpacked.data());
    require(unpacked == distance, "the same distances, packed before or not");
    t2p::vq::lookup_cpu(indices.data(), codebook.data(), k, threads, rows(quantized.data()));
    t2p::vq::accumulate_cpu(from, indices.data(), k, threads, counts.data(), sums.data());
    if (threads == 1) first = distance;
    require(first == distance, "the same distances for any number of threads");
  }
}

void masked_sampling(std::int64_t n, std::int64_t v, bool guided, std::int64_t top_k) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> logits(2 * n * v), log_probability(2 * n), first;
  for (float& value : logits) value = normal(random);
  std::vector<std::int64_t> tokens(2 * n, v), next(2 * n), sampled(2 * n);
  tokens[0] = 0;
  const std::int64_t count[2] = {n / 2, n}, seeds[2] = {5, -7};
  for (int threads : {1, 2, 5}) {
    t2p::masked_sampling::sample_cpu({.logits = logits.data(),
                                      .uncond = guided ? logits.data() : nullptr,
                                      .format = t2p::masked_sampling::Format::kF32,
                                      .transposed = top_k == 0,
                                      .tokens = tokens.data(),
                                      .mask_count = count,
                                      .seeds = seeds,
                                      .token_noise = nullptr,
                                      .confidence_noise = nullptr,
                                      .b = 2,
                                      .n = n,
                                      .v = v,
                                      .mask_token = v,
                                      .guidance = 1.5f,
                                      .temperature = 1,
                                      .choice_temperature = 1,
                                      .log_min_p = -3,
                                      .top_k = top_k,
                                      .step = 3,
                                      .next_tokens = next.data(),
                                      .sampled = sampled.data(),
                                      .log_probability = log_probability.data()},
                                     threads);
    if (threads == 1) first = log_probability;
    require(first == log_probability, "the same probabilities for any number of threads");
  }
}

// A step with everything that it can have, on `dtype`; arrays are as long as they have to be.
void step(std::int64_t batch, std::int64_t n, t2p::scheduler::Dtype dtype,
          t2p::scheduler::Bound bound) {
  using t2p::scheduler::Stream;
  const std::int64_t bytes = dtype == t2p::scheduler::Dtype::kFloat32 ? 4 : 2;
  std::mt19937 random(1);
  std::vector<std::vector<char>> tensors(8, std::vector<char>(batch * n * bytes));
  for (auto& tensor : tensors) {
    // Small positive numbers in any of the formats.
    for (std::int64_t i = 0; i < batch * n * bytes; ++i) {
      tensor[i] = i % bytes == bytes - 1 ? 0x3c : static_cast<char>(random() % 128);
    }
  }
  std::normal_distribution<float> normal;
  std::vector<float> coefficients(3 * t2p::scheduler::kColumns);
  for (float& value : coefficients) value = normal(random);
  std::vector<std::int64_t> index(batch, 2), seeds(batch, 5);
  std::vector<char> prev(batch * n * bytes), x0(batch * n * bytes), first;
  const auto stream = [&](int i) { return Stream{tensors[i].data(), n}; };
  for (int threads : {1, 2, 5}) {
    t2p::scheduler::Step s{};
    s.dtype = dtype;
    s.batch = batch;
    s.n = n;
    s.sample = stream(0);
    s.output = stream(1);
    s.uncond = stream(2);
    s.variance = stream(3);
    s.shift = stream(4);
    s.history1 = stream(5);
    s.history2 = stream(6);
    s.coefficients = coefficients.data();
    s.rows = 3;
    s.index = index.data();
    s.guidance = 3;
    s.rescale = 0.5f;
    s.bound = bound;
    s.limit = 1.5f;
    s.ratio = 0.9;
    s.source = t2p::scheduler::Noise::kPhilox;
    s.seeds = seeds.data();
    s.prev = prev.data();
    s.x0 = x0.data();
    t2p::scheduler::step_cpu(s, threads);
    if (threads == 1) first = prev;
    require(first == prev, "the same step for any number of threads");
  }
  std::vector<float> noise(batch * n);
  t2p::scheduler::noise_cpu(nullptr, 3, 4, batch, n, 2, noise.data());
}

}  // namespace

int main() {
  // First, while no other thread is alive: that is when a sanitizer lets a child start threads.
  pool_survives_fork();
  pool_runs_every_task_once();
  pool_passes_exceptions_on();
  for (bool image : {false, true}) {
    for (float scale : {1.0f, 1e-40f, 1e30f}) {
      vq(2, 1, 1, image, scale);
      vq(130, 47, 17, image, scale);
      vq(700, 200, 8, image, scale);
      vq(300, 101, 70, image, scale);
      vq(6, 30, 1030, image, scale);
      vq(300, 2000, 9, image, scale, t2p::vq::Metric::kCosine);
      vq(300, 2000, 33, image, scale, t2p::vq::Metric::kDot);
      vq(90, 300, 3, image, scale);
      vq(200, 500, 19, image, scale, t2p::vq::Metric::kL2, true);
    }
  }
  layers();
  for (bool guided : {false, true}) {
    masked_sampling(1, 1, guided, 0);
    masked_sampling(17, 65, guided, 7);
    masked_sampling(70, 1030, guided, 0);
  }
  fields();
  for (auto dtype : {t2p::scheduler::Dtype::kFloat32, t2p::scheduler::Dtype::kBfloat16,
                     t2p::scheduler::Dtype::kFloat16}) {
    for (auto bound : {t2p::scheduler::Bound::kNone, t2p::scheduler::Bound::kClip,
                       t2p::scheduler::Bound::kThreshold}) {
      step(1, 1, dtype, bound);
      step(3, 77, dtype, bound);
      step(2, 16411, dtype, bound);
    }
  }
  std::printf("ok on %s\n", t2p::isa_name(t2p::chosen_isa()));
}

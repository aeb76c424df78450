// SPDX-License-Identifier: Apache-2.0
// Markov random fields; see main.cpp.
#include <cstdint>
#include <random>
#include <vector>

#include "mrf/mrf.h"
#include "mrf/mrf_window.h"
#include "sanitize/checks.h"

namespace {

// A ring of n positions, of which the first is known in the second of two pictures.
void mrf(std::int64_t n, std::int64_t v, float temperature) {
  using t2p::mrf::Format;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const std::int64_t r = 2 * n - 1;
  std::vector<float> unary(2 * n * v), w_c(v * v), weight(2 * n, 0.5f), q(r * v), next(r * v);
  for (float& value : unary) value = normal(random);
  for (std::int64_t a = 0; a < v; ++a) w_c[a * v + a] = 1;
  std::vector<std::uint16_t> narrow(r * v);
  std::vector<std::int64_t> begin(n + 1), node(2 * n), reverse(2 * n), order(n), slot(2 * n),
      row(r), known(2 * n, -1), labels(2 * n);
  for (std::int64_t i = 0; i < n; ++i) {
    begin[i + 1] = 2 * i + 2;
    node[2 * i] = (i + 1) % n;
    node[2 * i + 1] = (i + n - 1) % n;
    reverse[2 * i] = 2 * ((i + 1) % n) + 1;
    reverse[2 * i + 1] = 2 * ((i + n - 1) % n);
    order[i] = i;
  }
  for (std::int64_t p = 0; p < 2 * n; ++p) {
    slot[p] = p == n ? -1 - (v - 1) : p - (p > n);
    if (p != n) row[slot[p]] = p;
  }
  const t2p::mrf::Edges edges{begin.data(), node.data(), weight.data()};
  const t2p::mrf::Positions positions{slot.data(), row.data(), 2, n, r};
  std::vector<float> ranks(5 * v, 0.25f), words(10 * n, 0.5f), said(10 * n), first_said,
      full(2 * n * v);
  std::vector<float> messages(4 * n * v), sent(4 * n * v), beliefs(2 * n * v), first;
  const std::vector<std::int64_t> factor_of(2 * n);
  for (int threads : {1, 2, 5}) {
    const t2p::mrf::Values from{q.data(), Format::kF32}, none{nullptr, Format::kF32};
    t2p::mrf::update_cpu(none, unary.data(), none, r, v, 1, 0, 1, threads,
                         {q.data(), Format::kF32});
    t2p::mrf::update_cpu(from, unary.data(), from, r, v, 1, 0.5f, temperature + 1, threads,
                         {narrow.data(), Format::kBf16});
    t2p::mrf::message_cpu(edges, positions, {narrow.data(), Format::kBf16}, v, threads,
                          {next.data(), Format::kF32});
    t2p::mrf::local_step_cpu(edges, positions, from, unary.data(), v, 1, 0.5f, 1, threads,
                             {next.data(), Format::kF32});
    if (threads == 1) first = next;
    require(first == next, "the same probabilities for any number of threads");
    const t2p::mrf::LowRankStep low{.unary = unary.data(),
                                    .row = row.data(),
                                    .words = words.data(),
                                    .edges = edges,
                                    .a = ranks.data(),
                                    .b = ranks.data(),
                                    .r = r,
                                    .n = n,
                                    .v = v,
                                    .k = 5,
                                    .temperature = temperature + 1};
    std::vector<std::int64_t> likeliest(full.size() / v), candidate(r * v), candidates(r);
    std::vector<float> sure(full.size() / v);
    const t2p::mrf::LowRankResult result{said.data(), full.data(), sure.data(), likeliest.data()};
    require(t2p::mrf::find_candidates_cpu(unary.data(), row.data(), r, v, v, threads,
                                          candidate.data(), candidates.data()),
            "no label is ruled out");
    t2p::mrf::LowRankStep few = low;
    few.candidate = candidate.data(), few.candidates = candidates.data(), few.most = v;
    t2p::mrf::low_rank_step_cpu(few, threads, result);
    t2p::mrf::low_rank_step_cpu(low, threads, result);
    if (threads == 1) first_said = said;
    require(first_said == said, "the same words for any number of threads");
    for (const bool known_factors : {false, true}) {
      const t2p::mrf::BeliefStep step{.unary = unary.data(),
                                      .w_c = w_c.data(),
                                      .reverse = reverse.data(),
                                      .order = order.data(),
                                      .factors = known_factors ? w_c.data() : nullptr,
                                      .factor_of = factor_of.data(),
                                      .b = 2,
                                      .n = n,
                                      .v = v,
                                      .e = 2 * n,
                                      .count = n,
                                      .damping = 0.5f,
                                      .temperature = temperature};
      t2p::mrf::belief_step_cpu(edges, step, messages.data(), threads, sent.data());
      t2p::mrf::beliefs_cpu(edges, step, sent.data(), threads, beliefs.data());
    }
    t2p::mrf::icm_cpu(edges, unary.data(), w_c.data(), known.data(), 2, n, v, 9, threads,
                      labels.data());
  }
}

// Rows times packed label weights, where the processor has instructions for it.
void label_product(std::int64_t r, std::int64_t v) {
  const std::int64_t words = t2p::mrf::packed_labels_size(v);
  if (words == 0) return;
  std::vector<std::uint16_t> rows(r * v), w_c(v * v);
  std::mt19937 random(1);
  for (auto* values : {&rows, &w_c}) {
    for (std::uint16_t& value : *values) value = static_cast<std::uint16_t>(random() % 0x4000);
  }
  std::vector<std::int32_t> packed(words), first_packed;
  std::vector<float> message(r * v), first;
  for (int threads : {1, 2, 5}) {
    t2p::mrf::pack_labels_cpu(w_c.data(), v, threads, packed.data());
    t2p::mrf::label_product_cpu(rows.data(), packed.data(), r, v, threads, message.data());
    if (threads == 1) first_packed = packed;
    if (threads == 1) first = message;
    require(first_packed == packed, "the same packed weights for any number of threads");
    require(first == message, "the same messages for any number of threads");
  }
}

// What positions of a picture hear, where the processor has tiles.
void mix(std::int64_t r, std::int64_t k, std::int64_t v) {
  if (!t2p::mrf::has_mix()) return;
  std::vector<std::uint16_t> weights(r * r, 0x3c01), q(r * v), to(r * v), first;
  std::mt19937 random(1);
  for (std::uint16_t& value : q) value = static_cast<std::uint16_t>(random() % 0x4000);
  const std::vector<float> others(r * k, 0.5f);
  std::vector<std::int64_t> labels(k);
  for (std::int64_t& label : labels) label = static_cast<std::int64_t>(random() % v);
  const t2p::mrf::Mix mix{weights.data(), q.data(), others.data(), labels.data(), r, k, v};
  for (int threads : {1, 2, 5}) {
    t2p::mrf::mix_cpu(mix, threads, to.data());
    if (threads == 1) first = to;
    require(first == to, "the same messages for any number of threads");
  }
}

// Two pictures, some of whose positions are known; arrays are as long as they have to be.
void mrf_window(std::int64_t height, std::int64_t width, std::int64_t v, std::int64_t kh,
                std::int64_t kw) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const std::int64_t n = height * width;
  std::vector<float> unary(2 * n * v), weights(kh * kw), down(kh, 0.5f), across(kw, 0.25f);
  across[kw / 2] = 1;
  for (float& value : unary) value = normal(random);
  for (float& value : weights) value = 0.1f * normal(random);
  std::vector<std::int64_t> known(2 * n, -1);
  for (std::int64_t i = 1; i < 2 * n; i += 3) known[i] = i % v;
  for (const bool separable : {false, true}) {
    const t2p::mrf::Window window{.height = height,
                                  .width = width,
                                  .kh = kh,
                                  .kw = kw,
                                  .weights = separable ? nullptr : weights.data(),
                                  .down = down.data(),
                                  .across = across.data(),
                                  .middle = -0.125f};
    std::vector<float> first;
    for (int threads : {1, 2, 5}) {
      for (const std::int64_t* given : {known.data(), static_cast<std::int64_t*>(nullptr)}) {
        const t2p::mrf::WindowField field{.unary = unary.data(),
                                          .known = given,
                                          .b = 2,
                                          .v = v,
                                          .iterations = 3,
                                          .temperature = 1.5f};
        std::vector<float> q(2 * n * v);
        require(t2p::mrf::window_cpu(window, field, threads, q.data()) == -1, "finite scores");
        if (given != nullptr) continue;
        if (threads == 1) first = q;
        require(first == q, "the same probabilities for any number of threads");
      }
    }
  }
}

}  // namespace

void fields() {
  for (float temperature : {0.0f, 1.0f}) {
    mrf(3, 1, temperature);
    mrf(17, 65, temperature);
    mrf(5, 259, temperature);
  }
  label_product(13, 1023);
  label_product(49, 500);
  for (std::int64_t rows : {5, 35, 261}) label_product(rows, 1024);
  mix(1, 0, 1);
  mix(33, 5, 300);
  mix(260, 3, 97);
  mrf_window(1, 1, 1, 3, 3);
  mrf_window(5, 7, 65, 5, 3);
  mrf_window(3, 19, 130, 9, 9);
  mrf_window(4, 3, 1100, 3, 5);
}

// SPDX-License-Identifier: Apache-2.0
// Inference in a Markov random field over a grid of tokens (R. Vyas et al., "MarkovGen: Structured
// Prediction for Efficient Text-to-Image Generation", CVPR 2024, arXiv 2308.10997).
//
// n positions take one of v labels each. f_i(a) is the unary score of label a at position i, higher
// is better, W_s [n, n] weighs pairs of positions and W_c [v, v] pairs of labels:
//
//   E(x) = -sum_i f_i(x_i) - sum_{i < j} W_s[i, j] W_c[x_i, x_j]      for symmetric W_s and W_c
//
// Rows are positions of all pictures, r of them. Products with a dense W_s or W_c are left to a
// matrix library; here is what surrounds them.
#pragma once

#include <cstdint>

namespace t2p::mrf {

constexpr std::int64_t kMostRank = 256;  // of label weights that are taken as such

enum class Format { kF32, kBf16 };

struct Values {
  const void* data;
  Format format;
};
struct MutableValues {
  void* data;
  Format format;
};

// Whom a position listens to: edges begin[i] to begin[i + 1] of position i go to position node[e]
// of the same picture with weight[e].
struct Edges {
  const std::int64_t* begin;  // [n + 1]
  const std::int64_t* node;   // [e]
  const float* weight;        // [e]
};

// Which row of q a position has; or, where that is negative, the known label a as -1 - a.
struct Positions {
  const std::int64_t* slot;  // [b n]
  const std::int64_t* row;   // [r], the position of every row
  std::int64_t b, n, r;
};

// The last lines of Algorithm 1 for r rows, in one pass:
//   next = (1 - damping) softmax((scale message + unary) / temperature) + damping previous
// Returns the first row whose maximum is not finite (NaN, +inf, or nothing but -inf), or -1.
std::int64_t update_cpu(Values message,      // [r, v], or null: 0
                        const float* unary,  // [r, v]
                        Values previous,     // [r, v], or null if damping is 0
                        std::int64_t r, std::int64_t v, float scale, float damping,
                        float temperature, int threads,
                        MutableValues next);  // [r, v], not an input

// An iteration with label weights of low rank, W_c = A B^T, where q itself is not needed: its
// rows are softmax((unary + (W_s words) A^T) / temperature), `words` being q B of the iteration
// before. The spatial message is linear, so that it is as long as the rank.
struct LowRankStep {
  const float* unary;       // [b n, v]
  const std::int64_t* row;  // [r], the rows of `unary` and of all results that are meant
  const float* words;       // [b n, k], or null: 0
  Edges edges;              // W_s
  const float* a;           // [k, v], A^T; with candidates [v, k], A
  const float* b;           // of the same shape, B^T or B
  // What find_candidates_cpu found: [r, most] labels, and how many in a row; or null: all.
  const std::int64_t *candidate, *candidates;
  std::int64_t most, r, n, v, k;
  float temperature;
};
struct LowRankResult {
  float* said;           // [b n, k], or null
  float* q;              // [b n, v], or null
  float* sure;           // [b n], the largest of q, or null
  std::int64_t* labels;  // [b n], the likeliest, or null
};
// Returns the first of r rows whose maximum is not finite, and whose label is 0, or -1.
std::int64_t low_rank_step_cpu(const LowRankStep& step, int threads, const LowRankResult& result);

// The labels that scores of -inf do not rule out, in their order, if no row has none, or more than
// `most`, or a NaN or an infinity.
bool find_candidates_cpu(const float* unary, const std::int64_t* row, std::int64_t r,
                         std::int64_t v, std::int64_t most, int threads,
                         std::int64_t* candidate,    // [r, most]
                         std::int64_t* candidates);  // [r], how many

// message[row] = sum_e weight[e] q[node[e]], the spatial message of Algorithm 1, line 3.
void message_cpu(const Edges& edges, const Positions& positions,
                 Values q,  // [r, v]
                 std::int64_t v, int threads,
                 MutableValues message);  // [r, v]

// message_cpu and update_cpu in one, for labels that only care to be equal (Potts): W_c = scale I.
void local_step_cpu(const Edges& edges, const Positions& positions,
                    Values q,            // [r, v], also `previous`
                    const float* unary,  // [r, v]
                    std::int64_t v, float scale, float damping, float temperature, int threads,
                    MutableValues next);  // [r, v], not q

// Belief propagation on a graph whose edges come in both directions with equal weights: reverse[e]
// is the edge back. messages[e] goes from the position whose edge e is to node[e], and is 0 at its
// largest. One step for the positions of `order`, reading `from` and writing `to`:
//   h_a          = unary[i, a] + sum of the messages to i but that from node[e]
//   new[e, c]    = max_a h_a + weight[e] W_c[a, c]                             temperature 0
//   new[e, c]    = t log sum_a exp((h_a + weight[e] W_c[a, c]) / t)            temperature t
//   to[e]        = (1 - damping) new[e] + damping from[e]
// `from` and `to` may be one array if no two positions of `order` are neighbours.
struct BeliefStep {
  const float* unary;             // [b, n, v]
  const float* w_c;               // [v, v], symmetric
  const std::int64_t* reverse;    // [e]
  const std::int64_t* order;      // [count]
  const float* factors;           // [k, v, v], exp(weight W_c / t) for k weights, or null
  const std::int64_t* factor_of;  // [e], which of them an edge has
  std::int64_t b, n, v, e, count;
  float damping, temperature;
};
void belief_step_cpu(const Edges& edges, const BeliefStep& step,
                     const float* from,  // [b, e, v]
                     int threads,
                     float* to);  // [b, e, v]

// beliefs[i] = unary[i] + sum of the messages to i.
void beliefs_cpu(const Edges& edges, const BeliefStep& step,
                 const float* messages,  // [b, e, v]
                 int threads,
                 float* beliefs);  // [b, n, v]

// Iterated conditional modes (J. Besag, "On the Statistical Analysis of Dirty Pictures", 1986):
// each position in turn takes the label that is best beside its neighbours' present ones, until
// none changes or `sweeps` are over. Returns the number of sweeps that were needed at most.
// Differences are decided in float64, so that the energy never rises.
std::int64_t icm_cpu(const Edges& edges, const float* unary,  // [b, n, v]
                     const float* w_c,                        // [v, v], symmetric
                     const std::int64_t* known,               // [b, n], negative where free
                     std::int64_t b, std::int64_t n, std::int64_t v, std::int64_t sweeps,
                     int threads,
                     std::int64_t* labels);  // [b, n], the start and the result

// message = rows W_c^T in bfloat16, with exact products and sums in float32, from W_c as
// pack_labels_cpu lays it out; packed_labels_size is the number of words it takes, or 0 where the
// processor has no instruction for it or a lot of that would be padding.
std::int64_t packed_labels_size(std::int64_t v);
void pack_labels_cpu(const std::uint16_t* w_c,  // [v, v]
                     std::int64_t v, int threads, std::int32_t* packed);
void label_product_cpu(const std::uint16_t* rows,  // [r, v]
                       const std::int32_t* packed, std::int64_t r, std::int64_t v, int threads,
                       float* message);  // [r, v]

// to = weights q + others e, e being the one-hot rows of known labels: what positions of a picture
// hear, with exact products, sums in float32, rounded once. Where has_mix() alone: by AMX.
struct Mix {
  const std::uint16_t* weights;  // [r, r] bfloat16
  const std::uint16_t* q;        // [r, v] bfloat16
  const float* others;           // [r, k]
  const std::int64_t* labels;    // [k], in [0, v)
  std::int64_t r, k, v;
};
bool has_mix();
void mix_cpu(const Mix& mix, int threads,
             std::uint16_t* to);  // [r, v] bfloat16

void update_cuda(Values message, const float* unary, Values previous, std::int64_t r,
                 std::int64_t v, float scale, float damping, float temperature, int device,
                 void* stream, MutableValues next);

void message_cuda(const Edges& edges, const Positions& positions, Values q, std::int64_t v,
                  int device, void* stream, MutableValues message);

// update_cuda with dense label weights, where the message is mixed W_c^T, by tensor cores. Products
// are exact, sums float32. A NaN, +inf, or a row of nothing but -inf make the row NaN.
struct LabelStep {
  const void* mixed;   // [r, v] bfloat16
  const void* w_c;     // [v, v] bfloat16
  const float* unary;  // [r, v]
  Values previous;     // [r, v], or null if damping is 0
  std::int64_t r, v;   // v a multiple of 8; all arrays on 16-byte boundaries
  std::int64_t parts;  // label_parts_cuda(v)
  float damping, temperature;
  float* logits;  // [r, v], workspace
  float* sums;    // [r, parts, 2], workspace
};
// In how many parts a row of v labels is reduced, or 0 where there is no such kernel for them.
std::int64_t label_parts_cuda(std::int64_t v, int device);
void label_step_cuda(const LabelStep& step, int device, void* stream, MutableValues next);

// belief_step_cpu, but without `factors`; RuntimeError if v is beyond what shared memory holds.
void belief_step_cuda(const Edges& edges, const BeliefStep& step, const float* from, int device,
                      void* stream, float* to);
void beliefs_cuda(const Edges& edges, const BeliefStep& step, const float* messages, int device,
                  void* stream, float* beliefs);

// icm_cpu, by the same decisions; how many sweeps it took only the device knows.
void icm_cuda(const Edges& edges, const float* unary, const float* w_c, const std::int64_t* known,
              std::int64_t b, std::int64_t n, std::int64_t v, std::int64_t sweeps, int device,
              void* stream, std::int64_t* labels);

}  // namespace t2p::mrf

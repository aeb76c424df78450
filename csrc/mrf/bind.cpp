// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "mrf/arguments.h"
#include "mrf/mrf.h"
#include "mrf/mrf_window.h"

namespace py = pybind11;

namespace t2p::mrf {
namespace {

std::int64_t update(const Optional& message, const TensorView& unary, const Optional& previous,
                    double scale, double damping, double temperature, const TensorView& next,
                    int threads) {
  constexpr const char* kOp = "mrf_mean_field";
  T2P_CHECK(unary.ndim() == 2 && unary.size(1) > 0, kOp, ": unary must be [r, v >= 1], got ",
            unary.shape_text());
  const std::int64_t r = unary.size(0), v = unary.size(1);
  const Values from = values_or_null(kOp, "message", message, r * v);
  const Values before = values_or_null(kOp, "previous", previous, r * v);
  const float* scores = floats(kOp, "unary", unary, r * v);
  const MutableValues to = values(kOp, "next", next, r * v);
  const auto s = static_cast<float>(scale), d = static_cast<float>(damping),
             t = static_cast<float>(temperature);
  if (unary.on_cuda()) {
    update_cuda(from, scores, before, r, v, s, d, t, unary.device().id, current_stream(unary), to);
    return -1;
  }
  py::gil_scoped_release nogil;
  return update_cpu(from, scores, before, r, v, s, d, t, threads, to);
}

std::int64_t low_rank_step(const TensorView& begin, const TensorView& node,
                           const TensorView& weight, const TensorView& unary, const TensorView& row,
                           const Optional& words, const TensorView& a, const TensorView& b,
                           const Optional& candidate, const Optional& candidates,
                           double temperature, const Optional& said, const Optional& q,
                           const Optional& sure, const Optional& labels, int threads) {
  constexpr const char* kOp = "mrf_mean_field";
  const int of_labels = candidate ? 0 : 1;
  T2P_CHECK(a.ndim() == 2 && unary.ndim() == 2 && unary.size(1) == a.size(of_labels), kOp,
            ": unary must be [., v] and a [k, v], or with candidates [v, k], got ",
            unary.shape_text(), " and ", a.shape_text());
  const std::int64_t r = row.count(), rows = unary.size(0), v = unary.size(1);
  const std::int64_t k = a.size(1 - of_labels), most = candidate && r ? candidate->count() / r : 0;
  T2P_CHECK(v > 0 && k <= kMostRank, kOp, ": a must have at most ", kMostRank, " numbers a label, ",
            "got ", k);
  T2P_CHECK(candidate.has_value() == candidates.has_value(), kOp,
            ": candidate and candidates must be given together");
  const LowRankStep step{
      .unary = floats(kOp, "unary", unary, rows * v),
      .row = integers(kOp, "row", row, r),
      .words = words ? floats(kOp, "words", *words, rows * k) : nullptr,
      .edges = edges_of(kOp, begin, node, weight),
      .a = floats(kOp, "a", a, k * v),
      .b = floats(kOp, "b", b, k * v),
      .candidate = candidate ? integers(kOp, "candidate", *candidate, r * most) : nullptr,
      .candidates = candidates ? integers(kOp, "candidates", *candidates, r) : nullptr,
      .most = most,
      .r = r,
      .n = begin.count() - 1,
      .v = v,
      .k = k,
      .temperature = static_cast<float>(temperature)};
  const LowRankResult result{.said = said ? floats(kOp, "said", *said, rows * k) : nullptr,
                             .q = q ? floats(kOp, "q", *q, rows * v) : nullptr,
                             .sure = sure ? floats(kOp, "sure", *sure, rows) : nullptr,
                             .labels = labels ? integers(kOp, "labels", *labels, rows) : nullptr};
  py::gil_scoped_release nogil;
  return low_rank_step_cpu(step, threads, result);
}

bool find_candidates(const TensorView& unary, const TensorView& row, const TensorView& candidate,
                     const TensorView& candidates, int threads) {
  constexpr const char* kOp = "mrf_mean_field";
  const std::int64_t r = row.count();
  T2P_CHECK(unary.ndim() == 2 && candidate.ndim() == 2, kOp,
            ": unary must be [., v] and candidate [r, most], got ", unary.shape_text(), " and ",
            candidate.shape_text());
  const std::int64_t v = unary.size(1), most = candidate.size(1);
  const float* scores = floats(kOp, "unary", unary, unary.count());
  const std::int64_t* rows = integers(kOp, "row", row, r);
  std::int64_t* labels = integers(kOp, "candidate", candidate, r * most);
  std::int64_t* counts = integers(kOp, "candidates", candidates, r);
  py::gil_scoped_release nogil;
  return find_candidates_cpu(scores, rows, r, v, most, threads, labels, counts);
}

void message(const TensorView& begin, const TensorView& node, const TensorView& weight,
             const TensorView& slot, const TensorView& row, const TensorView& q,
             const TensorView& to, int threads) {
  constexpr const char* kOp = "mrf_mean_field";
  const std::int64_t r = row.count(), v = q.size(1);
  const Edges edges = edges_of(kOp, begin, node, weight);
  const Positions positions = positions_of(kOp, begin, slot, row);
  const Values from = values_or_null(kOp, "q", q, r * v);
  const MutableValues out = values(kOp, "message", to, r * v);
  if (q.on_cuda()) {
    message_cuda(edges, positions, from, v, q.device().id, current_stream(q), out);
    return;
  }
  py::gil_scoped_release nogil;
  message_cpu(edges, positions, from, v, threads, out);
}

bool on_boundary(const TensorView& tensor) {
  return reinterpret_cast<std::uintptr_t>(tensor.data<void>()) % 16 == 0;
}

// 0 where label_step has no kernel for these.
std::int64_t label_parts(const TensorView& unary, const TensorView& w_c) {
  const bool fits = w_c.on_cuda() && w_c.is_bfloat16() && w_c.contiguous() && on_boundary(w_c) &&
                    on_boundary(unary);
  return fits ? label_parts_cuda(w_c.size(0), w_c.device().id) : 0;
}

void label_step(const TensorView& mixed, const TensorView& w_c, const TensorView& unary,
                const Optional& previous, double damping, double temperature,
                const TensorView& logits, const TensorView& sums, const TensorView& next) {
  constexpr const char* kOp = "mrf_mean_field";
  const std::int64_t parts = label_parts(unary, w_c), r = unary.size(0), v = unary.size(1);
  T2P_CHECK(parts > 0, kOp, ": there is no kernel for this w_c, of ", w_c.dtype_text(), " and ",
            w_c.shape_text());
  T2P_CHECK_TYPE(mixed.is_bfloat16(), kOp, ": mixed must be bfloat16, got ", mixed.dtype_text());
  const LabelStep step{.mixed = values(kOp, "mixed", mixed, r * v).data,
                       .w_c = values(kOp, "w_c", w_c, v * v).data,
                       .unary = floats(kOp, "unary", unary, r * v),
                       .previous = values_or_null(kOp, "previous", previous, r * v),
                       .r = r,
                       .v = v,
                       .parts = parts,
                       .damping = static_cast<float>(damping),
                       .temperature = static_cast<float>(temperature),
                       .logits = floats(kOp, "logits", logits, r * v),
                       .sums = floats(kOp, "sums", sums, r * parts * 2)};
  label_step_cuda(step, w_c.device().id, current_stream(w_c), values(kOp, "next", next, r * v));
}

std::int32_t* packed_labels(const TensorView& tensor, std::int64_t v) {
  constexpr const char* kOp = "mrf_mean_field";
  T2P_CHECK_TYPE(tensor.is_uint8(), kOp, ": packed must be uint8, got ", tensor.dtype_text());
  check_array(kOp, "packed", tensor, 4 * packed_labels_size(v));
  return tensor.data<std::int32_t>();
}

void pack_labels(const TensorView& w_c, const TensorView& packed, int threads) {
  constexpr const char* kOp = "mrf_pack";
  T2P_CHECK_TYPE(w_c.is_bfloat16(), kOp, ": w_c must be bfloat16, got ", w_c.dtype_text());
  const std::int64_t v = w_c.size(0);
  check_array(kOp, "w_c", w_c, v * v);
  std::int32_t* to = packed_labels(packed, v);
  py::gil_scoped_release nogil;
  pack_labels_cpu(w_c.data<std::uint16_t>(), v, threads, to);
}

void label_product(const TensorView& rows, const TensorView& packed, const TensorView& message,
                   int threads) {
  constexpr const char* kOp = "mrf_mean_field";
  T2P_CHECK_TYPE(rows.is_bfloat16(), kOp, ": rows must be bfloat16, got ", rows.dtype_text());
  T2P_CHECK(rows.ndim() == 2, kOp, ": rows must be [r, v], got ", rows.shape_text());
  const std::int64_t r = rows.size(0), v = rows.size(1);
  check_array(kOp, "rows", rows, r * v);
  T2P_CHECK(packed_labels_size(v) > 0, kOp, ": this processor has no product for packed labels");
  const std::int32_t* labels = packed_labels(packed, v);
  float* to = floats(kOp, "message", message, r * v);
  py::gil_scoped_release nogil;
  label_product_cpu(rows.data<std::uint16_t>(), labels, r, v, threads, to);
}

void mix(const TensorView& weights, const TensorView& q, const TensorView& others,
         const TensorView& labels, const TensorView& to, int threads) {
  constexpr const char* kOp = "mrf_mean_field";
  T2P_CHECK(has_mix(), kOp, ": this processor has no tiles");
  T2P_CHECK(q.ndim() == 2, kOp, ": q must be [r, v], got ", q.shape_text());
  T2P_CHECK_TYPE(weights.is_bfloat16() && q.is_bfloat16() && to.is_bfloat16(), kOp,
                 ": weights, q and message must be bfloat16, got ", weights.dtype_text(), ", ",
                 q.dtype_text(), " and ", to.dtype_text());
  const std::int64_t r = q.size(0), v = q.size(1), k = labels.count();
  check_array(kOp, "weights", weights, r * r);
  check_array(kOp, "q", q, r * v);
  check_array(kOp, "message", to, r * v);
  const Mix mix{.weights = weights.data<std::uint16_t>(),
                .q = q.data<std::uint16_t>(),
                .others = floats(kOp, "others", others, r * k),
                .labels = integers(kOp, "labels", labels, k),
                .r = r,
                .k = k,
                .v = v};
  std::uint16_t* out = to.data<std::uint16_t>();
  py::gil_scoped_release nogil;
  mix_cpu(mix, threads, out);
}

void local_step(const TensorView& begin, const TensorView& node, const TensorView& weight,
                const TensorView& slot, const TensorView& row, const TensorView& q,
                const TensorView& unary, double scale, double damping, double temperature,
                const TensorView& next, int threads) {
  constexpr const char* kOp = "mrf_mean_field";
  const std::int64_t r = row.count(), v = q.size(1);
  const Edges edges = edges_of(kOp, begin, node, weight);
  const Positions positions = positions_of(kOp, begin, slot, row);
  const Values from = values_or_null(kOp, "q", q, r * v);
  const float* scores = floats(kOp, "unary", unary, r * v);
  const MutableValues to = values(kOp, "next", next, r * v);
  py::gil_scoped_release nogil;
  local_step_cpu(edges, positions, from, scores, v, static_cast<float>(scale),
                 static_cast<float>(damping), static_cast<float>(temperature), threads, to);
}

std::int64_t window(const TensorView& unary, const Optional& known, std::int64_t height,
                    std::int64_t width, const Optional& down, const TensorView& across,
                    double middle, std::int64_t iterations, double temperature, const TensorView& q,
                    int threads) {
  constexpr const char* kOp = "mrf_mean_field";
  T2P_CHECK(unary.ndim() == 3 && unary.size(2) > 0 && unary.size(1) == height * width, kOp,
            ": unary must be [b, ", height, " x ", width, ", v >= 1], got ", unary.shape_text());
  const std::int64_t b = unary.size(0), v = unary.size(2), count = unary.count();
  // Factors, or all weights.
  T2P_CHECK(across.ndim() == 2 && (!down || across.size(0) == 1), kOp,
            ": weights must be [kh] and [1, kw], or [kh, kw], got ", across.shape_text());
  const std::int64_t kh = down ? down->count() : across.size(0), kw = across.size(1);
  T2P_CHECK(kh % 2 == 1 && kw % 2 == 1 && kh <= kMostWindow && kw <= kMostWindow, kOp,
            ": a window has odd sizes of at most ", kMostWindow, ", got ", kh, " x ", kw);
  const float* weights = floats(kOp, "across", across, across.count());
  T2P_CHECK(!down || weights[kw / 2] == 1, kOp, ": the middle of factors across must be 1, got ",
            weights[kw / 2]);
  const Window window{.height = height,
                      .width = width,
                      .kh = kh,
                      .kw = kw,
                      .weights = down ? nullptr : weights,
                      .down = down ? floats(kOp, "down", *down, kh) : nullptr,
                      .across = weights,
                      .middle = static_cast<float>(middle)};
  const WindowField field{
      .unary = floats(kOp, "unary", unary, count),
      .known = known ? integers(kOp, "known", *known, b * height * width) : nullptr,
      .b = b,
      .v = v,
      .iterations = iterations,
      .temperature = static_cast<float>(temperature)};
  float* to = floats(kOp, "q", q, count);
  py::gil_scoped_release nogil;
  return window_cpu(window, field, threads, to);
}

BeliefStep belief_of(const TensorView& unary, const TensorView& w_c, const TensorView& reverse,
                     const TensorView& order, const Optional& factors, const Optional& factor_of,
                     double damping, double temperature) {
  constexpr const char* kOp = "mrf_bp";
  T2P_CHECK(unary.ndim() == 3, kOp, ": unary must be [b, n, v], got ", unary.shape_text());
  const std::int64_t b = unary.size(0), n = unary.size(1), v = unary.size(2);
  return {
      .unary = floats(kOp, "unary", unary, b * n * v),
      .w_c = floats(kOp, "w_c", w_c, v * v),
      .reverse = integers(kOp, "reverse", reverse, reverse.count()),
      .order = integers(kOp, "order", order, order.count()),
      .factors = factors ? floats(kOp, "factors", *factors, factors->count()) : nullptr,
      .factor_of = factor_of ? integers(kOp, "factor_of", *factor_of, reverse.count()) : nullptr,
      .b = b,
      .n = n,
      .v = v,
      .e = reverse.count(),
      .count = order.count(),
      .damping = static_cast<float>(damping),
      .temperature = static_cast<float>(temperature)};
}

void belief_step(const TensorView& begin, const TensorView& node, const TensorView& weight,
                 const TensorView& reverse, const TensorView& order, const TensorView& unary,
                 const TensorView& w_c, const Optional& factors, const Optional& factor_of,
                 double damping, double temperature, const TensorView& from, const TensorView& to,
                 int threads) {
  constexpr const char* kOp = "mrf_bp";
  const Edges edges = edges_of(kOp, begin, node, weight);
  const BeliefStep step =
      belief_of(unary, w_c, reverse, order, factors, factor_of, damping, temperature);
  const std::int64_t count = step.b * step.e * step.v;
  const float* before = floats(kOp, "from", from, count);
  float* after = floats(kOp, "to", to, count);
  if (unary.on_cuda()) {
    belief_step_cuda(edges, step, before, unary.device().id, current_stream(unary), after);
    return;
  }
  py::gil_scoped_release nogil;
  belief_step_cpu(edges, step, before, threads, after);
}

void beliefs(const TensorView& begin, const TensorView& node, const TensorView& weight,
             const TensorView& reverse, const TensorView& unary, const TensorView& w_c,
             const TensorView& messages, const TensorView& to, int threads) {
  constexpr const char* kOp = "mrf_bp";
  const Edges edges = edges_of(kOp, begin, node, weight);
  const BeliefStep step = belief_of(unary, w_c, reverse, reverse, {}, {}, 0, 0);
  const float* from = floats(kOp, "messages", messages, step.b * step.e * step.v);
  float* out = floats(kOp, "beliefs", to, unary.count());
  if (unary.on_cuda()) {
    beliefs_cuda(edges, step, from, unary.device().id, current_stream(unary), out);
    return;
  }
  py::gil_scoped_release nogil;
  beliefs_cpu(edges, step, from, threads, out);
}

std::int64_t icm(const TensorView& begin, const TensorView& node, const TensorView& weight,
                 const TensorView& unary, const TensorView& w_c, const TensorView& known,
                 std::int64_t sweeps, const TensorView& labels, int threads) {
  constexpr const char* kOp = "mrf_icm";
  T2P_CHECK(unary.ndim() == 3, kOp, ": unary must be [b, n, v], got ", unary.shape_text());
  const std::int64_t b = unary.size(0), n = unary.size(1), v = unary.size(2);
  const Edges edges = edges_of(kOp, begin, node, weight);
  const float* scores = floats(kOp, "unary", unary, b * n * v);
  const float* pairs = floats(kOp, "w_c", w_c, v * v);
  const std::int64_t* fixed = integers(kOp, "known", known, b * n);
  std::int64_t* x = integers(kOp, "labels", labels, b * n);
  if (unary.on_cuda()) {
    icm_cuda(edges, scores, pairs, fixed, b, n, v, sweeps, unary.device().id, current_stream(unary),
             x);
    return -1;
  }
  py::gil_scoped_release nogil;
  return icm_cpu(edges, scores, pairs, fixed, b, n, v, sweeps, threads, x);
}

}  // namespace

void bind(py::module_& m) {
  m.def("mrf_update", &update, py::arg("message").none(true), py::arg("unary"),
        py::arg("previous").none(true), py::arg("scale"), py::arg("damping"),
        py::arg("temperature"), py::arg("next"), py::arg("threads"));
  m.def("mrf_low_rank_step", &low_rank_step, py::arg("begin"), py::arg("node"), py::arg("weight"),
        py::arg("unary"), py::arg("row"), py::arg("words").none(true), py::arg("a"), py::arg("b"),
        py::arg("candidate").none(true), py::arg("candidates").none(true), py::arg("temperature"),
        py::arg("said").none(true), py::arg("q").none(true), py::arg("sure").none(true),
        py::arg("labels").none(true), py::arg("threads"));
  m.def("mrf_find_candidates", &find_candidates, py::arg("unary"), py::arg("row"),
        py::arg("candidate"), py::arg("candidates"), py::arg("threads"));
  m.def("mrf_message", &message, py::arg("begin"), py::arg("node"), py::arg("weight"),
        py::arg("slot"), py::arg("row"), py::arg("q"), py::arg("message"), py::arg("threads"));
  m.def("mrf_label_parts", &label_parts, py::arg("unary"), py::arg("w_c"));
  m.def("mrf_label_step", &label_step, py::arg("mixed"), py::arg("w_c"), py::arg("unary"),
        py::arg("previous").none(true), py::arg("damping"), py::arg("temperature"),
        py::arg("logits"), py::arg("sums"), py::arg("next"));
  m.def("mrf_packed_size", &packed_labels_size, py::arg("v"));
  m.def("mrf_pack", &pack_labels, py::arg("w_c"), py::arg("packed"), py::arg("threads"));
  m.def("mrf_label_product", &label_product, py::arg("rows"), py::arg("packed"), py::arg("message"),
        py::arg("threads"));
  m.def("mrf_has_mix", &has_mix);
  m.def("mrf_mix", &mix, py::arg("weights"), py::arg("q"), py::arg("others"), py::arg("labels"),
        py::arg("message"), py::arg("threads"));
  m.def("mrf_local_step", &local_step, py::arg("begin"), py::arg("node"), py::arg("weight"),
        py::arg("slot"), py::arg("row"), py::arg("q"), py::arg("unary"), py::arg("scale"),
        py::arg("damping"), py::arg("temperature"), py::arg("next"), py::arg("threads"));
  m.attr("MRF_MOST_WINDOW") = kMostWindow;
  m.attr("MRF_MOST_MESSAGE") = kMostMessage;
  m.def("mrf_window", &window, py::arg("unary"), py::arg("known").none(true), py::arg("height"),
        py::arg("width"), py::arg("down").none(true), py::arg("across"), py::arg("middle"),
        py::arg("iterations"), py::arg("temperature"), py::arg("q"), py::arg("threads"));
  m.def("mrf_belief_step", &belief_step, py::arg("begin"), py::arg("node"), py::arg("weight"),
        py::arg("reverse"), py::arg("order"), py::arg("unary"), py::arg("w_c"),
        py::arg("factors").none(true), py::arg("factor_of").none(true), py::arg("damping"),
        py::arg("temperature"), py::arg("from_messages"), py::arg("to_messages"),
        py::arg("threads"));
  m.def("mrf_beliefs", &beliefs, py::arg("begin"), py::arg("node"), py::arg("weight"),
        py::arg("reverse"), py::arg("unary"), py::arg("w_c"), py::arg("messages"),
        py::arg("beliefs"), py::arg("threads"));
  m.def("mrf_icm", &icm, py::arg("begin"), py::arg("node"), py::arg("weight"), py::arg("unary"),
        py::arg("w_c"), py::arg("known"), py::arg("sweeps"), py::arg("labels"), py::arg("threads"));
}

}  // namespace t2p::mrf

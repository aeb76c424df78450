// SPDX-License-Identifier: Apache-2.0
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings/plain.h"
#include "bindings/results.h"
#include "bindings/tensor_view.h"
#include "common/normal.h"
#include "common/philox.h"
#include "scheduler/arguments.h"
#include "scheduler/scheduler.h"

namespace py = pybind11;

namespace t2p::scheduler {
namespace {

void run_on_cpu(const Step& s, int threads) {
  constexpr std::int64_t kShort = 4096;  // elements that take less long than to let others run
  if (s.batch * s.n <= kShort) return step_cpu(s, 1);
  py::gil_scoped_release nogil;
  step_cpu(s, threads);
}

void step(const TensorView& sample, const TensorView& output, const TensorView& coefficients,
          const std::optional<TensorView>& index, std::int64_t row,
          const std::optional<TensorView>& uncond, float guidance, float rescale, int bound,
          float limit, double ratio, bool learned, const std::optional<TensorView>& shift,
          const std::optional<TensorView>& history1, const std::optional<TensorView>& history2,
          const std::optional<TensorView>& noise, bool draw, const std::optional<TensorView>& seeds,
          std::uint64_t seed, std::uint64_t offset, const std::optional<TensorView>& workspace,
          const TensorView& prev, const std::optional<TensorView>& x0, int threads) {
  const Step s = checked(sample, output, coefficients, index, row, uncond, guidance, rescale, bound,
                         limit, ratio, learned, shift, history1, history2, noise, draw, seeds, seed,
                         offset, prev, x0);
  if (!sample.on_cuda()) return run_on_cpu(s, threads);
  const std::int64_t needed =
      workspace_size(s.batch, s.n, s.bound == Bound::kThreshold, uncond && rescale != 0);
  T2P_CHECK(needed == 0 || (workspace && workspace->count() >= needed), kOp,
            ": workspace must have ", needed, " elements");
  if (workspace) check_float32(kOp, "workspace", *workspace);
  step_cuda(s, sample.device().id, current_stream(sample),
            workspace ? workspace->data<float>() : nullptr);
}

// A number that torch draws into.
struct Drawn {
  py::object fill;  // Tensor.random_ of it
  const std::uint64_t* number;
};

Drawn make_drawn() {
  const py::module_ torch = py::module_::import("torch");
  const py::object mode = torch.attr("inference_mode")(false);  // whatever is on now, it stays
  mode.attr("__enter__")();
  const py::object number = torch.attr("zeros")(py::tuple(), py::arg("dtype") = torch.attr("int64"),
                                                py::arg("device") = "cpu");
  mode.attr("__exit__")(py::none(), py::none(), py::none());
  const auto address = number.attr("data_ptr")().cast<std::uintptr_t>();
  return {number.attr("random_"), reinterpret_cast<const std::uint64_t*>(address)};
}

// A seed out of torch's default generator for the CPU: torch.manual_seed makes it repeatable. Not
// for when torch has modes: they would see it.
std::uint64_t draw_seed() {
  // torch lets other threads run while it draws: each call has a number of its own meanwhile.
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<std::vector<Drawn>> stored;
  const auto none = [] { return std::vector<Drawn>(); };
  std::vector<Drawn>& unused = stored.call_once_and_store_result(none).get_stored();
  static std::mutex mutex;  // never held while torch runs
  std::optional<Drawn> drawn;
  {
    const std::lock_guard lock(mutex);
    if (!unused.empty()) {
      drawn = std::move(unused.back());
      unused.pop_back();
    }
  }
  if (!drawn) drawn = make_drawn();
  const auto filled = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(drawn->fill.ptr()));
  if (!filled) throw py::error_already_set();
  const std::uint64_t seed = *drawn->number;
  const std::lock_guard lock(mutex);
  unused.push_back(std::move(*drawn));
  return seed;
}

std::optional<TensorView> view_of(py::handle tensor) {
  if (tensor.is_none()) return std::nullopt;
  return TensorView(tensor);
}

std::optional<TensorView> view_of(const Result& result) {
  if (!result.tensor) return std::nullopt;
  return result.view;
}

py::object pair_of(Result prev, Result x0) {
  if (!x0.tensor) x0.tensor = py::none();
  return py::make_tuple(std::move(prev.tensor), std::move(x0.tensor));
}

// A step on CPU tensors, from the arguments of the registered op but the last, into `out` and
// `out_x0`, which are made here where they are None. Returns both; or None, where something of
// torch has to see the call. A seed of None is drawn.
py::object plain_step(const py::tuple& arguments, py::object out, py::object out_x0, bool return_x0,
                      int threads) {
  constexpr std::size_t kCount = 20;
  T2P_CHECK(arguments.size() == kCount, kOp, ": wanted ", kCount, " arguments");
  const auto at = [&](int i) { return py::handle(PyTuple_GET_ITEM(arguments.ptr(), i)); };
  if (!is_plain({{at(0), at(1), at(5), at(12), at(13), at(14), at(15)}})) return py::none();
  const TensorView sample(at(0));
  if (sample.on_cuda()) return py::none();
  const auto result_for = [&](py::object given) {
    if (given.is_none()) return empty_like(at(0), sample);
    const TensorView view(given);
    return Result{std::move(given), view};
  };
  dtype_of("sample", sample);
  Result prev = result_for(std::move(out)), x0;
  if (return_x0 || !out_x0.is_none()) x0 = result_for(std::move(out_x0));
  const bool draws_seed = at(18).is_none();
  try {
    Step s = checked(sample, TensorView(at(1)), TensorView(at(2)), view_of(at(3)),
                     at(4).cast<std::int64_t>(), view_of(at(5)), at(6).cast<float>(),
                     at(7).cast<float>(), at(8).cast<int>(), at(9).cast<float>(),
                     at(10).cast<double>(), at(11).cast<bool>(), view_of(at(12)), view_of(at(13)),
                     view_of(at(14)), view_of(at(15)), at(16).cast<bool>(), view_of(at(17)),
                     draws_seed ? 0 : at(18).cast<std::uint64_t>(), at(19).cast<std::uint64_t>(),
                     prev.view, view_of(x0));
    if (draws_seed) s.seed = draw_seed();
    run_on_cpu(s, threads);
  } catch (const py::cast_error& error) {
    throw TypeError(concat(kOp, ": ", error.what()));
  }
  return pair_of(std::move(prev), std::move(x0));
}

// The steps of one schedule and one choice of options, on plain CPU tensors with guidance at most:
// all that does not change from step to step, so that little has to be looked up and converted.
class Plan {
 public:
  // `timesteps` int64 [n] on the CPU has for every timestep its row of the coefficients, which
  // `rows` repeats, or has -1 for: not to be taken by a plan. Steps are then asked for by elements
  // of it; without it, by rows. Rows from `noisy` up to `quiet` draw noise.
  Plan(py::object timesteps, std::vector<std::int64_t> rows, py::object coefficients, int bound,
       float limit, double ratio, bool learned, std::int64_t noisy, std::int64_t quiet,
       bool returns_x0)
      : timesteps_(std::move(timesteps)),
        rows_(std::move(rows)),
        coefficients_(std::move(coefficients)),
        table_(coefficients_),
        bound_(bound),
        limit_(limit),
        ratio_(ratio),
        learned_(learned),
        noisy_(noisy),
        quiet_(quiet),
        returns_x0_(returns_x0) {
    if (timesteps_.is_none()) return;
    const TensorView view(timesteps_);
    check_int64(kOp, "timesteps", view);
    check_contiguous(kOp, "timesteps", view);
    T2P_CHECK(!view.on_cuda() && view.count() == static_cast<std::int64_t>(rows_.size()), kOp,
              ": there are ", rows_.size(), " rows for timesteps of shape ", view.shape_text(),
              " on ", view.device_text());
    first_ = view.data<const std::int64_t>();
  }

  // prev and x0, or None for one that is not returned; or None, where anything is not as planned
  // and nothing has been done.
  py::object step(py::handle sample, py::handle output, py::handle place, py::handle uncond,
                  py::handle guidance, py::handle rescale, py::handle history1, py::handle history2,
                  int threads) const {
    if (!is_plain({{sample, output, uncond, history1, history2}})) return py::none();
    try {
      const std::int64_t row = row_of(place, sample);
      const TensorView x(sample);
      if (row < 0 || x.on_cuda()) return py::none();
      dtype_of("sample", x);
      const bool draws = noisy_ <= row && row < quiet_;
      Result prev = empty_like(sample, x), x0;
      if (returns_x0_) x0 = empty_like(sample, x);
      Step s =
          checked(x, TensorView(output), table_, {}, row, view_of(uncond), guidance.cast<float>(),
                  rescale.cast<float>(), bound_, limit_, ratio_, learned_, {}, view_of(history1),
                  view_of(history2), {}, draws, {}, 0, 0, prev.view, view_of(x0));
      if (draws) s.seed = draw_seed();
      run_on_cpu(s, threads);
      return pair_of(std::move(prev), std::move(x0));
    } catch (const std::invalid_argument&) {
    } catch (const py::cast_error&) {
    }
    return py::none();
  }

 private:
  std::int64_t row_of(py::handle place, py::handle plain) const {
    if (!first_) return place.cast<std::int64_t>();
    if (Py_TYPE(place.ptr()) != Py_TYPE(plain.ptr())) return -1;
    const TensorView timestep(place);
    const auto* at = timestep.data<const std::int64_t>();
    const bool inside = timestep.is_int64() && at >= first_ && at < first_ + rows_.size();
    if (!inside || timestep.count() != 1) return -1;
    return *at == rows_[at - first_] ? *at : -1;  // somebody may have written others there
  }

  py::object timesteps_;
  const std::int64_t* first_ = nullptr;
  std::vector<std::int64_t> rows_;
  py::object coefficients_;
  TensorView table_;  // a view of them
  int bound_;
  float limit_;
  double ratio_;
  bool learned_;
  std::int64_t noisy_, quiet_;
  bool returns_x0_;
};

void noise(const TensorView& out, const std::optional<TensorView>& seeds, std::uint64_t seed,
           std::uint64_t offset, int threads) {
  check_float32("scheduler_noise", "out", out);
  check_contiguous("scheduler_noise", "out", out);
  T2P_CHECK(out.ndim() >= 1 && sample_size(out) < kMostElements,
            "scheduler_noise: shape must be [b, ...], got ", out.shape_text());
  const auto* each = each_sample("seed", seeds, out);
  const std::int64_t batch = out.size(0), n = sample_size(out);
  if (out.on_cuda()) {
    noise_cuda(each, seed, offset, batch, n, out.device().id, current_stream(out),
               out.data<float>());
    return;
  }
  py::gil_scoped_release nogil;
  noise_cpu(each, seed, offset, batch, n, threads, out.data<float>());
}

// For tests: the words, and the normal numbers made of them one by one.
py::tuple philox(std::uint64_t seed, std::uint64_t offset, std::uint64_t index) {
  const philox::Words words = philox::words(seed, offset, index);
  const auto& [a, b, c, d] = words.v;
  using normal::of_word;
  return py::make_tuple(py::make_tuple(a, b, c, d),
                        py::make_tuple(of_word(a), of_word(b), of_word(c), of_word(d)));
}

}  // namespace

void bind(py::module_& m) {
  m.def("scheduler_workspace_size", &workspace_size, py::arg("batch"), py::arg("n"),
        py::arg("threshold"), py::arg("rescale"));
  m.def("scheduler_step", &step, py::arg("sample"), py::arg("model_output"),
        py::arg("coefficients"), py::arg("index"), py::arg("row"), py::arg("uncond_output"),
        py::arg("guidance"), py::arg("rescale"), py::arg("bound"), py::arg("limit"),
        py::arg("ratio"), py::arg("learned"), py::arg("shift"), py::arg("history1"),
        py::arg("history2"), py::arg("noise"), py::arg("draw"), py::arg("seeds"), py::arg("seed"),
        py::arg("offset"), py::arg("workspace"), py::arg("prev"), py::arg("x0"),
        py::arg("threads"));
  m.def("scheduler_plain_step", &plain_step, py::arg("arguments"), py::arg("prev"), py::arg("x0"),
        py::arg("return_x0"), py::arg("threads"));
  py::class_<Plan>(m, "SchedulerPlan")
      .def(py::init<py::object, std::vector<std::int64_t>, py::object, int, float, double, bool,
                    std::int64_t, std::int64_t, bool>(),
           py::arg("timesteps"), py::arg("rows"), py::arg("coefficients"), py::arg("bound"),
           py::arg("limit"), py::arg("ratio"), py::arg("learned"), py::arg("noisy"),
           py::arg("quiet"), py::arg("returns_x0"))
      .def("step", &Plan::step, py::arg("sample"), py::arg("model_output"), py::arg("place"),
           py::arg("uncond_output"), py::arg("guidance"), py::arg("rescale"), py::arg("history1"),
           py::arg("history2"), py::arg("threads"));
  m.def("scheduler_seed", &draw_seed);
  m.def("scheduler_noise", &noise, py::arg("out"), py::arg("seeds"), py::arg("seed"),
        py::arg("offset"), py::arg("threads"));
  m.def("normal_of_word", &normal::of_word, py::arg("word"));
  m.def("philox", &philox, py::arg("seed"), py::arg("offset"), py::arg("index"));
}

}  // namespace t2p::scheduler

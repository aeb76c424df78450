// SPDX-License-Identifier: Apache-2.0
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings/plain.h"
#include "bindings/results.h"
#include "bindings/tensor_view.h"
#include "common/normal.h"
#include "common/philox.h"
#include "scheduler/scheduler.h"

namespace py = pybind11;

namespace t2p::scheduler {
namespace {

constexpr const char* kOp = "scheduler_step";
constexpr std::int64_t kMostElements = std::int64_t{1} << 34;

Dtype dtype_of(const char* name, const TensorView& tensor) {
  if (tensor.is_float32()) return Dtype::kFloat32;
  if (tensor.is_bfloat16()) return Dtype::kBfloat16;
  T2P_CHECK_TYPE(tensor.is_float16(), kOp, ": ", name,
                 " must be float32, bfloat16 or float16, got ", tensor.dtype_text());
  return Dtype::kFloat16;
}

std::int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Elements of a sample, `tensor` [batch, ...].
std::int64_t sample_size(const TensorView& tensor) {
  std::int64_t n = 1;
  for (int i = 1; i < tensor.ndim(); ++i) n *= tensor.size(i);
  return n;
}

bool samples_contiguous(const TensorView& tensor) {
  std::int64_t expected = 1;
  for (int i = tensor.ndim() - 1; i > 0; --i) {
    if (tensor.size(i) != 1 && tensor.stride(i) != expected) return tensor.count() == 0;
    expected *= tensor.size(i);
  }
  return true;
}

// What the tensors of one step have in common.
struct Frame {
  const TensorView& sample;
  Dtype dtype;
  std::int64_t n;

  // `times`: how often the sample's channels the tensor has.
  void check(const char* name, const TensorView& tensor, int times = 1) const {
    T2P_CHECK_TYPE(dtype_of(name, tensor) == dtype, kOp, ": ", name, " is ", tensor.dtype_text(),
                   " but sample is ", sample.dtype_text());
    check_same_device(kOp, name, tensor, "sample", sample);
    bool same = tensor.ndim() == sample.ndim();
    for (int i = 0; same && i < sample.ndim(); ++i) {
      same = tensor.size(i) == sample.size(i) * (i == 1 ? times : 1);
    }
    T2P_CHECK(same, kOp, ": ", name, " is ", tensor.shape_text(), " but sample is ",
              sample.shape_text(), times == 1 ? "" : ", it needs twice the channels");
    T2P_CHECK(samples_contiguous(tensor), kOp, ": ", name, " of shape ", tensor.shape_text(),
              " must be contiguous");
  }

  Stream stream(const char* name, const TensorView& tensor, int times = 1) const {
    check(name, tensor, times);
    return {tensor.data<const void>(), tensor.ndim() > 0 ? tensor.stride(0) : 0};
  }

  Stream stream(const char* name, const std::optional<TensorView>& tensor) const {
    return tensor ? stream(name, *tensor) : Stream{};
  }
};

// An output may be one of the inputs, element for element, but not lie across one.
void check_overlap(const char* name, const void* out, const char* other_name, const Stream& other,
                   const Step& step) {
  if (other.data == nullptr || step.batch == 0) return;
  const std::int64_t size = bytes_of(step.dtype);
  const auto* from = static_cast<const char*>(out);
  const auto* to = from + step.batch * step.n * size;
  const auto* other_from = static_cast<const char*>(other.data);
  const auto* other_to = other_from + ((step.batch - 1) * other.batch_stride + step.n) * size;
  const bool same = from == other_from && (step.batch == 1 || other.batch_stride == step.n);
  T2P_CHECK(same || to <= other_from || other_to <= from, kOp, ": ", name, " overlaps ", other_name,
            " without being the same memory");
}

const float* coefficients_of(const TensorView& coefficients, const TensorView& sample) {
  check_float32(kOp, "coefficients", coefficients);
  check_contiguous(kOp, "coefficients", coefficients);
  check_same_device(kOp, "coefficients", coefficients, "sample", sample);
  T2P_CHECK(coefficients.ndim() == 2 && coefficients.size(1) == kColumns, kOp,
            ": coefficients must be [t, ", int{kColumns}, "], got ", coefficients.shape_text());
  return coefficients.data<const float>();
}

// An int64 tensor with a number for every sample.
const std::int64_t* each_sample(const char* name, const std::optional<TensorView>& tensor,
                                const TensorView& sample) {
  if (!tensor) return nullptr;
  check_int64(kOp, name, *tensor);
  check_contiguous(kOp, name, *tensor);
  check_same_device(kOp, name, *tensor, "sample", sample);
  T2P_CHECK(tensor->ndim() == 1 && tensor->size(0) == sample.size(0), kOp, ": ", name, " is ",
            tensor->shape_text(), " but sample has a batch of ", sample.size(0));
  return tensor->data<const std::int64_t>();
}

Bound bound_of(int kind) {
  T2P_CHECK(kind >= 0 && kind <= 2, kOp, ": bound is ", kind, ", expected 0, 1 or 2");
  return static_cast<Bound>(kind);
}

// The step that the arguments ask for, once all of them have been checked.
Step checked(const TensorView& sample, const TensorView& output, const TensorView& coefficients,
             const std::optional<TensorView>& index, std::int64_t row,
             const std::optional<TensorView>& uncond, float guidance, float rescale, int bound,
             float limit, double ratio, bool learned, const std::optional<TensorView>& shift,
             const std::optional<TensorView>& history1, const std::optional<TensorView>& history2,
             const std::optional<TensorView>& noise, bool draw,
             const std::optional<TensorView>& seeds, std::uint64_t seed, std::uint64_t offset,
             const TensorView& prev, const std::optional<TensorView>& x0) {
  T2P_CHECK(sample.ndim() >= (learned ? 2 : 1), kOp, ": sample must be [b, ...], got ",
            sample.shape_text());
  const Frame frame{sample, dtype_of("sample", sample), sample_size(sample)};
  T2P_CHECK(frame.n < kMostElements, kOp, ": a sample of ", frame.n, " elements is too large");
  Step s{};
  s.dtype = frame.dtype;
  s.batch = sample.size(0);
  s.n = frame.n;
  s.sample = frame.stream("sample", sample);
  s.output = frame.stream("model_output", output, learned ? 2 : 1);
  if (learned) {
    s.variance = s.output;
    s.variance.data = static_cast<const char*>(s.output.data) + s.n * bytes_of(s.dtype);
  }
  if (uncond) {
    const bool both = learned && uncond->ndim() > 1 && uncond->size(1) == 2 * sample.size(1);
    s.uncond = frame.stream("uncond_output", *uncond, both ? 2 : 1);
  }
  s.shift = frame.stream("shift", shift);
  s.history1 = frame.stream("history", history1);
  s.history2 = frame.stream("history", history2);
  s.noise = frame.stream("noise", noise);
  s.coefficients = coefficients_of(coefficients, sample);
  s.rows = coefficients.size(0);
  s.index = each_sample("index", index, sample);
  s.row = row;
  T2P_CHECK(index || (row >= 0 && row < s.rows), kOp, ": index ", row, " is outside [0, ", s.rows,
            ")");
  s.guidance = guidance;
  s.rescale = rescale;
  s.bound = bound_of(bound);
  s.limit = limit;
  s.ratio = ratio;
  T2P_CHECK(s.bound == Bound::kNone || limit > 0, kOp, ": the bound of x0 is ", limit,
            ", it must be positive");
  T2P_CHECK(s.bound != Bound::kThreshold || (ratio >= 0 && ratio <= 1), kOp,
            ": the quantile of the threshold is ", ratio, ", expected 0 to 1");
  s.source = noise ? Noise::kGiven : draw ? Noise::kPhilox : Noise::kNone;
  s.seeds = each_sample("seed", seeds, sample);
  s.seed = seed;
  s.offset = offset;
  frame.check("out", prev);
  T2P_CHECK(prev.contiguous(), kOp, ": out must be contiguous");
  s.prev = prev.data<void>();
  if (x0) {
    frame.check("out", *x0);
    T2P_CHECK(x0->contiguous(), kOp, ": out must be contiguous");
    s.x0 = x0->data<void>();
    check_overlap("out[1]", s.x0, "out[0]", {s.prev, s.n + 1}, s);
  }
  for (const auto& [name, other] :
       {std::pair{"sample", &s.sample}, std::pair{"model_output", &s.output},
        std::pair{"the variance", &s.variance}, std::pair{"uncond_output", &s.uncond},
        std::pair{"shift", &s.shift}, std::pair{"history", &s.history1},
        std::pair{"history", &s.history2}, std::pair{"noise", &s.noise}}) {
    check_overlap("out", s.prev, name, *other, s);
    if (x0) check_overlap("out", s.x0, name, *other, s);
  }
  return s;
}

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

// A seed out of torch's default generator for the CPU: torch.manual_seed makes it repeatable.
std::uint64_t draw_seed() {
  struct Source {
    py::object fill;  // Tensor.random_ of the number
    const std::uint64_t* number;
  };
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Source> stored;
  const auto make = [] {
    const py::module_ torch = py::module_::import("torch");
    const py::object number = torch.attr("zeros")(
        py::tuple(), py::arg("dtype") = torch.attr("int64"), py::arg("device") = "cpu");
    const auto address = number.attr("data_ptr")().cast<std::uintptr_t>();
    return Source{number.attr("random_"), reinterpret_cast<const std::uint64_t*>(address)};
  };
  const Source& source = stored.call_once_and_store_result(make).get_stored();
  const auto filled = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(source.fill.ptr()));
  if (!filled) throw py::error_already_set();
  return *source.number;
}

std::optional<TensorView> view_of(py::handle tensor) {
  if (tensor.is_none()) return std::nullopt;
  return TensorView(tensor);
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
                     prev.view, x0.tensor ? std::optional(x0.view) : std::nullopt);
    if (draws_seed) s.seed = draw_seed();
    run_on_cpu(s, threads);
  } catch (const py::cast_error& error) {
    throw TypeError(concat(kOp, ": ", error.what()));
  }
  if (!x0.tensor) x0.tensor = py::none();
  return py::make_tuple(std::move(prev.tensor), std::move(x0.tensor));
}

// The steps of one schedule and one choice of options, on plain CPU tensors with guidance at most:
// all that does not change from step to step, so that little has to be looked up and converted.
class Plan {
 public:
  // `rows` has for every timestep its row of the coefficients, or -1: not to be taken by a plan.
  // Rows from `noisy` on draw noise.
  Plan(const TensorView& timesteps, std::vector<std::int64_t> rows, py::object coefficients,
       int bound, float limit, double ratio, bool learned, std::int64_t noisy)
      : first_(timesteps.data<const std::int64_t>()),
        rows_(std::move(rows)),
        coefficients_(std::move(coefficients)),
        table_(coefficients_),
        bound_(bound),
        limit_(limit),
        ratio_(ratio),
        learned_(learned),
        noisy_(noisy) {
    check_int64(kOp, "timesteps", timesteps);
    check_contiguous(kOp, "timesteps", timesteps);
    T2P_CHECK(timesteps.count() == static_cast<std::int64_t>(rows_.size()), kOp, ": there are ",
              rows_.size(), " rows for timesteps of shape ", timesteps.shape_text());
  }

  // prev and x0; or None, where anything is not as planned and nothing has been done.
  py::object step(py::handle sample, py::handle output, py::handle timestep, py::handle uncond,
                  py::handle guidance, py::handle rescale, int threads) const {
    if (!is_plain({{sample, output, uncond}})) return py::none();
    if (Py_TYPE(timestep.ptr()) != Py_TYPE(sample.ptr())) return py::none();
    try {
      const TensorView x(sample);
      const std::int64_t row = row_of(TensorView(timestep));
      if (row < 0 || x.on_cuda()) return py::none();
      dtype_of("sample", x);
      Result prev = empty_like(sample, x), x0 = empty_like(sample, x);
      Step s = checked(x, TensorView(output), table_, {}, row, view_of(uncond),
                       guidance.cast<float>(), rescale.cast<float>(), bound_, limit_, ratio_,
                       learned_, {}, {}, {}, {}, row >= noisy_, {}, 0, 0, prev.view, x0.view);
      if (row >= noisy_) s.seed = draw_seed();
      run_on_cpu(s, threads);
      return py::make_tuple(std::move(prev.tensor), std::move(x0.tensor));
    } catch (const std::invalid_argument&) {
    } catch (const py::cast_error&) {
    }
    return py::none();
  }

 private:
  // That of one of the timesteps, known by its address: it is not read.
  std::int64_t row_of(const TensorView& timestep) const {
    const auto* at = timestep.data<const std::int64_t>();
    const bool inside = at >= first_ && at < first_ + rows_.size();
    return inside && timestep.count() == 1 ? rows_[at - first_] : -1;
  }

  const std::int64_t* first_;
  std::vector<std::int64_t> rows_;
  py::object coefficients_;
  TensorView table_;  // a view of them
  int bound_;
  float limit_;
  double ratio_;
  bool learned_;
  std::int64_t noisy_;
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
      .def(py::init<const TensorView&, std::vector<std::int64_t>, py::object, int, float, double,
                    bool, std::int64_t>(),
           py::arg("timesteps"), py::arg("rows"), py::arg("coefficients"), py::arg("bound"),
           py::arg("limit"), py::arg("ratio"), py::arg("learned"), py::arg("noisy"))
      .def("step", &Plan::step, py::arg("sample"), py::arg("model_output"), py::arg("timestep"),
           py::arg("uncond_output"), py::arg("guidance"), py::arg("rescale"), py::arg("threads"));
  m.def("scheduler_seed", &draw_seed);
  m.def("scheduler_noise", &noise, py::arg("out"), py::arg("seeds"), py::arg("seed"),
        py::arg("offset"), py::arg("threads"));
  m.def("normal_of_word", &normal::of_word, py::arg("word"));
  m.def("philox", &philox, py::arg("seed"), py::arg("offset"), py::arg("index"));
}

}  // namespace t2p::scheduler

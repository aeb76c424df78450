// SPDX-License-Identifier: Apache-2.0
// Checked tensors as the Step that the functions of scheduler.h take.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>

#include "bindings/tensor_view.h"
#include "scheduler/scheduler.h"

namespace t2p::scheduler {

inline constexpr const char* kOp = "scheduler_step";
inline constexpr std::int64_t kMostElements = std::int64_t{1} << 34;

inline Dtype dtype_of(const char* name, const TensorView& tensor) {
  if (tensor.is_float32()) return Dtype::kFloat32;
  if (tensor.is_bfloat16()) return Dtype::kBfloat16;
  T2P_CHECK_TYPE(tensor.is_float16(), kOp, ": ", name,
                 " must be float32, bfloat16 or float16, got ", tensor.dtype_text());
  return Dtype::kFloat16;
}

inline std::int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Elements of a sample, `tensor` [batch, ...].
inline std::int64_t sample_size(const TensorView& tensor) {
  std::int64_t n = 1;
  for (int i = 1; i < tensor.ndim(); ++i) n *= tensor.size(i);
  return n;
}

inline bool samples_contiguous(const TensorView& tensor) {
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
inline void check_overlap(const char* name, const void* out, const char* other_name,
                          const Stream& other, const Step& step) {
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

inline const float* coefficients_of(const TensorView& coefficients, const TensorView& sample) {
  check_float32(kOp, "coefficients", coefficients);
  check_contiguous(kOp, "coefficients", coefficients);
  check_same_device(kOp, "coefficients", coefficients, "sample", sample);
  T2P_CHECK(coefficients.ndim() == 2 && coefficients.size(1) == kColumns, kOp,
            ": coefficients must be [t, ", int{kColumns}, "], got ", coefficients.shape_text());
  return coefficients.data<const float>();
}

// An int64 tensor with a number for every sample.
inline const std::int64_t* each_sample(const char* name, const std::optional<TensorView>& tensor,
                                       const TensorView& sample) {
  if (!tensor) return nullptr;
  check_int64(kOp, name, *tensor);
  check_contiguous(kOp, name, *tensor);
  check_same_device(kOp, name, *tensor, "sample", sample);
  T2P_CHECK(tensor->ndim() == 1 && tensor->size(0) == sample.size(0), kOp, ": ", name, " is ",
            tensor->shape_text(), " but sample has a batch of ", sample.size(0));
  return tensor->data<const std::int64_t>();
}

inline Bound bound_of(int kind) {
  T2P_CHECK(kind >= 0 && kind <= 2, kOp, ": bound is ", kind, ", expected 0, 1 or 2");
  return static_cast<Bound>(kind);
}

// The step that the arguments ask for, once all of them have been checked.
inline Step checked(const TensorView& sample, const TensorView& output,
                    const TensorView& coefficients, const std::optional<TensorView>& index,
                    std::int64_t row, const std::optional<TensorView>& uncond, float guidance,
                    float rescale, int bound, float limit, double ratio, bool learned,
                    const std::optional<TensorView>& shift,
                    const std::optional<TensorView>& history1,
                    const std::optional<TensorView>& history2,
                    const std::optional<TensorView>& noise, bool draw,
                    const std::optional<TensorView>& seeds, std::uint64_t seed,
                    std::uint64_t offset, const TensorView& prev,
                    const std::optional<TensorView>& x0) {
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

}  // namespace t2p::scheduler

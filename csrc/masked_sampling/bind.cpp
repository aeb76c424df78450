// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>

#include "bindings/tensor_view.h"
#include "masked_sampling/masked_sampling.h"

namespace py = pybind11;

namespace t2p::masked_sampling {
namespace {

constexpr const char* kOp = "masked_sample";

Format format_of(const TensorView& logits) {
  if (logits.is_float32()) return Format::kF32;
  if (logits.is_bfloat16()) return Format::kBf16;
  T2P_CHECK_TYPE(logits.is_float16(), kOp, ": logits must be float32, bfloat16 or float16, got ",
                 logits.dtype_text());
  return Format::kF16;
}

// A contiguous tensor of the shape [b, n, v], [b, n] or [b], on the device of the logits.
void check_array(const char* name, const TensorView& tensor, std::int64_t count,
                 const TensorView& logits) {
  check_contiguous(kOp, name, tensor);
  check_same_device(kOp, name, tensor, "logits", logits);
  T2P_CHECK(tensor.count() == count, kOp, ": ", name, " must have ", count,
            " elements, got a shape of ", tensor.shape_text());
}

std::int64_t* integers(const char* name, const TensorView& tensor, std::int64_t count,
                       const TensorView& logits) {
  check_int64(kOp, name, tensor);
  check_array(name, tensor, count, logits);
  return tensor.data<std::int64_t>();
}

float* floats(const char* name, const TensorView& tensor, std::int64_t count,
              const TensorView& logits) {
  check_float32(kOp, name, tensor);
  check_array(name, tensor, count, logits);
  return tensor.data<float>();
}

void sample(const TensorView& logits, const std::optional<TensorView>& uncond,
            const TensorView& tokens, const std::optional<TensorView>& mask_count,
            const TensorView& seeds, const std::optional<TensorView>& token_noise,
            const std::optional<TensorView>& confidence_noise, std::int64_t mask_token,
            double guidance, double temperature, double choice_temperature, double log_min_p,
            std::int64_t top_k, std::int64_t step, bool transposed, const TensorView& next_tokens,
            const TensorView& sampled, const TensorView& log_probability, int threads) {
  T2P_CHECK(logits.ndim() == 3 && logits.size(transposed ? 1 : 2) > 0, kOp,
            ": logits must be [b, n, v >= 1], or [b, v, n] if transposed, got ",
            logits.shape_text());
  T2P_CHECK(!transposed || !logits.on_cuda(), kOp, ": logits are transposed, on ",
            logits.device_text(), " they must not be");
  const std::int64_t b = logits.size(0), n = logits.size(transposed ? 2 : 1),
                     v = logits.size(transposed ? 1 : 2);
  const Format format = format_of(logits);
  check_contiguous(kOp, "logits", logits);
  if (uncond) {
    T2P_CHECK_TYPE(format_of(*uncond) == format, kOp, ": uncond_logits are ", uncond->dtype_text(),
                   " but logits are ", logits.dtype_text());
    check_array("uncond_logits", *uncond, b * n * v, logits);
  }
  constexpr std::int64_t kWords = std::int64_t{1} << 32;
  T2P_CHECK(n < kWords && v < kWords && step >= 0 && step < kWords, kOp, ": logits are ",
            logits.shape_text(), " in step ", step, ", which the noise cannot count");
  const Round round{
      .logits = logits.data<void>(),
      .uncond = uncond ? uncond->data<void>() : nullptr,
      .format = format,
      .transposed = transposed,
      .tokens = integers("tokens", tokens, b * n, logits),
      .mask_count = mask_count ? integers("mask_count", *mask_count, b, logits) : nullptr,
      .seeds = integers("seed", seeds, b, logits),
      .token_noise = token_noise ? floats("noise", *token_noise, b * n * v, logits) : nullptr,
      .confidence_noise =
          confidence_noise ? floats("confidence_noise", *confidence_noise, b * n, logits) : nullptr,
      .b = b,
      .n = n,
      .v = v,
      .mask_token = mask_token,
      .guidance = static_cast<float>(guidance),
      .temperature = static_cast<float>(temperature),
      .choice_temperature = static_cast<float>(choice_temperature),
      .log_min_p = static_cast<float>(log_min_p),
      .top_k = top_k,
      .step = static_cast<std::uint32_t>(step),
      .next_tokens = integers("next_tokens", next_tokens, b * n, logits),
      .sampled = integers("sampled", sampled, b * n, logits),
      .log_probability = floats("log_probability", log_probability, b * n, logits)};
  if (logits.on_cuda()) return sample_cuda(round, logits.device().id, current_stream(logits));
  py::gil_scoped_release nogil;
  sample_cpu(round, threads);
}

}  // namespace

void bind(py::module_& m) {
  m.def("masked_sample", &sample, py::arg("logits"), py::arg("uncond").none(true),
        py::arg("tokens"), py::arg("mask_count").none(true), py::arg("seeds"),
        py::arg("token_noise").none(true), py::arg("confidence_noise").none(true),
        py::arg("mask_token"), py::arg("guidance"), py::arg("temperature"),
        py::arg("choice_temperature"), py::arg("log_min_p"), py::arg("top_k"), py::arg("step"),
        py::arg("transposed"), py::arg("next_tokens"), py::arg("sampled"),
        py::arg("log_probability"), py::arg("threads"));
}

}  // namespace t2p::masked_sampling

// SPDX-License-Identifier: Apache-2.0
// Compiled in place of the CUDA kernels where there is no CUDA compiler: every launcher says so.
#include <stdexcept>

#include "group_norm/group_norm.h"
#include "linear_attention/linear_attention.h"
#include "masked_sampling/masked_sampling.h"
#include "mrf/mrf.h"
#include "scheduler/scheduler.h"
#include "vq/vq.h"

namespace t2p {
namespace {

[[noreturn]] void built_without_cuda(const char* op) {
  throw std::runtime_error(
      std::string(op) +
      ": t2p_fast was built without CUDA; install nvcc and reinstall with "
      "`pip install -C cmake.define.T2P_CUDA=ON t2p-fast`, or use CPU tensors");
}

}  // namespace

namespace group_norm {

std::int64_t forward_workspace(const Norm&) { return 0; }
std::int64_t backward_workspace(const Norm&) { return 0; }
void forward_cuda(const Norm&, int, void*, double*, void*, double*) {
  built_without_cuda("group_norm_silu");
}
void backward_cuda(const Norm&, const void*, const double*, int, void*, double*, void*, float*) {
  built_without_cuda("group_norm_silu");
}

}  // namespace group_norm

namespace linear_attention {

std::int64_t forward_workspace(const Attention&) { return 0; }
std::int64_t backward_workspace(const Attention&) { return 0; }
void forward_cuda(const Attention&, int, void*, float*, const Rows&, float*) {
  built_without_cuda("linear_attention");
}
void backward_cuda(const Attention&, int, void*, float*, const Gradients&) {
  built_without_cuda("linear_attention");
}

}  // namespace linear_attention

namespace masked_sampling {

void sample_cuda(const Round&, int, void*) { built_without_cuda("masked_sample"); }

}  // namespace masked_sampling

namespace mrf {

void update_cuda(Values, const float*, Values, std::int64_t, std::int64_t, float, float, float, int,
                 void*, MutableValues) {
  built_without_cuda("mrf_mean_field");
}
void message_cuda(const Edges&, const Positions&, Values, std::int64_t, int, void*, MutableValues) {
  built_without_cuda("mrf_mean_field");
}
std::int64_t label_parts_cuda(std::int64_t, int) { return 0; }
void label_step_cuda(const LabelStep&, int, void*, MutableValues) {
  built_without_cuda("mrf_mean_field");
}
void belief_step_cuda(const Edges&, const BeliefStep&, const float*, int, void*, float*) {
  built_without_cuda("mrf_bp");
}
void beliefs_cuda(const Edges&, const BeliefStep&, const float*, int, void*, float*) {
  built_without_cuda("mrf_bp");
}
void icm_cuda(const Edges&, const float*, const float*, const std::int64_t*, std::int64_t,
              std::int64_t, std::int64_t, std::int64_t, int, void*, std::int64_t*) {
  built_without_cuda("mrf_icm");
}

}  // namespace mrf

namespace scheduler {

void step_cuda(const Step&, int, void*, float*) { built_without_cuda("scheduler_step"); }
std::int64_t workspace_size(std::int64_t, std::int64_t, bool, bool) { return 0; }
void noise_cuda(const std::int64_t*, std::uint64_t, std::uint64_t, std::int64_t, std::int64_t, int,
                void*, float*) {
  built_without_cuda("scheduler_noise");
}

}  // namespace scheduler

namespace vq {

void nearest_cuda(const AnyRows&, const float*, std::int64_t, Metric, int, void*, float*,
                  std::int64_t*, float*) {
  built_without_cuda("vq_nearest");
}
std::int64_t workspace_size(std::int64_t, std::int64_t, std::int64_t, Metric) { return 0; }
void lookup_cuda(const std::int64_t*, const float*, std::int64_t, int, void*, const MutableRows&) {
  built_without_cuda("vq_lookup");
}
std::int64_t accumulate_workspace_size(std::int64_t, std::int64_t) { return 0; }
void accumulate_cuda(const AnyRows&, const std::int64_t*, std::int64_t, int, void*, float*, float*,
                     float*) {
  built_without_cuda("vq_accumulate");
}
void quantize_cuda(const AnyRows&, const float*, std::int64_t, Metric, double, int, void*, float*,
                   std::int64_t*, float*, const Rows<void>&, float*) {
  built_without_cuda("vq_quantize");
}

}  // namespace vq
}  // namespace t2p

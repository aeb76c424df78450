// SPDX-License-Identifier: Apache-2.0
#include "attention/attention.h"

#include "attention/attention-inl.h"
#include "attention/kernels.h"
#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace t2p::attention {

void forward_cpu(const Attention& attention, int threads, const Rows& out) {
  const Kernels& kernels = T2P_DISPATCH_BF16(kKernels);
  const std::int64_t queries = queries_of(attention), parts = ceil_div(attention.m, queries);
  parallel_for(threads, attention.b * attention.h * parts, [&](std::int64_t task) {
    thread_local Buffer<float> scratch;
    scratch.reserve(scratch_size(attention));
    const std::int64_t head = task / parts, begin = task % parts * queries;
    kernels.attend(attention, head / attention.h, head % attention.h, begin,
                   std::min(begin + queries, attention.m), scratch.data(), out);
  });
}

}  // namespace t2p::attention

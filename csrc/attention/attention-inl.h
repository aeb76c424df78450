// SPDX-License-Identifier: Apache-2.0
// Attention of some queries of one head, for one instruction set. Included once per ISA.
#include "attention/kernels.h"
#include "attention/tiles-inl.h"
#if defined(__AVX512BF16__)
#include "attention/bf16-inl.h"
#endif
#if defined(T2P_AMX)
#include "attention/amx-inl.h"
#endif

namespace t2p::attention::T2P_ISA_NAMESPACE {
namespace {

void attend(const Attention& attention, std::int64_t batch, std::int64_t head, std::int64_t begin,
            std::int64_t end, [[maybe_unused]] const std::int32_t* blocks, float* scratch,
            const Rows& out) {
#if defined(T2P_AMX)
  if (attention.q.format == Format::kBf16) {
    return attend_by_tiles(attention, batch, head, begin, end, blocks, scratch, out);
  }
#elif defined(__AVX512BF16__)
  if (attention.q.format == Format::kBf16) {
    return attend_with<Pairs>(attention, batch, head, begin, end, scratch, out);
  }
#endif
  attend_with<Floats>(attention, batch, head, begin, end, scratch, out);
}

}  // namespace

#if defined(T2P_AMX)
extern const Kernels kKernels = {attend, prepare};
#else
extern const Kernels kKernels = {attend, nullptr};
#endif

}  // namespace t2p::attention::T2P_ISA_NAMESPACE

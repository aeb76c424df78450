// SPDX-License-Identifier: Apache-2.0
#include "attention/attention.h"

#include <optional>

#include "attention/attention-inl.h"
#include "attention/kernels.h"
#include "common/block_cache.h"
#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace t2p::attention {

void forward_cpu(const Attention& attention, int threads, const Rows& out) {
  const Kernels& kernels = T2P_AMX_DISPATCH_BF16(kKernels);
  const bool tiled = kernels.prepare && attention.q.format == Format::kBf16;
  const std::int64_t queries = tiled ? kTiledQueries : queries_of(attention),
                     parts = ceil_div(attention.m, queries), heads = attention.b * attention.h;

  // Keys and values that several tasks need are prepared once for all.
  const TileSizes sizes(attention);
  const std::int64_t blocks = tiled && parts > 1 ? ceil_div(attention.n, kTiledKeys) : 0;
  std::optional<CachedArray<std::int32_t>> prepared;
  if (blocks > 0) {
    prepared.emplace(heads * blocks * sizes.block());
    parallel_for(threads, heads * blocks, [&](std::int64_t task) {
      const std::int64_t head = task / blocks;
      kernels.prepare(attention, head / attention.h, head % attention.h, task % blocks * kTiledKeys,
                      prepared->data() + task * sizes.block());
    });
  }
  parallel_for(threads, heads * parts, [&](std::int64_t task) {
    thread_local Buffer<float> scratch;
    scratch.reserve(tiled ? tiled_scratch_size(attention) : scratch_size(attention));
    const std::int64_t head = task / parts, begin = task % parts * queries;
    kernels.attend(attention, head / attention.h, head % attention.h, begin,
                   std::min(begin + queries, attention.m),
                   prepared ? prepared->data() + head * blocks * sizes.block() : nullptr,
                   scratch.data(), out);
  });
}

}  // namespace t2p::attention

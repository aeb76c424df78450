// SPDX-License-Identifier: Apache-2.0
#include "common/block_cache.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <iterator>
#include <mutex>
#include <new>

namespace t2p {
namespace {

constexpr std::int64_t kHugePage = std::int64_t{1} << 21;

// Whole huge pages, in steps of at most an eighth, so that results of similar size share blocks.
std::int64_t block_size(std::int64_t bytes) {
  std::int64_t step = kHugePage;
  while (16 * step <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

// On a huge page's boundary: what does not lie between two is mapped and unmapped again.
void* map_block(std::int64_t size) {
  const auto whole = static_cast<std::size_t>(size + kHugePage);
  void* mapped = mmap(nullptr, whole, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(mapped);
  const auto beyond = reinterpret_cast<std::uintptr_t>(begin) % kHugePage;
  char* block = begin + (beyond ? kHugePage - beyond : 0);
  if (block > begin) munmap(begin, static_cast<std::size_t>(block - begin));
  const auto behind = static_cast<std::size_t>(begin + whole - (block + size));
  if (behind > 0) munmap(block + size, behind);
#if defined(MADV_HUGEPAGE)
  // Fresh memory is then entered 2 MiB at a time. A kernel without them refuses without harm.
  madvise(block, static_cast<std::size_t>(size), MADV_HUGEPAGE);
#endif
  return block;
}

struct Block {
  void* data;
  std::int64_t size;
};

struct Cache {
  std::mutex mutex;
  std::deque<Block> blocks;  // free ones, in the order in which they were given back
  std::int64_t kept = 0, limit = 0;

  Cache() {
    const std::int64_t memory = std::int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
    limit = std::clamp<std::int64_t>(memory / 16, 0, std::int64_t{1} << 30);
  }
  void shrink_to(std::int64_t bytes) {
    while (kept > bytes) {
      munmap(blocks.front().data, static_cast<std::size_t>(blocks.front().size));
      kept -= blocks.front().size;
      blocks.pop_front();
    }
  }
};

// Never destroyed: results may die after everything else. A child that is forked while another
// thread has the lock would wait for it forever, so that whoever forks takes it first.
Cache& cache() {
  static Cache* cache = [] {
    pthread_atfork([] { t2p::cache().mutex.lock(); }, [] { t2p::cache().mutex.unlock(); },
                   [] { t2p::cache().mutex.unlock(); });
    return new Cache;
  }();
  return *cache;
}

}  // namespace

void* take_block(std::int64_t bytes) {
  const std::int64_t size = block_size(bytes);
  {
    const std::lock_guard lock(cache().mutex);
    std::deque<Block>& blocks = cache().blocks;
    // The one given back last, which may still be in the processor's cache.
    const auto found = std::find_if(blocks.rbegin(), blocks.rend(),
                                    [&](const Block& block) { return block.size == size; });
    if (found != blocks.rend()) {
      void* data = found->data;
      blocks.erase(std::next(found).base());
      cache().kept -= size;
      return data;
    }
  }
  void* block = map_block(size);
  if (block == nullptr) {
    drop_blocks();
    block = map_block(size);
  }
  if (block == nullptr) throw std::bad_alloc();
  return block;
}

void give_block(void* block, std::int64_t bytes) {
  const std::int64_t size = block_size(bytes);
  const std::lock_guard lock(cache().mutex);
  cache().blocks.push_back({block, size});
  cache().kept += size;
  cache().shrink_to(cache().limit);
}

std::int64_t kept_bytes() {
  const std::lock_guard lock(cache().mutex);
  return cache().kept;
}

std::int64_t kept_limit() {
  const std::lock_guard lock(cache().mutex);
  return cache().limit;
}

void set_kept_limit(std::int64_t bytes) {
  const std::lock_guard lock(cache().mutex);
  cache().limit = bytes;
  cache().shrink_to(bytes);
}

void drop_blocks() {
  const std::lock_guard lock(cache().mutex);
  cache().shrink_to(0);
}

}  // namespace t2p

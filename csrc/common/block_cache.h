// SPDX-License-Identifier: Apache-2.0
// Memory for large results, kept when they die and given to the next ones. glibc maps an array of
// megabytes anew for every result and unmaps it afterwards, so that each call enters all of its
// pages again, and that costs more than the arithmetic of most kernels here.
#pragma once

#include <algorithm>
#include <cstdint>

namespace t2p {

// At least `bytes` > 0 of memory, uninitialised, on a page's boundary; throws std::bad_alloc. What
// is free counts towards a limit, beyond which the blocks that were given back first are unmapped.
// Any thread, and a forked child, may take and give.
void* take_block(std::int64_t bytes);

// `bytes` is what take_block was asked for.
void give_block(void* block, std::int64_t bytes);

// An array in such a block, for work that is done and forgotten.
template <class T>
class CachedArray {
 public:
  explicit CachedArray(std::int64_t count)
      : bytes_(std::max<std::int64_t>(count, 1) * static_cast<std::int64_t>(sizeof(T))),
        data_(static_cast<T*>(take_block(bytes_))) {}
  ~CachedArray() { give_block(data_, bytes_); }
  CachedArray(const CachedArray&) = delete;
  CachedArray& operator=(const CachedArray&) = delete;
  T* data() const { return data_; }

 private:
  std::int64_t bytes_;
  T* data_;
};

// Bytes that are free but kept, and their limit; at first a sixteenth of the machine's memory, and
// at most 1 GiB.
std::int64_t kept_bytes();
std::int64_t kept_limit();
void set_kept_limit(std::int64_t bytes);

// Unmaps what is free.
void drop_blocks();

}  // namespace t2p

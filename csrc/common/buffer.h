// SPDX-License-Identifier: Apache-2.0
// Uninitialised memory on a cache line's boundary.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace t2p {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t count) { reserve(count); }

  // At least `count` elements from here on; what was in them is lost when the buffer grows.
  void reserve(std::int64_t count) {
    if (count <= count_) return;
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    count_ = data_ ? count : 0;
    if (!data_) throw std::bad_alloc();
  }
  T* data() const { return data_.get(); }
  T& operator[](std::int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  std::int64_t count_ = 0;
};

}  // namespace t2p

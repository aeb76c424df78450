// SPDX-License-Identifier: Apache-2.0
// The parts of a CUDA launcher's workspace.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef T2P_EMULATED_TILE
// Of the runtime in tests/ptx/cudart. A part at offset 0 is the first one; of the memory that
// `base` lies in, only what is a part may be touched from then on.
extern "C" void t2p_emulator_part(const void* base, std::size_t offset, std::size_t bytes,
                                  const char* name);
#endif

namespace t2p {

// Hands out parts of the workspace, each on a 16-byte boundary; without one it only counts. The
// emulated build of the tests leaves a gap after every part and tells the emulator of it, so that
// an access beyond the end of one is found, and not taken for one of the next.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(std::int64_t count, [[maybe_unused]] const char* name) {
    const std::int64_t at = used_, bytes = count * static_cast<std::int64_t>(sizeof(T));
    used_ += (bytes + 15) / 16 * 16 + kGap;
    if (base_ == nullptr) return nullptr;
#ifdef T2P_EMULATED_TILE
    t2p_emulator_part(base_, static_cast<std::size_t>(at), static_cast<std::size_t>(bytes), name);
#endif
    return reinterpret_cast<T*>(base_ + at);
  }

  // The size of all parts, in elements of T.
  template <class T>
  std::int64_t size() const {
    return used_ / static_cast<std::int64_t>(sizeof(T));
  }

 private:
#ifdef T2P_EMULATED_TILE
  static constexpr std::int64_t kGap = 4096;
#else
  static constexpr std::int64_t kGap = 0;
#endif
  char* base_;
  std::int64_t used_ = 0;
};

}  // namespace t2p

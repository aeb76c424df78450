// SPDX-License-Identifier: Apache-2.0
// Large results on fresh memory. glibc maps an array of megabytes anew at every call, and the first
// write to each of its pages costs more than the arithmetic of most kernels here.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace t2p {

// Asks the kernel to back [p, p + bytes) with huge pages, in which fresh memory is then entered
// 2 MiB at a time. Advice: what is in memory stays, and a kernel that does not know it or has them
// turned off refuses without harm. Nothing for small arrays. The advice is for all pages that the
// array touches: one that begins some bytes behind a huge page's boundary, as glibc's do, would
// lose that one to the last byte in front of it.
inline void advise_huge_pages(void* p, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHuge = std::uintptr_t{1} << 21;
  static const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  if (bytes < static_cast<std::int64_t>(kHuge)) return;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(p) / page * page;
  const std::uintptr_t end =
      reinterpret_cast<std::uintptr_t>(p) + static_cast<std::uintptr_t>(bytes);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p;
  (void)bytes;
#endif
}

}  // namespace t2p

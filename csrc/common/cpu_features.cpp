// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "common/check.h"
#include "common/isa.h"

#if T2P_X86
#include <cpuid.h>
#endif
#if T2P_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace t2p {
namespace {

#if T2P_X86
// XCR0: the register files that the operating system saves on a context switch. A processor may
// have AVX-512 while its system, or its hypervisor, does not.
std::uint64_t saved_register_files() {
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

// Whether the system lets this process use AMX's tiles, which it has to be asked for.
bool may_use_tiles() {
#if defined(T2P_TILES_IN_SOFTWARE)
  return true;
#elif defined(__linux__) && defined(SYS_arch_prctl)
  constexpr std::uint32_t kTiles = 1u << 24, kInt8 = 1u << 25, kBf16 = 1u << 22;  // leaf 7, edx
  constexpr std::uint64_t kTilesSaved = 0x60000;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  std::uint32_t eax, ebx, ecx, edx;
  constexpr std::uint32_t kAll = kTiles | kInt8 | kBf16;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kAll) != kAll) return false;
  if ((saved_register_files() & kTilesSaved) != kTilesSaved) return false;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  constexpr std::uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kF16c = 1u << 29;  // leaf 1, ecx
  constexpr std::uint32_t kAvx2 = 1u << 5;                                         // leaf 7, ebx
  constexpr std::uint32_t kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;     // F, DQ, BW, VL
  constexpr std::uint32_t kVbmi = 1u << 1, kVnni = 1u << 11;                       // leaf 7, ecx
  constexpr std::uint32_t kBf16 = 1u << 5;                                         // leaf 7.1, eax
  constexpr std::uint64_t kYmmSaved = 0x6, kZmmSaved = 0xe6;

  std::uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Isa::kScalar;
  if (!(ecx & kFma) || !(ecx & kOsxsave) || !(ecx & kF16c)) return Isa::kScalar;
  const std::uint64_t saved = saved_register_files();
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return Isa::kScalar;
  if ((saved & kYmmSaved) != kYmmSaved || !(ebx & kAvx2)) return Isa::kScalar;
  if ((saved & kZmmSaved) != kZmmSaved || (ebx & kAvx512) != kAvx512) return Isa::kAvx2;
  if (!(ecx & kVnni)) return Isa::kAvx512;
  const bool vbmi = ecx & kVbmi;
  const bool bf16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kBf16);
  if (!bf16) return Isa::kAvx512Vnni;
  return vbmi && may_use_tiles() ? Isa::kAmx : Isa::kAvx512Bf16;
}
#else
Isa detect() { return Isa::kScalar; }
#endif

Isa choose() {
  const char* wanted = std::getenv("T2P_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_isa();
  for (Isa isa :
       {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni, Isa::kAvx512Bf16, Isa::kAmx}) {
    if (std::string_view(wanted) != isa_name(isa)) continue;
    T2P_CHECK(isa <= best_isa(), "T2P_ISA=", wanted, " but this machine supports at most ",
              isa_name(best_isa()));
    return isa;
  }
  T2P_CHECK(false, "T2P_ISA=", wanted,
            " is not one of scalar, avx2, avx512, avx512_vnni, avx512_bf16, amx");
  return Isa::kScalar;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512Vnni:
      return "avx512_vnni";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "scalar";
  }
}

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace t2p

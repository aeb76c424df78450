// SPDX-License-Identifier: Apache-2.0
// Instruction sets: which one a translation unit is compiled for, and which one runs.
//
// A kernel's body, <op>-inl.h, is compiled once per ISA inside a namespace of that ISA's name. Code
// built with other flags is then never merged by the linker. For the same reason such a body calls
// no function template of the standard library that could be emitted out of line.
#pragma once

#if defined(T2P_AMX)
#define T2P_ISA_NAMESPACE amx
#elif defined(__AVX512BF16__)
#define T2P_ISA_NAMESPACE avx512_bf16
#elif defined(__AVX512VNNI__)
#define T2P_ISA_NAMESPACE avx512_vnni
#elif defined(__AVX512F__)
#define T2P_ISA_NAMESPACE avx512
#elif defined(__AVX2__)
#define T2P_ISA_NAMESPACE avx2
#else
#define T2P_ISA_NAMESPACE scalar
#endif

#if defined(__x86_64__)
#define T2P_X86 1
#else
#define T2P_X86 0
#endif

#define T2P_INLINE inline __attribute__((always_inline))

namespace t2p {

enum class Isa {
  kScalar = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kAvx512Vnni = 3,
  kAvx512Bf16 = 4,
  kAmx = 5,  // and all before
};

const char* isa_name(Isa isa);

// The best level that the processor and the operating system support. Where that is kAmx, the first
// call asks the system for the use of tiles, for the whole process.
Isa best_isa();

// best_isa(), or the level that the environment variable T2P_ISA asks for, read once. Throws
// std::invalid_argument when T2P_ISA is not a level or the machine lacks it.
Isa chosen_isa();

}  // namespace t2p

// The dispatch helpers. `T2P_DISPATCH(kKernels)` is scalar::kKernels, avx2::kKernels,
// avx512::kKernels or avx512_vnni::kKernels of the enclosing namespace; with T2P_DISPATCH_BF16, for
// an op that has it, also avx512_bf16::kKernels; with T2P_AMX_DISPATCH and
// T2P_AMX_DISPATCH_BF16, for those that have it, amx::kKernels too.
#if T2P_X86
#define T2P_DISPATCH(name)                                            \
  (::t2p::chosen_isa() >= ::t2p::Isa::kAvx512Vnni ? avx512_vnni::name \
   : ::t2p::chosen_isa() == ::t2p::Isa::kAvx512   ? avx512::name      \
   : ::t2p::chosen_isa() == ::t2p::Isa::kAvx2     ? avx2::name        \
                                                  : scalar::name)
#define T2P_DISPATCH_BF16(name) \
  (::t2p::chosen_isa() >= ::t2p::Isa::kAvx512Bf16 ? avx512_bf16::name : T2P_DISPATCH(name))
#define T2P_AMX_DISPATCH(name) \
  (::t2p::chosen_isa() == ::t2p::Isa::kAmx ? amx::name : T2P_DISPATCH(name))
#define T2P_AMX_DISPATCH_BF16(name) \
  (::t2p::chosen_isa() == ::t2p::Isa::kAmx ? amx::name : T2P_DISPATCH_BF16(name))
#else
#define T2P_DISPATCH(name) ((void)::t2p::chosen_isa(), scalar::name)
#define T2P_DISPATCH_BF16(name) T2P_DISPATCH(name)
#define T2P_AMX_DISPATCH(name) T2P_DISPATCH(name)
#define T2P_AMX_DISPATCH_BF16(name) T2P_DISPATCH(name)
#endif

// What a dispatch helper chooses from, declared: one `name` for every instruction set. Who has no
// kernel for AVX-512 BF16 or AMX does not define that one.
#define T2P_DECLARE_FOR_ISAS(Type, name) \
  namespace scalar {                     \
  extern const Type name;                \
  }                                      \
  namespace avx2 {                       \
  extern const Type name;                \
  }                                      \
  namespace avx512 {                     \
  extern const Type name;                \
  }                                      \
  namespace avx512_vnni {                \
  extern const Type name;                \
  }                                      \
  namespace avx512_bf16 {                \
  extern const Type name;                \
  }                                      \
  namespace amx {                        \
  extern const Type name;                \
  }

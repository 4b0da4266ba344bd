// A file that is compiled more than once, for processors of different ages, keeps what it defines
// in an inline namespace of the instruction set: otherwise the linker would keep one of several
// equal names for all, and an older processor might be given a newer one's code.
#pragma once
#ifndef HGRN_ISA
#define HGRN_ISA isa_default  // what HGRN_MARCH says
#endif
namespace hgrn::cpu {
inline namespace HGRN_ISA {}
}  // namespace hgrn::cpu

// What `function` of the build for this processor returns, a table of kernels.
#ifdef HGRN_CPU_V4  // there is one for x86-64-v4 (AVX-512) beside that of HGRN_MARCH
#define HGRN_BEST_ISA(function) \
  (__builtin_cpu_supports("x86-64-v4") ? isa_v4::function() : isa_default::function())
#else
#define HGRN_BEST_ISA(function) isa_default::function()
#endif

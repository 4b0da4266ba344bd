// Which build of the products of narrow layers this processor takes.
// Test: tests/ops/test_split_gemm.cpp
#include <cstdlib>
#include <cstring>
#include <optional>

#include "cpu/narrow_gemm.h"

#if defined(HGRN_CPU_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hgrn::cpu {

#if defined(HGRN_CPU_AMX) && defined(__linux__)
namespace {

// Linux gives a process the tiles' registers, 8 KiB a thread, when it asks for them.
bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // EDX of leaf 7
  constexpr long kAskForState = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d;
  return __builtin_cpu_supports("x86-64-v4") && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
         (d & kBf16) && (d & kTile) && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}

}  // namespace

const NarrowGemm* amx_narrow_gemm() {
  // Not called where it cannot run: even what fills the table is built for AVX-512.
  static const auto table =
      has_amx() ? std::optional(isa_amx::narrow_gemm()) : std::optional<NarrowGemm>();
  return table ? &*table : nullptr;
}
#else
const NarrowGemm* amx_narrow_gemm() {
  return nullptr;
}
#endif

const NarrowGemm& best_narrow_gemm() {
  static const NarrowGemm best = [] {
    const char* const set = std::getenv("HGRN_AMX");
    const NarrowGemm* const amx = set && !std::strcmp(set, "0") ? nullptr : amx_narrow_gemm();
    return amx ? *amx : HGRN_BEST_ISA(narrow_gemm);
  }();
  return best;
}

}  // namespace hgrn::cpu

// split_gemm.h on Intel's AMX: TDPBF16PS multiplies 16 x 32 by 32 x 16 bf16 and adds in fp32.
// Assembler, since g++'s intrinsics do not tell the compiler that a tile's load reads memory, and
// take a tile's number as text alone.
// Twin: kernels/cpu/narrow_gemm.cpp   Test: tests/ops/test_split_gemm.cpp
#include "cpu/split_gemm.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed inline only

namespace hgrn::cpu {
namespace {

struct alignas(64) TileConfig {  // as LDTILECFG reads it: eight registers, zeros behind
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

class AmxTiles {  // of this thread, while the object lives
 public:
  AmxTiles() {
    const TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~AmxTiles() { asm volatile("tilerelease" ::: "memory"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  template <int tile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  template <int tile, int64_t offset = 0>
  void load(const void* from, int64_t row) {
    asm volatile("tileloadd %c2(%0,%1,1), %%tmm%c3" ::"r"(from), "r"(row), "i"(offset), "i"(tile)
                 : "memory");
  }
  template <int tile, int64_t offset = 0>
  void stream(const void* from, int64_t row) {
    asm volatile("tileloaddt1 %c2(%0,%1,1), %%tmm%c3" ::"r"(from), "r"(row), "i"(offset), "i"(tile)
                 : "memory");
  }
  template <int tile>
  void store(void* to, int64_t row) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row), "i"(tile) : "memory");
  }
  template <int c, int a, int b>
  void multiply() {  // c += a b
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};

}  // namespace

inline namespace HGRN_ISA {
NarrowGemm narrow_gemm() {
  return split_gemm<AmxTiles>("narrow products by AMX in three bf16 parts");
}
}  // namespace HGRN_ISA

}  // namespace hgrn::cpu

// TDPBF16PS as Intel's manual defines it: products of even and of odd k are summed apart in fp32,
// over the 16 words of a row, then both and then C are added. Denormals count as zero, before and
// after each operation; sums round to nearest.
#include "ops/emulated_tiles.h"

#include <cstring>

#include "cpu/split_gemm.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed inline only

namespace hgrn::cpu {
namespace {

struct Tile {
  alignas(64) Words row[kTile];
};

[[gnu::noinline]] void multiply_tiles(Tile& c, const Tile& a, const Tile& b) {
  for (int m = 0; m < kTile; ++m) {
    Vec even{}, odd{};
    for (int k = 0; k < kTile; ++k) {
      const Words left = Words{} + a.row[m][k], right = b.row[k];
      even = _mm512_fmadd_ps(Vec(left << 16), Vec(right << 16), even);
      odd = _mm512_fmadd_ps(Vec(left & 0xffff0000u), Vec(right & 0xffff0000u), odd);
    }
    c.row[m] = Words(Vec(c.row[m]) + (even + odd));
  }
}

class EmulatedTiles {
 public:
  template <int tile>
  void zero() {
    tile_[tile] = {};
  }
  template <int tile, int64_t offset = 0>
  void load(const void* from, int64_t row) {
    const char* const p = static_cast<const char*>(from) + offset;
    for (int64_t m = 0; m < kTile; ++m) std::memcpy(&tile_[tile].row[m], p + m * row, 64);
  }
  template <int tile, int64_t offset = 0>
  void stream(const void* from, int64_t row) {
    load<tile, offset>(from, row);
  }
  template <int tile>
  void store(void* to, int64_t row) {
    for (int64_t m = 0; m < kTile; ++m)
      std::memcpy(static_cast<char*>(to) + m * row, &tile_[tile].row[m], 64);
  }
  template <int c, int a, int b>
  void multiply() {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040u);
    multiply_tiles(tile_[c], tile_[a], tile_[b]);
    _mm_setcsr(before);
  }

 private:
  Tile tile_[8] = {};
};

}  // namespace

inline namespace HGRN_ISA {

NarrowGemm narrow_gemm() {
  return split_gemm<EmulatedTiles>("tiles in software");
}

void split(float x, float* parts) {
  alignas(64) char row[kStepBytes] = {};
  split_row(row, Vec{} + x, Vec{});
  for (int part = 0; part < kParts; ++part) {
    uint32_t word;
    std::memcpy(&word, row + part * kPartBytes, 4);
    word <<= 16;
    std::memcpy(parts + part, &word, 4);
  }
}

}  // namespace HGRN_ISA

}  // namespace hgrn::cpu

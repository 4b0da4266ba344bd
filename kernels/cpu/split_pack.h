// Operands of split_gemm.h: a float as three bf16, in tiles of a matrix unit that multiplies bf16.
// a = a1 + a2 + a3 exactly, 8 significant bits each, every one but the last rounded to nearest:
// |a2| <= 2^-8 |a|, |a3| <= 2^-17 |a|. Infinity becomes NaN, as do numbers from
// (2 - 2^-8) 2^127 on, which bf16 rounds to infinity; NaN stays. For AVX-512.
// Test: tests/ops/test_split_gemm.cpp
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/tiles.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed inline only

namespace hgrn::cpu {
inline namespace HGRN_ISA {

// A tile has 16 rows of 16 words. A word holds two bf16, of k and k + 16, so that it makes no
// difference to the split which way a tile lies: A's are rows of 16 words of k, B's words of k in
// rows of 16 columns. A step is 32 of k: two tiles beside each other, three parts of each.
constexpr int64_t kTile = 16, kTileBytes = kTile * 64, kStep = 2 * kTile;
constexpr int kParts = 3;
constexpr int64_t kPartBytes = 2 * kTileBytes, kStepBytes = kParts * kPartBytes;

static_assert(kLanes == kTile, "split_pack.h is for AVX-512: compile it with -march=x86-64-v4");
typedef uint32_t Words __attribute__((vector_size(kVecBytes)));

// One row of a tile's three parts.
inline void split_row(char* to, Vec low, Vec high) {
#pragma GCC unroll 2
  for (int part = 0; part < kParts - 1; ++part) {
    const Words x = (Words(low) + 0x8000u) & 0xffff0000u, y = (Words(high) + 0x8000u) & 0xffff0000u;
    *reinterpret_cast<Words*>(to + part * kPartBytes) = x >> 16 | y;
    low -= Vec(x), high -= Vec(y);
  }
  // What is left fits, but for bits below the least normal number.
  *reinterpret_cast<Words*>(to + (kParts - 1) * kPartBytes) =
      Words(low) >> 16 | (Words(high) & 0xffff0000u);
}

// X (R,K): x(r,k) = data[r * ld + k], or data[k * ld + r] where r runs along memory.
struct Operand {
  const float* data;
  int64_t ld;
  bool along_k;
  int64_t R, K;
  bool turned;    // tiles lie across memory: of A where r runs along it, of B where k does
  int64_t ahead;  // what is asked for: so many floats behind what is read
};

// 16 rows of memory of which those beyond `rows` and columns beyond the mask are zeros.
struct MemoryRows {
  const float* data;
  int64_t ld, rows;
  __mmask16 mask;
  Vec row(int64_t i) const {
    return _mm512_maskz_loadu_ps(i < rows ? mask : __mmask16(0), data + i * ld);
  }
};
inline __mmask16 first(int64_t count) {
  return __mmask16((1u << std::clamp<int64_t>(count, 0, kTile)) - 1);
}

// to (16,16) = the transpose.
[[gnu::noinline]] inline void transpose_tile(float* to, const MemoryRows& from) {
  Vec row[kTile];
  if (from.rows >= kTile) [[likely]] {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; ++i)
      row[i] = _mm512_maskz_loadu_ps(from.mask, from.data + i * from.ld);
  } else {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; ++i) row[i] = from.row(i);
  }
  transpose_stage<kLanes / 2>(row);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTile; ++i) at(to + i * kTile) = row[i];
}

// Packs an operand piece by piece. Zeros beyond R and K.
class Packer {
 public:
  explicit Packer(const Operand& x) : x_(x) {}

  // `tiles` tiles of 16 r from r on, `steps` steps from k on; `to`: (tiles / 2, steps, parts, 2)
  // tiles. Returns the number of pieces.
  int64_t start(char* to, int64_t r, int64_t tiles, int64_t k, int64_t steps) {
    to_ = to, r_ = r, k_ = k, tiles_ = tiles, steps_ = steps;
    t_ = s_ = phase_ = row_ = 0;
    return tiles_ * steps_ * (x_.turned ? 2 + kTile / kRows : kTile / kRows);
  }

  [[gnu::noinline]] void piece() {
    if (phase_ == 0) begin();
    if (x_.turned && phase_ < 2) {
      MemoryRows& from = from_[phase_];
      for (int64_t i = 0; i < kTile; ++i)
        __builtin_prefetch(from.data + i * from.ld + x_.ahead, 0, 2);
      transpose_tile(turned_[phase_], from);
      from = {turned_[phase_], kTile, kTile, first(kTile)};
      ++phase_;
      return;
    }
    split_rows(tile_ + row_ * 64, from_[0], from_[1], row_, x_.turned ? 0 : x_.ahead);
    ++phase_, row_ += kRows;
    if (row_ == kTile) next();
  }

 private:
  static constexpr int64_t kRows = 4;  // of a tile in a piece

  static void split_rows(char* to, const MemoryRows& low, const MemoryRows& high, int64_t row,
                         int64_t ahead) {
    const float *x = low.data + row * low.ld, *y = high.data + row * high.ld;
    const int64_t x_row = low.ld, y_row = high.ld, end = row + kRows;
    const bool whole = end <= low.rows && end <= high.rows;
    const __mmask16 x_mask = low.mask, y_mask = high.mask;
    for (; row < end; ++row, to += 64, x += x_row, y += y_row) {
      __builtin_prefetch(x + ahead, 0, 2);
      __builtin_prefetch(y + ahead, 0, 2);
      if (whole) [[likely]]
        split_row(to, _mm512_maskz_loadu_ps(x_mask, x), _mm512_maskz_loadu_ps(y_mask, y));
      else
        split_row(to, low.row(row), high.row(row));
    }
  }
  void begin() {
    const int64_t r = r_ + t_ * kTile, k = k_ + s_ * kStep;
    tile_ = to_ + (t_ / 2 * steps_ + s_) * kStepBytes + t_ % 2 * kTileBytes;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t from = k + half * kTile, rows = x_.R - r, depth = x_.K - from;
      if (x_.along_k)
        from_[half] = {x_.data + r * x_.ld + from, x_.ld, rows, first(depth)};
      else
        from_[half] = {x_.data + from * x_.ld + r, x_.ld, depth, first(rows)};
    }
  }
  void next() {  // in the order of memory
    phase_ = row_ = 0;
    if (x_.along_k) {
      if (++s_ == steps_) s_ = 0, ++t_;
    } else {
      if (++t_ == tiles_) t_ = 0, ++s_;
    }
  }

  const Operand x_;
  char *to_ = nullptr, *tile_ = nullptr;
  int64_t r_ = 0, k_ = 0, tiles_ = 0, steps_ = 0;
  int64_t t_ = 0, s_ = 0, phase_ = 0, row_ = 0;  // next: tile, step, piece of it, row of it
  MemoryRows from_[2] = {};                      // k and k + 16 of the tile
  alignas(64) float turned_[2][kTile * kTile] = {};
};

}  // namespace HGRN_ISA
}  // namespace hgrn::cpu

#pragma GCC diagnostic pop

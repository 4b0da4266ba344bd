// C (M,N) = op(A) op(B) + plus in fp32 on a matrix unit that multiplies bf16 and adds in fp32: each
// operand as three bf16 (split_pack.h), of whose nine products six are taken,
//   a b = a1 b3 + a1 b2 + a2 b2 + a2 b1 + a3 b1 + a1 b1 + less than 2^-24 |a b|.
// Of kSplitDepth k the small ones are summed first and then, in fewer and as large steps as the
// unit takes, a1 b1; that is added to C, as narrow_gemm.cpp does it. The order is the same for
// every element of C, whatever the shares of the threads. Between products a core is nearly idle:
// packing of what comes next, sums of what was multiplied last and requests for lines of memory are
// dealt out between them. Denormals count as zero, parts of numbers below 2^-103 among them. Tiles:
// eight registers of 16 rows of 64 bytes, and zero, load, store and multiply of them. Shapes:
// narrow_gemm.h   Test: tests/ops/test_split_gemm.cpp
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/narrow_gemm.h"
#include "cpu/split_pack.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed inline only

namespace hgrn::cpu {
inline namespace HGRN_ISA {

constexpr int64_t kSplitDepth = 128;   // of k at a time: 24 KiB of 32 rows of A stay in L1
constexpr int64_t kBlock = 2 * kTile;  // rows and columns of C at a time, four tiles
constexpr int64_t kProducts = 6;
constexpr int64_t kLineFloats = 16;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// `things` dealt out over `turns` turns.
class Spread {
 public:
  Spread() = default;
  Spread(int64_t things, int64_t turns) : things_(things), turns_(turns) {}
  void turn() { due_ += things_; }
  bool take() {
    if (due_ < turns_) return false;
    due_ -= turns_;
    return true;
  }

 private:
  int64_t things_ = 0, turns_ = 1, due_ = 0;
};

// Lines of memory to ask for: rows of so many lines.
class Lines {
 public:
  Lines() = default;
  Lines(const float* from, int64_t row, int64_t lines) : row_(from), ld_(row), lines_(lines) {}
  const float* next() {
    const float* const line = row_ + at_ * kLineFloats;
    if (++at_ == lines_) at_ = 0, row_ += ld_;
    return line;
  }

 private:
  const float* row_ = nullptr;
  int64_t ld_ = 0, lines_ = 1, at_ = 0;
};

// A block of C that was multiplied: C = from + sums, row by row; from may be null: 0.
struct Sums {
  const float* sums = nullptr;  // rows of kBlock
  const float* from = nullptr;
  float* to = nullptr;
  int64_t ld = 0, left = 0;  // rows to do
  __mmask16 columns[2] = {};

  void row() {
    for (int half = 0; half < 2; ++half) {
      Vec sum = at(sums + half * kTile);
      if (from) sum += Vec(_mm512_maskz_loadu_ps(columns[half], from + half * kTile));
      _mm512_mask_storeu_ps(to + half * kTile, columns[half], sum);
    }
    sums += kBlock, to += ld, --left;
    if (from) from += ld;
  }
};

// What goes on beside the products: a turn after every four of them.
struct Beside {
  Packer a, b;  // the next block of A's rows; with A transposed, of k
  Spread a_pieces = {}, b_pieces = {};
  Sums sums = {};  // the last block
  Spread sum_rows = {};
  Lines to = {}, from = {};  // this block's C and what is added
  Spread to_lines = {}, from_lines = {};
  Lines ahead[2] = {};  // of NarrowProduct
  Spread ahead_lines = {};

  [[gnu::noinline]] void turn() {
    to_lines.turn(), from_lines.turn(), ahead_lines.turn();
    sum_rows.turn(), a_pieces.turn(), b_pieces.turn();
    while (to_lines.take()) __builtin_prefetch(to.next(), 1);
    while (from_lines.take()) __builtin_prefetch(from.next());
    while (ahead_lines.take())
      for (Lines& lines : ahead) __builtin_prefetch(lines.next(), 0, 2);
    while (sum_rows.take()) sums.row();
    while (a_pieces.take()) a.piece();
    while (b_pieces.take()) b.piece();
  }
};

// sums (high, wide) tiles, in registers 0-3, of packed A (registers 4, 5) and B (6, 7), in an order
// that changes one operand at a time.
template <class Tiles, int high, int wide>
[[gnu::noinline]] void split_block(Tiles& tiles, float* sums, const char* a, const char* b,
                                   int64_t steps, Beside& beside) {
  const auto left = [&]<int part>(const char* from) {
    tiles.template load<4, part * kPartBytes>(from, 64);
    if constexpr (high > 1) tiles.template load<5, part * kPartBytes + kTileBytes>(from, 64);
  };
  const auto right = [&]<int part>(const char* from) {
    tiles.template load<6, part * kPartBytes>(from, 64);
    if constexpr (wide > 1) tiles.template load<7, part * kPartBytes + kTileBytes>(from, 64);
  };
  const auto products = [&] {
    tiles.template multiply<0, 4, 6>();
    if constexpr (wide > 1) tiles.template multiply<1, 4, 7>();
    if constexpr (high > 1) tiles.template multiply<2, 5, 6>();
    if constexpr (high > 1 && wide > 1) tiles.template multiply<3, 5, 7>();
    beside.turn();
  };
  tiles.template zero<0>();
  if constexpr (wide > 1) tiles.template zero<1>();
  if constexpr (high > 1) tiles.template zero<2>();
  if constexpr (high > 1 && wide > 1) tiles.template zero<3>();
  for (int64_t s = 0; s < steps * kStepBytes; s += kStepBytes) {
    left.template operator()<0>(a + s);
    right.template operator()<2>(b + s);
    products();  // a1 b3
    right.template operator()<1>(b + s);
    products();  // a1 b2
    left.template operator()<1>(a + s);
    products();  // a2 b2
    right.template operator()<0>(b + s);
    products();  // a2 b1
    left.template operator()<2>(a + s);
    products();  // a3 b1
  }
  for (int64_t s = 0; s < steps * kStepBytes; s += kStepBytes) {
    left.template operator()<0>(a + s);
    right.template operator()<0>(b + s);
    products();  // a1 b1
  }
  constexpr int64_t kRow = kBlock * 4;
  tiles.template store<0>(sums, kRow);
  if constexpr (wide > 1) tiles.template store<1>(sums + kTile, kRow);
  if constexpr (high > 1) tiles.template store<2>(sums + kTile * kBlock, kRow);
  if constexpr (high > 1 && wide > 1) tiles.template store<3>(sums + kTile * kBlock + kTile, kRow);
}

// One call. With A plain, blocks of rows go by, and of each the blocks of k; all of B stays packed.
// With A transposed k is long and C small: blocks of k go by, and of each the blocks of rows.
template <class Tiles>
class SplitGemm {
 public:
  SplitGemm(const NarrowProduct& p, float* work)
      : p_(p),
        k_blocks_(ceil_div(p.K, kSplitDepth)),
        row_blocks_(ceil_div(p.M, kBlock)),
        panels_(ceil_div(p.N, kBlock)),
        beside_{Packer({p.A, p.lda, !p.transpose_a, p.M, p.K, p.transpose_a,
                        (p.transpose_a ? kSplitDepth : kBlock) * p.lda}),
                Packer({p.B, p.ldb, p.transpose_b, p.N, p.K, p.transpose_b,
                        (p.transpose_a ? kSplitDepth : kStep) * p.ldb})} {
    char* const to = reinterpret_cast<char*>(work);
    left_[0] = to, left_[1] = to + left_bytes(p), right_ = to + 2 * left_bytes(p);
  }

  static int64_t floats(const NarrowProduct& p) {
    const int64_t steps = p.transpose_a ? 2 * steps_of(p, 0) : ceil_div(p.K, kStep);
    return (2 * left_bytes(p) + ceil_div(p.N, kBlock) * steps * kStepBytes) / 4;
  }

  void run() {
    for (int64_t i = 0; i < (p_.transpose_a ? 1 : k_blocks_); ++i)
      for (int64_t left = start_right(i); left > 0; --left) beside_.b.piece();
    for (int64_t left = start_left(0); left > 0; --left) beside_.a.piece();
    const int64_t tasks = row_blocks_ * k_blocks_;
    for (int64_t t = 0; t < tasks; ++t) {
      const Task now = task(t);
      const int64_t band = now.m / kNarrowBand * kNarrowBand,
                    band_end = std::min(p_.M, band + kNarrowBand),
                    turns = panels_ * now.steps * kProducts;
      beside_.a_pieces = {t + 1 < tasks ? start_left(t + 1) : 0, turns};
      if (p_.transpose_a && now.m == 0)
        beside_.b_pieces = {now.k_block + 1 < k_blocks_ ? start_right(now.k_block + 1) : 0,
                            turns * row_blocks_};
      if (now.k_block == 0 && now.m == band) ask_ahead(band, band_end);
      rows(now, left_[t % 2], p_.C - (p_.reuse ? band * p_.ldc : 0));
      if (p_.after && now.k_block + 1 == k_blocks_ && now.m + kBlock >= band_end) {
        finish_sums();
        p_.after(p_.context, band, band_end);
      }
    }
    finish_sums();
  }

 private:
  struct Task {
    int64_t m, k_block, steps;
  };

  static int64_t steps_of(const NarrowProduct& p, int64_t k_block) {
    return ceil_div(std::min(kSplitDepth, p.K - k_block * kSplitDepth), kStep);
  }
  static int64_t left_bytes(const NarrowProduct& p) { return steps_of(p, 0) * kStepBytes; }

  Task task(int64_t t) const {
    const int64_t k_block = p_.transpose_a ? t / row_blocks_ : t % k_blocks_,
                  row_block = p_.transpose_a ? t % row_blocks_ : t / k_blocks_;
    return {row_block * kBlock, k_block, steps_of(p_, k_block)};
  }
  int64_t start_left(int64_t t) {
    const Task to = task(t);
    return beside_.a.start(left_[t % 2], to.m, p_.M - to.m > kTile ? 2 : 1,
                           to.k_block * kSplitDepth, to.steps);
  }
  char* right_of(int64_t k_block) const {
    constexpr int64_t kSteps = kSplitDepth / kStep;
    return right_ + (p_.transpose_a ? k_block % 2 : k_block) * kSteps * panels_ * kStepBytes;
  }
  int64_t start_right(int64_t k_block) {
    return beside_.b.start(right_of(k_block), 0, ceil_div(p_.N, kTile), k_block * kSplitDepth,
                           steps_of(p_, k_block));
  }

  // Lines of rows [m, end) of p.ahead while these rows are made.
  void ask_ahead(int64_t m, int64_t end) {
    if (!p_.ahead_row) return;
    for (int i = 0; i < 2; ++i)
      beside_.ahead[i] =
          p_.ahead[i] ? Lines(p_.ahead[i] + m * p_.ahead_row, kLineFloats, 1) : Lines(p_.C, 0, 1);
    beside_.ahead_lines = {(end - m) * p_.ahead_row / kLineFloats,
                           ceil_div(end - m, kBlock) * panels_ * ceil_div(p_.K, kStep) * kProducts};
  }

  // Rows of a task by all panels; C: that of row 0.
  void rows(const Task& now, const char* left, float* C) {
    const int64_t high = std::min(kBlock, p_.M - now.m), turns = now.steps * kProducts;
    float* const to = C + now.m * p_.ldc;
    const float* const from = now.k_block > 0 ? to : p_.plus ? p_.plus + now.m * p_.ldc : nullptr;
    const char* right = right_of(now.k_block);
    for (int64_t n = 0; n < p_.N; n += kBlock, right += now.steps * kStepBytes) {
      const int64_t wide = std::min(kBlock, p_.N - n), lines = ceil_div(wide, kLineFloats);
      beside_.sum_rows = {beside_.sums.left, turns};
      beside_.to = Lines(to + n, p_.ldc, lines), beside_.to_lines = {high * lines, turns};
      beside_.from = Lines(from + n, p_.ldc, lines);
      beside_.from_lines = {from && from != to ? high * lines : 0, turns};
      float* const sums = sums_[which_ ^= 1];
      if (high > kTile)
        (wide > kTile ? split_block<Tiles, 2, 2>
                      : split_block<Tiles, 2, 1>)(tiles_, sums, left, right, now.steps, beside_);
      else
        (wide > kTile ? split_block<Tiles, 1, 2>
                      : split_block<Tiles, 1, 1>)(tiles_, sums, left, right, now.steps, beside_);
      beside_.sums = {sums, from ? from + n : nullptr,         to + n, p_.ldc,
                      high, {first(wide), first(wide - kTile)}};
    }
  }
  void finish_sums() {
    while (beside_.sums.left > 0) beside_.sums.row();
  }

  const NarrowProduct& p_;
  const int64_t k_blocks_, row_blocks_, panels_;
  Beside beside_;
  char *left_[2], *right_;
  Tiles tiles_;
  int which_ = 0;
  alignas(64) float sums_[2][kBlock * kBlock];  // of this block and of the last
};

template <class Tiles>
NarrowGemm split_gemm(const char* how) {
  return {SplitGemm<Tiles>::floats,
          [](const NarrowProduct& p, float* work) { SplitGemm<Tiles>(p, work).run(); }, true, how};
}

}  // namespace HGRN_ISA
}  // namespace hgrn::cpu

#pragma GCC diagnostic pop

// C (M,N) = op(A) op(B) + plus in fp32 on a matrix unit that multiplies bf16 and adds in fp32: each
// operand as three bf16 (split_pack.h), of whose nine products six are taken,
//   a b = a1 b3 + a1 b2 + a2 b2 + a2 b1 + a3 b1 + a1 b1 + less than 2^-24 |a b|.
// Of kSplitDepth k the small ones are summed first, then a1 b1; their sum is added to C. The order
// is the same for every element of C, whatever the shares of the threads. Denormals count as zero,
// and so do parts of numbers below 2^-103 that are denormal.
// Between products a core is nearly idle: packing of what comes next, sums of what was multiplied
// last and requests for lines of memory are dealt out between them.
// Tiles: eight registers of 16 rows of 64 bytes, and zero, load, stream (a load of what need not
// stay in L1), store and multiply of them.
// Shapes: narrow_gemm.h   Test: tests/ops/test_split_gemm.cpp
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/narrow_gemm.h"
#include "cpu/split_pack.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed inline only

namespace hgrn::cpu {
inline namespace HGRN_ISA {

// Of k at a time: 24 KiB of 32 rows of A, which stay in L1 while all panels of B go by from L2.
constexpr int64_t kSplitDepth = 128;
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

// What is left of a block of C: its rows = rows of `from`, or null: 0, + sums (., kBlock).
struct Rest {
  const float* sums;
  const float* from;
  float* to;
  int64_t ld, rows;
  __mmask16 left, right;  // columns

  void add(int64_t count) {
    count = std::min(count, rows);
    rows -= count;
    for (; count > 0; --count, sums += kBlock, to += ld) {
      Vec x = at(sums), y = at(sums + kTile);
      if (from) {
        x += Vec(_mm512_maskz_loadu_ps(left, from));
        y += Vec(_mm512_maskz_loadu_ps(right, from + kTile));
        from += ld;
      }
      _mm512_mask_storeu_ps(to, left, x);
      _mm512_mask_storeu_ps(to + kTile, right, y);
    }
  }
};

// Rows of two lines that will be written (or read, where `from` is not null), asked for.
struct Request {
  const float* from;
  const float* to;
  int64_t ld, rows;

  void ask(int64_t count) {
    count = std::min(count, rows);
    rows -= count;
    for (; count > 0; --count, to += ld) {
      __builtin_prefetch(to, 1);
      __builtin_prefetch(to + kLineFloats, 1);
      if (!from) continue;
      __builtin_prefetch(from);
      __builtin_prefetch(from + kLineFloats);
      from += ld;
    }
  }
};

// What goes on beside the products: a turn after every four of them.
struct Beside {
  Packer a, b;  // the next block of A's rows; with A transposed, of k
  Spread a_pieces = {}, b_pieces = {};
  Rest rest = {};              // of the last block
  Request request = {};        // this block's
  int64_t rows = 0;            // of both in a turn
  const float* ahead[2] = {};  // of NarrowProduct
  Spread ahead_lines = {};

  [[gnu::noinline]] void turn() {
    if (request.rows > 0) request.ask(rows);
    if (rest.rows > 0) rest.add(rows);
    a_pieces.turn(), b_pieces.turn(), ahead_lines.turn();
    while (a_pieces.take()) a.piece();
    while (b_pieces.take()) b.piece();
    while (ahead_lines.take())
      for (const float*& line : ahead)
        if (line) __builtin_prefetch(line, 0, 2), line += kLineFloats;
  }
};

// high x wide tiles of sums, in registers 0-3 and then in memory, rows of so many bytes, of packed
// A (registers 4, 5) and B (6, 7), in an order that changes one operand at a time.
template <class Tiles, int high, int wide>
[[gnu::noinline]] void split_block(Tiles& tiles, float* sums, int64_t row, const char* a,
                                   const char* b, int64_t steps, Beside& beside) {
  const auto left = [&]<int part>(const char* from) {
    tiles.template load<4, part * kPartBytes>(from, 64);
    if constexpr (high > 1) tiles.template load<5, part * kPartBytes + kTileBytes>(from, 64);
  };
  const auto right = [&]<int part>(const char* from) {
    tiles.template stream<6, part * kPartBytes>(from, 64);
    if constexpr (wide > 1) tiles.template stream<7, part * kPartBytes + kTileBytes>(from, 64);
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
  tiles.template store<0>(sums, row);
  if constexpr (wide > 1) tiles.template store<1>(sums + kTile, row);
  sums += kTile * row / 4;
  if constexpr (high > 1) tiles.template store<2>(sums, row);
  if constexpr (high > 1 && wide > 1) tiles.template store<3>(sums + kTile, row);
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
        add_rest();
        p_.after(p_.context, band, band_end);
      }
    }
    add_rest();
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
      beside_.ahead[i] = p_.ahead[i] ? p_.ahead[i] + m * p_.ahead_row : nullptr;
    beside_.ahead_lines = {(end - m) * p_.ahead_row / kLineFloats,
                           ceil_div(end - m, kBlock) * panels_ * ceil_div(p_.K, kStep) * kProducts};
  }

  // Rows of a task by all panels; C: that of row 0.
  void rows(const Task& now, const char* left, float* C) {
    const int64_t high = std::min(kBlock, p_.M - now.m);
    float* const to = C + now.m * p_.ldc;
    const float* const from = now.k_block > 0 ? to : p_.plus ? p_.plus + now.m * p_.ldc : nullptr;
    const char* right = right_of(now.k_block);
    for (int64_t n = 0; n < p_.N; n += kBlock, right += now.steps * kStepBytes) {
      const int64_t wide = std::min(kBlock, p_.N - n), turns = now.steps * kProducts;
      const float* const plus = from ? from + n : nullptr;
      const bool ready = !plus && high % kTile == 0 && wide % kTile == 0;  // nothing is left to do
      float* const sums = ready ? to + n : sums_[which_ ^= 1];
      const bool cold = now.k_block == 0 && !p_.reuse;
      beside_.request = {plus == to + n ? nullptr : plus, to + n, p_.ldc, cold ? high : 0};
      beside_.rows = ceil_div(kBlock, turns);
      if (high > kTile)
        (wide > kTile ? split_block<Tiles, 2, 2>
                      : split_block<Tiles, 2, 1>)(tiles_, sums, ready ? p_.ldc * 4 : kBlock * 4,
                                                  left, right, now.steps, beside_);
      else
        (wide > kTile ? split_block<Tiles, 1, 2>
                      : split_block<Tiles, 1, 1>)(tiles_, sums, ready ? p_.ldc * 4 : kBlock * 4,
                                                  left, right, now.steps, beside_);
      beside_.rest = {
          sums, plus, to + n, p_.ldc, ready ? 0 : high, first(wide), first(wide - kTile)};
    }
  }
  void add_rest() { beside_.rest.add(kBlock); }

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

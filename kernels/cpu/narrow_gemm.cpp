// C (M,N) = op(A) op(B) + plus for the linear layers of narrow models, fp32. A general BLAS packs
// A and B and clears C on every call: with weights of a few hundred channels that is a sixth of its
// time. Here B is packed in panels of kVecs vectors, (depth, kPanel) each, that stay in L1 while
// rows of A go by. A is read where it lies, and what the next tile takes of it is asked for ahead.
// Each element of C is summed over k in order, whatever the shares of the threads.
// Twin: kernels/cuda/gemm.cu   Test: tests/ops/test_linear.cpp
#include "cpu/narrow_gemm.h"

#include <algorithm>
#include <type_traits>

#include "cpu/tiles.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed inline only

namespace hgrn::cpu {
namespace {

constexpr int kRows = kVecBytes == 64 ? 8 : 4;  // of a tile
constexpr int kVecs = kVecBytes == 64 ? 3 : 2;
constexpr int64_t kPanel = kVecs * kLanes;  // columns of a tile
// Of k at a time. A tile of A^T has a cache line for each k, all in L1 beside the panel.
constexpr int64_t kDepth = 192, kTransposedDepth = 128;
constexpr int64_t kLine = 16;           // floats of a cache line
constexpr int64_t kBand = kNarrowBand;  // rows of C whose part of A stays in L2 while panels go by

inline int64_t panels(int64_t N) {
  return (N + kPanel - 1) / kPanel;
}

// to (panels, depth, kPanel) = B from row k on, zeros beyond N.
void pack_panels(float* to, const NarrowProduct& p, int64_t k, int64_t depth) {
  for (int64_t i = 0; i < depth; ++i)
    for (int64_t n = 0; n < p.N; n += kLanes)
      at(to + n / kPanel * kPanel * depth + i * kPanel + n % kPanel) =
          load(p.B + (k + i) * p.ldb + n, p.N - n);
}
void pack_panels_transposed(float* to, const NarrowProduct& p, int64_t k, int64_t depth) {
  for (int64_t n = 0; n < p.N; n += kLanes)
    for (int64_t i = 0; i < depth; i += kLanes) {
      Vec row[kLanes];
      for (int64_t r = 0; r < kLanes; ++r)
        row[r] = n + r < p.N ? load(p.B + (n + r) * p.ldb + k + i, depth - i) : Vec{};
      transpose_stage<kLanes / 2>(row);
      float* panel = to + n / kPanel * kPanel * depth + n % kPanel;
      for (int64_t r = 0; r < std::min<int64_t>(kLanes, depth - i); ++r)
        at(panel + (i + r) * kPanel) = row[r];
    }
}

struct Ones {  // a row stride of 1 that the compiler sees
  friend constexpr int64_t operator*(int64_t m, Ones) { return m; }
};

// Lines that are asked for beside the products, one for each k.
struct Ahead {
  const float* from = nullptr;
  int64_t lines = 0;
};

// A function of its own: inlined, g++ spills the addresses of its rows.
// One tile of C: `rows` of op(A), of which a(m,k) = a[m * row + k * step], by a packed panel.
template <int rows, int vecs, class Row>
[[gnu::noinline]] void tile(float* C, int64_t ldc, const float* plus, const float* a, Row row,
                            int64_t step, const float* B, int64_t depth, Ahead ahead) {
  for (int m = 0; m < rows; ++m)  // C comes while the products run
    for (int v = 0; v < vecs; ++v) __builtin_prefetch(C + m * ldc + v * kLanes, 1);
  if (plus && plus != C)
    for (int m = 0; m < rows; ++m)
      for (int v = 0; v < vecs; ++v) __builtin_prefetch(plus + m * ldc + v * kLanes);
  Vec acc[rows][vecs] = {};
  constexpr bool transposed = std::is_same_v<Row, Ones>;
  [[maybe_unused]] const float* next = a + rows * row;
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k, a += step, B += kPanel) {
    if constexpr (transposed)
      __builtin_prefetch(a + 2 * kLine);
    else if (k < depth / kLine * rows)  // a line of each row in turn
      __builtin_prefetch(next + k % rows * row + k / rows * kLine);
    if (k < ahead.lines) __builtin_prefetch(ahead.from + k * kLine, 0, 2);
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
      const float left = a[m * row];
#pragma GCC unroll 3
      for (int v = 0; v < vecs; ++v) acc[m][v] += left * at(B + v * kLanes);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 3
    for (int v = 0; v < vecs; ++v) {
      const int64_t at = m * ldc + v * kLanes;
      if (plus) acc[m][v] += *reinterpret_cast<const AnyVec*>(plus + at);
      *reinterpret_cast<AnyVec*>(C + at) = acc[m][v];
    }
}

// The same where only `cols` of the panel's columns are C's.
template <int rows, int vecs = kVecs, class Row>
inline void tile_of(int64_t cols, float* C, int64_t ldc, const float* plus, const float* a, Row row,
                    int64_t step, const float* B, int64_t depth, Ahead ahead) {
  if constexpr (vecs > 1)
    if (cols <= (vecs - 1) * kLanes)
      return tile_of<rows, vecs - 1>(cols, C, ldc, plus, a, row, step, B, depth, ahead);
  if (cols >= vecs * kLanes) return tile<rows, vecs>(C, ldc, plus, a, row, step, B, depth, ahead);
  alignas(64) float out[rows * kPanel];
  tile<rows, vecs>(out, kPanel, nullptr, a, row, step, B, depth, ahead);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < cols; ++n)
      C[m * ldc + n] = plus ? plus[m * ldc + n] + out[m * kPanel + n] : out[m * kPanel + n];
}

// The lines of rows [m, end) of p.ahead, in equal shares for `tiles` tiles.
class AheadLines {
 public:
  AheadLines(const NarrowProduct& p, int64_t m, int64_t end, int64_t tiles) {
    if (!p.ahead_row) return;
    for (int i = 0; i < 2; ++i)
      if (p.ahead[i]) next_[i] = p.ahead[i] + m * p.ahead_row;
    const int64_t lines = (end - m) * p.ahead_row / kLine;
    for (int i = 0; i < 2; ++i) left_[i] = next_[i] ? lines : 0;
    share_ = (left_[0] + left_[1] + tiles - 1) / tiles;
  }
  Ahead take() {
    const int i = left_[0] > 0 ? 0 : 1;
    const Ahead a{next_[i], std::min(share_, left_[i])};
    next_[i] += a.lines * kLine;
    left_[i] -= a.lines;
    return a;
  }

 private:
  const float* next_[2] = {};
  int64_t left_[2] = {}, share_ = 0;
};

// Rows [m, end) of C by all panels.
template <class Row>
void band(const NarrowProduct& p, const float* plus, int64_t k, int64_t depth, int64_t m,
          int64_t end, const float* B, Row row, int64_t step) {
  const int64_t whole = m + (end - m) / kRows * kRows;
  const float* A = p.A + k * step;
  const int64_t tiles = std::max<int64_t>(1, (whole - m) / kRows * panels(p.N));
  AheadLines ahead = k == 0 ? AheadLines(p, m, end, tiles) : AheadLines({}, 0, 0, 1);
  for (int64_t n = 0; n < p.N; n += kPanel, B += kPanel * depth) {
    float* C = p.C + n - (p.reuse ? m * p.ldc : 0);
    const float* from = plus ? plus + n : nullptr;
    const auto from_row = [&](int64_t r) { return from ? from + r * p.ldc : nullptr; };
    int64_t r = m;
    for (; r < whole; r += kRows)
      tile_of<kRows>(p.N - n, C + r * p.ldc, p.ldc, from_row(r), A + r * row, row, step, B, depth,
                     ahead.take());
    for (; r < end; ++r)
      tile_of<1>(p.N - n, C + r * p.ldc, p.ldc, from_row(r), A + r * row, row, step, B, depth, {});
  }
}

int64_t floats(const NarrowProduct& p) {
  return panels(p.N) * kPanel * (p.transpose_a ? std::min(kTransposedDepth, p.K) : p.K);
}

void pack(float* to, const NarrowProduct& p, int64_t k, int64_t depth) {
  (p.transpose_b ? pack_panels_transposed : pack_panels)(to, p, k, depth);
}

// A^T B: k is long and C small.
void multiply_transposed(const NarrowProduct& p, float* work) {
  for (int64_t k = 0; k < p.K; k += kTransposedDepth) {
    const int64_t depth = std::min(kTransposedDepth, p.K - k);
    pack(work, p, k, depth);
    band(p, k > 0 ? p.C : p.plus, k, depth, 0, p.M, work, Ones{}, p.lda);
  }
}

// A B: B is small and stays packed.
void multiply(const NarrowProduct& p, float* work) {
  if (p.transpose_a) return multiply_transposed(p, work);
  const int64_t N = panels(p.N) * kPanel;
  for (int64_t k = 0; k < p.K; k += kDepth) pack(work + k * N, p, k, std::min(kDepth, p.K - k));
  for (int64_t m = 0; m < p.M; m += kBand) {
    const int64_t end = std::min(p.M, m + kBand);
    // With reuse the sum so far lies at the start of C.
    const float* const sum = p.C - (p.reuse ? m * p.ldc : 0);
    for (int64_t k = 0; k < p.K; k += kDepth)
      band(p, k > 0 ? sum : p.plus, k, std::min(kDepth, p.K - k), m, end, work + k * N, p.lda, 1);
    if (p.after) p.after(p.context, m, end);
  }
}

}  // namespace

inline namespace HGRN_ISA {
NarrowGemm narrow_gemm() {
  return {floats, multiply, kVecBytes == 64};
}
}  // namespace HGRN_ISA

}  // namespace hgrn::cpu

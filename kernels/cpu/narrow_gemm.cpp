// C (M,N) = op(A) op(B) + beta C for the linear layers of narrow models, fp32. A general BLAS packs
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

// A function of its own: inlined, g++ spills the addresses of its rows.
// One tile of C: `rows` of op(A), of which a(m,k) = a[m * row + k * step], by a packed panel.
template <int rows, int vecs, class Row>
[[gnu::noinline]] void tile(float* C, int64_t ldc, bool add, const float* a, Row row, int64_t step,
                            const float* B, int64_t depth) {
  for (int m = 0; m < rows; ++m)  // C comes while the products run
    for (int v = 0; v < vecs; ++v) __builtin_prefetch(C + m * ldc + v * kLanes, 1);
  Vec acc[rows][vecs] = {};
  constexpr bool transposed = std::is_same_v<Row, Ones>;
  [[maybe_unused]] const float* next = a + rows * row;
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k, a += step, B += kPanel) {
    if constexpr (transposed)
      __builtin_prefetch(a + 2 * kLine);
    else if (k < depth / kLine * rows)  // a line of each row in turn
      __builtin_prefetch(next + k % rows * row + k / rows * kLine);
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
      AnyVec& c = *reinterpret_cast<AnyVec*>(C + m * ldc + v * kLanes);
      c = add ? c + acc[m][v] : acc[m][v];
    }
}

// The same where only `cols` of the panel's columns are C's.
template <int rows, int vecs = kVecs, class Row>
inline void tile_of(int64_t cols, float* C, int64_t ldc, bool add, const float* a, Row row,
                    int64_t step, const float* B, int64_t depth) {
  if constexpr (vecs > 1)
    if (cols <= (vecs - 1) * kLanes)
      return tile_of<rows, vecs - 1>(cols, C, ldc, add, a, row, step, B, depth);
  if (cols >= vecs * kLanes) return tile<rows, vecs>(C, ldc, add, a, row, step, B, depth);
  alignas(64) float out[rows * kPanel];
  tile<rows, vecs>(out, kPanel, false, a, row, step, B, depth);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < cols; ++n)
      C[m * ldc + n] = add ? C[m * ldc + n] + out[m * kPanel + n] : out[m * kPanel + n];
}

// Rows [m, end) of C by all panels.
template <class Row>
void band(const NarrowProduct& p, bool add, int64_t k, int64_t depth, int64_t m, int64_t end,
          const float* B, Row row, int64_t step) {
  const int64_t whole = m + (end - m) / kRows * kRows;
  const float* A = p.A + k * step;
  for (int64_t n = 0; n < p.N; n += kPanel, B += kPanel * depth) {
    float* C = p.C + n - (p.reuse ? m * p.ldc : 0);
    int64_t r = m;
    for (; r < whole; r += kRows)
      tile_of<kRows>(p.N - n, C + r * p.ldc, p.ldc, add, A + r * row, row, step, B, depth);
    for (; r < end; ++r)
      tile_of<1>(p.N - n, C + r * p.ldc, p.ldc, add, A + r * row, row, step, B, depth);
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
    band(p, p.add || k > 0, k, depth, 0, p.M, work, Ones{}, p.lda);
  }
}

// A B: B is small and stays packed.
void multiply(const NarrowProduct& p, float* work) {
  if (p.transpose_a) return multiply_transposed(p, work);
  const int64_t N = panels(p.N) * kPanel;
  for (int64_t k = 0; k < p.K; k += kDepth) pack(work + k * N, p, k, std::min(kDepth, p.K - k));
  for (int64_t m = 0; m < p.M; m += kBand) {
    const int64_t end = std::min(p.M, m + kBand);
    for (int64_t k = 0; k < p.K; k += kDepth)
      band(p, p.add || k > 0, k, std::min(kDepth, p.K - k), m, end, work + k * N, p.lda, 1);
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

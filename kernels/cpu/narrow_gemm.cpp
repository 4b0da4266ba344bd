// C (M,N) = op(A) op(B) + beta C for the linear layers of narrow models, fp32. A general BLAS packs
// A and B and clears C on every call: with weights of a few hundred channels that is a sixth of its
// time. Here B is packed in panels of two vectors, (kDepth, 2 kLanes) each, that stay in L1 while
// rows of A go by; A is read where it lies, or, transposed, packed by plain copies of kRows floats.
// Each element of C is summed over k in order, whatever the shares of the threads.
// Twin: kernels/cuda/gemm.cu   Test: tests/ops/test_linear.cpp
#include "cpu/narrow_gemm.h"

#include <algorithm>

#include "cpu/tiles.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed inline only

namespace hgrn::cpu {
namespace {

constexpr int kRows = kVecBytes == 64 ? 8 : 4;  // of a tile
constexpr int64_t kPanel = 2 * kLanes;          // columns of a tile
constexpr int64_t kDepth = 192;                 // of k at a time
// Rows of C whose part of A stays in L2 while panels go by; A^T is packed in long pieces of its
// rows.
constexpr int64_t kBand = kNarrowBand, kPackedBand = 512;

constexpr int64_t kAhead = 16;  // rows asked for ahead of packing

inline int64_t panels(int64_t N) {
  return (N + kPanel - 1) / kPanel;
}
inline int64_t depth(const NarrowProduct& p) {
  return std::min(kDepth, p.K);
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

// to (M / kRows, depth, kRows) = A^T from (k, m) on; M a multiple of kRows.
void pack_rows(float* to, const NarrowProduct& p, int64_t k, int64_t depth, int64_t m, int64_t M) {
  typedef float Piece __attribute__((vector_size(kRows * 4), aligned(4)));
  for (int64_t i = 0; i < depth; ++i) {
    const float* from = p.A + (k + i) * p.lda + m;
    for (int64_t r = 0; r < M; r += kRows)
      *reinterpret_cast<Piece*>(to + (r * depth + i * kRows)) =
          *reinterpret_cast<const Piece*>(from + r);
  }
}

// A function of its own: inlined, g++ spills the addresses of its rows.
// One tile of C: `rows` of op(A), of which a(m,k) = a[m * row + k * step], by a packed panel.
template <int rows, int vecs, class Row>
[[gnu::noinline]] void tile(float* C, int64_t ldc, bool add, const float* a, Row row, int64_t step,
                            const float* B, int64_t depth) {
  for (int m = 0; m < rows; ++m)  // C comes while the products run
    for (int v = 0; v < vecs; ++v) __builtin_prefetch(C + m * ldc + v * kLanes, 1);
  Vec acc[rows][vecs] = {};
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k, a += step, B += kPanel) {
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
      const float left = a[m * row];
#pragma GCC unroll 2
      for (int v = 0; v < vecs; ++v) acc[m][v] += left * at(B + v * kLanes);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < vecs; ++v) {
      AnyVec& c = *reinterpret_cast<AnyVec*>(C + m * ldc + v * kLanes);
      c = add ? c + acc[m][v] : acc[m][v];
    }
}

// The same where only `cols` of the panel's columns are C's.
template <int rows, class Row>
inline void tile_of(int64_t cols, float* C, int64_t ldc, bool add, const float* a, Row row,
                    int64_t step, const float* B, int64_t depth) {
  if (cols >= kPanel) return tile<rows, 2>(C, ldc, add, a, row, step, B, depth);
  if (cols == kLanes) return tile<rows, 1>(C, ldc, add, a, row, step, B, depth);
  alignas(64) float out[rows * kPanel];
  tile<rows, 2>(out, kPanel, false, a, row, step, B, depth);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < cols; ++n)
      C[m * ldc + n] = add ? C[m * ldc + n] + out[m * kPanel + n] : out[m * kPanel + n];
}

struct Ones {  // a row stride of 1 that the compiler sees
  friend constexpr int64_t operator*(int64_t m, Ones) { return m; }
};

// Rows [m, end) of C by all panels.
void band(const NarrowProduct& p, bool add, int64_t k, int64_t depth, int64_t m, int64_t end,
          const float* B, float* A) {
  const int64_t whole = (end - m) / kRows * kRows;
  if (p.transpose_a) pack_rows(A, p, k, depth, m, whole);
  for (int64_t n = 0; n < p.N; n += kPanel, B += kPanel * depth) {
    const int64_t cols = p.N - n;
    float* C = p.C + (p.reuse ? 0 : m * p.ldc) + n;
    int64_t r = 0;
    for (; r < whole; r += kRows)
      if (p.transpose_a)
        tile_of<kRows>(cols, C + r * p.ldc, p.ldc, add, A + r * depth, Ones{}, kRows, B, depth);
      else
        tile_of<kRows>(cols, C + r * p.ldc, p.ldc, add, p.A + (m + r) * p.lda + k, p.lda, 1, B,
                       depth);
    for (; m + r < end; ++r) {
      const float* a = p.transpose_a ? p.A + k * p.lda + m + r : p.A + (m + r) * p.lda + k;
      tile_of<1>(cols, C + r * p.ldc, p.ldc, add, a, Ones{}, p.transpose_a ? p.lda : 1, B, depth);
    }
  }
}

int64_t floats(const NarrowProduct& p) {
  const int64_t N = panels(p.N) * kPanel;
  return p.transpose_a ? depth(p) * (N + std::min(p.M, kPackedBand)) : p.K * N;
}

void pack(float* to, const NarrowProduct& p, int64_t k, int64_t depth) {
  (p.transpose_b ? pack_panels_transposed : pack_panels)(to, p, k, depth);
}

// A^T B: k is long and C small.
void multiply_transposed(const NarrowProduct& p, float* work) {
  float* A = work + depth(p) * panels(p.N) * kPanel;
  for (int64_t k = 0; k < p.K; k += kDepth) {
    const int64_t depth = std::min(kDepth, p.K - k);
    pack(work, p, k, depth);
    for (int64_t m = 0; m < p.M; m += kPackedBand)
      band(p, p.add || k > 0, k, depth, m, std::min(p.M, m + kPackedBand), work, A);
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
      band(p, p.add || k > 0, k, std::min(kDepth, p.K - k), m, end, work + k * N, nullptr);
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

// Linear layers through BLAS. y (N,O) = x (N,I) w^T + b + c; dx = dy w; dw += dy^T x; db += sum dy.
// w (O,I) b (O)
// Twin: kernels/cuda/gemm.cpp   Test: tests/ops/test_linear.cpp
#include <cblas.h>

#include <limits>
#include <sstream>

#include "cpu/cpu_ops.h"

namespace hgrn {
namespace {

// C (M,N) = op(A) op(B) + beta C, row-major and contiguous.
template <class T>
void gemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int64_t M, int64_t N, int64_t K, const T* A,
          const T* B, T beta, T* C) {
  constexpr int64_t kMax = std::numeric_limits<blasint>::max();
  check(M <= kMax && N <= kMax && K <= kMax,
        "a matrix product of {} x {} x {} is too large for BLAS", M, N, K);
  const auto lda = blasint(ta == CblasNoTrans ? K : M), ldb = blasint(tb == CblasNoTrans ? N : K);
  if constexpr (std::is_same_v<T, float>)
    cblas_sgemm(CblasRowMajor, ta, tb, blasint(M), blasint(N), blasint(K), 1, A, lda, B, ldb, beta,
                C, blasint(N));
  else
    cblas_dgemm(CblasRowMajor, ta, tb, blasint(M), blasint(N), blasint(K), 1, A, lda, B, ldb, beta,
                C, blasint(N));
}

template <class T>
void add_bias(T* y, const T* b, int64_t rows, int64_t O) {
  cpu::parallel_blocks(rows, 16, rows * O, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < O; ++c) y[r * O + c] += b[c];
  });
}

template <class T>
void bias_backward(Grad db, const T* dy, int64_t rows, int64_t O, cpu::Scratch& scratch) {
  const int64_t blocks = cpu::row_blocks(rows);
  T* partial = scratch.get<T>(size_t(blocks * O));
  cpu::parallel_for(blocks, rows * O, [&](int64_t block) {
    T* sum = partial + block * O;
    std::fill(sum, sum + O, T(0));
    for (int64_t r = block * rows / blocks; r < (block + 1) * rows / blocks; ++r)
      for (int64_t c = 0; c < O; ++c) sum[c] += dy[r * O + c];
  });
  cpu::combine_blocks(db.to.ptr<T>(), partial, blocks, O, O, db.fresh);
}

}  // namespace

void CpuOps::linear_forward(Tensor y, Tensor x, Tensor w, Tensor b, Tensor c) {
  check(w.shape.rank == 2 && x.cols() == w.cols() && y.cols() == w.rows() && x.rows() == y.rows() &&
            (!b || b.numel() == w.rows()) && (!c || (c.numel() == y.numel() && c.data != y.data)),
        "linear_forward: y {}, x {}, w {}, b {}, c {} do not fit", y.shape.str(), x.shape.str(),
        w.shape.str(), b.shape.str(), c.shape.str());
  if (c) copy(y, c);
  cpu::with_real(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    gemm<T>(CblasNoTrans, CblasTrans, x.rows(), w.rows(), w.cols(), x.ptr<T>(), w.ptr<T>(),
            c ? 1 : 0, y.ptr<T>());
    if (b) add_bias(y.ptr<T>(), b.ptr<T>(), y.rows(), y.cols());
  });
}

void CpuOps::linear_backward(Tensor dx, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w) {
  const int64_t rows = dy.rows(), O = dy.cols();
  check(w.shape.rank == 2 && O == w.rows() &&
            (!dx || (dx.cols() == w.cols() && dx.rows() == rows)) &&
            (!dw || (dw.to.numel() == w.numel() && x.cols() == w.cols() && x.rows() == rows)) &&
            (!db || db.to.numel() == O),
        "linear_backward: dx {}, dw {}, db {}, dy {}, x {}, w {} do not fit", dx.shape.str(),
        dw.to.shape.str(), db.to.shape.str(), dy.shape.str(), x.shape.str(), w.shape.str());
  cpu::with_real(dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* grad = dy.ptr<T>();
    if (dx)
      gemm<T>(CblasNoTrans, CblasNoTrans, rows, w.cols(), O, grad, w.ptr<T>(), 0, dx.ptr<T>());
    if (dw)
      gemm<T>(CblasTrans, CblasNoTrans, O, w.cols(), rows, grad, x.ptr<T>(), dw.fresh ? 0 : 1,
              dw.to.ptr<T>());
    if (db) bias_backward(db, grad, rows, O, scratch_);
  });
}

namespace cpu {

std::string blas_name() {  // "OpenBLAS 0.3.21 SkylakeX"
  std::istringstream config(openblas_get_config());
  std::string name, version;
  config >> name >> version;
  return name + " " + version + " " + openblas_get_corename();
}

void set_blas_threads(int threads) {
  openblas_set_num_threads(threads);
}

}  // namespace cpu
}  // namespace hgrn

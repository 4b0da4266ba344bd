// RMSNorm and LayerNorm over the columns, alone and behind the residual addition.
//   y = w xhat + b,  xhat = (x - mean) rstd,  rstd = 1/sqrt(variance + eps);  rms: mean = 0
//   dx = rstd (g - [layer] avg(g) - xhat avg(g xhat)),  g = w dy;  dw += dy xhat;  db += dy
// x, y (N,D) stats (N,2) w, b (D); statistics in double, two passes over a row in cache.
// Twin: kernels/cuda/norm_*.cu   Test: tests/ops/test_norm.cpp
#include "cpu/cpu_ops.h"
#include "cpu/dropout.h"
#include "cpu/rows.h"

namespace hgrn {
namespace {

void check_shapes(const char* op, Tensor y, Tensor x, Tensor stats, Tensor w, Tensor b) {
  check(x.numel() == y.numel() && x.cols() == w.numel() && stats.numel() == 2 * x.rows() &&
            (!b || b.numel() == w.numel()),
        "{}: rows {} and {}, stats {}, w {}, b {} do not fit", op, y.shape.str(), x.shape.str(),
        stats.shape.str(), w.shape.str(), b.shape.str());
}

void check_again(const NormAgain& again, Tensor x, Tensor w) {
  check((!again.y || again.y.numel() == x.numel()) && (!again.b || again.b.numel() == w.numel()),
        "norm_backward: rows {}, y {}, b {} do not fit", x.shape.str(), again.y.shape.str(),
        again.b.shape.str());
}

struct Backward {  // what both backward operations share
  Tensor dx, dbranch;
  Grad dw, db;
  Tensor dy, x, w, stats;
  Norm kind;
  Dropout drop;
  NormAgain again;
};

template <class T, bool add>
void backward(const Backward& a, cpu::Scratch& scratch) {
  const int64_t rows = a.x.rows(), D = a.x.cols(), blocks = cpu::row_blocks(rows);
  const bool layer = a.kind == Norm::layer;
  T* partial = scratch.get<T>(size_t(blocks * 2 * D));
  T *dx = a.dx.ptr<T>(), *dbranch = a.dbranch ? a.dbranch.ptr<T>() : nullptr;
  const T *dy = a.dy.ptr<T>(), *x = a.x.ptr<T>(), *w = a.w.ptr<T>(), *stats = a.stats.ptr<T>();
  T* y = a.again.y ? a.again.y.ptr<T>() : nullptr;
  const T* bias = a.again.b ? a.again.b.ptr<T>() : nullptr;
  const uint64_t key = a.drop.key();
  cpu::parallel_for(blocks, rows * D, [&](int64_t block) {
    T* dw = partial + block * 2 * D;
    T* db = a.db ? dw + D : nullptr;
    std::fill(dw, dw + 2 * D, T(0));
    for (int64_t r = block * rows / blocks; r < (block + 1) * rows / blocks; ++r) {
      cpu::rows<T>().norm_backward(add, dx + r * D, dw, db, dy + r * D, x + r * D, w, stats + 2 * r,
                                   D, layer);
      if (y)
        cpu::rows<T>().scale(y + r * D, stats + 2 * r, x + r * D, w, bias, D);  // dy has been read
      if (!dbranch) continue;
      T* out = dbranch + r * D;
      const T* in = dx + r * D;
      if (a.drop.p > 0) {
        cpu::dropout_factors(out, a.drop, key, r, 0, D);
        for (int64_t d = 0; d < D; ++d) out[d] *= in[d];
      } else {
        std::copy(in, in + D, out);
      }
    }
  });
  if (a.dw) cpu::combine_blocks(a.dw.to.ptr<T>(), partial, blocks, 2 * D, D, a.dw.fresh);
  if (a.db) cpu::combine_blocks(a.db.to.ptr<T>(), partial + D, blocks, 2 * D, D, a.db.fresh);
}

}  // namespace

void CpuOps::norm_forward(Tensor y, Tensor stats, Tensor x, Tensor w, Tensor b, Norm kind,
                          float eps) {
  check_shapes("norm_forward", y, x, stats, w, b);
  const int64_t D = x.cols();
  cpu::with_real(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T *out = y.ptr<T>(), *st = stats.ptr<T>();
    const T *in = x.ptr<T>(), *weight = w.ptr<T>(), *bias = b ? b.ptr<T>() : nullptr;
    cpu::parallel_for(x.rows(), x.numel(), [&](int64_t r) {
      cpu::rows<T>().norm(out + r * D, st + 2 * r, in + r * D, weight, bias, D, kind == Norm::layer,
                          eps);
    });
  });
}

void CpuOps::residual_norm_forward(Tensor sum, Tensor y, Tensor stats, Tensor x, Tensor branch,
                                   Tensor w, Tensor b, Norm kind, float eps, Dropout drop) {
  check_shapes("residual_norm_forward", y, x, stats, w, b);
  check(sum.numel() == x.numel() && branch.numel() == x.numel(),
        "residual_norm_forward: sum {}, x {}, branch {} differ", sum.shape.str(), x.shape.str(),
        branch.shape.str());
  const int64_t D = x.cols();
  drop = drop.now();
  const uint64_t key = drop.key();
  cpu::with_real(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T *out = y.ptr<T>(), *st = stats.ptr<T>(), *total = sum.ptr<T>();
    const T *in = x.ptr<T>(), *add = branch.ptr<T>(), *weight = w.ptr<T>();
    const T* bias = b ? b.ptr<T>() : nullptr;
    cpu::parallel_for(x.rows(), x.numel(), [&](int64_t r) {
      T *s = total + r * D, *factor = out + r * D;  // y is free until the norm is taken
      const T *xr = in + r * D, *br = add + r * D;
      if (drop.p > 0) {
        cpu::dropout_factors(factor, drop, key, r, 0, D);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) s[d] = xr[d] + br[d] * factor[d];
      } else {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) s[d] = xr[d] + br[d];
      }
      cpu::rows<T>().norm(out + r * D, st + 2 * r, s, weight, bias, D, kind == Norm::layer, eps);
    });
  });
}

void CpuOps::norm_backward(Tensor dx, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w, Tensor stats,
                           Norm kind, NormAgain again) {
  check_shapes("norm_backward", dx, x, stats, w, db.to);
  check_again(again, x, w);
  const Backward args{dx, {}, dw, db, dy, x, w, stats, kind, {}, again};
  cpu::with_real(x.dtype, [&](auto zero) { backward<decltype(zero), false>(args, scratch_); });
}

void CpuOps::residual_norm_backward(Tensor dsum, Tensor dbranch, Grad dw, Grad db, Tensor dy,
                                    Tensor sum, Tensor w, Tensor stats, Norm kind, Dropout drop,
                                    NormAgain again) {
  check_shapes("residual_norm_backward", dsum, sum, stats, w, db.to);
  check_again(again, sum, w);
  check(dbranch || drop.p == 0, "residual_norm_backward: dropout needs a dbranch");
  const Backward args{dsum, dbranch, dw, db, dy, sum, w, stats, kind, drop.now(), again};
  cpu::with_real(sum.dtype, [&](auto zero) { backward<decltype(zero), true>(args, scratch_); });
}

}  // namespace hgrn

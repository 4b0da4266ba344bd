// Linear layers through BLAS. y (N,O) = x (N,I) w^T + b + c; dx = dy w; dw += dy^T x; db += sum dy.
// w (O,I) b (O)
// Twin: kernels/cuda/gemm.cu   Test: tests/ops/test_linear.cpp
#include <algorithm>
#include <array>

#include "cpu/blas.h"
#include "cpu/cpu_ops.h"
#include "cpu/narrow_gemm.h"
#include "cpu/rows.h"

namespace hgrn {
namespace {

const cpu::NarrowGemm& narrow() {
  return cpu::best_narrow_gemm();
}

constexpr bool kPlain = false, kTransposed = true;  // op

template <class T>
struct GemmOf {  // C (M,N) = op(A) op(B) + plus, row-major and contiguous
  bool ta, tb;   // op is the transpose
  int64_t M, N, K;
  const T *A, *B;
  T* C;
  const T* plus;  // C itself, another (M,N), or null: 0

  // The part of C from (m,n) on of rows x cols.
  cpu::BlasProduct<T> part(int64_t m, int64_t n, int64_t rows, int64_t cols) const {
    const int64_t lda = ta ? M : K, ldb = tb ? K : N;
    return {rows,
            cols,
            K,
            A + (ta ? m : m * K),
            lda,
            ta,
            B + (tb ? n * K : n),
            ldb,
            tb,
            T(plus ? 1 : 0),
            C + m * N + n,
            N};
  }

  // The same part for cpu::NarrowGemm; f32 only.
  cpu::NarrowProduct narrow(int64_t m, int64_t n, int64_t rows, int64_t cols) const {
    const auto q = part(m, n, rows, cols);
    return {rows, cols,  K,  q.A, q.lda, ta,
            q.B,  q.ldb, tb, q.C, N,     plus ? plus + m * N + n : nullptr};
  }
};

constexpr int64_t kTile = 16;     // parts end at multiples: BLAS's kernels take whole tiles
constexpr double kMinPart = 1e5;  // multiply-adds below which a thread is not worth waking

// Parts of C, as square as the thread count allows: what a thread packs of A and B is then least.
struct Grid {
  int64_t rows, cols;  // counts of parts

  Grid(int64_t M, int64_t N, int64_t K) {
    const double worth = double(M) * double(N) * double(K) / kMinPart;
    const int64_t parts = int64_t(std::clamp(worth, 1.0, double(cpu::max_threads())));
    rows = parts, cols = 1;
    for (int64_t r = 1; r <= parts; ++r)
      if (parts % r == 0 && M / r + N / (parts / r) < M / rows + N / cols)
        rows = r, cols = parts / r;
  }
};

// Where share i of n elements begins.
int64_t share(int64_t i, int64_t shares, int64_t n) {
  return i == shares ? n : n * i / shares / kTile * kTile;
}

// Whether cpu::NarrowGemm is the faster one: many rows, but weights of which a BLAS, packing all
// operands, has too little use, and which it can keep packed for each thread. By the layer's size
// alone: never by the number of threads.
template <class T>
bool is_narrow(const GemmOf<T>& p) {
  const bool to_weights = p.ta;  // dw = dy^T x
  const int64_t rows = to_weights ? p.K : p.M, weights = to_weights ? p.M * p.N : p.N * p.K;
  return std::is_same_v<T, float> && narrow().fast && std::min({p.M, p.N, p.K}) >= 16 &&
         rows >= 256 && weights <= 1 << 18;
}

// Each thread computes a part of C by itself. Threads of a BLAS pass packed panels to each other
// and wait for them, which costs most where products are small or other programs hold a core.
template <class T>
void gemm(const GemmOf<T>& p, cpu::Scratch& scratch) {
  check(std::max({p.M, p.N, p.K}) <= cpu::kMaxBlas,
        "a matrix product of {} x {} x {} is too large for BLAS", p.M, p.N, p.K);
  const Grid grid(p.M, p.N, p.K);
  const int64_t parts = grid.rows * grid.cols;
  const auto each_part = [&](const auto& f) {
#pragma omp parallel for schedule(static) if (parts > 1)
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t r = i / grid.cols, c = i % grid.cols;
      const int64_t m = share(r, grid.rows, p.M), n = share(c, grid.cols, p.N);
      f(i, m, n, share(r + 1, grid.rows, p.M) - m, share(c + 1, grid.cols, p.N) - n);
    }
  };
  if constexpr (std::is_same_v<T, float>)
    if (is_narrow(p)) {
      const int64_t each = (narrow().floats(p.narrow(0, 0, p.M, p.N)) + 15) / 16 * 16;
      float* work = scratch.get<float>(size_t(each * parts));
      return each_part([&](int64_t i, int64_t m, int64_t n, int64_t rows, int64_t cols) {
        narrow().multiply(p.narrow(m, n, rows, cols), work + i * each);
      });
    }
  each_part([&](int64_t, int64_t m, int64_t n, int64_t rows, int64_t cols) {
    if (p.plus && p.plus != p.C)
      for (int64_t r = m; r < m + rows; ++r)
        std::copy_n(p.plus + r * p.N + n, cols, p.C + r * p.N + n);
    cpu::multiply(p.part(m, n, rows, cols));
  });
}

// A product by bands of rows, where is_narrow; f(rows, m, end) gets each band while it is in cache.
// Without C the rows live no longer than that. f reads or writes `width` floats a row of each of
// `beside` as well.
template <class F>
void by_bands(const GemmOf<float>& p, cpu::Scratch& scratch, std::array<const float*, 2> beside,
              int64_t width, const F& f) {
  const Grid grid(p.M, p.N, p.K);
  const int64_t parts = grid.rows * grid.cols;
  const int64_t packed = narrow().floats(p.narrow(0, 0, p.M, p.N)),
                each = (packed + (p.C ? 0 : cpu::kNarrowBand * p.N) + 15) / 16 * 16;
  float* work = scratch.get<float>(size_t(each * parts));
#pragma omp parallel for schedule(static) if (parts > 1)
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = share(i, parts, p.M);
    cpu::NarrowProduct q = p.narrow(first, 0, share(i + 1, parts, p.M) - first, p.N);
    q.reuse = !p.C;
    if (q.reuse) q.C = work + i * each + packed;
    const auto band = [&](int64_t m, int64_t end) {
      f(q.C + (q.reuse ? 0 : m * p.N), first + m, first + end);
    };
    for (int side = 0; side < 2; ++side)
      if (beside[size_t(side)]) q.ahead[side] = beside[size_t(side)] + first * width;
    q.ahead_row = width;
    q.context = &band;
    q.after = [](const void* context, int64_t m, int64_t end) {
      (*static_cast<const decltype(band)*>(context))(m, end);
    };
    narrow().multiply(q, work + i * each);
  }
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
  cpu::with_real(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    gemm<T>({kPlain, kTransposed, x.rows(), w.rows(), w.cols(), x.ptr<T>(), w.ptr<T>(), y.ptr<T>(),
             c ? c.ptr<T>() : nullptr},
            scratch_);
    if (b) add_bias(y.ptr<T>(), b.ptr<T>(), y.rows(), y.cols());
  });
}

void CpuOps::linear_backward(Tensor dx, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w) {
  const int64_t rows = dy.rows(), O = dy.cols();
  const bool weights = w.shape.rank == 2 && O == w.rows();  // of no interest to db
  check(((!dx && !dw) || weights) && (!dx || (dx.cols() == w.cols() && dx.rows() == rows)) &&
            (!dw || (dw.to.numel() == w.numel() && x.cols() == w.cols() && x.rows() == rows)) &&
            (!db || db.to.numel() == O),
        "linear_backward: dx {}, dw {}, db {}, dy {}, x {}, w {} do not fit", dx.shape.str(),
        dw.to.shape.str(), db.to.shape.str(), dy.shape.str(), x.shape.str(), w.shape.str());
  cpu::with_real(dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* grad = dy.ptr<T>();
    if (dx)
      gemm<T>({kPlain, kPlain, rows, w.cols(), O, grad, w.ptr<T>(), dx.ptr<T>(), nullptr},
              scratch_);
    if (dw)
      gemm<T>({kTransposed, kPlain, O, w.cols(), rows, grad, x.ptr<T>(), dw.to.ptr<T>(),
               dw.fresh ? nullptr : dw.to.ptr<T>()},
              scratch_);
    if (db) bias_backward(db, grad, rows, O, scratch_);
  });
}

void CpuOps::linear_glu_forward(Tensor h, Tensor gu, Tensor x, Tensor w, Tensor b, Act act) {
  const int64_t rows = x.rows(), F = h.cols();
  const GemmOf<float> p{kPlain,  kTransposed, rows,    2 * F,  x.cols(),
                        nullptr, nullptr,     nullptr, nullptr};
  if (b || x.dtype != DType::f32 || !is_narrow(p))
    return Ops::linear_glu_forward(h, gu, x, w, b, act);
  check(w.rows() == 2 * F && x.cols() == w.cols() && gu.cols() == 2 * F && gu.rows() == rows &&
            h.rows() == rows,
        "linear_glu_forward: h {}, gu {}, x {}, w {} do not fit", h.shape.str(), gu.shape.str(),
        x.shape.str(), w.shape.str());
  GemmOf<float> full = p;
  full.A = x.ptr<float>(), full.B = w.ptr<float>(), full.C = gu.ptr<float>();
  float* out = h.ptr<float>();
  by_bands(full, scratch_, {out, nullptr}, F, [&](const float* gate, int64_t m, int64_t end) {
    for (; m < end; ++m, gate += 2 * F) cpu::rows<float>().glu(act, out + m * F, gate, gate + F, F);
  });
}

void CpuOps::glu_linear_backward(Tensor dgu, Tensor dh, Grad dw, Grad db, Grad db_gu, Tensor dy,
                                 Tensor h, Tensor gu, Tensor w, Act act, bool again) {
  const int64_t rows = dy.rows(), F = w.cols();
  const GemmOf<float> p{kPlain, kPlain, rows, F, dy.cols(), nullptr, nullptr, nullptr, nullptr};
  if (dy.dtype != DType::f32 || !is_narrow(p))
    return Ops::glu_linear_backward(dgu, dh, dw, db, db_gu, dy, h, gu, w, act, again);
  check(dy.cols() == w.rows() && gu.cols() == 2 * F && gu.rows() == rows &&
            dgu.numel() == gu.numel() && (!again || (h.rows() == rows && h.cols() == F)),
        "glu_linear_backward: dgu {}, dy {}, h {}, gu {}, w {} do not fit", dgu.shape.str(),
        dy.shape.str(), h.shape.str(), gu.shape.str(), w.shape.str());
  GemmOf<float> full = p;
  full.A = dy.ptr<float>(), full.B = w.ptr<float>();
  float *out = dgu.ptr<float>(), *hidden = again ? h.ptr<float>() : nullptr;
  const float* in = gu.ptr<float>();
  by_bands(full, scratch_, {in, out}, 2 * F, [&](const float* grad, int64_t m, int64_t end) {
    for (; m < end; ++m, grad += F) {
      float* dg = out + m * 2 * F;
      const float* g = in + m * 2 * F;
      cpu::rows<float>().glu_backward(act, dg, dg + F, grad, g, g + F, F);
      if (hidden) cpu::rows<float>().glu(act, hidden + m * F, g, g + F, F);
    }
  });
  linear_backward({}, dw, db, dy, h, w);
  if (db_gu) linear_backward({}, {}, db_gu, dgu, {}, {});
}

}  // namespace hgrn

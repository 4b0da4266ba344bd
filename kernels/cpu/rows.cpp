// Rows of the gated linear unit and of the norms; glu.cpp and norm.cpp have the maths.
// Test: tests/ops/test_glu.cpp, tests/ops/test_norm.cpp
#include "cpu/rows.h"

#include <cmath>

#include "cpu/tiles.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed inline only

namespace hgrn::cpu {
namespace {

// The vectors that a row is taken in, or the numbers. g++ would vectorise loops over floats as
// well, but with a division (tiles.h) for each.
template <class T>
constexpr int64_t kStep = std::is_same_v<T, float> ? kLanes : 1;
using HGRN_ISA::load;
using HGRN_ISA::store;
inline double load(const double* p, int64_t) {
  return *p;
}
inline void store(double* p, double x, int64_t) {
  *p = x;
}

template <class T>
void glu_row(Act act, T* h, const T* g, const T* u, int64_t F) {
  with_act(act, [&]<Act A>() {
    for (int64_t i = 0; i < F; i += kStep<T>)
      store(h + i, act_of<A>(load(g + i, F - i)) * load(u + i, F - i), F - i);
  });
}

template <class T>
void glu_backward_row(Act act, T* dg, T* du, const T* dh, const T* g, const T* u, int64_t F) {
  with_act(act, [&]<Act A>() {
    for (int64_t i = 0; i < F; i += kStep<T>) {
      const auto a = act_pair<A>(load(g + i, F - i));
      const auto grad = load(dh + i, F - i);
      store(dg + i, grad * load(u + i, F - i) * a.slope, F - i);
      store(du + i, grad * a.value, F - i);
    }
  });
}

// The one place that scales rows: what backward makes again has forward's bits.
template <class T>
void scale_row(T* y, const T* stats, const T* x, const T* w, const T* b, int64_t D) {
  const T shift = stats[0], rstd = stats[1];
  if (b)
    for (int64_t d = 0; d < D; ++d) y[d] = (x[d] - shift) * rstd * w[d] + b[d];
  else
    for (int64_t d = 0; d < D; ++d) y[d] = (x[d] - shift) * rstd * w[d];
}

template <class T>
void norm_row(T* y, T* stats, const T* x, const T* w, const T* b, int64_t D, bool layer,
              float eps) {
  double mean = 0, square = 0;
  if (layer) {
#pragma omp simd reduction(+ : mean)
    for (int64_t d = 0; d < D; ++d) mean += double(x[d]);
    mean /= double(D);
  }
#pragma omp simd reduction(+ : square)
  for (int64_t d = 0; d < D; ++d) square += (double(x[d]) - mean) * (double(x[d]) - mean);
  stats[0] = T(mean);
  stats[1] = T(1 / std::sqrt(square / double(D) + double(eps)));
  scale_row(y, stats, x, w, b, D);
}

template <class T>
void norm_backward_row(bool add, T* dx, T* dw, T* db, const T* dy, const T* x, const T* w,
                       const T* stats, int64_t D, bool layer) {
  const T mean = stats[0], rstd = stats[1];
  double sum_g = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_g, sum_gx)
  for (int64_t d = 0; d < D; ++d) {
    const T g = w[d] * dy[d], xhat = (x[d] - mean) * rstd;
    sum_g += double(g);
    sum_gx += double(g) * double(xhat);
  }
  const T avg_g = layer ? T(sum_g / double(D)) : T(0), avg_gx = T(sum_gx / double(D));
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) {
    const T xhat = (x[d] - mean) * rstd;
    const T grad = rstd * (w[d] * dy[d] - avg_g - xhat * avg_gx);
    dw[d] += dy[d] * xhat;
    dx[d] = add ? dx[d] + grad : grad;
  }
  if (db)
    for (int64_t d = 0; d < D; ++d) db[d] += dy[d];
}

template <class T>
RowKernels<T> kernels() {
  return {glu_row<T>, glu_backward_row<T>, norm_row<T>, scale_row<T>, norm_backward_row<T>};
}

}  // namespace

inline namespace HGRN_ISA {
RowKernels<float> row_kernels() {
  return kernels<float>();
}
RowKernels<double> row_kernels_f64() {
  return kernels<double>();
}
}  // namespace HGRN_ISA

}  // namespace hgrn::cpu

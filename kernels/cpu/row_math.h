// One row of the gated linear unit and of the norms in plain loops, for rows.cpp (fp32) and for
// double; glu.cpp and norm.cpp have the maths.
#pragma once
#include <cmath>
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/vec_math.h"

namespace hgrn::cpu {
inline namespace HGRN_ISA {

template <Act A, class T>
void glu_row(T* h, const T* g, const T* u, int64_t F) {
  for (int64_t i = 0; i < F; ++i) h[i] = act_of<A>(g[i]) * u[i];
}

template <Act A, class T>
void glu_backward_row(T* dg, T* du, const T* dh, const T* g, const T* u, int64_t F) {
  for (int64_t i = 0; i < F; ++i) {
    const ActPair<T> a = act_pair<A>(g[i]);
    const T grad = dh[i], up = u[i];
    dg[i] = grad * up * a.slope;
    du[i] = grad * a.value;
  }
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

template <bool add, class T>
void norm_backward_row(T* dx, T* dw, T* db, const T* dy, const T* x, const T* w, const T* stats,
                       int64_t D, bool layer) {
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

}  // namespace HGRN_ISA
}  // namespace hgrn::cpu

// One row of the gated linear unit, both directions; glu.cpp has the maths.
#pragma once
#include <cstdint>

#include "cpu/vec_math.h"

namespace hgrn::cpu {

template <Act A, class T>
void glu_row(T* h, const T* g, const T* u, int64_t F) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) h[i] = act_of<A>(g[i]) * u[i];
}

template <Act A, class T>
void glu_backward_row(T* dg, T* du, const T* dh, const T* g, const T* u, int64_t F) {
#pragma omp simd
  for (int64_t i = 0; i < F; ++i) {
    const ActPair<T> a = act_pair<A>(g[i]);
    const T grad = dh[i], up = u[i];
    dg[i] = grad * up * a.slope;
    du[i] = grad * a.value;
  }
}

}  // namespace hgrn::cpu

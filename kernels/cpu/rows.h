// Operations on one row at a time, fp32 or (for checks) fp64: the gated linear unit and the norms.
// Their maths is in glu.cpp and norm.cpp, which share rows out to the threads. Plain pointers only
// (isa.h).
#pragma once
#include <cstdint>
#include <type_traits>

#include "cpu/isa.h"
#include "ops/act.h"

namespace hgrn::cpu {

template <class T>
struct RowKernels {
  // h (F) = act(g) u
  void (*glu)(Act act, T* h, const T* g, const T* u, int64_t F);
  void (*glu_backward)(Act act, T* dg, T* du, const T* dh, const T* g, const T* u, int64_t F);
  // y (D), stats (2) of x (D); b may be null
  void (*norm)(T* y, T* stats, const T* x, const T* w, const T* b, int64_t D, bool layer,
               float eps);
  // y of the stats that there are
  void (*scale)(T* y, const T* stats, const T* x, const T* w, const T* b, int64_t D);
  // dx = or, with add, += ; dw and db (or null) gain the row's share
  void (*norm_backward)(bool add, T* dx, T* dw, T* db, const T* dy, const T* x, const T* w,
                        const T* stats, int64_t D, bool layer);
};

namespace isa_default {
RowKernels<float> row_kernels();
RowKernels<double> row_kernels_f64();
}  // namespace isa_default
namespace isa_v4 {
RowKernels<float> row_kernels();
}

template <class T>
const RowKernels<T>& rows() {
  if constexpr (std::is_same_v<T, double>) {
    static const RowKernels<double> wide = isa_default::row_kernels_f64();
    return wide;
  } else {
    static const RowKernels<float> best = HGRN_BEST_ISA(row_kernels);
    return best;
  }
}

}  // namespace hgrn::cpu

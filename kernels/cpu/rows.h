// Operations on one row at a time, fp32: the gated linear unit and the norms. Their maths is in
// glu.cpp and norm.cpp, which share rows out to the threads; row_math.h has them for any type.
// Plain pointers only (isa.h).
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "ops/act.h"

namespace hgrn::cpu {

struct RowKernels {
  // h (F) = act(g) u
  void (*glu)(Act act, float* h, const float* g, const float* u, int64_t F);
  void (*glu_backward)(Act act, float* dg, float* du, const float* dh, const float* g,
                       const float* u, int64_t F);
  // y (D), stats (2) of x (D); b may be null
  void (*norm)(float* y, float* stats, const float* x, const float* w, const float* b, int64_t D,
               bool layer, float eps);
  void (*scale)(float* y, const float* stats, const float* x, const float* w, const float* b,
                int64_t D);
  // dx = or, with add, += ; dw and db (or null) gain the row's share
  void (*norm_backward)(bool add, float* dx, float* dw, float* db, const float* dy, const float* x,
                        const float* w, const float* stats, int64_t D, bool layer);
};

namespace isa_default {
RowKernels row_kernels();
}
namespace isa_v4 {
RowKernels row_kernels();
}

inline const RowKernels& rows() {
  static const RowKernels best = HGRN_BEST_ISA(row_kernels);
  return best;
}

}  // namespace hgrn::cpu

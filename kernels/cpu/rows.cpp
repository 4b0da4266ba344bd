// Rows of the gated linear unit and of the norms, fp32; glu.cpp and norm.cpp have the maths.
// Test: tests/ops/test_glu.cpp, tests/ops/test_norm.cpp
#include "cpu/rows.h"

#include "cpu/row_math.h"
#include "cpu/tiles.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed inline only

namespace hgrn::cpu {
namespace {

void glu(Act act, float* h, const float* g, const float* u, int64_t F) {
  with_act(act, [&]<Act A>() {
    for (int64_t i = 0; i < F; i += kLanes)
      store(h + i, act_of<A>(load(g + i, F - i)) * load(u + i, F - i), F - i);
  });
}

void glu_backward(Act act, float* dg, float* du, const float* dh, const float* g, const float* u,
                  int64_t F) {
  with_act(act, [&]<Act A>() {
    for (int64_t i = 0; i < F; i += kLanes) {
      const ActPair<Vec> a = act_pair<A>(load(g + i, F - i));
      const Vec grad = load(dh + i, F - i);
      store(dg + i, grad * load(u + i, F - i) * a.slope, F - i);
      store(du + i, grad * a.value, F - i);
    }
  });
}

void norm_backward(bool add, float* dx, float* dw, float* db, const float* dy, const float* x,
                   const float* w, const float* stats, int64_t D, bool layer) {
  if (add)
    norm_backward_row<true>(dx, dw, db, dy, x, w, stats, D, layer);
  else
    norm_backward_row<false>(dx, dw, db, dy, x, w, stats, D, layer);
}

}  // namespace

inline namespace HGRN_ISA {
RowKernels row_kernels() {
  return {glu, glu_backward, norm_row<float>, scale_row<float>, norm_backward};
}
}  // namespace HGRN_ISA

}  // namespace hgrn::cpu

// Gated linear unit. h = act(g) * u; du = dh act(g); dg = dh u act'(g).
// h (N,F) gu (N,2F) = [g|u]
// Twin: kernels/cuda/glu.cu   Test: tests/ops/test_glu.cpp
#include "cpu/cpu_ops.h"
#include "cpu/rows.h"

namespace hgrn {

void CpuOps::glu_forward(Tensor h, Tensor gu, Act act) {
  const int64_t rows = h.rows(), F = h.cols();
  check(gu.cols() == 2 * F && gu.rows() == rows, "glu_forward: h {}, gu {} do not fit",
        h.shape.str(), gu.shape.str());
  cpu::with_real(h.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = h.ptr<T>();
    const T* in = gu.ptr<T>();
    cpu::parallel_for(rows, gu.numel(), [&](int64_t r) {
      cpu::rows<T>().glu(act, out + r * F, in + r * 2 * F, in + r * 2 * F + F, F);
    });
  });
}

void CpuOps::glu_backward(Tensor dgu, Tensor dh, Tensor gu, Act act, Tensor h) {
  const int64_t rows = dh.rows(), F = dh.cols();
  check(gu.cols() == 2 * F && gu.rows() == rows && dgu.numel() == gu.numel() &&
            (!h || h.numel() == dh.numel()),
        "glu_backward: dgu {}, dh {}, gu {}, h {} do not fit", dgu.shape.str(), dh.shape.str(),
        gu.shape.str(), h.shape.str());
  cpu::with_real(dh.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = dgu.ptr<T>();
    const T *grad = dh.ptr<T>(), *in = gu.ptr<T>();
    T* hidden = h ? h.ptr<T>() : nullptr;
    cpu::parallel_for(rows, gu.numel(), [&](int64_t r) {
      const int64_t at = r * 2 * F;
      cpu::rows<T>().glu_backward(act, out + at, out + at + F, grad + r * F, in + at, in + at + F,
                                  F);
      if (hidden) cpu::rows<T>().glu(act, hidden + r * F, in + at, in + at + F, F);
    });
  });
}

}  // namespace hgrn

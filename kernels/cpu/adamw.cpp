// AdamW (Loshchilov & Hutter 2019), in the order of operations of PyTorch's:
//   w *= 1 - lr wd;  m += (1-b1)(g-m);  v = b2 v + (1-b2) g^2;
//   w -= lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps)
// Scalars are formed in double and rounded once to the element type. A weight in two halves
// (core/dtype.h) is joined, updated and split again.
// Twin: kernels/cuda/adamw.cu   Test: tests/ops/test_adamw.cpp
#include <algorithm>
#include <cmath>

#include "cpu/cpu_ops.h"

namespace hgrn {
namespace {

constexpr int64_t kBlock = 16384;  // elements of a task

template <class T>
struct Factors {
  T decay, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps, clip;

  Factors(const AdamStep& s, double clip_factor)
      : decay(T(1 - s.lr * s.weight_decay)),
        one_minus_beta1(T(1 - s.beta1)),
        beta2(T(s.beta2)),
        one_minus_beta2(T(1 - s.beta2)),
        step_size(T(s.lr / (1 - std::pow(s.beta1, double(s.t))))),
        root_correction(T(std::sqrt(1 - std::pow(s.beta2, double(s.t))))),
        eps(T(s.eps)),
        clip(T(clip_factor)) {}
};

void split_floats(uint16_t* upper, int16_t* lower /*or null*/, const float* w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const SplitWeight half = split_weight(w[i]);
    upper[i] = half.bf16;
    if (lower) lower[i] = half.rest;
  }
}
void join_floats(float* w, const uint16_t* upper, const int16_t* lower, int64_t n) {
  for (int64_t i = 0; i < n; ++i) w[i] = join_weight({upper[i], lower[i]});
}
uint16_t* upper_half(Tensor compute) {
  return static_cast<uint16_t*>(compute.data);
}

template <class T>
void update(T* w, T* m, T* v, const T* grad, int64_t n, const Factors<T>& f) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T g = grad[i] * f.clip;
    const T mi = m[i] + f.one_minus_beta1 * (g - m[i]);
    const T vi = f.beta2 * v[i] + f.one_minus_beta2 * (g * g);
    const T root = std::sqrt(vi) / f.root_correction + f.eps;
    w[i] = w[i] * f.decay - f.step_size * (mi / root);
    m[i] = mi;
    v[i] = vi;
  }
}

// The same for weights in two halves, some at a time.
void update(uint16_t* upper, int16_t* lower, float* m, float* v, const float* grad, int64_t n,
            const Factors<float>& f) {
  constexpr int64_t kPiece = 256;
  float w[kPiece];
  for (int64_t at = 0; at < n; at += kPiece) {
    const int64_t count = std::min(kPiece, n - at);
    join_floats(w, upper + at, lower + at, count);
    update(w, m + at, v + at, grad + at, count, f);
    split_floats(upper + at, lower + at, w, count);
  }
}

// of and halves of n elements
void check_halves(Tensor of, Tensor upper, Tensor lower, const char* name) {
  check(upper.dtype == DType::bf16 && upper.numel() == of.numel() &&
            (!lower || (lower.dtype == DType::i16 && lower.numel() == of.numel())),
        "{}: {} and halves of {} {} and {} {}", name, of.shape.str(), name_of(upper.dtype),
        upper.shape.str(), name_of(lower.dtype), lower.shape.str());
}

}  // namespace

void CpuOps::split(Tensor compute, Tensor rest, Tensor master) {
  check_halves(master, compute, rest, "split");
  const int64_t n = master.numel();
  cpu::parallel_blocks(n, kBlock, n, [&](int64_t begin, int64_t end) {
    split_floats(upper_half(compute) + begin, rest ? rest.ptr<int16_t>() + begin : nullptr,
                 master.ptr<float>() + begin, end - begin);
  });
}

void CpuOps::join(Tensor master, Tensor compute, Tensor rest) {
  check_halves(master, compute, rest, "join");
  const int64_t n = master.numel();
  cpu::parallel_blocks(n, kBlock, n, [&](int64_t begin, int64_t end) {
    join_floats(master.ptr<float>() + begin, upper_half(compute) + begin,
                rest.ptr<int16_t>() + begin, end - begin);
  });
}

void CpuOps::clip_control(Tensor control, Tensor square_sum, Tensor nll_sum, double max_norm) {
  double* out = control.ptr<double>();
  const double norm = std::sqrt(*square_sum.ptr<double>());
  const bool ok = std::isfinite(norm) && (!nll_sum || std::isfinite(*nll_sum.ptr<double>()));
  out[0] = norm;
  out[1] = max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1;
  out[2] = ok ? 1 : 0;
}

void CpuOps::adamw(Tensor master, Tensor compute, Tensor m, Tensor v, Tensor grad,
                   const AdamStep& step, Tensor control) {
  const int64_t n = master.numel();
  check(m.numel() == n && v.numel() == n && grad.numel() == n && (!compute || compute.numel() == n),
        "adamw: master {}, compute {}, m {}, v {}, grad {} do not fit", n, compute.numel(),
        m.numel(), v.numel(), grad.numel());
  check(step.t >= 1, "adamw: updates count from 1, not from {}", step.t);
  const double* c = control.ptr<double>();
  if (c[2] == 0) return;
  if (master.dtype == DType::i16) {
    check_halves(grad, compute, master, "adamw");
    const Factors<float> f(step, c[1]);
    return cpu::parallel_blocks(n, kBlock, n, [&](int64_t begin, int64_t end) {
      update(upper_half(compute) + begin, master.ptr<int16_t>() + begin, m.ptr<float>() + begin,
             v.ptr<float>() + begin, grad.ptr<float>() + begin, end - begin, f);
    });
  }
  cpu::with_real(master.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Factors<T> f(step, c[1]);
    T *w = master.ptr<T>(), *mean = m.ptr<T>(), *var = v.ptr<T>();
    const T* g = grad.ptr<T>();
    cpu::parallel_blocks(n, kBlock, n, [&](int64_t begin, int64_t end) {
      update(w + begin, mean + begin, var + begin, g + begin, end - begin, f);
    });
  });
  if (compute && compute.data != master.data) cast(compute, master);
}

}  // namespace hgrn

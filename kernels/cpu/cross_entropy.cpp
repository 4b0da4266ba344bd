// Cross-entropy over the vocabulary with its gradient, in place.
// nll[r] = log sum_v exp(z[r,v] - max) + max - z[r,target];  dz = grad_scale * (softmax - onehot)
// logits z (N,Vp), valid columns [0,V); nll (N) targets (N), negative: not scored
// Twin: kernels/cuda/cross_entropy.cu   Test: tests/ops/test_cross_entropy.cpp
#include "cpu/cpu_ops.h"
#include "cpu/vec_math.h"

namespace hgrn {
namespace {

constexpr int64_t kBlock = 512;  // columns summed in T before they join the double

template <class T>
T row_max(const T* z, int64_t V) {
  T m = z[0];
#pragma omp simd reduction(max : m)
  for (int64_t v = 0; v < V; ++v) m = z[v] > m ? z[v] : m;
  return m;
}

// Sum of exp(z - max); with keep, z is overwritten by the exponentials.
template <class T, bool keep>
double exp_sum(std::conditional_t<keep, T, const T>* z, int64_t V, T max) {
  double total = 0;
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t end = std::min(V, begin + kBlock);
    T s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t v = begin; v < end; ++v) {
      const T e = cpu::exp_of(z[v] - max);
      s += e;
      if constexpr (keep) z[v] = e;
    }
    total += double(s);
  }
  return total;
}

template <class T>
T score_row(T* z, int64_t V, int64_t Vp, int32_t target, bool backward, double grad_scale) {
  if (target < 0) {
    if (backward) std::fill(z, z + Vp, T(0));
    return 0;
  }
  // A NaN may lose in the maximum, but never in the sum: it reaches nll either way.
  const T max = row_max(z, V);
  const double at_target = double(z[target]) - double(max);
  if (!backward) return T(std::log(exp_sum<T, false>(z, V, max)) - at_target);
  const double total = exp_sum<T, true>(z, V, max);
  const T scale = T(grad_scale / total);
  const double p = double(z[target]) / total;
  for (int64_t v = 0; v < V; ++v) z[v] *= scale;
  z[target] = T(grad_scale * (p - 1));
  std::fill(z + V, z + Vp, T(0));
  return T(std::log(total) - at_target);
}

}  // namespace

void CpuOps::cross_entropy(Tensor nll, Tensor logits, Tensor targets, int64_t vocab, bool backward,
                           double grad_scale) {
  const int64_t rows = logits.rows(), Vp = logits.cols();
  check(nll.numel() == rows && targets.numel() == rows && vocab >= 1 && vocab <= Vp,
        "cross_entropy: nll {}, logits {}, targets {}, vocabulary {} do not fit", nll.shape.str(),
        logits.shape.str(), targets.shape.str(), vocab);
  const int32_t* target = targets.ptr<int32_t>();
  for (int64_t r = 0; r < rows; ++r)
    check(target[r] < vocab, Exit::data,
          "target {} in row {} is outside the vocabulary of {}; do the data and the tokenizer "
          "belong together?",
          target[r], r, vocab);
  cpu::with_real(logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    T *out = nll.ptr<T>(), *z = logits.ptr<T>();
    cpu::parallel_for(rows, logits.numel(), [&](int64_t r) {
      out[r] = score_row(z + r * Vp, vocab, Vp, target[r], backward, grad_scale);
    });
  });
}

}  // namespace hgrn

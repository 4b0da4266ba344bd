// The two CPU implementations of the sequence kernel "hgru2" and what they share.
// Maths, per head, from logits x = [q|f|i] (paper Eq. 2):
//   o = act_o(x_q)  v = act_i(x_i)  f = bound + (1-bound) sigmoid(x_f)  k = (1-bound) sigmoid(-x_f)
//   h_t = diag(f_t) h_{t-1} + k_t (x) v_t        h (n,n), indexed [key][value]
//   y_t = (query_scale o_t)^T h_t
// k is never formed as 1 - f, which cancels where f is near 1.
#pragma once
#include <memory>

#include "cpu/parallel.h"
#include "cpu/vec_math.h"
#include "ops/seq_kernel.h"

namespace hgrn::cpu {

// The recurrence as written, f32 or f64: the gold standard (hgru2.cpp).
std::unique_ptr<SeqKernel> make_hgru2_plain(DType dtype);
// The same in chunks of 16 tokens by small matrix products, f32 (hgru2_chunked.cpp).
std::unique_ptr<SeqKernel> make_hgru2_chunked();

// Shapes and dtypes of a call; throws where they do not fit.
void check_hgru2(const char* op, DType dtype, const SeqShape& s, Tensor y, Tensor state,
                 const SeqInputs& in);

// One token of one head: where its logits lie and which channels it has.
template <class T>
struct Hgru2Token {
  const T *xq, *xf, *xi;
  bool reset;

  Hgru2Token(const SeqShape& s, const T* x, const uint8_t* resets, int64_t row, int64_t channel)
      : xq(x + row * 3 * s.D + channel),
        xf(xq + s.D),
        xi(xf + s.D),
        reset(resets && resets[row] != 0) {}
};

// The loops below are functions of their own, with pointers and counts by value: inside lambdas, or
// with a branch on a null pointer, g++ leaves them scalar.
template <Act A, class T>
void act_loop(T* __restrict out, const T* __restrict x, T scale, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = scale * act_of<A>(x[i]);
}
template <Act A, class T>
void act_backward_loop(T* __restrict dx, const T* __restrict dout, const T* __restrict x, T scale,
                       int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) dx[i] = scale * dout[i] * act_pair<A>(x[i]).slope;
}

// out = scale * act(x)
template <class T>
void act_row(Act act, T* out, const T* x, T scale, int64_t n) {
  with_act(act, [=]<Act A>() { act_loop<A>(out, x, scale, n); });
}
// dx = scale * dout * act'(x)
template <class T>
void act_backward_row(Act act, T* dx, const T* dout, const T* x, T scale, int64_t n) {
  with_act(act, [=]<Act A>() { act_backward_loop<A>(dx, dout, x, scale, n); });
}

// bound: the lower bounds of the row's channels, zeros where the model has none.
template <class T>
void gate_row(T* __restrict f, T* __restrict k, const T* __restrict xf, const T* __restrict bound,
              int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const SigmoidPair<T> s = sigmoid_pair(xf[i]);
    f[i] = bound[i] + (T(1) - bound[i]) * s.plus;
    k[i] = (T(1) - bound[i]) * s.minus;
  }
}

// dxf = (1-bound) s (1-s) (df-dk), dbound += (1-s) (df-dk), s = sigmoid(xf). df is overwritten.
template <class T>
void gate_backward_row(T* __restrict dxf, double* __restrict dbound, T* __restrict df,
                       const T* __restrict dk, const T* __restrict xf, const T* __restrict bound,
                       int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const SigmoidPair<T> s = sigmoid_pair(xf[i]);
    const T rest = s.minus * (df[i] - dk[i]);
    dxf[i] = (T(1) - bound[i]) * s.plus * rest;
    df[i] = rest;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) dbound[i] += double(df[i]);
}

// The bounds of a call, or zeros.
template <class T>
const T* bounds_or_zeros(Tensor bound, Scratch& zeros, int64_t D) {
  if (bound) return bound.ptr<T>();
  T* none = zeros.get<T>(size_t(D));
  std::fill_n(none, D, T(0));
  return none;
}

// out (D) += the rows of partial (B,D), in order.
template <class T>
void add_bound_gradient(T* out, const double* partial, int64_t B, int64_t D) {
  for (int64_t d = 0; d < D; ++d) {
    double sum = 0;
    for (int64_t b = 0; b < B; ++b) sum += partial[b * D + d];
    out[d] += T(sum);
  }
}

}  // namespace hgrn::cpu

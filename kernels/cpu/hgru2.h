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

template <class T>
void act_row(Act act, T* out, const T* x, T scale, int64_t n) {
  with_act(act, [&]<Act A>() {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = scale * act_of<A>(x[i]);
  });
}

// dx = scale * dout * act'(x)
template <class T>
void act_backward_row(Act act, T* dx, const T* dout, const T* x, T scale, int64_t n) {
  with_act(act, [&]<Act A>() {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dx[i] = scale * dout[i] * act_pair<A>(x[i]).slope;
  });
}

// bound may be null: 0.
template <class T>
void gate_row(T* f, T* k, const T* xf, const T* bound, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const SigmoidPair<T> s = sigmoid_pair(xf[i]);
    const T low = bound ? bound[i] : T(0);
    f[i] = low + (T(1) - low) * s.plus;
    k[i] = (T(1) - low) * s.minus;
  }
}

// dxf = (1-bound) s (1-s) (df-dk), dbound += (1-s) (df-dk), s = sigmoid(xf); dbound may be null.
template <class T>
void gate_backward_row(T* dxf, double* dbound, const T* df, const T* dk, const T* xf,
                       const T* bound, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const SigmoidPair<T> s = sigmoid_pair(xf[i]);
    const T low = bound ? bound[i] : T(0);
    const T rest = s.minus * (df[i] - dk[i]);
    dxf[i] = (T(1) - low) * s.plus * rest;
    if (dbound) dbound[i] += double(rest);
  }
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

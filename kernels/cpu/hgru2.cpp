// HGRU2 as the plain recurrence; hgru2.h has the maths. Backward, with dh_t = dL/dh_t:
//   dh_t = diag(f_{t+1}) dh_{t+1} + q_t (x) dy_t
//   dq_t = h_t dy_t  dk_t = dh_t v_t  dv_t = dh_t^T k_t  df_t = rowsum(h_{t-1} * dh_t)
// and h_t dy_t = f_t (h_{t-1} dy_t) + k_t (v_t . dy_t), so that only h_{t-1} is needed. The states
// are recomputed a block of kBlock tokens at a time from the saved state at the block's start.
// Twin: kernels/cuda/hgru2_forward.cu, hgru2_backward.cu   Test: tests/ops/test_hgru2.cpp
#include "cpu/hgru2.h"

#include <algorithm>

namespace hgrn::cpu {

void check_hgru2(const char* op, DType dtype, const SeqShape& s, Tensor y, Tensor state,
                 const SeqInputs& in) {
  check(s.B > 0 && s.T > 0 && s.D > 0 && s.n > 0 && s.D % s.n == 0,
        "{}: B {}, T {}, D {}, n {}: all must be positive and D a multiple of n", op, s.B, s.T, s.D,
        s.n);
  const int64_t state_size = s.B * s.H() * s.n * s.n;
  check(in.x.dtype == dtype && in.x.numel() == s.N() * 3 * s.D && y.dtype == dtype &&
            y.numel() == s.N() * s.D,
        "{}: x {} {} and y {} {} do not fit B {}, T {}, D {}", op, name_of(in.x.dtype),
        in.x.shape.str(), name_of(y.dtype), y.shape.str(), s.B, s.T, s.D);
  check((!in.bound || in.bound.numel() == s.D) && (!in.reset || in.reset.numel() == s.N()) &&
            (!in.h0 || in.h0.numel() == state_size) && (!state || state.numel() == state_size),
        "{}: bound {}, reset {}, h0 {} or final state {} do not fit B {}, T {}, D {}, n {}", op,
        in.bound.shape.str(), in.reset.shape.str(), in.h0.shape.str(), state.shape.str(), s.B, s.T,
        s.D, s.n);
}

namespace {

constexpr int64_t kBlock = 16;  // tokens between saved states

// h = diag(f) h + k (x) v
template <class T>
void advance(T* h, const T* f, const T* k, const T* v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    T* row = h + i * n;
    const T fi = f[i], ki = k[i];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) row[j] = fi * row[j] + ki * v[j];
  }
}

// y = q^T h
template <class T>
void read_out(T* y, const T* q, const T* h, int64_t n) {
  std::fill(y, y + n, T(0));
  for (int64_t i = 0; i < n; ++i) {
    const T* row = h + i * n;
    const T qi = q[i];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[j] += qi * row[j];
  }
}

template <class T>
struct TokenGrads {  // all (n)
  T *dq, *df, *dk, *dv;
};

// dh enters as diag(f_{t+1}) dh_{t+1} and leaves as diag(f_t) dh_t; h is h_{t-1}.
template <class T>
void token_backward(const TokenGrads<T>& g, T* dh, const T* h, const T* q, const T* f, const T* k,
                    const T* v, const T* dy, int64_t n) {
  T vdy = 0;
#pragma omp simd reduction(+ : vdy)
  for (int64_t j = 0; j < n; ++j) vdy += v[j] * dy[j];
  std::fill(g.dv, g.dv + n, T(0));
  T* dv = g.dv;
  for (int64_t i = 0; i < n; ++i) {
    T* dhi = dh + i * n;
    const T* hi = h + i * n;
    const T qi = q[i], fi = f[i], ki = k[i];
    T hdy = 0, dhv = 0, hdh = 0;
#pragma omp simd reduction(+ : hdy, dhv, hdh)
    for (int64_t j = 0; j < n; ++j) {
      const T d = dhi[j] + qi * dy[j];
      hdy += hi[j] * dy[j];
      dhv += d * v[j];
      hdh += hi[j] * d;
      dv[j] += ki * d;
      dhi[j] = fi * d;
    }
    g.dq[i] = fi * hdy + ki * vdy;
    g.dk[i] = dhv;
    g.df[i] = hdh;
  }
}

template <class T>
class PlainHgru2 final : public SeqKernel {
 public:
  int64_t packed_width(const SeqShape& s) const override { return 3 * s.D; }
  Shape state_shape(const SeqShape& s) const override { return {s.B, s.H(), s.n, s.n}; }
  std::vector<SavedSpec> saved(const SeqShape& s) const override {
    const int64_t blocks = (s.T + kBlock - 1) / kBlock;
    return {{"states", {s.B, blocks, s.H(), s.n, s.n}, DTypeOf<T>::value}};
  }

  void forward(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor hT, const SeqInputs& in,
               std::span<const Tensor> saved) override {
    check_hgru2("hgru2 forward", DTypeOf<T>::value, s, y, hT, in);
    const size_t each = size_t(s.n * s.n + 4 * s.n);
    T* work = scratch_.get<T>(each * size_t(max_threads()));
    const T* bound = bounds_or_zeros<T>(in.bound, zeros_, s.D);
    parallel_for(s.B * s.H(), s.N() * s.D * s.n, [&](int64_t task) {
      forward_head(s, o, y, hT, in, bound, saved, task, work + each * size_t(thread_index()));
    });
  }

  void backward(const SeqShape& s, const SeqOptions& o, const SeqGrads& out, Tensor dy, Tensor dhT,
                const SeqInputs& in, std::span<const Tensor> saved) override {
    check_hgru2("hgru2 backward", DTypeOf<T>::value, s, dy, dhT, in);
    check(saved.size() == 1 && out.dx.numel() == in.x.numel(),
          "hgru2 backward: needs the saved states of its forward and a dx like x");
    const size_t each = size_t((kBlock + 1) * s.n * s.n + 4 * kBlock * s.n + 4 * s.n);
    T* work = scratch_.get<T>(each * size_t(max_threads()));
    const T* bound = bounds_or_zeros<T>(in.bound, zeros_, s.D);
    double* dbound = dbound_.get<double>(size_t(s.B * s.D));
    std::fill_n(dbound, s.B * s.D, 0.0);
    parallel_for(s.B * s.H(), s.N() * s.D * s.n, [&](int64_t task) {
      backward_head(s, o, out, dy, dhT, in, bound, saved[0], task,
                    work + each * size_t(thread_index()), dbound);
    });
    if (out.dbound) add_bound_gradient(out.dbound.ptr<T>(), dbound, s.B, s.D);
  }

  void step(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor h,
            const SeqInputs& in) override {
    check(s.T == 1, "hgru2 step: takes one token of each row, not {}", s.T);
    SeqInputs with_state = in;
    with_state.h0 = h;
    forward(s, o, y, h, with_state, {});
  }

 private:
  static void gates(const SeqShape& s, const SeqOptions& o, const Hgru2Token<T>& token,
                    const T* bound, T* q, T* f, T* k, T* v) {
    act_row(o.output_act, q, token.xq, T(o.query_scale), s.n);
    gate_row(f, k, token.xf, bound, s.n);
    act_row(o.input_act, v, token.xi, T(1), s.n);
  }

  static const uint8_t* resets_of(const SeqInputs& in) {
    return in.reset ? in.reset.ptr<uint8_t>() : nullptr;
  }

  static void forward_head(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor hT,
                           const SeqInputs& in, const T* bounds, std::span<const Tensor> saved,
                           int64_t task, T* work) {
    const int64_t n = s.n, nn = n * n, b = task / s.H(), head = task % s.H(), channel = head * n;
    const int64_t blocks = (s.T + kBlock - 1) / kBlock;
    T *h = work, *q = h + nn, *f = q + n, *k = f + n, *v = k + n;
    if (in.h0)
      std::copy_n(in.h0.ptr<T>() + task * nn, nn, h);
    else
      std::fill_n(h, nn, T(0));
    for (int64_t t = 0; t < s.T; ++t) {
      const int64_t row = b * s.T + t;
      if (!saved.empty() && t % kBlock == 0)
        std::copy_n(h, nn, saved[0].ptr<T>() + ((b * blocks + t / kBlock) * s.H() + head) * nn);
      const Hgru2Token<T> token(s, in.x.ptr<T>(), resets_of(in), row, channel);
      if (token.reset) std::fill_n(h, nn, T(0));
      gates(s, o, token, bounds + channel, q, f, k, v);
      advance(h, f, k, v, n);
      read_out(y.ptr<T>() + row * s.D + channel, q, h, n);
    }
    if (hT) std::copy_n(h, nn, hT.ptr<T>() + task * nn);
  }

  static void backward_head(const SeqShape& s, const SeqOptions& o, const SeqGrads& out, Tensor dy,
                            Tensor dhT, const SeqInputs& in, const T* bounds, Tensor saved,
                            int64_t task, T* work, double* dbound) {
    const int64_t n = s.n, nn = n * n, b = task / s.H(), head = task % s.H(), channel = head * n;
    const int64_t blocks = (s.T + kBlock - 1) / kBlock;
    T *states = work, *dh = states + kBlock * nn, *gate = dh + nn;  // gate: q,f,k,v of each token
    const TokenGrads<T> g{gate + 4 * kBlock * n, gate + (4 * kBlock + 1) * n,
                          gate + (4 * kBlock + 2) * n, gate + (4 * kBlock + 3) * n};
    const T *x = in.x.ptr<T>(), *bound = bounds + channel;
    if (dhT)
      std::copy_n(dhT.ptr<T>() + task * nn, nn, dh);
    else
      std::fill_n(dh, nn, T(0));
    for (int64_t block = blocks - 1; block >= 0; --block) {
      const int64_t first = block * kBlock, count = std::min(kBlock, s.T - first);
      std::copy_n(saved.ptr<T>() + ((b * blocks + block) * s.H() + head) * nn, nn, states);
      for (int64_t r = 0; r < count; ++r) {  // states[r] = h before token r, after its reset
        const Hgru2Token<T> token(s, x, resets_of(in), b * s.T + first + r, channel);
        T *h = states + r * nn, *p = gate + 4 * r * n;
        if (token.reset) std::fill_n(h, nn, T(0));
        gates(s, o, token, bound, p, p + n, p + 2 * n, p + 3 * n);
        if (r + 1 == count) break;
        std::copy_n(h, nn, h + nn);
        advance(h + nn, p + n, p + 2 * n, p + 3 * n, n);
      }
      for (int64_t r = count - 1; r >= 0; --r) {
        const int64_t row = b * s.T + first + r;
        const Hgru2Token<T> token(s, x, resets_of(in), row, channel);
        const T* p = gate + 4 * r * n;
        token_backward(g, dh, states + r * nn, p, p + n, p + 2 * n, p + 3 * n,
                       dy.ptr<T>() + row * s.D + channel, n);
        if (token.reset) std::fill_n(dh, nn, T(0));
        T* dx = out.dx.ptr<T>() + row * 3 * s.D + channel;
        act_backward_row(o.output_act, dx, g.dq, token.xq, T(o.query_scale), n);
        gate_backward_row(dx + s.D, dbound + b * s.D + channel, g.df, g.dk, token.xf, bound, n);
        act_backward_row(o.input_act, dx + 2 * s.D, g.dv, token.xi, T(1), n);
      }
    }
    if (out.dh0) std::copy_n(dh, nn, out.dh0.ptr<T>() + task * nn);
  }

  Scratch scratch_, dbound_, zeros_;
};

}  // namespace

std::unique_ptr<SeqKernel> make_hgru2_plain(DType dtype) {
  if (dtype == DType::f32) return std::make_unique<PlainHgru2<float>>();
  return std::make_unique<PlainHgru2<double>>();
}

}  // namespace hgrn::cpu

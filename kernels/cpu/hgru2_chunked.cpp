// HGRU2 in chunks of C = 16 tokens, fp32; hgru2.h has the maths. With S the state at the start of
// a chunk, P_t = f_1 ... f_t and R_s = f_{s+1} ... f_C (products within the chunk):
//   y_t = (q_t P_t)^T S + sum_{s<=t} A_ts v_s     A_ts = sum_i q_ti k_si f_{s+1,i} ... f_{t,i}
//   S' = diag(P_C) S + sum_s (k_s R_s) (x) v_s
// Backward, with dS' the gradient at the end of the chunk and dA_ts = dy_t . v_s:
//   dv_s = sum_t A_ts dy_t + dS'^T (k_s R_s)      dS = diag(P_C) dS' + sum_t (q_t P_t) (x) dy_t
//   dq_t = P_t * (S dy_t) + sum_s dA_ts k_s f_{s+1} ... f_t
//   dk_s = R_s * (dS' v_s) + sum_t dA_ts q_t f_{s+1} ... f_t
//   df_r = the same products with f_r left out, summed by recurrences over the chunk.
// Every product of gates runs over gates <= 1 in order, nothing is divided by a gate and no
// logarithm is taken: gates that vanish or saturate are as exact as in the plain recurrence. A
// reset is a gate of 0. Heads narrower than a vector and single tokens go to the plain kernel.
// Twin: kernels/cuda/hgru2_forward.cu, hgru2_backward.cu   Test: tests/ops/test_hgru2.cpp
#include <algorithm>

#include "cpu/flush_denormals.h"
#include "cpu/hgru2.h"
#include "cpu/tiles.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed inline only

namespace hgrn::cpu {
namespace {

constexpr int C = 16;           // tokens of a chunk
constexpr int64_t kChunks = 4;  // chunks between saved states
constexpr int64_t kBlock = C * kChunks;
static_assert(C == kLanes, "the scores of a chunk are rows of one vector");

inline int64_t padded(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

// Where the head of a task lies.
struct Head {
  const SeqShape& s;
  const SeqOptions& o;
  const SeqInputs& in;
  const float* bounds;
  int64_t b, head, task, np, blocks;  // np: n rounded up to whole vectors

  Head(const SeqShape& shape, const SeqOptions& options, const SeqInputs& inputs, const float* low,
       int64_t i)
      : s(shape),
        o(options),
        in(inputs),
        bounds(low),
        b(i / shape.H()),
        head(i % shape.H()),
        task(i),
        np(padded(shape.n)),
        blocks((shape.T + kBlock - 1) / kBlock) {}
  int64_t channel() const { return head * s.n; }
  int64_t count(int64_t first) const { return std::min<int64_t>(C, s.T - first); }
  const float* bound() const { return bounds + channel(); }
  Hgru2Token<float> token(int64_t t) const {
    return {s, in.x.ptr<float>(), in.reset ? in.reset.ptr<uint8_t>() : nullptr, b * s.T + t,
            channel()};
  }
  float* row(Tensor y, int64_t t) const { return y.ptr<float>() + (b * s.T + t) * s.D + channel(); }
  float* saved(Tensor states, int64_t block) const {
    return states.ptr<float>() + ((b * blocks + block) * s.H() + head) * s.n * s.n;
  }
};

// Hands out aligned pieces of a thread's workspace.
struct Cursor {
  float* next;
  float* take(int64_t count) {
    float* p = next;
    next += (count + kLanes - 1) / kLanes * kLanes;
    return p;
  }
};

// Gates of one chunk, all (C,np): q scaled; qp = q P; kr = k R; P (np) the whole chunk's decay.
struct Chunk {
  float *q, *f, *k, *v, *qp, *kr, *P;

  Chunk(Cursor& cursor, int64_t np)
      : q(cursor.take(C * np)),
        f(cursor.take(C * np)),
        k(cursor.take(C * np)),
        v(cursor.take(C * np)),
        qp(cursor.take(C * np)),
        kr(cursor.take(C * np)),
        P(cursor.take(np)) {}
  static int64_t size(int64_t np) { return (6 * C + 1) * np; }

  // Rows and channels of padding: they keep the state and add nothing.
  void pad(int64_t np, int64_t first_row, int64_t n) {
    for (int64_t t = 0; t < C; ++t)
      for (int64_t i = t < first_row ? n : 0; i < np; ++i)
        q[t * np + i] = k[t * np + i] = v[t * np + i] = 0, f[t * np + i] = 1;
  }

  void load(const Head& h, int64_t first) {
    const int64_t n = h.s.n, np = h.np, count = h.count(first);
    pad(np, count, n);
    for (int64_t t = 0; t < count; ++t) {
      const Hgru2Token<float> token = h.token(first + t);
      act_row(h.o.output_act, q + t * np, token.xq, h.o.query_scale, n);
      gate_row(f + t * np, k + t * np, token.xf, h.bound(), n);
      act_row(h.o.input_act, v + t * np, token.xi, 1.0f, n);
      if (token.reset) std::fill_n(f + t * np, n, 0.0f);
    }
    for (int64_t i = 0; i < np; i += kLanes) {
      Vec p = Vec{} + 1.0f;
      for (int64_t t = 0; t < C; ++t) {
        p *= at(f + t * np + i);
        at(qp + t * np + i) = at(q + t * np + i) * p;
      }
      at(P + i) = p;
      p = Vec{} + 1.0f;
      for (int64_t t = C - 1; t >= 0; --t) {
        at(kr + t * np + i) = at(k + t * np + i) * p;
        p *= at(f + t * np + i);
      }
    }
  }

  // A (C,C), lower triangular. Lane s of p is k_s f_{s+1} ... f_t, 0 while t < s.
  void scores(float* A, int64_t n, int64_t np) const {
    alignas(64) static constexpr auto kOnly = [] {
      struct {
        int32_t lane[C][C];
      } m{};
      for (int t = 0; t < C; ++t) m.lane[t][t] = -1;
      return m;
    }();
    Vec acc[C] = {};
    for (int64_t i = 0; i < n; ++i) {
      Vec p{};
#pragma GCC unroll 16
      for (int t = 0; t < C; ++t) {
        const Vec key = Vec{} + k[t * np + i];
        const IntVec own = reinterpret_cast<const IntVec&>(kOnly.lane[t]) & (IntVec)key;
        p = p * f[t * np + i] + (Vec)own;
        acc[t] += p * q[t * np + i];
      }
    }
    for (int t = 0; t < C; ++t) at(A + t * C) = acc[t];
  }
};

// Between a packed (n,n) state and a padded (np,np) one.
void unpack(float* padded, const float* packed, int64_t n, int64_t np) {
  std::fill_n(padded, np * np, 0.0f);
  if (!packed) return;
  for (int64_t i = 0; i < n; ++i) std::copy_n(packed + i * n, n, padded + i * np);
}
void pack(float* packed, const float* padded, int64_t n, int64_t np) {
  for (int64_t i = 0; i < n; ++i) std::copy_n(padded + i * np, n, packed + i * n);
}

int64_t forward_size(int64_t np) {
  return np * np + Chunk::size(np) + C * np + C * C;
}

void forward_head(const Head& h, Tensor y, Tensor hT, std::span<const Tensor> saved, float* work) {
  const int64_t n = h.s.n, np = h.np;
  Cursor cursor{work};
  float* S = cursor.take(np * np);
  Chunk c(cursor, np);
  float *Y = cursor.take(C * np), *A = cursor.take(C * C);
  unpack(S, h.in.h0 ? h.in.h0.ptr<float>() + h.task * n * n : nullptr, n, np);
  for (int64_t first = 0; first < h.s.T; first += C) {
    if (!saved.empty() && first % kBlock == 0) pack(h.saved(saved[0], first / kBlock), S, n, np);
    c.load(h, first);
    c.scores(A, n, np);
    product<Start::zero>(Y, {c.qp, np, 1}, S, C, np, np);
    product<Start::keep>(Y, {A, C, 1}, c.v, C, np, C);
    for (int64_t t = 0; t < h.count(first); ++t) std::copy_n(Y + t * np, n, h.row(y, first + t));
    product<Start::row_scaled>(S, {c.kr, 1, np}, c.v, np, np, C, c.P);
  }
  if (hT) pack(hT.ptr<float>() + h.task * n * n, S, n, np);
}

// Gradients of one chunk, all (C,np); iq = S dy, ik = dS' v.
struct ChunkGrads {
  float *dy, *dq, *dk, *df, *dv, *iq, *ik, *cross;

  ChunkGrads(Cursor& cursor, int64_t np)
      : dy(cursor.take(C * np)),
        dq(cursor.take(C * np)),
        dk(cursor.take(C * np)),
        df(cursor.take(C * np)),
        dv(cursor.take(C * np)),
        iq(cursor.take(C * np)),
        ik(cursor.take(C * np)),
        cross(cursor.take(np)) {}
  static int64_t size(int64_t np) { return (7 * C + 1) * np; }
};

// dq, dk, df from the pairs (t,s) of tokens within the chunk, for 16 channels from i on.
void within_chunk(const ChunkGrads& g, const Chunk& c, const float* dA, int64_t np, int64_t i) {
  Vec q[C], f[C], dq[C] = {}, df[C] = {};
  for (int t = 0; t < C; ++t) q[t] = at(c.q + t * np + i), f[t] = at(c.f + t * np + i);
  for (int s = 0; s < C; ++s) {
    Vec reach[C];  // k_s f_{s+1} ... f_t
    Vec p = at(c.k + s * np + i);
    reach[s] = p;
    dq[s] += dA[s * C + s] * p;
    for (int t = s + 1; t < C; ++t) {
      p *= f[t];
      reach[t] = p;
      dq[t] += dA[t * C + s] * p;
    }
    Vec a{};  // sum over t' >= t of dA_t's q_t' f_{t+1} ... f_t'
    for (int t = C - 1; t > s; --t) {
      a += dA[t * C + s] * q[t];
      df[t] += a * reach[t - 1];
      a *= f[t];
    }
    at(g.dk + s * np + i) = a + dA[s * C + s] * q[s];
  }
  for (int t = 0; t < C; ++t) at(g.dq + t * np + i) = dq[t], at(g.df + t * np + i) = df[t];
}

// Adds what goes through the states at both ends of the chunk, for 16 channels from i on.
void across_chunks(const ChunkGrads& g, const Chunk& c, int64_t np, int64_t i) {
  Vec before[C], after[C];  // f_1 ... f_{t-1} and f_{t+1} ... f_C
  Vec p = Vec{} + 1.0f;
  Vec b{};  // sum over s < t of k_s ik_s f_{s+1} ... f_{t-1}
  const Vec cross = at(g.cross + i);
  for (int t = 0; t < C; ++t) {
    before[t] = p;
    p *= at(c.f + t * np + i);
    at(g.dq + t * np + i) += p * at(g.iq + t * np + i);
  }
  p = Vec{} + 1.0f;
  Vec a{};  // sum over t' >= t of q_t' iq_t' f_{t+1} ... f_t'
  for (int t = C - 1; t >= 0; --t) {
    after[t] = p;
    at(g.dk + t * np + i) += p * at(g.ik + t * np + i);
    a += at(c.q + t * np + i) * at(g.iq + t * np + i);
    at(g.df + t * np + i) += before[t] * (a + p * cross);
    a *= at(c.f + t * np + i);
    p *= at(c.f + t * np + i);
  }
  for (int t = 0; t < C; ++t) {
    at(g.df + t * np + i) += after[t] * b;
    b = b * at(c.f + t * np + i) + at(c.k + t * np + i) * at(g.ik + t * np + i);
  }
}

struct BackwardWork {
  float *dS, *dST, *ST[kChunks], *A, *dA, *VT;
  std::vector<Chunk> chunks;
  ChunkGrads g;

  BackwardWork(Cursor& cursor, int64_t np) : g(cursor, np) {
    dS = cursor.take(np * np), dST = cursor.take(np * np);
    for (float*& state : ST) state = cursor.take(np * np);
    A = cursor.take(C * C), dA = cursor.take(C * C), VT = cursor.take(C * np);
    for (int64_t i = 0; i < kChunks; ++i) chunks.emplace_back(cursor, np);
  }
  static int64_t size(int64_t np) {
    return (2 + kChunks) * np * np + 2 * C * C + C * np + kChunks * Chunk::size(np) +
           ChunkGrads::size(np);
  }
};

// Everything of one chunk; w.dS goes from the chunk's end to its start. ST: S transposed.
void chunk_backward(BackwardWork& w, const Chunk& c, const float* ST, int64_t n, int64_t np) {
  const ChunkGrads& g = w.g;
  transpose(w.dST, w.dS, np, np);
  transpose(w.VT, c.v, C, np);
  c.scores(w.A, n, np);
  product<Start::zero>(w.dA, {g.dy, np, 1}, w.VT, C, C, np);
  product<Start::zero>(g.dv, {w.A, 1, C}, g.dy, C, np, C);
  product<Start::keep>(g.dv, {c.kr, np, 1}, w.dS, C, np, np);
  product<Start::zero>(g.iq, {g.dy, np, 1}, ST, C, np, np);
  product<Start::zero>(g.ik, {c.v, np, 1}, w.dST, C, np, np);
  for (int64_t i = 0; i < np; i += kLanes) {
    Vec cross{};
    for (int64_t j = 0; j < n; ++j) cross += at(ST + j * np + i) * at(w.dST + j * np + i);
    at(g.cross + i) = cross;
    within_chunk(g, c, w.dA, np, i);
    across_chunks(g, c, np, i);
  }
  product<Start::row_scaled>(w.dS, {c.qp, 1, np}, g.dy, np, np, C, c.P);
}

void load_dy(const Head& h, const ChunkGrads& g, Tensor dy, int64_t first) {
  std::fill_n(g.dy, C * h.np, 0.0f);
  for (int64_t t = 0; t < h.count(first); ++t)
    std::copy_n(h.row(dy, first + t), h.s.n, g.dy + t * h.np);
}

// From gradients of q, f, k, v to those of the logits.
void store_dx(const Head& h, const ChunkGrads& g, Tensor dx, double* dbound, int64_t first) {
  const int64_t n = h.s.n, np = h.np, D = h.s.D;
  for (int64_t t = 0; t < h.count(first); ++t) {
    const Hgru2Token<float> token = h.token(first + t);
    float* out = dx.ptr<float>() + (h.b * h.s.T + first + t) * 3 * D + h.channel();
    if (token.reset) std::fill_n(g.df + t * np, n, 0.0f);  // its gate was not used
    act_backward_row(h.o.output_act, out, g.dq + t * np, token.xq, h.o.query_scale, n);
    gate_backward_row(out + D, dbound, g.df + t * np, g.dk + t * np, token.xf, h.bound(), n);
    act_backward_row(h.o.input_act, out + 2 * D, g.dv + t * np, token.xi, 1.0f, n);
  }
}

void backward_head(const Head& h, const SeqGrads& out, Tensor dy, Tensor dhT, Tensor saved,
                   double* dbound, float* work) {
  const int64_t n = h.s.n, np = h.np;
  Cursor cursor{work};
  BackwardWork w(cursor, np);
  unpack(w.dS, dhT ? dhT.ptr<float>() + h.task * n * n : nullptr, n, np);
  for (int64_t block = h.blocks - 1; block >= 0; --block) {
    const int64_t start = block * kBlock;
    const int64_t count = std::min(kChunks, (h.s.T - start + C - 1) / C);
    unpack(w.dST, h.saved(saved, block), n, np);  // dST is free here
    transpose(w.ST[0], w.dST, np, np);
    for (int64_t i = 0; i < count; ++i) {
      const Chunk& c = w.chunks[size_t(i)];
      w.chunks[size_t(i)].load(h, start + i * C);
      if (i + 1 == count) break;
      std::copy_n(w.ST[i], np * np, w.ST[i + 1]);
      product<Start::column_scaled>(w.ST[i + 1], {c.v, 1, np}, c.kr, np, np, C, c.P);
    }
    for (int64_t i = count - 1; i >= 0; --i) {
      load_dy(h, w.g, dy, start + i * C);
      chunk_backward(w, w.chunks[size_t(i)], w.ST[i], n, np);
      store_dx(h, w.g, out.dx, dbound, start + i * C);
    }
  }
  if (out.dh0) pack(out.dh0.ptr<float>() + h.task * n * n, w.dS, n, np);
}

class ChunkedHgru2 final : public SeqKernel {
 public:
  ChunkedHgru2() : plain_(make_hgru2_plain(DType::f32)) {}

  int64_t packed_width(const SeqShape& s) const override { return plain_->packed_width(s); }
  Shape state_shape(const SeqShape& s) const override { return plain_->state_shape(s); }
  std::vector<SavedSpec> saved(const SeqShape& s) const override {
    if (is_small(s)) return plain_->saved(s);
    const int64_t blocks = (s.T + kBlock - 1) / kBlock;
    return {{"states", {s.B, blocks, s.H(), s.n, s.n}, DType::f32}};
  }

  void forward(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor hT, const SeqInputs& in,
               std::span<const Tensor> saved) override {
    if (is_small(s)) return plain_->forward(s, o, y, hT, in, saved);
    check_hgru2("hgru2 forward", DType::f32, s, y, hT, in);
    const int64_t each = forward_size(padded(s.n));
    float* work = scratch_.get<float>(size_t(each * max_threads()));
    const float* bounds = bounds_or_zeros<float>(in.bound, zeros_, s.D);
    parallel_for(s.B * s.H(), s.N() * s.D * s.n, [&](int64_t task) {
      const FlushDenormals flush;
      forward_head(Head(s, o, in, bounds, task), y, hT, saved, work + each * thread_index());
    });
  }

  void backward(const SeqShape& s, const SeqOptions& o, const SeqGrads& out, Tensor dy, Tensor dhT,
                const SeqInputs& in, std::span<const Tensor> saved) override {
    if (is_small(s)) return plain_->backward(s, o, out, dy, dhT, in, saved);
    check_hgru2("hgru2 backward", DType::f32, s, dy, dhT, in);
    check(saved.size() == 1 && out.dx.numel() == in.x.numel(),
          "hgru2 backward: needs the saved states of its forward and a dx like x");
    const int64_t each = BackwardWork::size(padded(s.n));
    float* work = scratch_.get<float>(size_t(each * max_threads()));
    const float* bounds = bounds_or_zeros<float>(in.bound, zeros_, s.D);
    double* dbound = dbound_.get<double>(size_t(s.B * s.D));
    std::fill_n(dbound, s.B * s.D, 0.0);
    parallel_for(s.B * s.H(), s.N() * s.D * s.n, [&](int64_t task) {
      const FlushDenormals flush;
      const Head h(s, o, in, bounds, task);
      backward_head(h, out, dy, dhT, saved[0], dbound + h.b * s.D + h.channel(),
                    work + each * thread_index());
    });
    if (out.dbound) add_bound_gradient(out.dbound.ptr<float>(), dbound, s.B, s.D);
  }

  void step(const SeqShape& s, const SeqOptions& o, Tensor y, Tensor h,
            const SeqInputs& in) override {
    plain_->step(s, o, y, h, in);
  }

 private:
  static bool is_small(const SeqShape& s) { return s.T == 1 || s.n < kLanes; }

  std::unique_ptr<SeqKernel> plain_;
  Scratch scratch_, dbound_, zeros_;
};

}  // namespace

std::unique_ptr<SeqKernel> make_hgru2_chunked() {
  return std::make_unique<ChunkedHgru2>();
}

}  // namespace hgrn::cpu

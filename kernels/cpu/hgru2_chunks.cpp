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
// reset is a gate of 0.
// A head's channels lie 3D floats apart from token to token, which the processor does not foresee:
// each line of the next chunk is asked for while this one's is read.
// Twin: kernels/cuda/hgru2_forward.cu, hgru2_backward.cu   Test: tests/ops/test_hgru2.cpp
#include "cpu/hgru2_chunks.h"

#include <algorithm>

#include "cpu/tiles.h"
#include "cpu/vec_math.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed inline only

namespace hgrn::cpu {
namespace {

constexpr int C = kHgru2Chunk;
constexpr int64_t kBlock = kHgru2Block, kChunks = kBlock / C;
static_assert(C % kLanes == 0, "a row of scores is whole vectors");

inline int64_t padded(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

// Hands out aligned pieces of a thread's workspace.
struct Cursor {
  float* next;
  float* take(int64_t count) {
    float* p = next;
    next += padded(count);
    return p;
  }
};

// Gates of one chunk, all (C,np): q scaled; qp = q P; kr = k R; P (np) the whole chunk's decay.
// For backward also the slopes: q' and v' of the activations, f' = -k' of the gate, and
// rest = sigmoid(-x_f), the slope of the gate in its bound.
struct Chunk {
  float *q, *f, *k, *v, *qp, *kr, *P;
  float *q_slope, *v_slope, *f_slope, *rest;

  void place(Cursor& cursor, int64_t np, bool slopes) {
    for (float** p : {&q, &f, &k, &v, &qp, &kr}) *p = cursor.take(C * np);
    for (float** p : {&q_slope, &v_slope, &f_slope, &rest})
      *p = slopes ? cursor.take(C * np) : nullptr;
    P = cursor.take(np);
  }
  static int64_t size(int64_t np, bool slopes) { return ((slopes ? 10 : 6) * C + 1) * np; }
};

// Reads the logits of one chunk, kLanes channels from i on. Padding rows keep the state and add
// nothing; padding channels have q = 0, so that nothing of theirs reaches a real one.
template <bool slopes>
struct Loader {
  const Chunk& c;
  const Hgru2Head& h;
  int64_t np, first, count, ahead;  // ahead: floats to the token that will be read later

  const float* logits(int part, int64_t t, int64_t i) const {
    const float* p = h.x + (first + t) * 3 * h.D + part * h.D + i;
    __builtin_prefetch(p + ahead, 0, slopes ? 2 : 3);
    return p;
  }

  void gates(int64_t i) const {
    const Vec bound = load(h.bound + i, h.n - i), room = 1.0f - bound;
    for (int64_t t = 0; t < count; ++t) {
      const SigmoidPair<Vec> s = sigmoid_pair(load(logits(1, t, i), h.n - i));
      const Vec k = room * s.minus;
      at(c.f + t * np + i) = h.reset && h.reset[first + t] ? Vec{} : bound + room * s.plus;
      at(c.k + t * np + i) = k;
      if constexpr (slopes)
        at(c.f_slope + t * np + i) = k * s.plus, at(c.rest + t * np + i) = s.minus;
    }
    for (int64_t t = count; t < C; ++t)
      at(c.f + t * np + i) = Vec{} + 1.0f, at(c.k + t * np + i) = Vec{};
    Vec p = Vec{} + 1.0f;
    for (int64_t t = C - 1; t >= 0; --t) {
      at(c.kr + t * np + i) = at(c.k + t * np + i) * p;
      p *= at(c.f + t * np + i);
    }
    at(c.P + i) = p;
  }

  template <Act A>
  void queries(int64_t i) const {
    Vec p = Vec{} + 1.0f, real{};
    for (int l = 0; l < kLanes; ++l) real[l] = i + l < h.n ? h.query_scale : 0.0f;
    for (int64_t t = 0; t < C; ++t) {
      Vec q{};
      if (t < count) {
        const ActPair<Vec> a = act_pair<A>(load(logits(0, t, i), h.n - i));
        q = real * a.value;
        if constexpr (slopes) at(c.q_slope + t * np + i) = real * a.slope;
      }
      p *= at(c.f + t * np + i);
      at(c.q + t * np + i) = q;
      at(c.qp + t * np + i) = q * p;
    }
  }

  template <Act A>
  void values(int64_t i) const {
    for (int64_t t = 0; t < C; ++t) {
      Vec v{};
      if (t < count) {
        const ActPair<Vec> a = act_pair<A>(load(logits(2, t, i), h.n - i));
        v = a.value;
        if constexpr (slopes && A != Act::identity) at(c.v_slope + t * np + i) = a.slope;
      }
      at(c.v + t * np + i) = v;
    }
  }

  void all() const {
    for (int64_t i = 0; i < np; i += kLanes) {
      gates(i);
      with_act(h.output_act, [&]<Act A>() { queries<A>(i); });
      with_act(h.input_act, [&]<Act A>() { values<A>(i); });
    }
  }
};

// AT (C,C): row s holds A_ts of all t, 0 where t < s.
template <int s = 0>
inline void scores_of(Vec (*sums)[C], const Chunk& c, int64_t np) {
  Vec acc[C] = {};
  for (int64_t i = 0; i < np; i += kLanes) {
    Vec p = at(c.k + s * np + i);
    acc[s] += p * at(c.q + s * np + i);
#pragma GCC unroll 16
    for (int t = s + 1; t < C; ++t) {
      p *= at(c.f + t * np + i);
      acc[t] += p * at(c.q + t * np + i);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < C; ++t) sums[s][t] = acc[t];
  if constexpr (s + 1 < C) scores_of<s + 1>(sums, c, np);
}
void scores(float* AT, const Chunk& c, int64_t np) {
  Vec sums[C][C];
  scores_of(sums, c, np);
  for (int s = 0; s < C; ++s)
    for (int t = 0; t < C; t += kLanes)
      at(AT + s * C + t) = t + kLanes <= s ? Vec{} : lane_sums(sums[s] + t);
}

// Y (C,np) += A X and Y += A^T X, without the zeros above A's diagonal.
void lower_product(float* Y, const float* AT, const float* X, int64_t np) {
  for (int64_t t = 0; t < C; t += 8)
    product<Start::keep>(Y + t * np, {AT + t, 1, C}, X, 8, np, t + 8);
}
void upper_product(float* Y, const float* AT, const float* X, int64_t np) {
  for (int64_t s = 0; s < C; s += 8)
    product<Start::keep>(Y + s * np, {AT + s * C + s, C, 1}, X + s * np, 8, np, C - s);
}

// Between a packed (n,n) state and a padded (np,np) one.
void unpack(float* to, const float* packed, int64_t n, int64_t np) {
  std::fill_n(to, np * np, 0.0f);
  if (!packed) return;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; j += kLanes) at(to + i * np + j) = load(packed + i * n + j, n - j);
}
void pack(float* packed, const float* from, int64_t n, int64_t np) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; j += kLanes) store(packed + i * n + j, at(from + i * np + j), n - j);
}

int64_t forward_floats(int64_t n) {
  const int64_t np = padded(n);
  return np * np + Chunk::size(np, false) + C * np + C * C;
}

void forward_head(const Hgru2Head& h, float* work) {
  const int64_t n = h.n, np = padded(n);
  Cursor cursor{work};
  float* S = cursor.take(np * np);
  Chunk c;
  c.place(cursor, np, false);
  float *Y = cursor.take(C * np), *AT = cursor.take(C * C);
  unpack(S, h.h0, n, np);
  for (int64_t first = 0; first < h.T; first += C) {
    const int64_t count = std::min<int64_t>(C, h.T - first);
    if (h.saved && first % kBlock == 0) pack(h.saved + first / kBlock * h.saved_step, S, n, np);
    Loader<false>{c, h, np, first, count, C * 3 * h.D}.all();
    scores(AT, c, np);
    product<Start::zero>(Y, {c.qp, np, 1}, S, C, np, np);
    lower_product(Y, AT, c.v, np);
    for (int64_t t = 0; t < count; ++t)
      for (int64_t j = 0; j < n; j += kLanes) {
        float* y = h.y + (first + t) * h.D + j;
        store(y, at(Y + t * np + j), n - j);
        __builtin_prefetch(y + C * h.D, 1);
      }
    product<Start::row_scaled>(S, {c.kr, 1, np}, c.v, np, np, C, c.P);
  }
  if (h.hT) pack(h.hT, S, n, np);
}

// Gradients of one chunk, all (C,np); iq = S dy, ik = dS' v; cross (np) = rowsum(S * dS').
struct ChunkGrads {
  float *dy, *dq, *dk, *df, *dv, *iq, *ik, *cross;

  void place(Cursor& cursor, int64_t np) {
    for (float** p : {&dy, &dq, &dk, &df, &dv, &iq, &ik}) *p = cursor.take(C * np);
    cross = cursor.take(np);
  }
  static int64_t size(int64_t np) { return (7 * C + 1) * np; }
};

// dq, dk, df from the pairs (t,s) of tokens within the chunk, for kLanes channels from i on. S
// tokens s go together: they share what is read of t, and their sums do not wait for each other.
void within_chunk(const ChunkGrads& g, const Chunk& c, const float* dA, int64_t np, int64_t i) {
  constexpr int S = 4;
  Vec q[C], f[C], dq[C] = {}, df[C] = {};
  for (int t = 0; t < C; ++t) q[t] = at(c.q + t * np + i), f[t] = at(c.f + t * np + i);
  for (int s = 0; s < C; s += S) {
    Vec reach[C][S];  // k_s f_{s+1} ... f_t
    Vec p[S];
#pragma GCC unroll 4
    for (int d = 0; d < S; ++d) {  // t = s + d: the tokens after it have not begun
      const int t = s + d;
      for (int j = 0; j < d; ++j) p[j] *= f[t];
      p[d] = at(c.k + t * np + i);
      for (int j = 0; j <= d; ++j) reach[t][j] = p[j], dq[t] += dA[t * C + s + j] * p[j];
    }
    for (int t = s + S; t < C; ++t)
#pragma GCC unroll 4
      for (int j = 0; j < S; ++j) {
        reach[t][j] = p[j] *= f[t];
        dq[t] += dA[t * C + s + j] * p[j];
      }
    Vec a[S] = {};  // sums over t' >= t of dA_t's q_t' f_{t+1} ... f_t'
    for (int t = C - 1; t >= s + S; --t)
#pragma GCC unroll 4
      for (int j = 0; j < S; ++j) {
        a[j] += dA[t * C + s + j] * q[t];
        df[t] += a[j] * reach[t - 1][j];
        a[j] *= f[t];
      }
#pragma GCC unroll 4
    for (int d = S - 1; d >= 0; --d) {
      const int t = s + d;
      for (int j = 0; j <= d; ++j) a[j] += dA[t * C + s + j] * q[t];
      for (int j = 0; j < d; ++j) df[t] += a[j] * reach[t - 1][j], a[j] *= f[t];
      at(g.dk + t * np + i) = a[d];
    }
  }
  for (int t = 0; t < C; ++t) at(g.dq + t * np + i) = dq[t], at(g.df + t * np + i) = df[t];
}

// Adds what goes through the states at both ends of the chunk, for kLanes channels from i on.
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
  float *dS, *dST, *ST[kChunks], *AT, *dA, *VT;
  Chunk chunks[kChunks];
  ChunkGrads g;

  BackwardWork(Cursor& cursor, int64_t np) {
    g.place(cursor, np);
    dS = cursor.take(np * np), dST = cursor.take(np * np);
    for (float*& state : ST) state = cursor.take(np * np);
    AT = cursor.take(C * C), dA = cursor.take(C * C), VT = cursor.take(C * np);
    for (Chunk& c : chunks) c.place(cursor, np, true);
  }
  static int64_t size(int64_t np) {
    return (2 + kChunks) * np * np + 2 * C * C + C * np + kChunks * Chunk::size(np, true) +
           ChunkGrads::size(np);
  }
};

// Everything of one chunk; w.dS goes from the chunk's end to its start. ST: S transposed.
void chunk_backward(BackwardWork& w, const Chunk& c, const float* ST, int64_t n, int64_t np) {
  const ChunkGrads& g = w.g;
  transpose(w.dST, w.dS, np, np);
  transpose(w.VT, c.v, C, np);
  scores(w.AT, c, np);
  product<Start::zero>(w.dA, {g.dy, np, 1}, w.VT, C, C, np);
  product<Start::zero>(g.dv, {c.kr, np, 1}, w.dS, C, np, np);
  upper_product(g.dv, w.AT, g.dy, np);
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

void load_dy(const ChunkGrads& g, const Hgru2Head& h, int64_t np, int64_t first, int64_t count) {
  for (int64_t t = 0; t < C; ++t)
    for (int64_t i = 0; i < np; i += kLanes) {
      const float* dy = h.dy + (first + t) * h.D + i;
      at(g.dy + t * np + i) = t < count ? load(dy, h.n - i) : Vec{};
      __builtin_prefetch(dy - C * h.D);
    }
}

// From gradients of q, f, k, v to those of the logits. df is overwritten.
void store_dx(const ChunkGrads& g, const Chunk& c, const Hgru2Head& h, int64_t np, int64_t first,
              int64_t count) {
  typedef float HalfVec __attribute__((vector_size(kVecBytes / 2), may_alias));
  typedef double DoubleVec __attribute__((vector_size(kVecBytes)));
  for (int64_t i = 0; i < np; i += kLanes) {
    DoubleVec sums[2] = {};  // of the bound's gradient
    for (int64_t t = 0; t < count; ++t) {
      const int64_t e = t * np + i, real = h.n - i;
      float* dx = h.dx + (first + t) * 3 * h.D + i;
      for (int part = 0; part < 3; ++part) __builtin_prefetch(dx + (part - 3 * C) * h.D, 1);
      const bool reset = h.reset && h.reset[first + t];  // its gate was not used
      const Vec gate = (reset ? Vec{} : at(g.df + e)) - at(g.dk + e);
      store(dx, at(g.dq + e) * at(c.q_slope + e), real);
      store(dx + h.D, gate * at(c.f_slope + e), real);
      store(dx + 2 * h.D,
            h.input_act == Act::identity ? at(g.dv + e) : at(g.dv + e) * at(c.v_slope + e), real);
      at(g.df + e) = gate * at(c.rest + e);
      const HalfVec* halves = reinterpret_cast<const HalfVec*>(g.df + e);
      for (int part = 0; part < 2; ++part)
        sums[part] += __builtin_convertvector(halves[part], DoubleVec);
    }
    for (int64_t l = 0; l < std::min<int64_t>(kLanes, h.n - i); ++l)
      h.dbound[i + l] += sums[l / (kLanes / 2)][l % (kLanes / 2)];
  }
}

int64_t backward_floats(int64_t n) {
  return BackwardWork::size(padded(n));
}

void backward_head(const Hgru2Head& h, float* work) {
  const int64_t n = h.n, np = padded(n);
  Cursor cursor{work};
  BackwardWork w(cursor, np);
  unpack(w.dS, h.dhT, n, np);
  for (int64_t block = (h.T - 1) / kBlock; block >= 0; --block) {
    const int64_t start = block * kBlock;
    const int64_t chunks = std::min(kChunks, (h.T - start + C - 1) / C);
    const auto count = [&](int64_t i) { return std::min<int64_t>(C, h.T - start - i * C); };
    unpack(w.dST, h.saved + block * h.saved_step, n, np);  // dST is free here
    transpose(w.ST[0], w.dST, np, np);
    for (int64_t i = 0; i < chunks; ++i) {
      const Chunk& c = w.chunks[i];
      Loader<true>{c, h, np, start + i * C, count(i), -kBlock * 3 * h.D}.all();
      if (i + 1 == chunks) break;
      std::copy_n(w.ST[i], np * np, w.ST[i + 1]);
      product<Start::column_scaled>(w.ST[i + 1], {c.v, 1, np}, c.kr, np, np, C, c.P);
    }
    for (int64_t i = chunks - 1; i >= 0; --i) {
      load_dy(w.g, h, np, start + i * C, count(i));
      chunk_backward(w, w.chunks[i], w.ST[i], n, np);
      store_dx(w.g, w.chunks[i], h, np, start + i * C, count(i));
    }
  }
  if (h.dh0) pack(h.dh0, w.dS, n, np);
}

}  // namespace

inline namespace HGRN_ISA {
Hgru2Chunks hgru2_chunks() {
  return {forward_floats, backward_floats, forward_head, backward_head};
}
}  // namespace HGRN_ISA

}  // namespace hgrn::cpu

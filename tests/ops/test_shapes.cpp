// Every operation but the sequence kernels, at odd, even and wide shapes, against loops in double:
// outputs start poisoned, two runs must give equal bits, and dropout masks must be those of
// core/rng.h. Backends vectorise by width and cut rows into blocks; each such path is met here.
// Twin of kernels/*; tests/ops/test_hgru2.cpp has the sequence kernel.
#include <algorithm>
#include <array>
#include <optional>

#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

// A stream of numbers from the project's own generator.
class Random {
 public:
  explicit Random(uint64_t key) : key_(key) {}
  int64_t below(int64_t n) { return int64_t(philox(key_, 0, n_++).v[0]) % n; }
  double normal() {
    const Philox p = philox(key_, 1, n_++);
    const double u = (double(p.v[0]) + 1) / 4294967297.0, a = double(p.v[1]) / 4294967296.0;
    return std::sqrt(-2 * std::log(u)) * std::cos(2 * M_PI * a);
  }
  Values normals(int64_t n, double scale = 1, double mean = 0) {
    Values h(static_cast<size_t>(n));
    for (double& v : h) v = mean + scale * normal();
    return h;
  }

 private:
  uint64_t key_, n_ = 0;
};

double round_to(DType t, double v) {
  if (t == DType::bf16) {  // once, to nearest even: 8 bits of significand
    int exponent;
    const double significand = std::frexp(v, &exponent);
    return std::ldexp(std::nearbyint(std::ldexp(significand, 8)), exponent - 8);
  }
  if (t == DType::f32) return double(float(v));
  return v;
}

// A test's tensors on a backend.
class Buffers : public Bench {
 public:
  explicit Buffers(Ops& ops) : Bench(ops) {}
  Tensor make(Shape shape, DType dtype) { return empty(shape, dtype); }
  // Rounds `values` to dtype, in place too, so that a reference sees what the backend sees.
  Tensor put(Values& values, Shape shape, DType dtype) {
    const Tensor t = make(shape, dtype);
    write(t, values);
    return t;
  }
  void write(Tensor t, Values& values) {
    if (t.dtype == DType::i32) {
      const std::vector<int32_t> host(values.begin(), values.end());
      ops().upload(t, host.data());
      return;
    }
    for (double& v : values) v = round_to(t.dtype, v);
    fill(t, values);
  }
  void poison(Tensor t) {
    const std::vector<char> ones(t.bytes(), char(0xff));  // NaN in every type
    ops().upload(t, ones.data());
  }
  std::vector<char> raw(Tensor t) {
    std::vector<char> bytes(t.bytes());
    ops().download(bytes.data(), t);
    return bytes;
  }
};

void report(bool ok, const std::string& what) {
  INFO(what);
  CHECK(ok);
}

struct Output {
  const char* name;
  Tensor t;
  std::optional<Values> start;  // what the operation adds to; else the tensor is poisoned with NaN
  Values want;
  double tolerance;
};

// Runs an operation twice from the same start: equal bits, and close to what the loops gave.
void compare(Ops& ops, Buffers& buffers, const std::string& op, const std::string& shape,
             std::vector<Output> outputs, const std::function<void()>& call) {
  std::vector<std::vector<char>> first;
  for (int run = 0; run < 2; ++run) {
    for (Output& o : outputs) {
      if (o.start)
        buffers.write(o.t, *o.start);
      else
        buffers.poison(o.t);
    }
    call();
    for (size_t i = 0; i < outputs.size(); ++i) {
      Output& o = outputs[i];
      std::vector<char> raw = buffers.raw(o.t);
      const std::string what =
          fmt::format("{} {} {}: {}", op, name_of(ops.act_dtype()), shape, o.name);
      if (run == 0) {
        const double error = relative_error(buffers.read(o.t), o.want);
        report(error <= o.tolerance,
               fmt::format("{}: error {:.3g}, allowed {:.3g}", what, error, o.tolerance));
        first.push_back(std::move(raw));
      } else {
        report(raw == first[i], what + ": two runs differ");
      }
    }
  }
}

struct Tolerance {
  double act, f32;  // of outputs in act_dtype (bf16 rounds by up to 2^-8 of it), of f32 outputs
};
Tolerance tolerance(const Ops& ops) {
  return ops.act_dtype() == DType::bf16 ? Tolerance{4e-3, 5e-5} : Tolerance{5e-6, 5e-6};
}

double kept(const Dropout& d, int64_t row, int64_t col) {  // the factor of core/rng.h
  if (d.p == 0) return 1;
  const Philox bits = Dropout::bits(d.key(), d.row0 + row, col / 4);
  return uniform01(bits.v[col % 4]) >= d.p ? double(d.scale()) : 0.0;
}

Dropout some_dropout(float p) {
  Dropout d;
  d.p = p, d.seed = 11, d.step = 1234567, d.site = 5, d.row0 = (int64_t(1) << 33) + 17;
  return d;
}

void check_linear(Ops& ops, int64_t N, int64_t I, int64_t O, bool bias) {
  Buffers buffers(ops);
  Random random(uint64_t(N * 31 + I * 7 + O));
  const DType act = ops.act_dtype();
  Values x = random.normals(N * I), w = random.normals(O * I, 1 / std::sqrt(double(I)));
  Values b = random.normals(O), dy = random.normals(N * O);
  const Tensor tx = buffers.put(x, {N, I}, act), tw = buffers.put(w, {O, I}, act);
  const Tensor tb = buffers.put(b, {O}, act), tdy = buffers.put(dy, {N, O}, act);
  Values y(size_t(N * O)), dx(size_t(N * I), 0), dw0 = random.normals(O * I),
                                                 db0 = random.normals(O);
  for (double& v : dw0) v = float(v);
  for (double& v : db0) v = float(v);
  Values dw = dw0, db = db0;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t o = 0; o < O; ++o) {
      double sum = bias ? b[o] : 0;
      const double g = dy[n * O + o];
      db[o] += g;
      for (int64_t i = 0; i < I; ++i) {
        sum += x[n * I + i] * w[o * I + i];
        dx[n * I + i] += g * w[o * I + i];
        dw[o * I + i] += g * x[n * I + i];
      }
      y[n * O + o] = sum;
    }
  const Tolerance tol = tolerance(ops);
  const std::string shape = fmt::format("N={} I={} O={} bias={}", N, I, O, bias);
  const Tensor ty = buffers.make({N, O}, act), tdx = buffers.make({N, I}, act);
  const Tensor tdw = buffers.make({O, I}, DType::f32), tdb = buffers.make({O}, DType::f32);
  compare(ops, buffers, "linear_forward", shape, {{"y", ty, {}, y, tol.act}},
          [&] { ops.linear_forward(ty, tx, tw, bias ? tb : Tensor()); });
  compare(
      ops, buffers, "linear_backward", shape,
      {{"dx", tdx, {}, dx, tol.act}, {"dw", tdw, dw0, dw, tol.f32}, {"db", tdb, db0, db, tol.f32}},
      [&] { ops.linear_backward(tdx, tdw, tdb, tdy, tx, tw); });
}

struct NormReference {
  Values stats, y, dx, dw, db;  // dx without the residual's own gradient
};

NormReference norm_reference(const Values& x, const Values& w, const Values& b, const Values& dy,
                             int64_t N, int64_t D, bool layer, double eps) {
  NormReference r{Values(size_t(2 * N)), Values(size_t(N * D)), Values(size_t(N * D)),
                  Values(size_t(D), 0), Values(size_t(D), 0)};
  for (int64_t n = 0; n < N; ++n) {
    double mean = 0, variance = 0, along = 0, flat = 0;
    for (int64_t d = 0; layer && d < D; ++d) mean += x[n * D + d] / double(D);
    for (int64_t d = 0; d < D; ++d) variance += std::pow(x[n * D + d] - mean, 2) / double(D);
    const double rstd = 1 / std::sqrt(variance + eps);
    for (int64_t d = 0; d < D; ++d) {
      const double h = (x[n * D + d] - mean) * rstd, g = dy[n * D + d];
      r.y[n * D + d] = h * w[d] + b[d];
      r.dw[d] += g * h, r.db[d] += g;
      along += w[d] * g * h / double(D), flat += layer ? w[d] * g / double(D) : 0;
    }
    for (int64_t d = 0; d < D; ++d)
      r.dx[n * D + d] = rstd * (w[d] * dy[n * D + d] - (x[n * D + d] - mean) * rstd * along - flat);
    r.stats[2 * n] = mean, r.stats[2 * n + 1] = rstd;
  }
  return r;
}

void check_norm(Ops& ops, int64_t N, int64_t D, Norm kind, float p) {
  Buffers buffers(ops);
  Random random(uint64_t(N * 131 + D));
  const DType act = ops.act_dtype();
  const bool layer = kind == Norm::layer;
  const float eps = 1e-5f;
  const Dropout drop = some_dropout(p);
  Values x = random.normals(N * D, 1.5, 0.5), branch = random.normals(N * D);
  Values w = random.normals(D, 0.3, 1), b = random.normals(D), dy = random.normals(N * D);
  Values dsum = random.normals(N * D), dw0 = random.normals(D), db0 = random.normals(D);
  for (double& v : dw0) v = float(v);
  for (double& v : db0) v = float(v);
  const bool biased = layer || N == 33;
  if (!biased) b.assign(size_t(D), 0);
  const Tensor tx = buffers.put(x, {N, D}, act), tbranch = buffers.put(branch, {N, D}, act);
  const Tensor tw = buffers.put(w, {D}, DType::f32), tb = buffers.put(b, {D}, DType::f32);
  const Tensor tdy = buffers.put(dy, {N, D}, act), tdsum = buffers.put(dsum, {N, D}, act);
  const Tensor ty = buffers.make({N, D}, act), tsum = buffers.make({N, D}, act);
  const Tensor tdx = buffers.make({N, D}, act), tdbranch = buffers.make({N, D}, act);
  const Tensor tstats = buffers.make({N, 2}, DType::f32);
  const Tensor tdw = buffers.make({D}, DType::f32), tdb = buffers.make({D}, DType::f32);
  const Tensor bias = biased ? tb : Tensor(), dbias = biased ? tdb : Tensor();
  const Tolerance tol = tolerance(ops);
  const std::string shape = fmt::format("N={} D={} {} p={}", N, D, layer ? "layer" : "rms", p);

  const auto accumulated = [&](const Values& start, const Values& add) {
    Values total = start;
    for (size_t i = 0; i < total.size(); ++i) total[i] += add[i];
    return total;
  };
  // A row of one element has gradients that cancel to nothing: compare with what cancels.
  const double act_tol = D == 1 ? 1.0 : tol.act;
  if (p == 0) {
    NormReference r = norm_reference(x, w, b, dy, N, D, layer, eps);
    compare(ops, buffers, "norm_forward", shape,
            {{"y", ty, {}, r.y, D == 1 && layer ? 1e-3 : tol.act},
             {"stats", tstats, {}, r.stats, tol.f32}},
            [&] { ops.norm_forward(ty, tstats, tx, tw, bias, kind, eps); });
    std::vector<Output> outputs{{"dx", tdx, {}, r.dx, act_tol},
                                {"dw", tdw, dw0, accumulated(dw0, r.dw), tol.f32}};
    if (biased) outputs.push_back({"db", tdb, db0, accumulated(db0, r.db), tol.f32});
    compare(ops, buffers, "norm_backward", shape, outputs,
            [&] { ops.norm_backward(tdx, tdw, dbias, tdy, tx, tw, tstats, kind); });
  }
  Values sum = x;
  // Through float, as the backends: with a scale of 1/0.9 one element in a hundred is nearly a tie.
  for (int64_t i = 0; i < N * D; ++i)
    sum[i] = round_to(act, double(float(x[i] + branch[i] * kept(drop, i / D, i % D))));
  const NormReference r = norm_reference(sum, w, b, dy, N, D, layer, eps);
  compare(
      ops, buffers, "residual_norm_forward", shape,
      {{"sum", tsum, {}, sum, act == DType::bf16 ? 2e-4 : 1e-6},  // rare ties round elsewhere
       {"y", ty, {}, r.y, D == 1 && layer ? 1e-3 : tol.act},
       {"stats", tstats, {}, r.stats, 10 * tol.f32}},
      [&] { ops.residual_norm_forward(tsum, ty, tstats, tx, tbranch, tw, bias, kind, eps, drop); });
  Values dtotal = accumulated(dsum, r.dx), dbranch(size_t(N * D));
  for (int64_t i = 0; i < N * D; ++i)
    dbranch[i] = round_to(act, dtotal[i]) * kept(drop, i / D, i % D);
  std::vector<Output> outputs{{"dsum", tdsum, dsum, dtotal, D == 1 ? 2 * tol.act : tol.act},
                              {"dbranch", tdbranch, {}, dbranch, D == 1 ? 2 * tol.act : tol.act},
                              {"dw", tdw, dw0, accumulated(dw0, r.dw), 10 * tol.f32}};
  if (biased) outputs.push_back({"db", tdb, db0, accumulated(db0, r.db), tol.f32});
  compare(ops, buffers, "residual_norm_backward", shape, outputs, [&] {
    ops.residual_norm_backward(tdsum, tdbranch, tdw, dbias, tdy, tsum, tw, tstats, kind, drop);
  });
}

void check_glu(Ops& ops, int64_t N, int64_t F, Act act) {
  Buffers buffers(ops);
  Random random(uint64_t(N + F * 3));
  const DType t = ops.act_dtype();
  Values gu = random.normals(N * 2 * F, 2), dh = random.normals(N * F);
  gu[0] = 120, gu[size_t(N * 2 * F - 1)] = -3;  // far into saturation
  if (N > 1) gu[size_t(2 * F)] = -120;
  const Tensor tgu = buffers.put(gu, {N, 2 * F}, t), tdh = buffers.put(dh, {N, F}, t);
  Values h(size_t(N * F)), dgu(size_t(N * 2 * F));
  for (int64_t i = 0; i < N * F; ++i) {
    const int64_t at = i / F * 2 * F + i % F;
    const double g = gu[at], u = gu[at + F], s = 1 / (1 + std::exp(-g));
    const double a = act == Act::identity ? g : act == Act::silu ? g * s : s;
    const double slope = act == Act::identity ? 1
                         : act == Act::silu   ? s * (1 + g * (1 - s))
                                              : s * (1 - s);
    h[i] = a * u, dgu[at] = dh[i] * u * slope, dgu[at + F] = dh[i] * a;
  }
  const Tolerance tol = tolerance(ops);
  const std::string shape = fmt::format("N={} F={} act={}", N, F, int(act));
  const Tensor th = buffers.make({N, F}, t), tdgu = buffers.make({N, 2 * F}, t);
  compare(ops, buffers, "glu_forward", shape, {{"h", th, {}, h, tol.act}},
          [&] { ops.glu_forward(th, tgu, act); });
  compare(ops, buffers, "glu_backward", shape, {{"dgu", tdgu, {}, dgu, tol.act}},
          [&] { ops.glu_backward(tdgu, tdh, tgu, act); });
}

void check_embedding(Ops& ops, int64_t N, int64_t V, int64_t D, float p) {
  Buffers buffers(ops);
  Random random(uint64_t(N * 5 + D));
  const DType act = ops.act_dtype();
  const Dropout drop = some_dropout(p);
  const float scale = 3.25f;
  Values tokens(static_cast<size_t>(N));
  // Three tokens take two thirds of the rows: runs that span many pieces.
  for (double& t : tokens)
    t = double(random.below(3) ? random.below(3) * (V - 1) / 2 : random.below(V));
  Values w = random.normals(V * D), dx = random.normals(N * D), dw0 = random.normals(V * D);
  for (double& v : dw0) v = float(v);
  const Tensor tt = buffers.put(tokens, {N}, DType::i32), tw = buffers.put(w, {V, D}, act);
  const Tensor tdx = buffers.put(dx, {N, D}, act);
  Values x(size_t(N * D)), dw = dw0;
  for (int64_t i = 0; i < N * D; ++i) {
    const int64_t at = int64_t(tokens[i / D]) * D + i % D;
    const double k = kept(drop, i / D, i % D);
    x[i] = scale * w[at] * k;
    dw[at] += scale * dx[i] * k;
  }
  const Tolerance tol = tolerance(ops);
  const std::string shape = fmt::format("N={} V={} D={} p={}", N, V, D, p);
  const Tensor tx = buffers.make({N, D}, act), tdw = buffers.make({V, D}, DType::f32);
  compare(ops, buffers, "embedding_forward", shape, {{"x", tx, {}, x, tol.act}},
          [&] { ops.embedding_forward(tx, tt, tw, scale, drop); });
  compare(ops, buffers, "embedding_backward", shape, {{"dw", tdw, dw0, dw, tol.f32}},
          [&] { ops.embedding_backward(tdw, tdx, tt, scale, drop); });
}

// Every place that applies a mask must drop exactly the elements that core/rng.h says.
void check_masks(Ops& ops, int64_t N, int64_t D) {
  Buffers buffers(ops);
  const DType act = ops.act_dtype();
  const Dropout drop = some_dropout(0.3f);
  Values ones(size_t(N * D), 1), zeros(size_t(N * D), 0), tokens(static_cast<size_t>(N)),
      unit(size_t(D), 1);
  for (int64_t n = 0; n < N; ++n) tokens[n] = double(N - 1 - n);
  const Tensor tones = buffers.put(ones, {N, D}, act), tzeros = buffers.put(zeros, {N, D}, act);
  const Tensor tt = buffers.put(tokens, {N}, DType::i32),
               tunit = buffers.put(unit, {D}, DType::f32);
  const Tensor x = buffers.make({N, D}, act), sum = buffers.make({N, D}, act);
  const Tensor y = buffers.make({N, D}, act), stats = buffers.make({N, 2}, DType::f32);
  const Tensor dsum = buffers.put(ones, {N, D}, act), dbranch = buffers.make({N, D}, act);
  const Tensor dw = buffers.put(zeros, {N, D}, DType::f32), dnorm = buffers.make({D}, DType::f32);
  ops.embedding_forward(x, tt, tones, 1, drop);
  ops.embedding_backward(dw, tones, tt, 1, drop);
  ops.residual_norm_forward(sum, y, stats, tzeros, tones, tunit, Tensor(), Norm::rms, 1e-5f, drop);
  ops.zero(dnorm);
  ops.residual_norm_backward(dsum, dbranch, dnorm, Tensor(), tzeros, sum, tunit, stats, Norm::rms,
                             drop);
  const std::pair<const char*, Tensor> results[] = {{"embedding_forward", x},
                                                    {"embedding_backward", dw},
                                                    {"residual_norm_forward", sum},
                                                    {"residual_norm_backward", dbranch}};
  for (const auto& [name, t] : results) {
    const Values got = buffers.read(t);
    int64_t wrong = 0;
    for (int64_t i = 0; i < N * D; ++i) {
      const int64_t row = name == results[1].first ? N - 1 - i / D : i / D;  // dw is by token
      wrong += got[i] != round_to(t.dtype, kept(drop, row, i % D));
    }
    report(wrong == 0, fmt::format("{} {} N={} D={}: {} mask elements differ", name, name_of(act),
                                   N, D, wrong));
  }
}

void check_cross_entropy(Ops& ops, int64_t N, int64_t V, int64_t Vp, bool backward) {
  Buffers buffers(ops);
  Random random(uint64_t(N + V));
  const DType act = ops.act_dtype();
  const double scale = 1.0 / 1024;
  Values logits = random.normals(N * Vp, 3), targets(static_cast<size_t>(N)),
         nll(static_cast<size_t>(N), 0);
  for (double& t : targets) t = double(random.below(V));
  targets[0] = double(V - 1);
  if (N > 2) targets[2] = -1;
  const Tensor tl = buffers.put(logits, {N, Vp}, act), tt = buffers.put(targets, {N}, DType::i32);
  Values grad(size_t(N * Vp), 0);
  for (int64_t n = 0; n < N; ++n) {
    if (targets[n] < 0) continue;
    double top = -1e300, sum = 0;
    for (int64_t v = 0; v < V; ++v) top = std::max(top, logits[n * Vp + v]);
    for (int64_t v = 0; v < V; ++v) sum += std::exp(logits[n * Vp + v] - top);
    nll[n] = std::log(sum) + top - logits[n * Vp + int64_t(targets[n])];
    for (int64_t v = 0; v < V; ++v)
      grad[n * Vp + v] =
          scale * (std::exp(logits[n * Vp + v] - top) / sum - (v == int64_t(targets[n])));
  }
  const std::string shape = fmt::format("N={} V={} Vp={}", N, V, Vp);
  const Tensor tnll = buffers.make({N}, DType::f32);
  compare(ops, buffers, backward ? "cross_entropy" : "cross_entropy (no grad)", shape,
          {{"nll", tnll, {}, nll, 2e-6},
           {"logits", tl, logits, backward ? grad : logits, tolerance(ops).act}},
          [&] { ops.cross_entropy(tnll, tl, tt, V, backward, scale); });
}

void check_update(Ops& ops, int64_t n, bool ok) {
  Buffers buffers(ops);
  Random random(static_cast<uint64_t>(n));
  const AdamStep step{3e-4, 0.9, 0.95, 1e-8, 0.1, 7};
  Values w = random.normals(n), m = random.normals(n, 0.1), v = random.normals(n),
         g = random.normals(n);
  for (double& x : v) x = 0.01 * x * x;
  const Tensor tg = buffers.put(g, {n}, DType::f32), tw = buffers.put(w, {n}, DType::f32);
  const Tensor tm = buffers.put(m, {n}, DType::f32), tv = buffers.put(v, {n}, DType::f32);
  const bool separate = ops.act_dtype() == DType::bf16;
  const Tensor tc = separate ? buffers.make({n}, DType::bf16) : tw;
  Values zero{0}, poison{ok ? 1.0 : std::nan("")}, sums{0};
  double squares = 2.5, total = 2.5;
  for (double x : g) squares += x * x, total += x;
  const Tensor tsq = buffers.make({1}, DType::f64), tsum = buffers.make({1}, DType::f64);
  const Tensor tnll = buffers.put(poison, {1}, DType::f64),
               tcontrol = buffers.make({3}, DType::f64);
  const std::string shape = fmt::format("n={} ok={}", n, ok);
  const Values start{2.5};
  compare(ops, buffers, "square_sum", shape, {{"out", tsq, start, {squares}, 1e-13}},
          [&] { ops.square_sum(tsq, tg); });
  compare(ops, buffers, "sum", shape, {{"out", tsum, start, {total}, 1e-10}},
          [&] { ops.sum(tsum, tg); });
  const double norm = std::sqrt(squares), factor = std::min(1.0, 1.0 / (norm + 1e-6));
  compare(ops, buffers, "clip_control", shape,
          {{"control", tcontrol, {}, {norm, factor, ok ? 1.0 : 0.0}, 1e-13}},
          [&] { ops.clip_control(tcontrol, tsq, tnll, 1.0); });
  Values w1 = w, m1 = m, v1 = v, c0(size_t(n), 0.5), c1 = c0;
  for (int64_t i = 0; ok && i < n; ++i) {
    const double gi = g[i] * factor;
    m1[i] = step.beta1 * m[i] + (1 - step.beta1) * gi;
    v1[i] = step.beta2 * v[i] + (1 - step.beta2) * gi * gi;
    const double mh = m1[i] / (1 - std::pow(step.beta1, step.t)),
                 vh = v1[i] / (1 - std::pow(step.beta2, step.t));
    w1[i] = w[i] - step.lr * (mh / (std::sqrt(vh) + step.eps) + step.weight_decay * w[i]);
    c1[i] = round_to(DType::bf16, w1[i]);
  }
  std::vector<Output> outputs{
      {"master", tw, w, w1, 1e-7}, {"m", tm, m, m1, 1e-6}, {"v", tv, v, v1, 1e-6}};
  if (separate) outputs.push_back({"compute", tc, c0, c1, 2e-4});
  compare(ops, buffers, "adamw", shape, outputs,
          [&] { ops.adamw(tw, tc, tm, tv, tg, step, tcontrol); });
}

void check_lower_bound(Ops& ops, int64_t L, int64_t D) {
  Buffers buffers(ops);
  Random random(uint64_t(L * 7 + D));
  Values gamma = random.normals(L * D), dbeta = random.normals(L * D),
         dgamma0 = random.normals(L * D);
  for (double& v : dgamma0) v = float(v);
  const Tensor tg = buffers.put(gamma, {L, D}, DType::f32),
               tdb = buffers.put(dbeta, {L, D}, DType::f32);
  Values beta(size_t(L * D), 0), dgamma = dgamma0;
  for (int64_t d = 0; d < D; ++d) {
    double sum = 0, dot = 0;
    Values s(static_cast<size_t>(L)), ds(static_cast<size_t>(L), 0);
    for (int64_t l = 0; l < L; ++l) sum += s[l] = std::exp(gamma[l * D + d]);
    for (int64_t l = 0; l < L; ++l) s[l] /= sum;
    for (int64_t l = 1; l < L; ++l) beta[l * D + d] = beta[(l - 1) * D + d] + s[l];
    for (int64_t j = 1; j < L; ++j)
      for (int64_t l = j; l < L; ++l) ds[j] += dbeta[l * D + d];
    for (int64_t l = 0; l < L; ++l) dot += s[l] * ds[l];
    for (int64_t l = 0; l < L; ++l) dgamma[l * D + d] += s[l] * (ds[l] - dot);
  }
  const std::string shape = fmt::format("L={} D={}", L, D);
  const Tensor tbeta = buffers.make({L, D}, DType::f32), tdg = buffers.make({L, D}, DType::f32);
  compare(ops, buffers, "lower_bound_forward", shape, {{"beta", tbeta, {}, beta, 1e-6}},
          [&] { ops.lower_bound_forward(tbeta, tg); });
  compare(ops, buffers, "lower_bound_backward", shape, {{"dgamma", tdg, dgamma0, dgamma, 1e-6}},
          [&] { ops.lower_bound_backward(tdg, tdb, tg); });
}

void check_memory(Ops& ops) {
  Buffers buffers(ops);
  Random random(3);
  const DType types[] = {DType::f32, DType::f64, DType::bf16};
  for (const int64_t n : {int64_t(1), int64_t(1001), int64_t(700001)})  // the last is not staged
    for (const DType from : types)
      for (const DType to : types) {
        Values values = random.normals(n), want;
        const Tensor src = buffers.put(values, {n}, from), dst = buffers.make({n}, to);
        for (double v : values) want.push_back(round_to(to, v));
        compare(ops, buffers, "cast", fmt::format("{} to {}", name_of(from), name_of(to)),
                {{"dst", dst, {}, want, 0}}, [&] { ops.cast(dst, src); });
        if (from == to)
          compare(ops, buffers, "copy", name_of(from), {{"dst", dst, {}, want, 0}},
                  [&] { ops.copy(dst, src); });
        compare(ops, buffers, "zero", name_of(to), {{"dst", dst, {}, Values(want.size(), 0), 0}},
                [&] { ops.zero(dst); });
      }
}

void check_all(Ops& ops, bool small) {
  check_memory(ops);
  for (const int64_t D : {1, 7, 192, 768, 1365}) check_lower_bound(ops, D == 1 ? 1 : 15, D);
  for (const int64_t n : {1, 7, 1000, 4099, 300000})
    for (const bool ok : {true, false}) check_update(ops, n, ok);
  using Shape3 = std::array<int64_t, 3>;
  std::vector<Shape3> linear = {
      {1, 1, 1}, {33, 7, 1}, {33, 192, 7}, {1, 768, 192}, {33, 1365, 192}};
  if (!small)
    linear.insert(linear.end(), {{1000, 768, 192},
                                 {200, 192, 2730},
                                 {33, 64, 50304},
                                 {1000, 1365, 192},
                                 {500, 192, 1365},
                                 {512, 546, 2730}});
  for (const auto& [N, I, O] : linear)
    for (const bool bias : {false, true}) check_linear(ops, N, I, O, bias);
  std::vector<int64_t> rows = {1, 33};
  if (!small) rows.push_back(1000);
  for (const int64_t N : rows)
    for (const int64_t D : {1, 7, 192, 512, 768, 1024, 1365, 2048, 2560, 8192, 8200}) {
      if (N * D > 1 << 20 || (small && N * D > 30000)) continue;
      for (const Norm kind : {Norm::rms, Norm::layer})
        for (const float p : {0.0f, 0.1f}) check_norm(ops, N, D, kind, p);
    }
  if (!small)
    check_norm(ops, 5000, 768, Norm::rms, 0), check_norm(ops, 5000, 512, Norm::layer, 0.1f);
  for (const int64_t N : rows)
    for (const int64_t F : {1, 7, 192, 768, 1365})
      for (const Act act : {Act::identity, Act::silu, Act::sigmoid}) check_glu(ops, N, F, act);
  for (const int64_t N : rows)
    for (const int64_t D : {1, 7, 192, 768})
      for (const float p : {0.0f, 0.1f}) check_embedding(ops, N, 257, D, p);
  if (!small) check_embedding(ops, 5000, 50304, 64, 0);
  for (const int64_t D : {7, 192, 1365}) check_masks(ops, 33, D);
  for (const bool backward : {true, false}) {
    for (const int64_t N : rows) check_cross_entropy(ops, N, 257, 384, backward);
    check_cross_entropy(ops, 5, 257, 257, backward);
    check_cross_entropy(ops, small ? 3 : 33, 50257, 50304, backward);
    if (!small) check_cross_entropy(ops, 5, 151000, 151040, backward);  // longer than shared memory
  }
}

void check_backends(bool small) {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    const std::unique_ptr<Ops> ops = backend.open();
    check_all(*ops, small);
  }
}

}  // namespace

TEST_CASE("shapes: every operation at odd and even widths", "[ops][small]") {
  check_backends(/*small=*/true);
}

TEST_CASE("shapes: every operation at the widths of real models", "[ops][gpu]") {
  if (!cuda_available()) {
    WARN("skipped: no GPU is visible, or this build has no CUDA");
    return;
  }
  check_backends(/*small=*/false);
}

TEST_CASE("shapes: what a GPU cannot do is refused", "[ops][gpu]") {
  if (!cuda_available()) {
    WARN("skipped: no GPU is visible, or this build has no CUDA");
    return;
  }
  const std::unique_ptr<Ops> ops = make_cuda_ops(DType::bf16, 0);
  CHECK_THROWS_AS(ops->alloc(size_t(1) << 44, "a far too large tensor"), Error);
  CHECK_THROWS_AS(make_cuda_ops(DType::f64, 0), Error);
}

// Every operation of a layer but the sequence kernels, at odd, even and wide shapes, against loops
// in double: outputs start poisoned, two runs must give equal bits, and dropout masks must be those
// of core/rng.h. Backends vectorise by width and cut rows into blocks; each such path is met here.
// Twin of kernels/*; test_shapes_update.cpp has updates and copies, test_hgru2.cpp the recurrence.
#include <algorithm>
#include <array>

#include "ops/shape_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

double kept(const Dropout& d, int64_t row, int64_t col) {  // the factor of core/rng.h
  if (d.p == 0) return 1;
  return double(d.factor(d.key(), d.row0 + row, col));
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
  // A row of one column is its own scale: its dx is a difference of numbers up to 1/sqrt(eps).
  const double dtol = D == 1 ? 4 * tol.act : tol.act;
  std::vector<Output> outputs{{"dsum", tdsum, dsum, dtotal, dtol},
                              {"dbranch", tdbranch, {}, dbranch, dtol},
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
    INFO(name << " " << name_of(act) << " N=" << N << " D=" << D);
    CHECK(wrong == 0);
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

void check_layers(Ops& ops, bool small) {
  using Shape3 = std::array<int64_t, 3>;
  std::vector<Shape3> linear = {
      {1, 1, 1}, {33, 7, 1}, {33, 192, 7}, {1, 768, 192}, {33, 1365, 192}};
  if (!small)
    linear.insert(linear.end(), {{1000, 768, 192},
                                 {200, 192, 2730},
                                 {33, 64, 50304},
                                 {1000, 1365, 192},
                                 {500, 192, 1365},
                                 {300, 8, 50304},  // column sums: a CTA has all rows
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
  if (!small) {  // several rows for every group of warps, which has several warps at 2048
    check_norm(ops, 2501, 2048, Norm::rms, 0), check_norm(ops, 2501, 2048, Norm::layer, 0.1f);
    check_norm(ops, 20001, 192, Norm::rms, 0.1f);
    check_norm(ops, 5001, 512, Norm::layer, 0.1f);  // as the 44M model has them
  }
  for (const int64_t N : rows)
    for (const int64_t F : {1, 7, 192, 768, 1365})
      for (const Act act : {Act::identity, Act::silu, Act::sigmoid}) check_glu(ops, N, F, act);
  for (const int64_t N : rows)
    for (const int64_t D : {1, 7, 192, 768})
      for (const float p : {0.0f, 0.1f}) check_embedding(ops, N, 257, D, p);
  if (!small) {
    check_embedding(ops, 5000, 50304, 64, 0);
    check_embedding(ops, 20001, 50304, 8, 0.1f);  // a warp of the sort has several batches of rows
    check_embedding(ops, 1000, 151000, 8, 0);     // more ranges of tokens than multiprocessors
    check_embedding(ops, 70001, 50304, 8, 0.1f);  // as many rows as a step has
  }
  for (const int64_t D : {7, 192, 1365}) check_masks(ops, 33, D);
  for (const bool backward : {true, false}) {
    for (const int64_t N : rows) check_cross_entropy(ops, N, 257, 384, backward);
    check_cross_entropy(ops, 5, 257, 257, backward);
    check_cross_entropy(ops, small ? 3 : 33, 50257, 50304, backward);
    if (!small) check_cross_entropy(ops, 5, 151000, 151040, backward);  // longer than shared memory
  }
}

}  // namespace

TEST_CASE("shapes: operations of a layer at odd and even widths", "[ops][small]") {
  check_backends([](Ops& ops) { check_layers(ops, /*small=*/true); });
}

TEST_CASE("shapes: operations of a layer at the widths of real models", "[ops][gpu]") {
  if (!cuda_available()) {
    WARN("skipped: no GPU is visible, or this build has no CUDA");
    return;
  }
  check_backends([](Ops& ops) { check_layers(ops, /*small=*/false); });
}

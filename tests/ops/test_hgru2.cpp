// Twin of kernels/*/hgru2*. Truth here is a recurrence of its own, in double, as the paper writes
// it.
#include <algorithm>

#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

struct Regime {
  const char* name;
  double mean, sd, bound;  // of the forget logits; lower bound
};
constexpr Regime kRegimes[] = {
    {"normal", 0, 1, 0},          {"wide", 0, 4, 0},        {"forgetful", -4, 3, 0},
    {"very forgetful", -9, 3, 0}, {"f to 0", -30, 10, 0},   {"keep", 4, 2, 0},
    {"bound 0.03", -3, 3, 0.03},  {"bound 0.5", 0, 2, 0.5}, {"bound 0.95", -3, 3, 0.95}};

struct Case {
  SeqShape s;
  SeqOptions o;
  Values x, bound, h0, dhT, dy;  // bound, h0 and dhT may be empty: absent
  std::vector<uint8_t> reset;    // may be empty
};

Case make_case(SeqShape s, const Regime& g, unsigned seed) {
  Case c;
  c.s = s;
  c.o.query_scale = 0.5f;
  c.x = normals(size_t(s.N() * 3 * s.D), seed);
  const Values gate = normals(size_t(s.N() * s.D), seed + 1, g.mean, g.sd);
  for (int64_t r = 0; r < s.N(); ++r)
    for (int64_t d = 0; d < s.D; ++d)
      c.x[size_t(r * 3 * s.D + s.D + d)] = gate[size_t(r * s.D + d)];
  c.x = exact(c.x);
  c.bound = exact(Values(size_t(s.D), g.bound));
  c.h0 = exact(normals(size_t(s.D * s.B * s.n), seed + 2));
  c.dhT = exact(normals(size_t(s.D * s.B * s.n), seed + 3));
  c.dy = exact(normals(size_t(s.N() * s.D), seed + 4));
  return c;
}

struct Result {
  Values y, hT, dx, dbound, dh0;
};

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}
double act(Act a, double x) {
  return a == Act::identity ? x : a == Act::sigmoid ? sigmoid(x) : x * sigmoid(x);
}
double act_slope(Act a, double x) {
  const double s = sigmoid(x), rest = sigmoid(-x);
  return a == Act::identity ? 1 : a == Act::sigmoid ? s * rest : s + x * s * rest;
}

// One head of one row, both directions, all states kept.
void truth_head(const Case& c, int64_t b, int64_t head, Result& out, double* dbound) {
  const int64_t n = c.s.n, D = c.s.D, T = c.s.T, nn = n * n;
  const auto at = [&](int64_t t, int64_t part, int64_t i) {
    return size_t((b * T + t) * 3 * D + part * D + head * n + i);
  };
  const auto yat = [&](int64_t t, int64_t j) { return size_t((b * T + t) * D + head * n + j); };
  const auto low = [&](int64_t i) { return c.bound.empty() ? 0 : c.bound[size_t(head * n + i)]; };
  const auto resets = [&](int64_t t) {
    return !c.reset.empty() && c.reset[size_t(b * T + t)] != 0;
  };
  const double scale = double(c.o.query_scale);
  const auto base = size_t((b * c.s.H() + head) * nn);
  std::vector<Values> h(size_t(T + 1), Values(size_t(nn), 0));
  if (!c.h0.empty()) h[0].assign(c.h0.begin() + int64_t(base), c.h0.begin() + int64_t(base) + nn);
  const auto f = [&](int64_t t, int64_t i) {
    return low(i) + (1 - low(i)) * sigmoid(c.x[at(t, 1, i)]);
  };
  const auto k = [&](int64_t t, int64_t i) { return (1 - low(i)) * sigmoid(-c.x[at(t, 1, i)]); };
  const auto q = [&](int64_t t, int64_t i) {
    return scale * act(c.o.output_act, c.x[at(t, 0, i)]);
  };
  const auto v = [&](int64_t t, int64_t j) { return act(c.o.input_act, c.x[at(t, 2, j)]); };
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t i = 0; i < n; ++i) {
      const double fi = f(t, i), ki = k(t, i), qi = q(t, i);
      for (int64_t j = 0; j < n; ++j) {
        const auto e = size_t(i * n + j);
        h[size_t(t + 1)][e] = (resets(t) ? 0 : fi * h[size_t(t)][e]) + ki * v(t, j);
        out.y[yat(t, j)] += qi * h[size_t(t + 1)][e];
      }
    }
  }
  Values dh(size_t(nn), 0);
  if (!c.dhT.empty()) dh.assign(c.dhT.begin() + int64_t(base), c.dhT.begin() + int64_t(base) + nn);
  for (int64_t t = T - 1; t >= 0; --t) {
    Values dv(size_t(n), 0);
    for (int64_t i = 0; i < n; ++i) {
      double dq = 0, dk = 0, df = 0;
      const double fi = f(t, i), ki = k(t, i), qi = q(t, i);
      for (int64_t j = 0; j < n; ++j) {
        const auto e = size_t(i * n + j);
        const double dyj = c.dy[yat(t, j)];
        dh[e] += qi * dyj;
        dq += h[size_t(t + 1)][e] * dyj;
        dk += dh[e] * v(t, j);
        if (!resets(t)) df += dh[e] * h[size_t(t)][e];
        dv[size_t(j)] += dh[e] * ki;
        dh[e] = resets(t) ? 0 : fi * dh[e];
      }
      const double xf = c.x[at(t, 1, i)];
      out.dx[at(t, 0, i)] = dq * scale * act_slope(c.o.output_act, c.x[at(t, 0, i)]);
      out.dx[at(t, 1, i)] = (1 - low(i)) * sigmoid(xf) * sigmoid(-xf) * (df - dk);
      dbound[size_t(head * n + i)] += sigmoid(-xf) * (df - dk);
    }
    for (int64_t j = 0; j < n; ++j)
      out.dx[at(t, 2, j)] = dv[size_t(j)] * act_slope(c.o.input_act, c.x[at(t, 2, j)]);
  }
  std::copy(h[size_t(T)].begin(), h[size_t(T)].end(), out.hT.begin() + int64_t(base));
  std::copy(dh.begin(), dh.end(), out.dh0.begin() + int64_t(base));
}

Result truth(const Case& c) {
  const auto state = size_t(c.s.B * c.s.D * c.s.n);
  Result r{Values(size_t(c.s.N() * c.s.D)), Values(state), Values(size_t(c.s.N() * 3 * c.s.D)),
           Values(size_t(c.s.D)), Values(state)};
  std::vector<Values> dbound(size_t(c.s.B), Values(size_t(c.s.D)));
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t b = 0; b < c.s.B; ++b)
    for (int64_t head = 0; head < c.s.H(); ++head)
      truth_head(c, b, head, r, dbound[size_t(b)].data());
  for (const Values& row : dbound)
    for (size_t d = 0; d < row.size(); ++d) r.dbound[d] += row[d];
  return r;
}

SeqInputs inputs(Bench& b, const Case& c, SeqKernel& kernel) {
  SeqInputs in;
  in.x = b.real({c.s.N(), 3 * c.s.D}, c.x);
  if (!c.bound.empty()) in.bound = b.real({c.s.D}, c.bound, b->master_dtype());
  if (!c.h0.empty()) in.h0 = b.real(kernel.state_shape(c.s), c.h0, b->stat_dtype());
  if (!c.reset.empty()) in.reset = b.bytes(c.reset);
  return in;
}

Result run(Bench& b, const Case& c, const char* name = "hgru2") {
  SeqKernel& kernel = b->seq(name);
  REQUIRE(kernel.packed_width(c.s) == 3 * c.s.D);
  const SeqInputs in = inputs(b, c, kernel);
  std::vector<Tensor> saved;
  for (const SavedSpec& spec : kernel.saved(c.s)) saved.push_back(b.empty(spec.shape, spec.dtype));
  Tensor y = b.empty({c.s.N(), c.s.D}, b->act_dtype());
  Tensor hT = b.empty(kernel.state_shape(c.s), b->stat_dtype());
  kernel.forward(c.s, c.o, y, hT, in, saved);
  SeqGrads out;
  out.dx = b.empty({c.s.N(), 3 * c.s.D}, b->act_dtype());
  out.dbound = b.zeros({c.s.D}, b->master_dtype());
  out.dh0 = b.empty(kernel.state_shape(c.s), b->stat_dtype());
  const Tensor dhT =
      c.dhT.empty() ? Tensor() : b.real(kernel.state_shape(c.s), c.dhT, b->stat_dtype());
  kernel.backward(c.s, c.o, out, b.real({c.s.N(), c.s.D}, c.dy), dhT, in, saved);
  return {b.read(y), b.read(hT), b.read(out.dx), b.read(out.dbound), b.read(out.dh0)};
}

// The three gradients in dx apart, each against its own scale.
Values part_of(const Values& dx, const SeqShape& s, int64_t part) {
  Values out;
  for (int64_t r = 0; r < s.N(); ++r) {
    const auto from = dx.begin() + (r * 3 + part) * s.D;
    out.insert(out.end(), from, from + s.D);
  }
  return out;
}

void check_close(const Result& got, const Result& want, const SeqShape& s, double tolerance) {
  CHECK(relative_error(got.y, want.y) < tolerance);
  CHECK(relative_error(got.hT, want.hT) < tolerance);
  for (int64_t part = 0; part < 3; ++part) {
    INFO("dx of "
         << "qfi"[part]);
    CHECK(relative_error(part_of(got.dx, s, part), part_of(want.dx, s, part)) < tolerance);
  }
  CHECK(relative_error(got.dbound, want.dbound) < tolerance);
  CHECK(relative_error(got.dh0, want.dh0) < tolerance);
}

void check_everywhere(const Case& c) {
  const Result want = truth(c);
  for (const Backend& backend : backends()) {
    INFO(backend.name << ", T " << c.s.T << ", n " << c.s.n);
    Bench b(backend.open());
    check_close(run(b, c), want, c.s, backend.recurrent);
  }
}

std::vector<uint8_t> some_resets(int64_t rows) {
  std::vector<uint8_t> reset(size_t(rows), 0);
  for (int64_t r : {int64_t(0), int64_t(5), int64_t(6), int64_t(16), int64_t(47), int64_t(150)})
    if (r < rows) reset[size_t(r)] = 1;
  return reset;
}

}  // namespace

TEST_CASE("hgru2: plain and chunked in every gate regime", "[ops]") {
  for (const Regime& g : kRegimes) {
    INFO(g.name);
    Case c = make_case({2, 65, 64, 32}, g, 1);
    const Result want = truth(c);
    Bench ref(reference_ops());
    check_close(run(ref, c), want, c.s, 1e-12);
    for (const Backend& backend : backends()) {
      INFO(backend.name);
      Bench b(backend.open());
      check_close(run(b, c), want, c.s, backend.recurrent);
    }
    Bench plain(make_cpu_ops(DType::f32));
    INFO("hgru2_plain fp32");
    check_close(run(plain, c, "hgru2_plain"), want, c.s, 2e-6);
  }
}

// The bars of the bf16 tensor-core kernels (docs/benchmarks.md): rms error over rms reference, all
// heads together.
TEST_CASE("hgru2: bf16 on a GPU, every gate regime and length", "[ops][gpu]") {
  if (!cuda_available()) {
    WARN("skipped: no GPU is visible, or this build has no CUDA");
    return;
  }
  Bench b(make_cuda_ops(DType::bf16, 0));
  for (int64_t n : {128, 64})
    for (int64_t T : {1, 63, 64, 65, 200, 2048})
      for (const Regime& g : kRegimes) {
        INFO(g.name << ", T " << T << ", n " << n);
        Case c = make_case({2, T, 2 * n, n}, g, unsigned(n + T));
        if (T == 200) c.reset = some_resets(c.s.N());
        const Result want = truth(c), got = run(b, c);
        const double bar = T >= 2048 ? 3e-3 : 5e-3, bound_bar = T >= 2048 ? 4e-3 : 5e-3;
        CHECK(relative_error(got.y, want.y) < bar);
        for (int64_t part = 0; part < 3; ++part) {
          INFO("dx of "
               << "qfi"[part]);
          CHECK(relative_error(part_of(got.dx, c.s, part), part_of(want.dx, c.s, part)) < bar);
        }
        CHECK(relative_error(got.dbound, want.dbound) < bound_bar);
        CHECK(relative_error(got.hT, want.hT) < 5e-3);
        // Where nearly all is forgotten dh0 is what underflow leaves of dhT: dhT is the measure.
        Values difference = got.dh0, scale = c.dhT;
        for (size_t i = 0; i < difference.size(); ++i) difference[i] -= want.dh0[i];
        CHECK(std::sqrt(dot(difference, difference) / dot(scale, scale)) < 5e-3);
      }
}

// 140 heads on 132 multiprocessors of a Hopper: some heads lie on two, and their states pass
// between them.
TEST_CASE("hgru2: bf16 on a GPU, more heads than multiprocessors", "[ops][gpu]") {
  if (!cuda_available()) {
    WARN("skipped: no GPU is visible, or this build has no CUDA");
    return;
  }
  Bench b(make_cuda_ops(DType::bf16, 0));
  Case c = make_case({20, 200, 7 * 128, 128}, {"mixed", 1, 3, 0.1}, 11);
  c.reset = some_resets(c.s.N());
  const Result want = truth(c), got = run(b, c), again = run(b, c);
  CHECK(relative_error(got.y, want.y) < 5e-3);
  CHECK(relative_error(got.hT, want.hT) < 5e-3);
  for (int64_t part = 0; part < 3; ++part)
    CHECK(relative_error(part_of(got.dx, c.s, part), part_of(want.dx, c.s, part)) < 5e-3);
  CHECK(relative_error(got.dbound, want.dbound) < 5e-3);
  CHECK(got.y == again.y);
  CHECK(got.dx == again.dx);
}

TEST_CASE("hgru2: every length and head size", "[ops]") {
  for (int64_t n : {1, 4, 8, 20, 32, 64, 128})
    for (int64_t T : {1, 15, 16, 17, 63, 64, 65, 200}) {
      const int64_t B = n == 128 || T == 200 ? 1 : 2, D = n == 128 ? 128 : 2 * n;
      Case c = make_case({B, T, D, n}, {"mixed", 1, 3, 0.1}, unsigned(100 * n + T));
      if (T % 2) c.reset = some_resets(c.s.N());
      check_everywhere(c);
    }
}

TEST_CASE("hgru2: the widest head", "[ops]") {
  check_everywhere(make_case({1, 33, 256, 256}, {"wide", 0, 4, 0}, 2));
}

TEST_CASE("hgru2: activations", "[ops]") {
  for (Act output : {Act::identity, Act::silu, Act::sigmoid})
    for (Act input : {Act::identity, Act::silu, Act::sigmoid}) {
      Case c = make_case({1, 20, 32, 16}, {"normal", 0, 1, 0}, 3);
      c.o.output_act = output;
      c.o.input_act = input;
      check_everywhere(c);
    }
}

TEST_CASE("hgru2: absent bound, states and resets mean zero", "[ops]") {
  Case c = make_case({2, 21, 32, 16}, {"normal", 0, 1, 0}, 4);
  Case zeros = c;
  c.bound.clear(), c.h0.clear(), c.dhT.clear();
  zeros.h0.assign(zeros.h0.size(), 0), zeros.dhT.assign(zeros.dhT.size(), 0);
  zeros.reset.assign(size_t(c.s.N()), 0);
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    const Result absent = run(b, c), given = run(b, zeros);
    CHECK(relative_error(absent.y, given.y) < 1e-7);
    CHECK(relative_error(absent.dx, given.dx) < 1e-7);
  }
  check_everywhere(c);
}

TEST_CASE("hgru2: gradients against central differences", "[ops]") {
  Case c = make_case({2, 19, 8, 4}, {"normal", 0, 1, 0.2}, 5);
  c.reset = some_resets(c.s.N());
  Bench b(reference_ops());
  const Result r = run(b, c);
  const auto check_input = [&](Values Case::*member, const Values& grad) {
    const auto loss = [&](const Values& at) {
      Case moved = c;
      moved.*member = at;
      Bench own(reference_ops());
      SeqKernel& kernel = own->seq("hgru2");
      Tensor y = own.empty({c.s.N(), c.s.D}, DType::f64);
      Tensor hT = own.empty(kernel.state_shape(c.s), DType::f64);
      kernel.forward(moved.s, moved.o, y, hT, inputs(own, moved, kernel), {});
      return dot(own.read(y), c.dy) + dot(own.read(hT), c.dhT);
    };
    CHECK(relative_error(grad, numeric_gradient(loss, c.*member)) < kGradientTolerance);
  };
  check_input(&Case::x, r.dx);
  check_input(&Case::bound, r.dbound);
  check_input(&Case::h0, r.dh0);
}

TEST_CASE("hgru2: a row cut in two, with the state carried, is one row", "[ops]") {
  const Case c = make_case({1, 90, 64, 32}, {"keep", 2, 2, 0.1}, 6);
  for (const Backend& backend : backends())
    for (int64_t cut : {1, 16, 37, 64}) {
      INFO(backend.name << ", cut at " << cut);
      Bench b(backend.open());
      SeqKernel& kernel = b->seq("hgru2");
      const Result whole = run(b, c);
      SeqInputs in = inputs(b, c, kernel);
      const Tensor x = in.x, state = in.h0;  // updated in place
      Tensor y = b.empty({c.s.N(), c.s.D}, b->act_dtype());
      SeqShape first = c.s, second = c.s;
      first.T = cut, second.T = c.s.T - cut;
      in.x = x.slice(0, first.T);
      kernel.forward(first, c.o, y.slice(0, first.T), state, in, {});
      in.x = x.slice(first.T, second.T);
      kernel.forward(second, c.o, y.slice(first.T, second.T), state, in, {});
      CHECK(relative_error(b.read(y), whole.y) < backend.recurrent);
      CHECK(relative_error(b.read(state), whole.hT) < backend.recurrent);
    }
}

TEST_CASE("hgru2: steps equal forward", "[ops]") {
  Case c = make_case({3, 18, 64, 32}, {"normal", 0, 2, 0.1}, 7);
  c.reset = some_resets(c.s.N());
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    SeqKernel& kernel = b->seq("hgru2");
    const Result whole = run(b, c);
    SeqShape one = c.s;
    one.T = 1;
    Tensor h = b.real(kernel.state_shape(one), c.h0, b->stat_dtype());
    Values y(whole.y.size());
    for (int64_t t = 0; t < c.s.T; ++t) {
      Case token = c;
      token.s = one;
      token.x.clear(), token.reset.clear(), token.h0.clear();
      for (int64_t row = 0; row < c.s.B; ++row) {
        const auto from = c.x.begin() + (row * c.s.T + t) * 3 * c.s.D;
        token.x.insert(token.x.end(), from, from + 3 * c.s.D);
        token.reset.push_back(c.reset[size_t(row * c.s.T + t)]);
      }
      Tensor out = b.empty({c.s.B, c.s.D}, b->act_dtype());
      kernel.step(one, c.o, out, h, inputs(b, token, kernel));
      const Values got = b.read(out);
      for (int64_t row = 0; row < c.s.B; ++row)
        std::copy_n(got.begin() + row * c.s.D, c.s.D, y.begin() + (row * c.s.T + t) * c.s.D);
    }
    CHECK(relative_error(y, whole.y) < backend.recurrent);
    CHECK(relative_error(b.read(h), whole.hT) < backend.recurrent);
  }
}

TEST_CASE("hgru2: the same call gives the same bits", "[ops]") {
  const Case c = make_case({4, 70, 64, 32}, {"normal", 0, 1, 0.1}, 8);
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    const Result first = run(b, c), second = run(b, c);
    CHECK(first.y == second.y);
    CHECK(first.dx == second.dx);
    CHECK(first.dbound == second.dbound);
    CHECK(first.dh0 == second.dh0);
  }
}

TEST_CASE("hgru2: a NaN logit or lower bound reaches the output", "[ops]") {
  for (int64_t n : {32, 64, 128})  // on a GPU: kernels without tensor cores, with, and of Hopper
    for (Act act : {Act::identity, Act::silu})
      for (int64_t part : {0, 1, 2, 3}) {
        Case c = make_case({1, 40, n, n}, {"normal", 0, 1, 0}, 9);
        c.o.input_act = c.o.output_act = act;
        if (part < 3)
          c.x[size_t(3 * 3 * c.s.D + part * c.s.D + 7)] = NAN;
        else
          c.bound[7] = NAN;
        for (const Backend& backend : backends()) {
          INFO(backend.name << ", n " << n << ", act " << int(act) << ", part " << part);
          Bench b(backend.open());
          const Result r = run(b, c);
          double sum = 0;
          for (double v : r.y) sum += v;
          CHECK(std::isnan(sum));
        }
      }
}

TEST_CASE("hgru2: unknown kernels and wrong shapes are refused", "[ops]") {
  Bench b(reference_ops());
  CHECK_THROWS_AS(b->seq("nothing"), Error);
  const Case c = make_case({1, 4, 8, 4}, kRegimes[0], 10);
  SeqKernel& kernel = b->seq("hgru2");
  SeqInputs in = inputs(b, c, kernel);
  Tensor y = b.empty({4, 8}, DType::f64);
  CHECK_THROWS_AS(kernel.forward({1, 5, 8, 4}, c.o, y, {}, in, {}), Error);
  CHECK_THROWS_AS(kernel.forward({1, 4, 8, 3}, c.o, y, {}, in, {}), Error);
}

// Twin of kernels/*/norm.*
#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

constexpr int64_t kN = 37, kD = 10;  // more rows than partial sums; not a multiple of 4
constexpr float kEps = 1e-5f;

struct Inputs {
  Values x = exact(normals(kN * kD, 1, 0.5)), branch = exact(normals(kN * kD, 2)),
         w = exact(normals(kD, 3, 1, 0.3)), b = exact(normals(kD, 4)),
         dy = exact(normals(kN * kD, 5)), dsum = exact(normals(kN * kD, 6));
};

struct Result {
  Values sum, y, stats;
};

Result plain(Bench& bench, const Inputs& in, Norm kind, bool bias = true) {
  Tensor y = bench.empty({kN, kD}, bench->act_dtype());
  Tensor stats = bench.empty({kN, 2}, bench->stat_dtype());
  bench->norm_forward(y, stats, bench.real({kN, kD}, in.x),
                      bench.real({kD}, in.w, bench->master_dtype()),
                      bias ? bench.real({kD}, in.b, bench->master_dtype()) : Tensor(), kind, kEps);
  return {{}, bench.read(y), bench.read(stats)};
}

Result residual(Bench& bench, const Inputs& in, Norm kind, const Dropout& drop) {
  Tensor sum = bench.real({kN, kD}, in.x), y = bench.empty({kN, kD}, bench->act_dtype());
  Tensor stats = bench.empty({kN, 2}, bench->stat_dtype());
  bench->residual_norm_forward(sum, y, stats, sum, bench.real({kN, kD}, in.branch),
                               bench.real({kD}, in.w, bench->master_dtype()),
                               bench.real({kD}, in.b, bench->master_dtype()), kind, kEps, drop);
  return {bench.read(sum), bench.read(y), bench.read(stats)};
}

struct Grads {
  Values dx, dbranch, dw, db;
};

Grads plain_backward(Bench& bench, const Inputs& in, Norm kind) {
  Tensor dx = bench.empty({kN, kD}, bench->act_dtype());
  Tensor dw = bench.zeros({kD}, bench->master_dtype()),
         db = bench.zeros({kD}, bench->master_dtype());
  const Result fwd = plain(bench, in, kind);
  bench->norm_backward(dx, dw, db, bench.real({kN, kD}, in.dy), bench.real({kN, kD}, in.x),
                       bench.real({kD}, in.w, bench->master_dtype()),
                       bench.real({kN, 2}, fwd.stats, bench->stat_dtype()), kind);
  return {bench.read(dx), {}, bench.read(dw), bench.read(db)};
}

Grads residual_backward(Bench& bench, const Inputs& in, Norm kind, const Dropout& drop) {
  Tensor dsum = bench.real({kN, kD}, in.dsum), dbranch = bench.empty({kN, kD}, bench->act_dtype());
  Tensor dw = bench.zeros({kD}, bench->master_dtype()),
         db = bench.zeros({kD}, bench->master_dtype());
  const Result fwd = residual(bench, in, kind, drop);
  bench->residual_norm_backward(dsum, dbranch, dw, db, bench.real({kN, kD}, in.dy),
                                bench.real({kN, kD}, fwd.sum),
                                bench.real({kD}, in.w, bench->master_dtype()),
                                bench.real({kN, 2}, fwd.stats, bench->stat_dtype()), kind, drop);
  return {bench.read(dsum), bench.read(dbranch), bench.read(dw), bench.read(db)};
}

using Loss = std::function<double(const Inputs&)>;

Values differences(const Inputs& in, Values Inputs::*member, const Loss& loss) {
  const auto f = [&](const Values& at) {
    Inputs moved = in;
    moved.*member = at;
    return loss(moved);
  };
  return numeric_gradient(f, in.*member);
}

const Dropout kDrop{0.3f, 7, 9, 1, 1000};

}  // namespace

TEST_CASE("norm: rows have the moments they should", "[ops]") {
  Bench bench(reference_ops());
  Inputs in;
  in.w.assign(kD, 1);
  for (Norm kind : {Norm::rms, Norm::layer}) {
    const Result r = plain(bench, in, kind, /*bias=*/false);
    for (size_t n = 0; n < kN; ++n) {
      double mean = 0, x_mean = 0, square = 0, x_square = 0;
      for (size_t d = 0; d < kD; ++d) x_mean += in.x[n * kD + d] / kD, mean += r.y[n * kD + d] / kD;
      if (kind == Norm::rms) x_mean = 0;
      for (size_t d = 0; d < kD; ++d) {
        square += r.y[n * kD + d] * r.y[n * kD + d] / kD;
        x_square += (in.x[n * kD + d] - x_mean) * (in.x[n * kD + d] - x_mean) / kD;
      }
      if (kind == Norm::layer) CHECK(std::fabs(mean) < 1e-12);
      CHECK(square == Approx(x_square / (x_square + double(kEps))).epsilon(1e-12));
      CHECK(r.stats[2 * n] == Approx(x_mean).margin(1e-12));
      CHECK(r.stats[2 * n + 1] == Approx(1 / std::sqrt(x_square + double(kEps))).epsilon(1e-12));
    }
  }
}

TEST_CASE("norm: gradients against central differences", "[ops]") {
  Bench bench(reference_ops());
  const Inputs in;
  for (Norm kind : {Norm::rms, Norm::layer}) {
    const Grads g = plain_backward(bench, in, kind);
    const Loss loss = [&](const Inputs& at) { return dot(plain(bench, at, kind).y, in.dy); };
    CHECK(relative_error(g.dx, differences(in, &Inputs::x, loss)) < kGradientTolerance);
    CHECK(relative_error(g.dw, differences(in, &Inputs::w, loss)) < kGradientTolerance);
    CHECK(relative_error(g.db, differences(in, &Inputs::b, loss)) < kGradientTolerance);
  }
}

TEST_CASE("residual norm: gradients against central differences", "[ops]") {
  Bench bench(reference_ops());
  const Inputs in;
  for (Norm kind : {Norm::rms, Norm::layer}) {
    for (const Dropout& drop : {Dropout{}, kDrop}) {
      const Grads g = residual_backward(bench, in, kind, drop);
      // The sum goes on as the residual stream, whose gradient arrives in dsum.
      const Loss loss = [&](const Inputs& at) {
        const Result r = residual(bench, at, kind, drop);
        return dot(r.y, in.dy) + dot(r.sum, in.dsum);
      };
      CHECK(relative_error(g.dx, differences(in, &Inputs::x, loss)) < kGradientTolerance);
      CHECK(relative_error(g.dbranch, differences(in, &Inputs::branch, loss)) < kGradientTolerance);
      CHECK(relative_error(g.dw, differences(in, &Inputs::w, loss)) < kGradientTolerance);
      CHECK(relative_error(g.db, differences(in, &Inputs::b, loss)) < kGradientTolerance);
    }
  }
}

TEST_CASE("residual norm: without dropout dbranch may be absent", "[ops]") {
  Bench bench(reference_ops());
  const Inputs in;
  const Result fwd = residual(bench, in, Norm::rms, {});
  Tensor dsum = bench.real({kN, kD}, in.dsum), dw = bench.zeros({kD}, DType::f64);
  bench->residual_norm_backward(dsum, {}, dw, {}, bench.real({kN, kD}, in.dy),
                                bench.real({kN, kD}, fwd.sum), bench.real({kD}, in.w),
                                bench.real({kN, 2}, fwd.stats), Norm::rms, {});
  const Grads expected = residual_backward(bench, in, Norm::rms, {});
  CHECK(bench.read(dsum) == expected.dx);
  CHECK(expected.dbranch == expected.dx);
  CHECK_THROWS_AS(bench->residual_norm_backward(
                      dsum, {}, dw, {}, bench.real({kN, kD}, in.dy), bench.real({kN, kD}, fwd.sum),
                      bench.real({kD}, in.w), bench.real({kN, 2}, fwd.stats), Norm::rms, kDrop),
                  Error);
}

TEST_CASE("norm: every backend against double", "[ops]") {
  const Inputs in;
  Bench ref(reference_ops());
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    for (Norm kind : {Norm::rms, Norm::layer}) {
      CHECK(relative_error(plain(b, in, kind).y, plain(ref, in, kind).y) < backend.elementwise);
      const Result r = residual(b, in, kind, kDrop), r_ref = residual(ref, in, kind, kDrop);
      CHECK(relative_error(r.sum, r_ref.sum) < backend.elementwise);
      CHECK(relative_error(r.y, r_ref.y) < backend.elementwise);
      CHECK(relative_error(r.stats, r_ref.stats) < backend.elementwise);
      const Grads g = plain_backward(b, in, kind), g_ref = plain_backward(ref, in, kind);
      CHECK(relative_error(g.dx, g_ref.dx) < backend.reduced);
      CHECK(relative_error(g.dw, g_ref.dw) < backend.reduced);
      CHECK(relative_error(g.db, g_ref.db) < backend.reduced);
      const Grads h = residual_backward(b, in, kind, kDrop);
      const Grads h_ref = residual_backward(ref, in, kind, kDrop);
      CHECK(relative_error(h.dx, h_ref.dx) < backend.reduced);
      CHECK(relative_error(h.dbranch, h_ref.dbranch) < backend.reduced);
      CHECK(relative_error(h.dw, h_ref.dw) < backend.reduced);
      CHECK(relative_error(h.db, h_ref.db) < backend.reduced);
    }
  }
}

// x^2 summed naively as E[x^2] - E[x]^2 would lose everything here.
TEST_CASE("norm: a large common offset costs no accuracy", "[ops]") {
  Inputs in;
  in.x = exact(normals(kN * kD, 9, 1000, 1));
  Bench ref(reference_ops());
  const Result expected = plain(ref, in, Norm::layer);
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    if (b->act_dtype() == DType::bf16) continue;  // 1000 +- 1 has no digits left there
    CHECK(relative_error(plain(b, in, Norm::layer).y, expected.y) < 1e-4);
  }
}

TEST_CASE("norm: a NaN reaches its row and no other", "[ops]") {
  for (const Backend& backend : backends()) {
    Bench b(backend.open());
    Inputs in;
    in.x[3 * kD + 5] = NAN;
    const Result r = plain(b, in, Norm::rms);
    CHECK(std::isnan(r.y[3 * kD]));
    CHECK(std::isfinite(r.y[2 * kD]));
    CHECK(std::isfinite(r.y[4 * kD]));
  }
}

// A fresh Grad is written whatever stood there, NaN included; the result is what adding to zeros
// gives. Of every operation that has gradients of weights, on every backend.
#include "environment.h"
#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

constexpr int64_t kN = 70, kI = 24, kO = 40;  // wide enough for the vector kernels
constexpr int64_t kOdd = 19;                  // and not

// The gradients that `run` leaves when they are fresh over NaN equal those added to zeros.
void check_fresh(Bench& b, const char* what, std::vector<Shape> shapes,
                 const std::function<void(const std::vector<Grad>&)>& run) {
  INFO(what);
  std::vector<Grad> fresh, added;
  for (const Shape& s : shapes) {
    fresh.emplace_back(b.real(s, Values(size_t(s.numel()), NAN), b->master_dtype()), true);
    added.emplace_back(b.zeros(s, b->master_dtype()));
  }
  run(fresh);
  run(added);
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Values want = b.read(added[i].to), got = b.read(fresh[i].to);
    CHECK(got == want);
    CHECK(dot(want, want) > 0);
  }
  run(fresh);  // and again over a result
  CHECK(b.read(fresh[0].to) == b.read(added[0].to));
}

void check_all(Bench& b, int64_t D) {
  const auto act = [&](int64_t rows, int64_t cols, unsigned seed) {
    return b.real({rows, cols}, exact(normals(size_t(rows * cols), seed)));
  };
  const auto master = [&](Shape s, unsigned seed) {
    return b.real(s, normals(size_t(s.numel()), seed), b->master_dtype());
  };
  const Tensor x = act(kN, D, 1), dy = act(kN, kO, 2), w = act(kO, D, 3), dx = act(kN, D, 4);
  check_fresh(b, "linear", {{kO, D}, {kO}},
              [&](const std::vector<Grad>& g) { b->linear_backward(dx, g[0], g[1], dy, x, w); });
  check_fresh(b, "bias alone", {{kO}},
              [&](const std::vector<Grad>& g) { b->linear_backward({}, {}, g[0], dy, {}, {}); });

  // With 192 columns the kernels that have the GLU in them, too. (Its product is "linear"'s.)
  for (const auto& [fused, O] : {std::pair{"0", kO}, std::pair{"1", int64_t(192)}}) {
    const EnvSetting setting("HGRN_FUSED_GLU", fused);
    const Tensor gu = act(kN, 2 * D, 11), h = act(kN, D, 12), down = act(O, D, 13);
    const Tensor dgu = act(kN, 2 * D, 14), dh = act(kN, D, 15), dout = act(kN, O, 16);
    check_fresh(b, "glu and linear", {{O}, {2 * D}}, [&](const std::vector<Grad>& g) {
      b->glu_linear_backward(dgu, dh, {}, g[0], g[1], dout, h, gu, down, Act::silu);
    });
  }

  const Tensor weight = master({D}, 5), stats = b.empty({kN, 2}, b->stat_dtype());
  const Tensor y = act(kN, D, 6), dnorm = act(kN, D, 7);
  for (Norm kind : {Norm::rms, Norm::layer}) {
    b->norm_forward(y, stats, x, weight, {}, kind, 1e-5f);
    check_fresh(b, "norm", {{D}, {D}}, [&](const std::vector<Grad>& g) {
      b->norm_backward(dx, g[0], g[1], dnorm, x, weight, stats, kind);
    });
    check_fresh(b, "residual norm", {{D}}, [&](const std::vector<Grad>& g) {
      b->residual_norm_backward(dx, {}, g[0], {}, dnorm, x, weight, stats, kind, {});
    });
  }
  const std::vector<int32_t> ids = integers(kN, 8, 0, 9);  // of 50 rows most have no token
  const std::vector<int32_t> same(kN, 48);                 // one run, cut twice
  for (const std::vector<int32_t>& tokens : {ids, same})
    check_fresh(b, "embedding", {{50, D}}, [&](const std::vector<Grad>& g) {
      b->embedding_backward(g[0], x, b.ids(tokens), 2, {});
    });
  const Tensor gamma = master({5, D}, 9), dbeta = master({5, D}, 10);
  check_fresh(b, "lower bounds", {{5, D}},
              [&](const std::vector<Grad>& g) { b->lower_bound_backward(g[0], dbeta, gamma); });
}

}  // namespace

TEST_CASE("fresh gradients are written, not added to", "[ops][gpu]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    check_all(b, kI);
    check_all(b, kOdd);
  }
  Bench b(reference_ops());
  check_all(b, kI);
}

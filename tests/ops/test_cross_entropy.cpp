// Twin of kernels/*/cross_entropy.*
#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

constexpr int64_t kN = 6, kV = 1037, kVp = 1040;  // longer than one block of columns, and padded
const std::vector<int32_t> kTargets = {0, 1036, -1, 17, 511, 512};

struct Result {
  Values nll, logits;
};

Result run(Bench& b, const Values& z, bool backward, double scale = 0.5) {
  Tensor logits = b.real({kN, kVp}, z), nll = b.empty({kN}, b->stat_dtype());
  b->cross_entropy(nll, logits, b.ids(kTargets), kV, backward, scale);
  return {b.read(nll), b.read(logits)};
}

Values random_logits(unsigned seed, double sd) {
  Values z = exact(normals(kN * kVp, seed, 0, sd));
  for (size_t r = 0; r < kN; ++r)  // what padding holds must not matter
    for (size_t v = kV; v < kVp; ++v) z[r * kVp + v] = 1e4;
  return z;
}

}  // namespace

TEST_CASE("cross-entropy: values by hand, padding and unscored rows", "[ops]") {
  Bench b(reference_ops());
  const Values z = random_logits(1, 3);
  const Result r = run(b, z, false), back = run(b, z, true);
  CHECK(r.logits == z);
  for (size_t n = 0; n < kN; ++n) {
    double total = 0;
    for (size_t v = 0; v < kV; ++v) total += std::exp(z[n * kVp + v]);
    const bool scored = kTargets[n] >= 0;
    const double nll = scored ? std::log(total) - z[n * kVp + size_t(kTargets[n])] : 0;
    CHECK(r.nll[n] == Approx(nll).epsilon(1e-12));
    CHECK(back.nll[n] == Approx(nll).epsilon(1e-12));
    for (size_t v = 0; v < kVp; ++v)
      if (v >= kV || !scored) CHECK(back.logits[n * kVp + v] == 0);
  }
}

TEST_CASE("cross-entropy: gradient against central differences", "[ops]") {
  Bench b(reference_ops());
  const Values z = random_logits(2, 1);
  const double scale = 0.37;
  const Values grad = run(b, z, true, scale).logits;
  // Row by row: the target, its neighbours and a few others; each row is its own function.
  Values numeric, analytic;
  for (size_t n = 0; n < kN; ++n)
    for (size_t v : {size_t(0), size_t(1), size_t(17), size_t(511), size_t(512), size_t(1036)}) {
      const auto loss = [&](const Values& at) {
        Values moved = z;
        moved[n * kVp + v] = at[0];
        return scale * run(b, moved, false).nll[n];
      };
      numeric.push_back(numeric_gradient(loss, {z[n * kVp + v]})[0]);
      analytic.push_back(grad[n * kVp + v]);
    }
  CHECK(relative_error(analytic, numeric) < kGradientTolerance);
}

TEST_CASE("cross-entropy: every backend against double", "[ops]") {
  Bench ref(reference_ops());
  for (double sd : {1.0, 30.0}) {
    const Values z = random_logits(3, sd);
    const Result expected = run(ref, z, true);
    for (const Backend& backend : backends()) {
      INFO(backend.name << ", logits of standard deviation " << sd);
      Bench b(backend.open());
      const Result r = run(b, z, true);
      CHECK(relative_error(r.nll, expected.nll) < backend.reduced);
      CHECK(relative_error(r.logits, expected.logits) < backend.reduced);
      CHECK(run(b, z, false).nll == run(b, z, false).nll);
    }
  }
}

// A GPU's CTA takes several rows here, and a row several pieces of shared memory.
TEST_CASE("cross-entropy: many long rows", "[ops]") {
  Bench ref(reference_ops());
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    const int64_t N = backend.bf16() ? 2000 : 24, V = 4100, Vp = 4224;
    const Values z = exact(normals(size_t(N * Vp), 5, 0, 2));
    std::vector<int32_t> targets = integers(size_t(N), 6, 0, int32_t(V - 1));
    targets[1] = targets[size_t(N - 1)] = -1, targets[2] = int32_t(V - 1);
    const auto results = [&](Bench& b) {
      Tensor logits = b.real({N, Vp}, z), nll = b.empty({N}, b->stat_dtype());
      b->cross_entropy(nll, logits, b.ids(targets), V, true, 1.0);
      return Result{b.read(nll), b.read(logits)};
    };
    Bench b(backend.open());
    const Result r = results(b), again = results(b), expected = results(ref);
    CHECK(relative_error(r.nll, expected.nll) < backend.reduced);
    CHECK(relative_error(r.logits, expected.logits) < backend.reduced);
    CHECK(r.nll == again.nll);
    CHECK(r.logits == again.logits);
    double padding = 0;
    for (int64_t n = 0; n < N; ++n)
      for (int64_t v = V; v < Vp; ++v) padding += std::abs(r.logits[size_t(n * Vp + v)]);
    CHECK(padding == 0);
  }
}

TEST_CASE("cross-entropy: huge logits neither overflow nor vanish", "[ops]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    Values z(kN * kVp, -3e4);
    for (size_t n = 0; n < kN; ++n) z[n * kVp + 17] = 3e4;
    const Result r = run(b, z, true, 1);
    CHECK(r.nll[3] == Approx(0).margin(1e-6));
    CHECK(r.nll[0] == Approx(6e4).epsilon(1e-2));
    CHECK(r.logits[0] == Approx(-1));
    CHECK(r.logits[17] == Approx(1));
  }
}

TEST_CASE("cross-entropy: NaN and infinity reach nll", "[ops]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    for (double bad : {double(NAN), double(INFINITY)})
      for (size_t at : {size_t(0), size_t(700), size_t(1036)}) {
        Values z = random_logits(4, 1);
        z[3 * kVp + at] = bad;
        CHECK_FALSE(std::isfinite(run(b, z, false).nll[3]));
        CHECK_FALSE(std::isfinite(run(b, z, true).nll[3]));
        CHECK(std::isfinite(run(b, z, true).nll[4]));
      }
  }
}

TEST_CASE("cross-entropy: a target outside the vocabulary is refused", "[ops]") {
  Bench b(reference_ops());
  Tensor nll = b.zeros({1}, DType::f64), logits = b.zeros({1, 16}, DType::f64);
  CHECK_THROWS_AS(b->cross_entropy(nll, logits, b.ids({12}), 12, false, 1), Error);
}

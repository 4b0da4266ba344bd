// Twin of kernels/*/glu.*; and the CPU's elementary functions.
#include <algorithm>
#include <limits>

#include "cpu/vec_math.h"
#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

constexpr int64_t kN = 5, kF = 37;
constexpr Act kActs[] = {Act::identity, Act::silu, Act::sigmoid};

Values forward(Bench& b, const Values& gu, Act act) {
  Tensor h = b.empty({kN, kF}, b->act_dtype());
  b->glu_forward(h, b.real({kN, 2 * kF}, gu), act);
  return b.read(h);
}

Values backward(Bench& b, const Values& dh, const Values& gu, Act act) {
  Tensor dgu = b.empty({kN, 2 * kF}, b->act_dtype());
  b->glu_backward(dgu, b.real({kN, kF}, dh), b.real({kN, 2 * kF}, gu), act);
  return b.read(dgu);
}

double ulps(float got, double exact) {
  const float nearest = float(exact);
  const double unit = double(std::nextafter(nearest, INFINITY)) - double(nearest);
  return std::fabs(double(got) - exact) / unit;
}

}  // namespace

TEST_CASE("glu: values by hand", "[ops]") {
  Bench b(reference_ops());
  const Values gu = normals(kN * 2 * kF, 1, 0, 3);
  for (Act act : kActs) {
    const Values h = forward(b, gu, act);
    for (size_t r = 0; r < kN; ++r)
      for (size_t i = 0; i < kF; ++i) {
        const double g = gu[r * 2 * kF + i], u = gu[r * 2 * kF + kF + i];
        const double s = 1 / (1 + std::exp(-g));
        const double a = act == Act::identity ? g : act == Act::silu ? g * s : s;
        CHECK(h[r * kF + i] == Approx(a * u).epsilon(1e-14));
      }
  }
}

TEST_CASE("glu: gradient against central differences", "[ops]") {
  Bench b(reference_ops());
  const Values gu = normals(kN * 2 * kF, 2), dh = normals(kN * kF, 3);
  for (Act act : kActs) {
    const auto loss = [&](const Values& at) { return dot(forward(b, at, act), dh); };
    CHECK(relative_error(backward(b, dh, gu, act), numeric_gradient(loss, gu)) <
          kGradientTolerance);
  }
}

TEST_CASE("glu: every backend against double", "[ops]") {
  const Values gu = exact(normals(kN * 2 * kF, 4, 0, 4)), dh = exact(normals(kN * kF, 5));
  Bench ref(reference_ops());
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    for (Act act : kActs) {
      CHECK(relative_error(forward(b, gu, act), forward(ref, gu, act)) < backend.elementwise);
      CHECK(relative_error(backward(b, dh, gu, act), backward(ref, dh, gu, act)) <
            backend.elementwise);
    }
  }
}

TEST_CASE("vec_math: exp and sigmoid of float are within 2 and 4 ulp", "[ops]") {
  double worst_exp = 0, worst_sigmoid = 0;
  for (float x = -87.0f; x < 88.7f; x += 0.000917f) {
    worst_exp = std::max(worst_exp, ulps(cpu::exp_of(x), std::exp(double(x))));
    worst_sigmoid =
        std::max(worst_sigmoid, ulps(cpu::sigmoid_of(x), 1 / (1 + std::exp(-double(x)))));
  }
  INFO("exp " << worst_exp << " ulp, sigmoid " << worst_sigmoid << " ulp");
  CHECK(worst_exp < 2);
  CHECK(worst_sigmoid < 4);  // exp, one addition and one division
}

TEST_CASE("vec_math: limits", "[ops]") {
  constexpr float inf = std::numeric_limits<float>::infinity();
  CHECK(cpu::exp_of(0.0f) == 1.0f);
  CHECK(cpu::exp_of(-inf) == 0.0f);
  CHECK(cpu::exp_of(-1e30f) == 0.0f);
  CHECK(cpu::exp_of(inf) == inf);
  CHECK(cpu::exp_of(88.8f) == inf);
  CHECK(cpu::exp_of(88.7f) < inf);
  CHECK(std::fabs(double(cpu::exp_of(-100.0f)) - std::exp(-100.0)) < 2e-45);  // subnormal
  CHECK(std::isnan(cpu::exp_of(NAN)));
  CHECK(cpu::sigmoid_of(inf) == 1.0f);
  CHECK(cpu::sigmoid_of(-inf) == 0.0f);
  CHECK(std::isnan(cpu::sigmoid_of(NAN)));
}

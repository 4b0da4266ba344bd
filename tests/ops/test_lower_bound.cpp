// Twin of the lower bounds in kernels/*/elementwise.*
#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

constexpr int64_t kL = 5, kD = 7;

Values forward(Bench& b, const Values& gamma) {
  Tensor beta = b.empty({kL, kD}, b->master_dtype());
  b->lower_bound_forward(beta, b.real({kL, kD}, gamma, b->master_dtype()));
  return b.read(beta);
}

Values backward(Bench& b, const Values& dbeta, const Values& gamma) {
  Tensor dgamma = b.zeros({kL, kD}, b->master_dtype());
  b->lower_bound_backward(dgamma, b.real({kL, kD}, dbeta, b->master_dtype()),
                          b.real({kL, kD}, gamma, b->master_dtype()));
  return b.read(dgamma);
}

}  // namespace

TEST_CASE("lower bound: equal gamma gives l/L; layer 0 is unbounded; bounds grow", "[ops]") {
  Bench b(reference_ops());
  const Values equal = forward(b, Values(kL * kD, 3.0));
  const Values beta = forward(b, normals(kL * kD, 1, 0, 4));
  for (size_t d = 0; d < kD; ++d)
    for (size_t l = 0; l < kL; ++l) {
      CHECK(equal[l * kD + d] == Approx(double(l) / double(kL)));
      if (l == 0) CHECK(beta[d] == 0);
      if (l > 0) CHECK(beta[l * kD + d] >= beta[(l - 1) * kD + d]);
      CHECK(beta[l * kD + d] < 1);
    }
}

TEST_CASE("lower bound: gradient against central differences", "[ops]") {
  Bench b(reference_ops());
  const Values gamma = normals(kL * kD, 2), dbeta = normals(kL * kD, 3);
  const auto loss = [&](const Values& at) { return dot(forward(b, at), dbeta); };
  CHECK(relative_error(backward(b, dbeta, gamma), numeric_gradient(loss, gamma)) <
        kGradientTolerance);
}

TEST_CASE("lower bound: backward adds to what is there", "[ops]") {
  Bench b(reference_ops());
  const Values gamma = normals(kL * kD, 4), dbeta = normals(kL * kD, 5);
  Tensor dgamma = b.real({kL, kD}, gamma);
  b->lower_bound_backward(dgamma, b.real({kL, kD}, dbeta), b.real({kL, kD}, gamma));
  Values expected = backward(b, dbeta, gamma);
  for (size_t i = 0; i < expected.size(); ++i) expected[i] += gamma[i];
  CHECK(relative_error(b.read(dgamma), expected) < 1e-14);
}

TEST_CASE("lower bound: every backend against double", "[ops]") {
  const Values gamma = exact(normals(kL * kD, 6, 0, 3)), dbeta = exact(normals(kL * kD, 7));
  Bench ref(reference_ops());
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    CHECK(relative_error(forward(b, gamma), forward(ref, gamma)) < backend.elementwise);
    CHECK(relative_error(backward(b, dbeta, gamma), backward(ref, dbeta, gamma)) <
          backend.elementwise);
  }
}

// Twin of kernels/*/embedding.*
#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

const std::vector<int32_t> kTokens = {3, 0, 3, 6, 1, 3, 0};
constexpr int64_t kVocab = 7, kD = 70;  // wider than one backward task, not a multiple of 4
constexpr float kScale = 1.75f;

Dropout some_dropout() {
  return {0.25f, 11, 5, 2, 40};
}

Values forward(Bench& b, const Values& w, const Dropout& drop) {
  Tensor x = b.empty({int64_t(kTokens.size()), kD}, b->act_dtype());
  b->embedding_forward(x, b.ids(kTokens), b.real({kVocab, kD}, w), kScale, drop);
  return b.read(x);
}

Values backward(Bench& b, const Values& dx, const Dropout& drop) {
  Tensor dw = b.zeros({kVocab, kD}, b->master_dtype());
  b->embedding_backward(dw, b.real({int64_t(kTokens.size()), kD}, dx), b.ids(kTokens), kScale,
                        drop);
  return b.read(dw);
}

}  // namespace

TEST_CASE("embedding: rows of the table, scaled", "[ops]") {
  Bench b(reference_ops());
  const Values w = normals(kVocab * kD, 1);
  const Values x = forward(b, w, {});
  for (size_t r = 0; r < kTokens.size(); ++r)
    for (size_t d = 0; d < kD; ++d)
      CHECK(x[r * kD + d] == double(kScale) * w[size_t(kTokens[r]) * kD + d]);
}

TEST_CASE("embedding: gradient against central differences", "[ops]") {
  for (const Dropout& drop : {Dropout{}, some_dropout()}) {
    Bench b(reference_ops());
    const Values w = normals(kVocab * kD, 2), dx = normals(kTokens.size() * kD, 3);
    // The map is linear, so differences are exact with any step.
    const Values numeric =
        numeric_gradient([&](const Values& at) { return dot(forward(b, at, drop), dx); }, w, 0.5);
    CHECK(relative_error(backward(b, dx, drop), numeric) < kGradientTolerance);
  }
}

TEST_CASE("embedding: backward adds to what is there", "[ops]") {
  Bench b(reference_ops());
  const Values before = normals(kVocab * kD, 4), dx = normals(kTokens.size() * kD, 5);
  Tensor dw = b.real({kVocab, kD}, before);
  b->embedding_backward(dw, b.real({int64_t(kTokens.size()), kD}, dx), b.ids(kTokens), kScale, {});
  Values expected = backward(b, dx, {});
  for (size_t i = 0; i < expected.size(); ++i) expected[i] += before[i];
  CHECK(relative_error(b.read(dw), expected) < 1e-14);
}

TEST_CASE("embedding: every backend against double", "[ops]") {
  const Values w = exact(normals(kVocab * kD, 6)), dx = exact(normals(kTokens.size() * kD, 7));
  Bench ref(reference_ops());
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    CHECK(relative_error(forward(b, w, some_dropout()), forward(ref, w, some_dropout())) <
          backend.elementwise);
    CHECK(relative_error(backward(b, dx, some_dropout()), backward(ref, dx, some_dropout())) <
          backend.elementwise);
  }
}

TEST_CASE("embedding: a token outside the vocabulary is refused", "[ops]") {
  Bench b(reference_ops());
  Tensor x = b.empty({1, 4}, DType::f64), w = b.zeros({5, 4}, DType::f64);
  CHECK_THROWS_AS(b->embedding_forward(x, b.ids({5}), w, 1, {}), Error);
  CHECK_THROWS_AS(b->embedding_forward(x, b.ids({-1}), w, 1, {}), Error);
}

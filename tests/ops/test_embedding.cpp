// Twin of kernels/*/embedding.*
#include <algorithm>

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

// Runs of rows of one token whose lengths lie around those at which the GPU's kernel sums them in
// another way (pieces of 32 rows), at all places; of some tokens none. The rows lie in any order.
TEST_CASE("embedding: backward of runs of every length, by forward's order and by its own",
          "[ops][gpu]") {
  constexpr int32_t kTable = 70;
  const int lengths[] = {0, 1, 2, 5, 30, 31, 32, 33, 34, 62, 63, 64, 65, 66, 95, 96, 97, 200};
  for (const unsigned seed : {1u, 2u, 3u}) {
    std::vector<int32_t> tokens;
    const std::vector<int32_t> picks = integers(kTable, seed, 0, int32_t(std::size(lengths)) - 1);
    for (int32_t t = 0; t < kTable; ++t)
      tokens.insert(tokens.end(), size_t(lengths[size_t(picks[size_t(t)])]), t);
    std::shuffle(tokens.begin(), tokens.end(), std::mt19937_64(seed));
    const int64_t N = int64_t(tokens.size());
    for (const int64_t D : {8, 19, 136, 140, 768}) {
      const Values w = exact(normals(size_t(kTable * D), seed)),
                   dx = exact(normals(size_t(N * D), seed + 1)),
                   before = normals(size_t(kTable * D), seed + 2);
      const Dropout drop = D == 19 || seed == 2 ? some_dropout() : Dropout{};
      Bench ref(reference_ops());
      const Tensor sum = ref.zeros({kTable, D}, DType::f64);
      ref->embedding_backward(sum, ref.real({N, D}, dx), ref.ids(tokens), kScale, drop);
      const Values fresh = ref.read(sum);
      Values added = fresh;
      for (size_t i = 0; i < added.size(); ++i) added[i] += double(float(before[i]));
      for (const Backend& backend : backends()) {
        INFO(backend.name << ", N=" << N << " D=" << D << " seed " << seed);
        Bench b(backend.open());
        const Tensor ids = b.ids(tokens), tdx = b.real({N, D}, dx), tw = b.real({kTable, D}, w);
        const Tensor x = b.empty({N, D}, b->act_dtype());
        b->embedding_forward(x, ids, tw, kScale, drop);
        const Values alone = b.read(x);
        Tensor order;
        if (const int64_t size = b->embedding_order_size(N, kTable, D))
          order = b.ids(std::vector<int32_t>(size_t(size), -7));
        b->embedding_forward(x, ids, tw, kScale, drop, order);
        CHECK((b.read(x) == alone));

        const Tensor dw = b.empty({kTable, D}, b->master_dtype());
        const auto run = [&](bool is_fresh, Tensor with) {
          b.fill(dw, is_fresh ? Values(before.size(), NAN) : before);
          b->embedding_backward(Grad(dw, is_fresh), tdx, ids, kScale, drop, with);
          return b.read(dw);
        };
        const Values got = run(true, {}), sums = run(false, {});
        CHECK(relative_error(got, fresh) < 1e-6);  // fp32 on every backend: dx is exact in bf16
        CHECK(relative_error(sums, added) < 1e-6);
        for (int i = 0; i < 2; ++i) {  // the order serves several times
          CHECK((run(true, order) == got));
          CHECK((run(false, order) == sums));
        }
      }
    }
  }
}

TEST_CASE("embedding: a token outside the vocabulary is refused", "[ops]") {
  Bench b(reference_ops());
  Tensor x = b.empty({1, 4}, DType::f64), w = b.zeros({5, 4}, DType::f64);
  CHECK_THROWS_AS(b->embedding_forward(x, b.ids({5}), w, 1, {}), Error);
  CHECK_THROWS_AS(b->embedding_forward(x, b.ids({-1}), w, 1, {}), Error);
}

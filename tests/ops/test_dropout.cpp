// The masks of core/rng.h as the operations apply them: embedding and residual norm.
#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

constexpr int64_t kN = 64, kD = 94;  // the last eight columns of a row are cut

Dropout drop_with(float p, int64_t row0 = 0) {
  return {p, 1234, 17, 3, row0};
}

// The factors, seen through the embedding of a table of ones.
Values mask(Bench& b, int64_t rows, const Dropout& drop) {
  Tensor x = b.empty({rows, kD}, b->act_dtype());
  b->embedding_forward(x, b.ids(std::vector<int32_t>(size_t(rows), 0)),
                       b.real({1, kD}, Values(kD, 1)), 1, drop);
  return b.read(x);
}

// The same factors in the residual stream: x = 0, branch = 1.
Values residual_mask(Bench& b, const Dropout& drop) {
  Tensor sum = b.empty({kN, kD}, b->act_dtype()), y = b.empty({kN, kD}, b->act_dtype());
  b->residual_norm_forward(sum, y, b.empty({kN, 2}, b->stat_dtype()),
                           b.zeros({kN, kD}, b->act_dtype()), b.real({kN, kD}, Values(kN * kD, 1)),
                           b.real({kD}, Values(kD, 1), b->master_dtype()), {}, Norm::rms, 1e-5f,
                           drop);
  return b.read(sum);
}

}  // namespace

TEST_CASE("dropout: every element follows the definition in core/rng.h", "[ops]") {
  const Dropout drop = drop_with(0.3f, 555);
  Bench ref(reference_ops());
  const Values m = mask(ref, kN, drop);
  for (int64_t r = 0; r < kN; ++r)
    for (int64_t c = 0; c < kD; ++c) {
      const uint32_t word = philox<7>(drop.key(), uint64_t(555 + r), uint64_t(c / 8)).v[c % 8 / 2];
      const uint32_t bits = c % 2 ? word >> 16 : word & 0xffff;  // 0.3 in units of 2^-16: 19661
      const double expected = bits >= 19661 ? 65536.0f / (65536 - 19661) : 0;
      REQUIRE(m[size_t(r * kD + c)] == expected);
    }
  CHECK(residual_mask(ref, drop) == m);
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    const Values got = mask(b, kN, drop), residual = residual_mask(b, drop);
    CHECK(residual == got);
    for (size_t i = 0; i < m.size(); ++i) REQUIRE((got[i] == 0) == (m[i] == 0));
  }
}

TEST_CASE("dropout: step and row may come from the backend's memory", "[ops][gpu]") {
  const Dropout told = drop_with(0.3f, 555);
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    Dropout ticking = told;
    ticking.step = 0, ticking.row0 = 0;
    const Tensor clock = b.empty({16}, DType::u8);
    ticking.clock = static_cast<const int64_t*>(clock.data);
    for (int64_t step : {int64_t(17), int64_t(18)}) {
      const int64_t now[2] = {step, 555};
      b->upload(clock, now);
      Dropout same = told;
      same.step = uint64_t(step);
      CHECK(mask(b, kN, ticking) == mask(b, kN, same));
      CHECK(residual_mask(b, ticking) == residual_mask(b, same));
      Tensor dw[2];
      for (int i = 0; i < 2; ++i) {
        dw[i] = b.zeros({3, kD}, b->master_dtype());
        b->embedding_backward(dw[i], b.real({kN, kD}, Values(kN * kD, 1)),
                              b.ids(integers(kN, 1, 0, 2)), 1, i ? ticking : same);
      }
      CHECK(b.read(dw[0]) == b.read(dw[1]));
    }
    CHECK(mask(b, kN, ticking) != mask(b, kN, told));  // the clock stands at 18
  }
}

TEST_CASE("downloads that do not wait come in order, a few at a time", "[ops][gpu]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    const Tensor x = b.empty({3}, DType::f64);
    std::vector<int64_t> tickets;
    for (int i = 0; i < 20; ++i) {
      const double v[3] = {double(i), double(i) / 2, -1};
      b->upload(x, v);
      tickets.push_back(b->download_later(x));
    }
    double got[3];
    for (size_t i = 4; i < 20; ++i) {
      b->fetch(got, tickets[i]);
      CHECK(got[0] == double(i));
      b->fetch(got, tickets[i]);  // again
      CHECK(got[1] == double(i) / 2);
    }
    CHECK_THROWS_AS(b->fetch(got, tickets[3]), Error);
    CHECK_THROWS_AS(b->fetch(got, tickets.back() + 1), Error);
    CHECK_THROWS_AS(b->download_later(b.zeros({9}, DType::f64)), Error);
  }
}

TEST_CASE("dropout: rate and scale", "[ops]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    for (float p : {0.1f, 0.5f, 0.9f}) {
      const Values m = mask(b, kN, drop_with(p));
      double kept = 0, mean = 0;
      for (double v : m) kept += v != 0, mean += v;
      kept /= double(m.size()), mean /= double(m.size());
      const double sd = std::sqrt(double(p) * (1 - double(p)) / double(m.size()));
      CHECK(std::fabs(kept - (1 - double(p))) < 4 * sd);
      CHECK(std::fabs(mean - 1) < 5 * sd / (1 - double(p)) + 0.004);  // bf16 rounds 1/(1-p)
    }
    CHECK(mask(b, kN, drop_with(0)) == Values(kN * kD, 1));
  }
}

TEST_CASE("dropout: splitting the rows changes no mask", "[ops]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    const Values whole = mask(b, kN, drop_with(0.4f));
    Values parts = mask(b, 20, drop_with(0.4f));
    const Values rest = mask(b, kN - 20, drop_with(0.4f, 20));
    parts.insert(parts.end(), rest.begin(), rest.end());
    CHECK(parts == whole);
  }
}

TEST_CASE("dropout: step, site and seed each draw anew", "[ops]") {
  Bench b(reference_ops());
  const Values base = mask(b, kN, {0.5f, 1, 1, 1, 0});
  for (const Dropout& other :
       {Dropout{0.5f, 2, 1, 1, 0}, Dropout{0.5f, 1, 2, 1, 0}, Dropout{0.5f, 1, 1, 2, 0}}) {
    const Values m = mask(b, kN, other);
    double equal = 0;
    for (size_t i = 0; i < m.size(); ++i) equal += m[i] == base[i];
    CHECK(std::fabs(equal / double(m.size()) - 0.5) < 0.05);
  }
}

TEST_CASE("dropout: backward takes the forward's mask", "[ops]") {
  const Dropout drop = drop_with(0.4f, 77);
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    const Values m = mask(b, kN, drop);
    // dsum = 1 and dy = 0: dbranch is the mask itself.
    Tensor dsum = b.real({kN, kD}, Values(kN * kD, 1)), dbranch = b.empty({kN, kD}, b->act_dtype());
    b->residual_norm_backward(dsum, dbranch, b.zeros({kD}, b->master_dtype()), {},
                              b.zeros({kN, kD}, b->act_dtype()), b.real({kN, kD}, m),
                              b.real({kD}, Values(kD, 1), b->master_dtype()),
                              b.real({kN, 2}, Values(2 * kN, 1), b->stat_dtype()), Norm::rms, drop);
    CHECK(b.read(dbranch) == m);
    // Distinct tokens: row r of dw is the mask of row r.
    std::vector<int32_t> ids(kN);
    for (size_t i = 0; i < kN; ++i) ids[i] = int32_t(i);
    Tensor dw = b.zeros({kN, kD}, b->master_dtype());
    b->embedding_backward(dw, b.real({kN, kD}, Values(kN * kD, 1)), b.ids(ids), 1, drop);
    const Values got = b.read(dw);
    for (size_t i = 0; i < m.size(); ++i) REQUIRE((got[i] == 0) == (m[i] == 0));
  }
}

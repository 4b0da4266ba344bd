// Twin of kernels/*/sample.*
#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>

#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

// The specification in src/core/sampling.h, by sorting.
int32_t by_sorting(const std::vector<float>& x, const Sampling& s, int64_t row, int64_t step) {
  std::vector<int32_t> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return x[a] > x[b]; });
  if (s.greedy()) return order[0];
  const float top = x[order[0]];
  const auto weight = [&](int32_t id) {
    return sampling::weight_of(x[size_t(id)], top, 1.0f / s.temperature);
  };
  const auto mass = [&] {
    uint64_t sum = 0;
    for (int32_t id : order) sum += weight(id);
    return sum;
  };
  if (s.top_k > 0 && s.top_k < int64_t(x.size())) order.resize(size_t(s.top_k));
  if (s.top_p < 1) {
    const uint64_t need = sampling::nucleus_mass(mass(), s.top_p);
    uint64_t sum = 0;
    size_t n = 0;
    while (sum < need) sum += weight(order[n++]);
    order.resize(n);
  }
  uint64_t left = sampling::draw(mass(), s.seed, row, step);
  std::sort(order.begin(), order.end());
  for (int32_t id : order) {
    if (left < weight(id)) return id;
    left -= weight(id);
  }
  return -1;
}

struct Case {
  int64_t B, V, Vp;
  std::vector<float> logits;  // (B,Vp)
};

Case random_case(int64_t B, int64_t V, int64_t Vp, unsigned seed, bool coarse) {
  Case c{B, V, Vp, {}};
  for (double x : normals(size_t(B * Vp), seed, 0, 3)) {
    // bf16 has these values exactly, and many of them are equal.
    c.logits.push_back(coarse ? float(std::round(x * 4) / 4) : float(x));
  }
  for (int64_t b = 0; b < B; ++b)
    for (int64_t i = V; i < Vp; ++i) c.logits[size_t(b * Vp + i)] = 1e30f;  // not of the vocabulary
  return c;
}

Values wide(const std::vector<float>& v) {
  return {v.begin(), v.end()};
}

std::vector<int32_t> read_ids(Bench& b, Tensor t) {
  std::vector<int32_t> out(size_t(t.numel()));
  b->download(out.data(), t);
  return out;
}

// Draws `rounds` tokens a row and checks each against sorting.
void check_against_sorting(std::unique_ptr<Ops> ops, const Case& c, const Sampling& s, int rounds) {
  Bench b(std::move(ops));
  const Tensor logits = b.real({c.B, c.Vp}, wide(c.logits));
  const Values stored = b.read(logits);  // what the backend's type made of them
  const std::vector<float> held(stored.begin(), stored.end());
  const Tensor tokens = b.zeros({c.B}, DType::i32), step = b.zeros({c.B}, DType::i32);
  const Tensor history = b.zeros({3, c.B}, DType::i32);
  std::vector<std::vector<int32_t>> drawn;
  for (int i = 0; i < rounds; ++i) {
    b->sample(tokens, history, {}, step, logits, c.V, s);
    drawn.push_back(read_ids(b, tokens));
    for (int64_t r = 0; r < c.B; ++r) {
      const auto row = held.begin() + r * c.Vp;
      const std::vector<float> x(row, row + c.V);
      REQUIRE(drawn.back()[size_t(r)] == by_sorting(x, s, s.row0 + r, i));
    }
  }
  CHECK(read_ids(b, step) == std::vector<int32_t>(size_t(c.B), rounds));
  const std::vector<int32_t> ring = read_ids(b, history);
  for (int i = std::max(0, rounds - 3); i < rounds; ++i)
    for (int64_t r = 0; r < c.B; ++r)
      CHECK(ring[size_t(i % 3 * c.B + r)] == drawn[size_t(i)][size_t(r)]);
}

std::vector<Sampling> settings() {
  std::vector<Sampling> all;
  for (const auto& [temperature, top_k, top_p] :
       {std::tuple{1.0f, 0, 1.0}, std::tuple{0.0f, 0, 1.0}, std::tuple{0.7f, 1, 0.5},
        std::tuple{1.3f, 40, 1.0}, std::tuple{0.8f, 0, 0.9}, std::tuple{1.0f, 50, 0.95},
        std::tuple{2.0f, 100000, 0.999999}, std::tuple{0.01f, 7, 1e-9}, std::tuple{50.0f, 3, 0.5}})
    all.push_back({.temperature = temperature,
                   .top_k = top_k,
                   .top_p = top_p,
                   .seed = all.size() * 77 + 5,
                   .row0 = 3});
  return all;
}

}  // namespace

namespace {

void check_every_backend(std::initializer_list<std::pair<int, int>> vocabularies, int rounds) {
  for (const Sampling& s : settings())
    for (bool coarse : {false, true})
      for (const auto& [V, Vp] : vocabularies) {
        const Case c = random_case(3, V, Vp, unsigned(V) + coarse, coarse);
        for (const Backend& backend : backends()) {
          INFO(backend.name << " V=" << V << " t=" << s.temperature << " k=" << s.top_k
                            << " p=" << s.top_p << " coarse=" << coarse);
          check_against_sorting(backend.open(), c, s, rounds);
        }
      }
}

}  // namespace

TEST_CASE("sample: every backend draws what sorting says", "[ops][gpu]") {
  check_every_backend({{257, 384}, {5000, 5120}, {1, 128}}, 5);
}

TEST_CASE("sample: few tokens to draw from", "[ops][gpu][small]") {  // for compute-sanitizer
  check_every_backend({{1, 128}, {257, 384}}, 1);
}

TEST_CASE("sample: bf16 logits on the GPU draw what sorting says", "[ops][gpu]") {
  if (!cuda_available()) {
    WARN("no GPU: skipped");
    return;
  }
  for (const Sampling& s : settings()) {
    const Case c = random_case(2, 50257, 50304, 9, /*coarse=*/true);
    check_against_sorting(make_cuda_ops(DType::bf16, 0), c, s, 4);
  }
}

TEST_CASE("sample: frequencies follow temperature, top-k and top-p", "[ops]") {
  const float p[5] = {0.4f, 0.1f, 0.3f, 0.15f, 0.05f};
  constexpr int64_t kRows = 20000, kWidth = 16;
  std::vector<float> logits(size_t(kRows * kWidth), -3.0f);
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t i = 0; i < 5; ++i) logits[size_t(r * kWidth + i)] = std::log(p[i]);
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    const Tensor x = b.real({kRows, kWidth}, wide(logits));
    const Tensor tokens = b.zeros({kRows}, DType::i32), step = b.zeros({kRows}, DType::i32);
    const auto frequencies = [&](Sampling s) {
      s.seed = 4;
      b->sample(tokens, {}, {}, step, x, 5, s);
      std::vector<double> f(5, 0);
      for (int32_t t : read_ids(b, tokens)) f[size_t(t)] += 1.0 / double(kRows);
      return f;
    };
    std::vector<double> f = frequencies({});
    for (size_t i = 0; i < 5; ++i) CHECK(f[i] == Approx(p[i]).margin(0.015));
    f = frequencies({.top_k = 2});
    CHECK(f[0] == Approx(4.0 / 7).margin(0.015));
    CHECK(f[0] + f[2] == Approx(1));
    f = frequencies({.top_p = 0.75});  // 0.4 + 0.3 < 0.75 <= 0.85
    CHECK(f[3] == Approx(0.15 / 0.85).margin(0.015));
    CHECK(f[1] + f[4] == 0);
    f = frequencies({.top_k = 3, .top_p = 0.8});  // 0.7 / 0.85 reaches 0.8
    CHECK(f[0] + f[2] == Approx(1));
    f = frequencies({.temperature = 0.5f});
    CHECK(f[0] == Approx(0.16 / 0.285).margin(0.015));
    f = frequencies({.temperature = 0});
    CHECK(f[0] == Approx(1));
  }
}

TEST_CASE("sample: the repetition penalty, and what was drawn joins the seen", "[ops]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    constexpr int64_t kWidth = 128;
    Values x(2 * kWidth, -50);
    x[0] = 3, x[1] = 2, x[2] = 1.8;                              // penalised: 1.5, 1, 0.9
    x[kWidth] = -1, x[kWidth + 1] = -1.5, x[kWidth + 2] = -1.9;  // penalised: -2, -3, -3.8
    const Tensor logits = b.real({2, kWidth}, x), seen = b.zeros({2, kWidth}, DType::u8);
    const Tensor tokens = b.zeros({2}, DType::i32), step = b.zeros({2}, DType::i32);
    const Sampling s{.temperature = 0, .repetition_penalty = 2};
    std::vector<std::vector<int32_t>> drawn;
    for (int i = 0; i < 4; ++i) {
      b->sample(tokens, {}, seen, step, logits, 5, s);
      drawn.push_back(read_ids(b, tokens));
    }
    CHECK(drawn == std::vector<std::vector<int32_t>>{{0, 0}, {1, 1}, {2, 2}, {0, 0}});
    std::vector<uint8_t> marks(2 * kWidth);
    b->download(marks.data(), seen);
    CHECK(std::count(marks.begin(), marks.end(), 1) == 6);
  }
}

TEST_CASE("sample: equal, infinite and NaN logits stay inside the vocabulary", "[ops]") {
  const double inf = std::numeric_limits<double>::infinity();
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    constexpr int64_t kWidth = 128;
    for (double fill : {0.0, -inf, inf, double(NAN)})
      for (const Sampling& s : settings()) {
        const Tensor logits = b.real({1, kWidth}, Values(kWidth, fill));
        const Tensor tokens = b.zeros({1}, DType::i32), step = b.zeros({1}, DType::i32);
        b->sample(tokens, {}, {}, step, logits, 100, s);
        const int32_t t = read_ids(b, tokens)[0];
        CHECK(t >= 0);
        CHECK(t < 100);
        if (fill == 0 && s.greedy()) CHECK(t == 0);  // of equal ones the first
      }
  }
}

TEST_CASE("sample: the integer exponential is exp to 2e-7", "[ops]") {
  for (double z = 0; z > -20; z -= 0.01) {
    const double want = std::exp(double(float(z))) * double(uint64_t(1) << sampling::kWeightBits);
    const double got = double(sampling::weight_of(float(z), 0, 1));
    CHECK(std::fabs(got - want) < 2e-7 * want * std::max(1.0, -z) + 1);
  }
}

// Twin of kernels/*/adamw.*; and the sums, the clip control and the casts that feed it.
#include <algorithm>

#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

constexpr size_t kCount = 40001;  // several blocks and a tail

struct State {
  Values w, m, v;
};

// One element in double, straight from the paper with PyTorch's order of decay.
void scalar_adamw(double& w, double& m, double& v, double g, const AdamStep& s) {
  w *= 1 - s.lr * s.weight_decay;
  m = s.beta1 * m + (1 - s.beta1) * g;
  v = s.beta2 * v + (1 - s.beta2) * g * g;
  const double m_hat = m / (1 - std::pow(s.beta1, double(s.t)));
  const double v_hat = v / (1 - std::pow(s.beta2, double(s.t)));
  w -= s.lr * m_hat / (std::sqrt(v_hat) + s.eps);
}

AdamStep step_at(int64_t t) {
  return {3e-3, 0.9, 0.95, 1e-8, 0.1, t};
}

// `steps` updates with gradients of seeds 10, 11, ...; clip factor as given.
State run(Bench& b, const Values& w0, int steps, double factor) {
  const DType type = b->master_dtype();
  const auto count = int64_t(w0.size());
  Tensor w = b.real({count}, w0, type), m = b.zeros({count}, type), v = b.zeros({count}, type);
  Tensor control = b.real({3}, {1.0, factor, 1.0}, DType::f64);
  for (int t = 1; t <= steps; ++t) {
    Tensor g = b.real({count}, exact(normals(w0.size(), unsigned(10 + t), 0, 0.1)), type);
    b->adamw(w, {}, m, v, g, step_at(t), control);
  }
  return {b.read(w), b.read(m), b.read(v)};
}

State run_scalar(Values w, int steps, double factor) {
  State s{std::move(w), {}, {}};
  s.m.assign(s.w.size(), 0);
  s.v.assign(s.w.size(), 0);
  for (int t = 1; t <= steps; ++t) {
    const Values g = exact(normals(s.w.size(), unsigned(10 + t), 0, 0.1));
    for (size_t i = 0; i < g.size(); ++i)
      scalar_adamw(s.w[i], s.m[i], s.v[i], g[i] * factor, step_at(t));
  }
  return s;
}

Values control_of(Bench& b, double square_sum, double nll_sum, double max_norm) {
  Tensor control = b.zeros({3}, DType::f64);
  b->clip_control(control, b.real({1}, {square_sum}, DType::f64),
                  b.real({1}, {nll_sum}, DType::f64), max_norm);
  return b.read(control);
}

}  // namespace

TEST_CASE("adamw: five updates against a scalar reference", "[ops]") {
  const Values w = exact(normals(kCount, 1));
  for (double factor : {1.0, 0.25}) {
    const State expected = run_scalar(w, 5, factor);
    Bench ref(reference_ops());
    const State exact = run(ref, w, 5, factor);
    CHECK(relative_error(exact.w, expected.w) < 1e-14);
    CHECK(relative_error(exact.m, expected.m) < 1e-14);
    CHECK(relative_error(exact.v, expected.v) < 1e-14);
    for (const Backend& backend : backends()) {
      INFO(backend.name);
      Bench b(backend.open());
      const State s = run(b, w, 5, factor);
      CHECK(relative_error(s.w, expected.w) < backend.elementwise);
      CHECK(relative_error(s.m, expected.m) < backend.elementwise);
      CHECK(relative_error(s.v, expected.v) < backend.elementwise);
    }
  }
}

TEST_CASE("adamw: with ok = 0 not one bit changes", "[ops]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    const DType type = b->master_dtype();
    const auto count = int64_t(kCount);
    const Values w0 = exact(normals(kCount, 2)), m0 = exact(normals(kCount, 3)),
                 v0 = exact(normals(kCount, 4, 1, 0.1)), c0(kCount, 7);
    Tensor w = b.real({count}, w0, type), m = b.real({count}, m0, type),
           v = b.real({count}, v0, type), compute = b.real({count}, c0, type);
    Tensor control = b.real({3}, {double(NAN), 1.0, 0.0}, DType::f64);
    b->adamw(w, compute, m, v, b.real({count}, Values(kCount, NAN), type), step_at(3), control);
    CHECK(b.read(w) == w0);
    CHECK(b.read(m) == m0);
    CHECK(b.read(v) == v0);
    CHECK(b.read(compute) == c0);
  }
}

TEST_CASE("adamw: the compute copy follows, in its own type", "[ops]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    const auto count = int64_t(1000);
    const Values w0 = exact(normals(1000, 5)), g = exact(normals(1000, 6));
    for (DType compute_type : {DType::f32, DType::bf16}) {
      Tensor w = b.real({count}, w0, b->master_dtype());
      Tensor m = b.zeros({count}, b->master_dtype()), v = b.zeros({count}, b->master_dtype());
      Tensor compute = b.zeros({count}, compute_type);
      b->adamw(w, compute, m, v, b.real({count}, g, b->master_dtype()), step_at(1),
               b.real({3}, {1.0, 1.0, 1.0}, DType::f64));
      const Values master = b.read(w), copy = b.read(compute);
      for (size_t i = 0; i < master.size(); ++i) {
        const double expected = compute_type == DType::bf16
                                    ? double(bf16_to_float(float_to_bf16(float(master[i]))))
                                    : master[i];
        REQUIRE(copy[i] == expected);
      }
    }
  }
}

TEST_CASE("split: two halves are all bits of a weight, the upper one is the nearest bf16",
          "[ops]") {
  // Every upper half with lower ones around the tie, and random ones.
  std::vector<float> weights;
  std::mt19937 random(5);
  for (uint32_t upper = 0; upper < 0x10000; ++upper)
    for (uint32_t lower :
         {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu, uint32_t(random()) & 0xffffu})
      weights.push_back(float_of(upper << 16 | lower));
  for (size_t count : {weights.size(), size_t(4099)})  // whole packs, and a tail
    for (const Backend& backend : backends()) {
      INFO(backend.name);
      Bench b(backend.open());
      const auto n = int64_t(count);
      const Tensor master = b.empty({n}, DType::f32), again = b.empty({n}, DType::f32);
      const Tensor upper = b.empty({n}, DType::bf16), lower = b.empty({n}, DType::i16);
      const Tensor alone = b.zeros({n}, DType::bf16);
      b->upload(master, weights.data());
      b->split(upper, lower, master);
      b->split(alone, {}, master);
      b->join(again, upper, lower);
      CHECK(b.halves(alone) == b.halves(upper));
      const std::vector<uint16_t> half = b.halves(upper);
      const std::vector<float> joined = b.floats(again);
      for (size_t i = 0; i < count; ++i) {
        const float w = weights[i], u = bf16_to_float(half[i]);
        CAPTURE(bits_of(w), half[i], bits_of(joined[i]));
        if (std::isnan(w)) {
          REQUIRE((std::isnan(u) && std::isnan(joined[i])));
          continue;
        }
        REQUIRE(bits_of(joined[i]) == bits_of(w));
        const bool tie = (bits_of(w) & 0xffffu) == 0x8000u;
        REQUIRE(half[i] == (tie ? uint16_t((bits_of(w) >> 16) + 1) : float_to_bf16(w)));
      }
    }
}

TEST_CASE("adamw: weights in two halves are updated like whole ones", "[ops]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    for (int64_t n : {int64_t(40001), int64_t(40004)}) {  // one by one, and by packs
      const size_t count = size_t(n);
      const Tensor whole = b.real({n}, normals(count, 1), DType::f32);
      const Tensor upper = b.empty({n}, DType::bf16), lower = b.empty({n}, DType::i16);
      b->split(upper, lower, whole);
      Tensor m[2], v[2];
      for (int i = 0; i < 2; ++i) m[i] = b.zeros({n}, DType::f32), v[i] = b.zeros({n}, DType::f32);
      const Tensor go = b.real({3}, {1.0, 0.25, 1.0}, DType::f64),
                   stop = b.real({3}, {double(NAN), 1.0, 0.0}, DType::f64);
      for (int t = 1; t <= 5; ++t) {
        const Tensor g = b.real({n}, normals(count, unsigned(10 + t), 0, 0.1), DType::f32);
        b->adamw(whole, {}, m[0], v[0], g, step_at(t), go);
        b->adamw(lower, upper, m[1], v[1], g, step_at(t), go);
        b->adamw(lower, upper, m[1], v[1], g, step_at(t), stop);
      }
      const Tensor joined = b.empty({n}, DType::f32);
      b->join(joined, upper, lower);
      CHECK(b.floats(joined) == b.floats(whole));
      CHECK(b.floats(m[1]) == b.floats(m[0]));
      CHECK(b.floats(v[1]) == b.floats(v[0]));
    }
  }
}

TEST_CASE("clip control: norm, factor and the verdict", "[ops]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    CHECK(control_of(b, 16, 2, 1) == Values{4, 1 / (4 + 1e-6), 1});
    CHECK(control_of(b, 16, 2, 8) == Values{4, 1, 1});
    CHECK(control_of(b, 16, 2, 0) == Values{4, 1, 1});
    CHECK(control_of(b, 0, 2, 1) == Values{0, 1, 1});
    CHECK(control_of(b, NAN, 2, 1)[2] == 0);
    CHECK(control_of(b, INFINITY, 2, 1)[2] == 0);
    CHECK(control_of(b, 16, NAN, 1)[2] == 0);
    CHECK(control_of(b, 16, INFINITY, 1)[2] == 0);
  }
}

TEST_CASE("sums: accumulate in double and let NaN through", "[ops]") {
  const size_t count = 100003;
  Values x = exact(normals(count, 8, 1, 1));
  double sum = 0, square = 0;
  for (double v : x) sum += v, square += v * v;
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    for (DType type : {DType::f32, DType::f64}) {
      Tensor t = b.real({int64_t(count)}, x, type);
      Tensor out = b.real({2}, {5.0, 7.0}, DType::f64);
      b->sum(out.slice(0, 1), t);
      b->square_sum(out.slice(1, 1), t);
      const Values got = b.read(out);
      CHECK(got[0] == Approx(sum + 5).epsilon(1e-12));
      CHECK(got[1] == Approx(square + 7).epsilon(1e-12));
    }
    Values bad = x;
    bad[count - 1] = NAN;
    Tensor out = b.zeros({1}, DType::f64);
    b->square_sum(out, b.real({int64_t(count)}, bad, DType::f32));
    CHECK(std::isnan(b.read(out)[0]));
  }
}

TEST_CASE("cast: between f32, f64 and bf16, rounding once to nearest even", "[ops]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    // 1 + 2^-8 lies halfway between two bf16; a hair above must go up even where float drops the
    // hair.
    const double half = 1 + std::ldexp(1.0, -8), hair = std::ldexp(1.0, -40);
    const Values x = {0.0, -1.5, half, half + hair, half - hair, 1e30, INFINITY, -INFINITY};
    const auto count = int64_t(x.size());
    Tensor f64 = b.real({count}, x, DType::f64), f32 = b.empty({count}, DType::f32),
           bf16 = b.empty({count}, DType::bf16), back = b.empty({count}, DType::f64);
    b->cast(f32, f64);
    for (size_t i = 0; i < x.size(); ++i) CHECK(b.read(f32)[i] == double(float(x[i])));
    b->cast(bf16, f64);
    const Values up = b.read(bf16);
    CHECK(up[0] == 0);
    CHECK(up[1] == -1.5);
    CHECK(up[2] == 1);
    CHECK(up[3] == 1 + std::ldexp(1.0, -7));
    CHECK(up[4] == 1);
    CHECK(up[6] == double(INFINITY));
    CHECK(up[7] == -double(INFINITY));
    b->cast(back, bf16);
    CHECK(b.read(back) == up);
    b->cast(bf16, f32);
    CHECK(b.read(bf16)[3] == 1);  // the hair is gone: an exact tie goes to even
    b->cast(back, f32);
    CHECK(b.read(back) == b.read(f32));
  }
}

// Twin of src/ops/ops.cpp and kernels/cuda/glu_gemm_sm90.cu: the block's products with the GLU.
#include <algorithm>
#include <cstdlib>
#include <tuple>

#include "environment.h"
#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

constexpr Act kActs[] = {Act::identity, Act::silu, Act::sigmoid};

struct Case {
  int64_t N, F, D;
  Values x, w, b, gu, h, dy, down, dw0, db0, db_gu0;
  Case(int64_t n, int64_t f, int64_t d) : N(n), F(f), D(d) {
    unsigned seed = unsigned(n * 7 + f * 3 + d);
    const auto fill = [&](int64_t count, double sd) {
      return exact(normals(size_t(count), ++seed, 0, sd));
    };
    const double fan_in = 1 / std::sqrt(double(D));
    x = fill(N * D, 1), w = fill(2 * F * D, 2 * fan_in), b = fill(2 * F, 1);
    gu = fill(N * 2 * F, 2), h = fill(N * F, 1), dy = fill(N * D, 1);
    down = fill(D * F, fan_in), dw0 = fill(D * F, 1), db0 = fill(D, 1), db_gu0 = fill(2 * F, 1);
  }
};

struct Forward {
  Values h, gu;
};
Forward forward(Bench& b, const Case& c, Act act, bool bias) {
  const Tensor h = b.real({c.N, c.F}, Values(size_t(c.N * c.F), NAN));
  const Tensor gu = b.real({c.N, 2 * c.F}, Values(size_t(c.N * 2 * c.F), NAN));
  b->linear_glu_forward(h, gu, b.real({c.N, c.D}, c.x), b.real({2 * c.F, c.D}, c.w),
                        bias ? b.real({2 * c.F}, c.b) : Tensor(), act);
  return {b.read(h), b.read(gu)};
}

struct Backward {
  Values dgu, dw, db, db_gu;
};
Backward backward(Bench& b, const Case& c, Act act, bool bias = true) {
  const Tensor dgu = b.real({c.N, 2 * c.F}, Values(size_t(c.N * 2 * c.F), NAN));
  const Tensor dh = b.empty({c.N, c.F}, b->act_dtype());
  const Tensor dw = b.real({c.D, c.F}, c.dw0, b->master_dtype());
  const Tensor db = bias ? b.real({c.D}, c.db0, b->master_dtype()) : Tensor();
  const Tensor db_gu = bias ? b.real({2 * c.F}, c.db_gu0, b->master_dtype()) : Tensor();
  b->glu_linear_backward(dgu, dh, dw, db, db_gu, b.real({c.N, c.D}, c.dy), b.real({c.N, c.F}, c.h),
                         b.real({c.N, 2 * c.F}, c.gu), b.real({c.D, c.F}, c.down), act);
  if (!bias) return {b.read(dgu), b.read(dw), {}, {}};
  return {b.read(dgu), b.read(dw), b.read(db), b.read(db_gu)};
}

void check_case(const Case& c, Act act, bool bias) {
  Bench ref(reference_ops());
  const Forward y = forward(ref, c, act, bias);
  const Backward g = backward(ref, c, act, bias);
  for (const Backend& backend : backends())
    for (const char* fused : {"0", "1"}) {  // the CPU knows one way alone
      const EnvSetting setting("HGRN_FUSED_GLU", fused);
      INFO(backend.name << " N=" << c.N << " F=" << c.F << " D=" << c.D << " act=" << int(act)
                        << " bias=" << bias << " fused=" << fused);
      Bench b(backend.open());
      const Forward got = forward(b, c, act, bias), again = forward(b, c, act, bias);
      CHECK(relative_error(got.gu, y.gu) < backend.reduced);
      CHECK(relative_error(got.h, y.h) < backend.reduced);
      CHECK(got.gu == again.gu);
      CHECK(got.h == again.h);
      const Backward dgot = backward(b, c, act, bias), dagain = backward(b, c, act, bias);
      CHECK(relative_error(dgot.dgu, g.dgu) < backend.reduced);
      CHECK(relative_error(dgot.dw, g.dw) < backend.reduced);
      if (bias) CHECK(relative_error(dgot.db, g.db) < backend.reduced);
      if (bias) CHECK(relative_error(dgot.db_gu, g.db_gu) < backend.reduced);
      CHECK(dgot.dgu == dagain.dgu);
      CHECK(dgot.dw == dagain.dw);
      CHECK(dgot.db_gu == dagain.db_gu);
    }
}

}  // namespace

TEST_CASE("glu_linear: forward by hand", "[ops]") {
  Bench bench(reference_ops());
  const Case c(5, 3, 7);
  for (Act act : kActs)
    for (bool bias : {false, true}) {
      const Forward got = forward(bench, c, act, bias);
      for (size_t r = 0; r < size_t(c.N); ++r)
        for (size_t f = 0; f < size_t(c.F); ++f) {
          double gu[2];
          for (size_t part = 0; part < 2; ++part) {
            const size_t row = part * size_t(c.F) + f;
            double s = bias ? c.b[row] : 0;
            for (size_t i = 0; i < size_t(c.D); ++i)
              s += c.x[r * size_t(c.D) + i] * c.w[row * size_t(c.D) + i];
            CHECK(got.gu[r * 2 * size_t(c.F) + row] == Approx(s).epsilon(1e-13));
            gu[part] = s;
          }
          const double s = 1 / (1 + std::exp(-gu[0]));
          const double a = act == Act::identity ? gu[0] : act == Act::silu ? gu[0] * s : s;
          CHECK(got.h[r * size_t(c.F) + f] == Approx(a * gu[1]).epsilon(1e-13));
        }
    }
}

TEST_CASE("glu_linear: gradients against central differences", "[ops]") {
  Bench bench(reference_ops());
  Case c(4, 5, 3);
  for (Act act : kActs) {
    const auto loss = [&](const Values& at) {
      const Tensor h = bench.empty({c.N, c.F}, bench->act_dtype());
      const Tensor y = bench.empty({c.N, c.D}, bench->act_dtype());
      bench->glu_forward(h, bench.real({c.N, 2 * c.F}, at), act);
      c.h = bench.read(h);
      bench->linear_forward(y, h, bench.real({c.D, c.F}, c.down), {});
      return dot(bench.read(y), c.dy);
    };
    const Values numeric = numeric_gradient(loss, c.gu);
    const Backward got = backward(bench, c, act);
    CHECK(relative_error(got.dgu, numeric) < kGradientTolerance);
    Values db_gu = c.db_gu0;
    for (size_t i = 0; i < numeric.size(); ++i) db_gu[i % db_gu.size()] += numeric[i];
    CHECK(relative_error(got.db_gu, db_gu) < kGradientTolerance);
  }
}

// Rows, widths and depths at the edges of a tile of 128 rows, 128 or 256 columns and 64 deep, and
// off them; one row more than a tile; several tiles a CTA where the card has few of them.
TEST_CASE("glu_linear: every backend against double", "[ops][gpu]") {
  for (const auto& [N, F, D] : {std::tuple{128, 256, 192}, std::tuple{129, 128, 256},
                                std::tuple{300, 136, 264}, std::tuple{9, 520, 200}}) {
    const Case c(N, F, D);
    for (Act act : kActs)
      for (bool bias : {false, true}) check_case(c, act, bias);
  }
}

TEST_CASE("glu_linear: widths that the fused kernels do not take", "[ops][gpu]") {
  for (const auto& [N, F, D] : {std::tuple{130, 37, 192}, std::tuple{130, 128, 190},
                                std::tuple{130, 128, 64}, std::tuple{1, 40, 256}})
    check_case(Case(N, F, D), Act::silu, true);
}

TEST_CASE("glu_linear: more tiles than a card has multiprocessors", "[ops][gpu]") {
  check_case(Case(4000, 1416, 192), Act::silu, true);  // backward, too: 192 tiles
}

// The fused kernels leave partial sums of the bias' gradient in the planned scratch. Where it is
// too small they are not made, and the sums are those of a pass over dgu as it was rounded.
TEST_CASE("glu_linear: a scratch that is too small for the sums of the bias", "[ops][gpu]") {
  constexpr int64_t kAmple = 1 << 20, kSmall = 256;  // less than one row of partial sums
  constexpr uint8_t kMark = 7;
  const Case c(300, 136, 264);
  Bench ref(reference_ops());
  const Backward want = backward(ref, c, Act::silu);
  for (const Backend& backend : backends())
    for (const char* fused : {"0", "1"}) {
      const EnvSetting setting("HGRN_FUSED_GLU", fused);
      INFO(backend.name << " fused=" << fused);
      Bench b(backend.open());
      const Tensor room = b.bytes(std::vector<uint8_t>(kAmple, kMark));
      b->use_scratch(room);
      const Backward ample = backward(b, c, Act::silu);
      std::vector<uint8_t> bytes(kAmple, kMark);
      b->upload(room, bytes.data());
      b->use_scratch(room.slice(0, kSmall));
      const Backward small = backward(b, c, Act::silu);
      CHECK(relative_error(ample.db_gu, want.db_gu) < backend.reduced);
      CHECK(relative_error(small.db_gu, want.db_gu) < backend.reduced);
      CHECK(relative_error(small.db_gu, ample.db_gu) < backend.reduced);
      CHECK(small.dgu == ample.dgu);
      CHECK(small.dw == ample.dw);
      CHECK(small.db == ample.db);
      // The same bits, which sums of dgu before it is rounded would not have.
      const Tensor pass = b.real({2 * c.F}, c.db_gu0, b->master_dtype());
      b->linear_backward({}, {}, pass, b.real({c.N, 2 * c.F}, small.dgu), {}, {});
      CHECK(small.db_gu == b.read(pass));
      b->download(bytes.data(), room);
      CHECK(std::count(bytes.begin() + kSmall, bytes.end(), kMark) == kAmple - kSmall);
    }
}

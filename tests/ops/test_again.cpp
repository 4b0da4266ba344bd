// What backward makes again for those that did not keep it: forward's bits, beside the gradients of
// a call that was not asked for it, and in the place of the gradient that came in.
#include <cstdlib>

#include "environment.h"
#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

constexpr Act kActs[] = {Act::identity, Act::silu, Act::sigmoid};

Values randoms(int64_t count, unsigned seed, double sd = 1) {
  return exact(normals(size_t(count), seed, 0, sd));
}

// Without the millions of numbers that a failed CHECK would print.
template <class T>
bool same(const T& a, const T& b) {
  return a == b;
}

// How the output is asked for.
enum class Ask { no, apart, in_place };

void check_norm(Bench& b, int64_t N, int64_t D, Norm kind, bool bias, bool residual, float p) {
  INFO("N=" << N << " D=" << D << " layer=" << (kind == Norm::layer) << " bias=" << bias
            << " residual=" << residual << " dropout=" << p);
  const DType act = b->act_dtype(), master = b->master_dtype();
  const Dropout drop{p, 7, 9, 1, 1000};
  const Values dy = randoms(N * D, 3), dsum = randoms(N * D, 4);
  const Tensor x = b.real({N, D}, randoms(N * D, 1, 2)), branch = b.real({N, D}, randoms(N * D, 2));
  const Tensor w = b.real({D}, normals(size_t(D), 5, 1, 0.3), master);
  const Tensor shift = bias ? b.real({D}, normals(size_t(D), 6), master) : Tensor();
  const Tensor y = b.empty({N, D}, act), stats = b.empty({N, 2}, b->stat_dtype());
  if (residual)
    b->residual_norm_forward(x, y, stats, x, branch, w, shift, kind, 1e-5f, drop);
  else
    b->norm_forward(y, stats, x, w, shift, kind, 1e-5f);
  const Values forward = b.read(y);

  std::vector<Values> plain;
  for (const Ask ask : {Ask::no, Ask::apart, Ask::in_place}) {
    INFO("asked " << int(ask));
    const Tensor gradient = b.real({N, D}, dy);
    const Tensor apart = b.real({N, D}, Values(size_t(N * D), NAN));
    NormAgain again;
    if (ask != Ask::no) again = {ask == Ask::apart ? apart : gradient, shift};
    const Tensor dx = b.real({N, D}, dsum), dbranch = b.real({N, D}, Values(size_t(N * D), NAN));
    const Tensor dw = b.zeros({D}, master), db = bias ? b.zeros({D}, master) : Tensor();
    if (residual)
      b->residual_norm_backward(dx, p > 0 ? dbranch : Tensor(), dw, db, gradient, x, w, stats, kind,
                                drop, again);
    else
      b->norm_backward(dx, dw, db, gradient, x, w, stats, kind, again);
    std::vector<Values> got = {b.read(dx), b.read(dw), bias ? b.read(db) : Values(),
                               residual && p > 0 ? b.read(dbranch) : Values()};
    if (ask == Ask::no) {
      plain = got;
      continue;
    }
    CHECK(same(b.read(again.y), forward));
    CHECK(same(got, plain));
    if (ask == Ask::apart) CHECK(same(b.read(gradient), dy));
  }
}

void check_glu(Bench& b, int64_t N, int64_t F, Act act) {
  INFO("N=" << N << " F=" << F << " act=" << int(act));
  const Values dh = randoms(N * F, 2);
  const Tensor gu = b.real({N, 2 * F}, randoms(N * 2 * F, 1, 3)), h = b.empty({N, F}, gu.dtype);
  b->glu_forward(h, gu, act);
  Values plain;
  for (const Ask ask : {Ask::no, Ask::apart, Ask::in_place}) {
    INFO("asked " << int(ask));
    const Tensor gradient = b.real({N, F}, dh), apart = b.empty({N, F}, gu.dtype);
    const Tensor dgu = b.real({N, 2 * F}, Values(size_t(N * 2 * F), NAN));
    const Tensor again = ask == Ask::no ? Tensor() : ask == Ask::apart ? apart : gradient;
    b->glu_backward(dgu, gradient, gu, act, again);
    if (ask == Ask::no) plain = b.read(dgu);
    CHECK(same(b.read(dgu), plain));
    if (again) CHECK(same(b.read(again), b.read(h)));
    if (ask != Ask::in_place) CHECK(same(b.read(gradient), dh));
  }
}

void check_glu_linear(Bench& b, int64_t N, int64_t F, int64_t D, Act act, bool bias) {
  INFO("N=" << N << " F=" << F << " D=" << D << " act=" << int(act) << " bias=" << bias);
  const DType type = b->act_dtype(), master = b->master_dtype();
  const double fan_in = 1 / std::sqrt(double(D));
  const Tensor gu = b.empty({N, 2 * F}, type), h = b.empty({N, F}, type);
  const Tensor x = b.real({N, D}, randoms(N * D, 1));
  b->linear_glu_forward(h, gu, x, b.real({2 * F, D}, randoms(2 * F * D, 2, 2 * fan_in)),
                        bias ? b.real({2 * F}, randoms(2 * F, 3)) : Tensor(), act);
  const Tensor dy = b.real({N, D}, randoms(N * D, 4));
  const Tensor down = b.real({D, F}, randoms(D * F, 5, fan_in));
  std::vector<Values> plain;
  for (const Ask ask : {Ask::no, Ask::apart, Ask::in_place}) {
    INFO("asked " << int(ask));
    const Tensor dh = b.real({N, F}, Values(size_t(N * F), NAN));
    const Tensor apart = b.real({N, F}, Values(size_t(N * F), NAN));
    const Tensor again = ask == Ask::no ? h : ask == Ask::apart ? apart : dh;
    const Tensor dgu = b.real({N, 2 * F}, Values(size_t(N * 2 * F), NAN));
    const Tensor dw = b.zeros({D, F}, master), db = bias ? b.zeros({D}, master) : Tensor();
    const Tensor db_gu = bias ? b.zeros({2 * F}, master) : Tensor();
    b->glu_linear_backward(dgu, dh, dw, db, db_gu, dy, again, gu, down, act, ask != Ask::no);
    std::vector<Values> got = {b.read(dgu), b.read(dw), bias ? b.read(db) : Values(),
                               bias ? b.read(db_gu) : Values()};
    if (ask == Ask::no) plain = got;
    CHECK(same(got, plain));
    CHECK(same(b.read(again), b.read(h)));
  }
}

}  // namespace

// Widths that are no multiple of 8; of one and two packs a lane; of several warps a row; longer
// than the wide kernels take. More rows than a card has CTAs.
TEST_CASE("norm: backward makes y again", "[ops][gpu]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    for (const int64_t D : {10, 192, 512, 768, 1024, 2048, 8192, 8200})
      for (const int64_t N : {5, 37}) {
        for (const Norm kind : {Norm::rms, Norm::layer})
          for (const bool bias : {false, true}) {
            check_norm(b, N, D, kind, bias, false, 0);
            for (const float p : {0.0f, 0.2f}) check_norm(b, N, D, kind, bias, true, p);
          }
      }
    check_norm(b, 5000, 256, Norm::rms, false, false, 0);
    check_norm(b, 5000, 768, Norm::rms, false, false, 0);
    check_norm(b, 5000, 256, Norm::layer, true, true, 0.2f);
  }
  Bench b(reference_ops());
  check_norm(b, 37, 10, Norm::layer, true, true, 0.2f);
}

TEST_CASE("glu: backward makes h again", "[ops][gpu]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    for (const Act act : kActs)
      for (const int64_t F : {7, 192, 1365})
        for (const int64_t N : {5, 37}) check_glu(b, N, F, act);
  }
  Bench b(reference_ops());
  for (const Act act : kActs) check_glu(b, 37, 7, act);
}

// As in test_glu_linear.cpp: the edges of tiles, widths that the fused kernels do not take, more
// tiles than a card has multiprocessors; what the CPU takes by bands and what not.
TEST_CASE("glu_linear: backward makes h again", "[ops][gpu]") {
  using Shape3 = std::array<int64_t, 3>;
  for (const Backend& backend : backends())
    for (const char* const fused : {"0", "1"}) {
      INFO(backend.name << " fused=" << fused);
      const EnvSetting setting("HGRN_FUSED_GLU", fused);
      Bench b(backend.open());
      for (const auto& [N, F, D] :
           {Shape3{128, 256, 192}, Shape3{129, 128, 256}, Shape3{300, 136, 264},
            Shape3{9, 520, 200}, Shape3{130, 37, 192}, Shape3{300, 1024, 512}})
        for (const Act act : kActs)
          for (const bool bias : {false, true}) check_glu_linear(b, N, F, D, act, bias);
      check_glu_linear(b, 4000, 1416, 192, Act::silu, true);
    }
}

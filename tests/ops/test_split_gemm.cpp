// Twin of kernels/cpu/split_gemm.h, amx_gemm.cpp and narrow_gemm.cpp: each table of kernels against
// double. Tiles in software run wherever AVX-512 is, AMX where the processor has it.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>
#include <string>
#include <tuple>

#include "ops/emulated_tiles.h"
#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;
using cpu::NarrowGemm;
using cpu::NarrowProduct;

namespace {

struct Named {
  const char* name;
  NarrowGemm table;
};

// Those on tiles that this processor can run.
std::vector<Named> tiled() {
  std::vector<Named> all;
#ifdef HGRN_EMULATED_TILES
  if (__builtin_cpu_supports("x86-64-v4"))
    all.push_back({"tiles in software", cpu::isa_emulated::narrow_gemm()});
#endif
  if (const NarrowGemm* amx = cpu::amx_narrow_gemm()) all.push_back({"AMX", *amx});
  if (all.empty()) WARN("skipped: products on tiles need a processor with AVX-512");
  return all;
}

using Floats = std::vector<float>;

Floats floats(int64_t count, unsigned seed, double mean = 0, double sd = 1) {
  const Values v = normals(size_t(count), seed, mean, sd);
  return Floats(v.begin(), v.end());
}

struct Case {
  int64_t M, N, K;
  bool ta, tb;
  Floats A, B, plus;
  Case(int64_t m, int64_t n, int64_t k, bool a, bool b)
      : M(m),
        N(n),
        K(k),
        ta(a),
        tb(b),
        A(floats(m * k, 1)),
        B(floats(k * n, 2)),
        plus(floats(m * n, 3)) {}

  NarrowProduct product(float* C, const float* from = nullptr) const {
    return {M, N, K, A.data(), ta ? M : K, ta, B.data(), tb ? K : N, tb, C, N, from};
  }
  double a(int64_t m, int64_t k) const { return double(A[size_t(ta ? k * M + m : m * K + k)]); }
  double b(int64_t k, int64_t n) const { return double(B[size_t(tb ? n * K + k : k * N + n)]); }
  Values exact_product(bool add) const {
    Values c(size_t(M * N));
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) {
        double s = add ? double(plus[size_t(m * N + n)]) : 0;
        for (int64_t k = 0; k < K; ++k) s += a(m, k) * b(k, n);
        c[size_t(m * N + n)] = s;
      }
    return c;
  }
};

struct Work {  // aligned, and not a number before it is written
  explicit Work(int64_t count) : memory(size_t(count + 16), NAN) {
    const size_t off = reinterpret_cast<uintptr_t>(memory.data()) % 64;
    data = memory.data() + (64 - off) % 64 / 4;
  }
  Floats memory;
  float* data;
};

void multiply(const NarrowGemm& table, const NarrowProduct& p) {
  Work work(table.floats(p));
  table.multiply(p, work.data);
}

Floats result(const NarrowGemm& table, const Case& c, bool add = false) {
  Floats C(size_t(c.M * c.N), NAN);
  multiply(table, c.product(C.data(), add ? c.plus.data() : nullptr));
  return C;
}

Values wide(const Floats& v) {
  return Values(v.begin(), v.end());
}

const NarrowGemm plain = cpu::isa_default::narrow_gemm();

// Where A is transposed the sum is over more than a block of k.
std::vector<Case> cases() {
  std::vector<Case> all;
  for (const auto& [M, N, K] :
       {std::tuple{64, 64, 64}, std::tuple{70, 33, 50}, std::tuple{300, 48, 129},
        std::tuple{33, 100, 260}, std::tuple{17, 15, 7}, std::tuple{1, 1, 1},
        std::tuple{129, 80, 400}})
    for (bool ta : {false, true})
      for (bool tb : {false, true}) all.emplace_back(M, N, K, ta, tb);
  return all;
}

}  // namespace

#ifdef HGRN_EMULATED_TILES
TEST_CASE("split_gemm: three bf16 are the float", "[ops]") {
  if (!__builtin_cpu_supports("x86-64-v4")) {
    WARN("skipped: needs AVX-512");
    return;
  }
  std::mt19937_64 engine(1);
  std::uniform_int_distribution<int> exponent(-100, 100), mantissa(0, (1 << 23) - 1);
  double second = 0, third = 0;
  const auto check_split = [&](float x) {
    float parts[3];
    cpu::isa_emulated::split(x, parts);
    const double sum = double(parts[0]) + double(parts[1]) + double(parts[2]);
    if (sum != double(x)) CHECK(sum == double(x));
    second = std::max(second, std::fabs(double(parts[1]) / double(x)));
    third = std::max(third, std::fabs(double(parts[2]) / double(x)));
  };
  for (int i = 0; i < 200000; ++i) {
    const float x = std::ldexp(1 + std::ldexp(float(mantissa(engine)), -23), exponent(engine));
    check_split(x);
    check_split(-x);
  }
  for (int low = 0; low < 1 << 16; ++low)  // every rounding
    check_split(1 + std::ldexp(float(low), -23));
  CHECK(second <= 0x1p-8);
  CHECK(third <= 0x1p-17);
  CHECK(third > 0x1p-18);
  float parts[3];
  cpu::isa_emulated::split(0.0f, parts);
  CHECK((parts[0] == 0 && parts[1] == 0 && parts[2] == 0));
  constexpr float inf = std::numeric_limits<float>::infinity();
  for (float x : {inf, -inf, NAN, std::numeric_limits<float>::max()}) {
    cpu::isa_emulated::split(x, parts);
    CHECK(std::isnan(parts[0] + parts[1] + parts[2]));
  }
}
#endif

TEST_CASE("split_gemm: every form and edge against double", "[ops]") {
  for (const Named& tiles : tiled())
    for (const Case& c : cases())
      for (bool add : {false, true}) {
        INFO(tiles.name << ": " << c.M << " x " << c.N << " x " << c.K << ", A transposed " << c.ta
                        << ", B transposed " << c.tb << ", plus " << add);
        const Floats C = result(tiles.table, c, add);
        CHECK(relative_error(wide(C), c.exact_product(add)) < 2e-7);
        if (!add) continue;
        Floats in_place = c.plus;  // C is what it starts from
        multiply(tiles.table, c.product(in_place.data(), in_place.data()));
        CHECK(in_place == C);
      }
}

TEST_CASE("split_gemm: a part of a larger C leaves the rest alone", "[ops]") {
  for (const Named& tiles : tiled()) {
    const Case c(50, 37, 70, false, true);
    const int64_t ldc = 61;
    Floats C(size_t(c.M * ldc), 7.0f);
    NarrowProduct p = c.product(C.data());
    p.ldc = ldc;
    multiply(tiles.table, p);
    const Floats expected = result(tiles.table, c);
    bool same = true;
    for (int64_t m = 0; m < c.M; ++m)
      for (int64_t n = 0; n < ldc; ++n)
        same = same && C[size_t(m * ldc + n)] == (n < c.N ? expected[size_t(m * c.N + n)] : 7.0f);
    INFO(tiles.name);
    CHECK(same);
  }
}

TEST_CASE("split_gemm: bands of rows are handed on when they are done", "[ops]") {
  for (const Named& tiles : tiled())
    for (int64_t K : {70, 300})
      for (bool reuse : {false, true}) {
        INFO(tiles.name << ", K " << K << ", reuse " << reuse);
        const Case c(300, 40, K, false, true);
        const Floats expected = result(tiles.table, c, true);
        Floats C(size_t((reuse ? cpu::kNarrowBand : c.M) * c.N), NAN),
            beside(size_t(c.M * 64), 1.0f);
        struct Seen {
          const Floats &C, &expected;
          int64_t N, done;
          bool reuse, same;
        } seen{C, expected, c.N, 0, reuse, true};
        NarrowProduct p = c.product(C.data(), c.plus.data());
        p.reuse = reuse;
        p.context = &seen;
        p.ahead[1] = beside.data(), p.ahead_row = 64;
        p.after = [](const void* context, int64_t m, int64_t end) {
          Seen& s = *static_cast<Seen*>(const_cast<void*>(context));
          s.same = s.same && m == s.done && end - m <= cpu::kNarrowBand;
          for (int64_t i = m * s.N; i < end * s.N; ++i)
            s.same = s.same && s.C[size_t(i - (s.reuse ? m * s.N : 0))] == s.expected[size_t(i)];
          s.done = end;
        };
        multiply(tiles.table, p);
        CHECK(seen.same);
        CHECK(seen.done == c.M);
      }
}

TEST_CASE("split_gemm: the same bits in any parts", "[ops]") {
  for (const Named& tiles : tiled())
    for (bool ta : {false, true})
      for (bool tb : {false, true}) {
        const Case c(160, 112, 300, ta, tb);
        const Floats whole = result(tiles.table, c, true);
        Floats parts(whole.size(), NAN);
        for (int64_t m : {0, 48, 144})
          for (int64_t n : {0, 16, 80}) {
            const int64_t rows = m == 0    ? 48
                                 : m == 48 ? 96
                                           : 16,
                          columns = n == 0    ? 16
                                    : n == 16 ? 64
                                              : 32;
            NarrowProduct p = c.product(parts.data() + m * c.N + n, c.plus.data() + m * c.N + n);
            p.M = rows, p.N = columns;
            p.A += ta ? m : m * c.K, p.B += tb ? n * c.K : n;
            multiply(tiles.table, p);
          }
        INFO(tiles.name << ", A transposed " << ta << ", B transposed " << tb);
        CHECK(parts == whole);
      }
}

TEST_CASE("split_gemm: as exact as fp32", "[ops]") {
  const int64_t M = 64, N = 48;
  for (const Named& tiles : tiled())
    for (int64_t K : {128, 704, 2048})
      for (bool ta : {false, true})
        for (bool positive : {false, true}) {
          Case c(M, N, K, ta, false);
          if (positive)
            for (Floats* x : {&c.A, &c.B})
              for (float& v : *x) v = std::fabs(v);
          const Values expected = c.exact_product(false);
          const double error = relative_error(wide(result(tiles.table, c)), expected),
                       fp32 = relative_error(wide(result(plain, c)), expected);
          UNSCOPED_INFO(tiles.name << ", K " << K << ", A transposed " << ta << ", positive "
                                   << positive << ": " << error << ", fp32 " << fp32);
          CHECK(error < fp32);
        }
}

TEST_CASE("split_gemm: what is not finite stays in its row and column", "[ops]") {
  constexpr float inf = std::numeric_limits<float>::infinity();
  for (const Named& tiles : tiled())
    for (float bad : {inf, -inf, float(NAN), -float(NAN)})
      for (bool in_a : {false, true})
        for (bool t : {false, true}) {
          Case c(40, 40, 50, t, t);
          const int64_t at = 35, k = 20;
          if (in_a)
            c.A[size_t(t ? k * c.M + at : at * c.K + k)] = bad;
          else
            c.B[size_t(t ? at * c.K + k : k * c.N + at)] = bad;
          const Floats C = result(tiles.table, c);
          bool right = true;
          for (int64_t m = 0; m < c.M; ++m)
            for (int64_t n = 0; n < c.N; ++n)
              right = right && std::isfinite(C[size_t(m * c.N + n)]) != ((in_a ? m : n) == at);
          INFO(tiles.name << ", " << bad << " in A " << in_a << ", transposed " << t);
          CHECK(right);
        }
}

// Parts below 2^-126 count as zero: nothing is lost of numbers above 2^-103, and of each product of
// smaller ones a few times 2^-126 of the other factor.
TEST_CASE("split_gemm: small and large numbers", "[ops]") {
  for (const Named& tiles : tiled())
    for (int scale : {-110, -100, 100, 122}) {
      Case c(32, 32, 32, false, false);
      for (float& v : c.A) v = std::ldexp(std::fabs(v) < 0.125f ? 0.125f : v, scale);
      for (float& v : c.B) v = std::ldexp(v, -scale / 2);
      INFO(tiles.name << ", 2^" << scale);
      const Values expected = c.exact_product(false), got = wide(result(tiles.table, c));
      double worst = 0;
      for (size_t i = 0; i < got.size(); ++i)
        worst = std::max(worst, std::fabs(got[i] - expected[i]));
      CHECK(worst <= std::ldexp(32.0 * 4, -scale / 2 - (scale == -110 ? 125 : 22 - scale)));
      if (scale != -110) CHECK(relative_error(got, expected) < 2e-7);
    }
}

TEST_CASE("split_gemm: AMX is taken where it is, and not with HGRN_AMX=0", "[ops]") {
  const NarrowGemm& best = cpu::best_narrow_gemm();
  const char* const set = std::getenv("HGRN_AMX");
  const NarrowGemm* const amx = set && std::string(set) == "0" ? nullptr : cpu::amx_narrow_gemm();
  CHECK((amx != nullptr) == (*best.how != '\0'));
  if (amx) CHECK(best.multiply == amx->multiply);
}

TEST_CASE("split_gemm: AMX has the bits of tiles in software", "[ops]") {
  const std::vector<Named> all = tiled();
  if (all.size() < 2) {
    WARN("skipped: this processor or system has no AMX");
    return;
  }
  for (const Case& c : cases()) {
    INFO(c.M << " x " << c.N << " x " << c.K);
    CHECK(result(all[0].table, c, true) == result(all[1].table, c, true));
  }
}

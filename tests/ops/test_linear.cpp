// Twin of kernels/*/gemm.*
#include <algorithm>
#include <array>
#include <set>
#include <string>
#include <tuple>

#include "cpu/blas.h"
#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

constexpr int64_t kN = 37, kI = 11, kO = 19;

struct Inputs {
  Values x = exact(normals(kN * kI, 1)), w = exact(normals(kO * kI, 2)), b = exact(normals(kO, 3)),
         dy = exact(normals(kN * kO, 4));
};

Values forward(Bench& bench, const Inputs& in, bool bias = true) {
  Tensor y = bench.empty({kN, kO}, bench->act_dtype());
  bench->linear_forward(y, bench.real({kN, kI}, in.x), bench.real({kO, kI}, in.w),
                        bias ? bench.real({kO}, in.b) : Tensor());
  return bench.read(y);
}

struct Grads {
  Values dx, dw, db;
};

Grads backward(Bench& bench, const Inputs& in) {
  Tensor dx = bench.empty({kN, kI}, bench->act_dtype());
  Tensor dw = bench.zeros({kO, kI}, bench->master_dtype());
  Tensor db = bench.zeros({kO}, bench->master_dtype());
  bench->linear_backward(dx, dw, db, bench.real({kN, kO}, in.dy), bench.real({kN, kI}, in.x),
                         bench.real({kO, kI}, in.w));
  return {bench.read(dx), bench.read(dw), bench.read(db)};
}

}  // namespace

TEST_CASE("linear: an OpenBLAS that does not know the processor is told of", "[ops]") {
  CHECK(cpu::kernel_advice("SkylakeX", true, true).empty());
  CHECK(cpu::kernel_advice("Haswell", true, false).empty());
  CHECK(cpu::kernel_advice("Zen", true, false).empty());
  CHECK(cpu::kernel_advice("Prescott", false, false).empty());  // it may be one
  CHECK(cpu::kernel_advice("Prescott", true, true).find("=SkylakeX") != std::string::npos);
  CHECK(cpu::kernel_advice("Nehalem", true, false).find("=Haswell") != std::string::npos);
}

TEST_CASE("linear: y = x w^T + b, by hand", "[ops]") {
  Bench bench(reference_ops());
  const Inputs in;
  for (bool bias : {false, true}) {
    Values expected(kN * kO);
    for (size_t r = 0; r < kN; ++r)
      for (size_t o = 0; o < kO; ++o) {
        double s = bias ? in.b[o] : 0;
        for (size_t i = 0; i < kI; ++i) s += in.x[r * kI + i] * in.w[o * kI + i];
        expected[r * kO + o] = s;
      }
    CHECK(relative_error(forward(bench, in, bias), expected) < 1e-14);
  }
}

TEST_CASE("linear: gradients against central differences", "[ops]") {
  Bench bench(reference_ops());
  const Inputs in;
  const Grads g = backward(bench, in);
  const auto check_input = [&](Values Inputs::*member, const Values& grad) {
    const auto loss = [&](const Values& at) {
      Inputs moved = in;
      moved.*member = at;
      return dot(forward(bench, moved), in.dy);
    };
    CHECK(relative_error(grad, numeric_gradient(loss, in.*member, 0.5)) < kGradientTolerance);
  };
  check_input(&Inputs::x, g.dx);
  check_input(&Inputs::w, g.dw);
  check_input(&Inputs::b, g.db);
}

TEST_CASE("linear: dw and db are added to, dx is optional", "[ops]") {
  Bench bench(reference_ops());
  const Inputs in;
  const Grads g = backward(bench, in);
  Tensor dw = bench.real({kO, kI}, in.w), db = bench.real({kO}, in.b);
  bench->linear_backward({}, dw, db, bench.real({kN, kO}, in.dy), bench.real({kN, kI}, in.x),
                         bench.real({kO, kI}, in.w));
  Values dw_expected = g.dw, db_expected = g.db;
  for (size_t i = 0; i < dw_expected.size(); ++i) dw_expected[i] += in.w[i];
  for (size_t i = 0; i < db_expected.size(); ++i) db_expected[i] += in.b[i];
  CHECK(relative_error(bench.read(dw), dw_expected) < 1e-14);
  CHECK(relative_error(bench.read(db), db_expected) < 1e-14);
}

TEST_CASE("linear: c is added before the result is rounded", "[ops][gpu]") {
  const Inputs in;
  const Values c = exact(normals(kN * kO, 5));
  Bench ref(reference_ops());
  for (bool bias : {false, true}) {
    Values expected = forward(ref, in, bias);
    for (size_t i = 0; i < expected.size(); ++i) expected[i] += c[i];
    const auto with_c = [&](Bench& b) {
      Tensor y = b.real({kN, kO}, Values(kN * kO, NAN)), from = b.real({kN, kO}, c);
      b->linear_forward(y, b.real({kN, kI}, in.x), b.real({kO, kI}, in.w),
                        bias ? b.real({kO}, in.b) : Tensor(), from);
      CHECK(b.read(from) == c);
      return b.read(y);
    };
    CHECK(relative_error(with_c(ref), expected) < 1e-14);
    for (const Backend& backend : backends()) {
      INFO(backend.name << ", bias " << bias);
      Bench b(backend.open());
      const Values y = with_c(b);
      CHECK(relative_error(y, expected) < backend.reduced);
      if (backend.bf16()) {  // one rounding: within half a bf16 step of each element
        double worst = 0;
        for (size_t i = 0; i < y.size(); ++i) {
          // A library's epilogue for biases may round what it adds the bias to.
          const double before = bias ? std::fabs(expected[i] - in.b[i % kO]) : 0;
          worst =
              std::max(worst, std::fabs(y[i] - expected[i]) / (std::fabs(expected[i]) + before));
        }
        CHECK(worst < 0x1p-8);
      }
    }
  }
  Tensor y = ref.zeros({2, 3}, DType::f64);
  CHECK_THROWS_AS(
      ref->linear_forward(y, ref.zeros({2, 4}, DType::f64), ref.zeros({3, 4}, DType::f64), {}, y),
      Error);
}

TEST_CASE("linear: the candidates of a product, of which one is taken", "[ops][gpu]") {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    for (auto kind :
         {Product::Kind::forward, Product::Kind::input_gradient, Product::Kind::weight_gradient}) {
      const auto trials = b->time_product({kind, 256, 128, 384, true}, {4, 3});
      if (!b->asynchronous()) {  // BLAS on the CPU decides for itself
        CHECK(trials.empty());
        continue;
      }
      CHECK(trials.size() >= 1);
      CHECK(trials.size() <= 4);
      CHECK(std::count_if(trials.begin(), trials.end(), [](const auto& t) { return t.chosen; }) ==
            1);
      for (const ProductTrial& t : trials) CHECK(t.us > 0);
      // Timed for longer, the slow ones are left out, what was chosen is not.
      const auto sustained = b->time_product({kind, 256, 128, 384, true}, {4, 3, 2});
      CHECK(sustained.size() <= trials.size());
      CHECK(std::count_if(sustained.begin(), sustained.end(),
                          [](const auto& t) { return t.chosen; }) == 1);
      for (const ProductTrial& t : sustained) CHECK(t.us > 0);
      // Those that the library does not rank, too.
      const auto every = b->time_product({kind, 256, 128, 384, true}, {4, 3, 0, true});
      CHECK(every.size() >= trials.size());
      CHECK(every.size() <= trials.size() + 4);
      std::set<std::string> names;
      for (size_t i = 0; i < every.size(); ++i) {
        CHECK(every[i].us > 0);
        const bool is_new = names.insert(every[i].algorithm).second;
        if (i >= trials.size()) CHECK(is_new);
      }
      if (backend.bf16()) CHECK(every.size() > trials.size());
      CHECK(std::count_if(every.begin(), every.end(), [](const auto& t) { return t.chosen; }) == 1);
    }
  }
}

// Where there are many rows, algorithms are taken by shape, some of them such as the library would
// not have chosen. Rows at the edges of their tiles.
TEST_CASE("linear: many rows at a model's widths", "[ops][gpu]") {
  constexpr size_t kRows = 4096, kWidth = 1024;
  const std::vector<size_t> rows = {0, 1, 127, 128, 343, 344, 2047};
  const Values x = exact(normals(kRows * kWidth, 1));
  for (const size_t out : {size_t(3072), size_t(5632)}) {
    INFO(out);
    const Values w = exact(normals(out * kWidth, 2)), dy = exact(normals(kRows * out, 3));
    const auto product = [](size_t n, size_t k, const auto& left, const auto& right) {
      Values row(n);
      for (size_t i = 0; i < k; ++i) {
        const double a = left(i);
        for (size_t j = 0; j < n; ++j) row[j] += a * right(i, j);
      }
      return row;
    };
    Values wt(w.size());
    for (size_t o = 0; o < out; ++o)
      for (size_t i = 0; i < kWidth; ++i) wt[i * out + o] = w[o * kWidth + i];
    for (const Backend& backend : backends()) {
      INFO(backend.name);
      Bench b(backend.open());
      const Shape rows_of_x = {int64_t(kRows), int64_t(kWidth)},
                  rows_of_y = {int64_t(kRows), int64_t(out)},
                  rows_of_w = {int64_t(out), int64_t(kWidth)};
      const Tensor bx = b.real(rows_of_x, x), bw = b.real(rows_of_w, w),
                   bdy = b.real(rows_of_y, dy);
      const Tensor y = b.empty(rows_of_y, b->act_dtype()), dx = b.empty(rows_of_x, b->act_dtype()),
                   dw = b.zeros(rows_of_w, b->master_dtype());
      b->linear_forward(y, bx, bw, {});
      b->linear_backward(dx, dw, {}, bdy, bx, bw);
      const Values got_y = b.read(y), got_dx = b.read(dx), got_dw = b.read(dw);
      const auto row_of = [](const Values& v, size_t row, size_t width) {
        return Values(v.begin() + ptrdiff_t(row * width), v.begin() + ptrdiff_t((row + 1) * width));
      };
      for (const size_t r : rows) {
        INFO(r);
        CHECK(relative_error(row_of(got_y, r, out),
                             product(
                                 out, kWidth, [&](size_t i) { return x[r * kWidth + i]; },
                                 [&](size_t i, size_t j) { return wt[i * out + j]; })) <
              backend.reduced);
        CHECK(relative_error(row_of(got_dx, r, kWidth),
                             product(
                                 kWidth, out, [&](size_t i) { return dy[r * out + i]; },
                                 [&](size_t i, size_t j) { return w[i * kWidth + j]; })) <
              backend.reduced);
        CHECK(relative_error(row_of(got_dw, r, kWidth),
                             product(
                                 kWidth, kRows, [&](size_t i) { return dy[i * out + r]; },
                                 [&](size_t i, size_t j) { return x[i * kWidth + j]; })) <
              backend.reduced);
      }
    }
  }
}

TEST_CASE("linear: few rows with c", "[ops][gpu]") {  // where rows are few, other kernels run
  Bench ref(reference_ops());
  const Values x = exact(normals(2 * 256, 1)), w = exact(normals(64 * 256, 2)),
               c = exact(normals(2 * 64, 3));
  const auto run = [&](Bench& b) {
    Tensor y = b.empty({2, 64}, b->act_dtype());
    b->linear_forward(y, b.real({2, 256}, x), b.real({64, 256}, w), {}, b.real({2, 64}, c));
    return b.read(y);
  };
  const Values expected = run(ref);
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    CHECK(relative_error(run(b), expected) < backend.reduced);
  }
}

TEST_CASE("linear: every backend against double", "[ops]") {
  const Inputs in;
  Bench ref(reference_ops());
  const Grads expected = backward(ref, in);
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    Bench b(backend.open());
    const Grads g = backward(b, in);
    CHECK(relative_error(forward(b, in), forward(ref, in)) < backend.reduced);
    CHECK(relative_error(g.dx, expected.dx) < backend.reduced);
    CHECK(relative_error(g.dw, expected.dw) < backend.reduced);
    CHECK(relative_error(g.db, expected.db) < backend.reduced);
  }
}

// Rows, widths and depths at and off the edges of the tiles, panels and depths of
// kernels/cpu/narrow_gemm.cpp; the last is too wide for it.
TEST_CASE("linear: narrow layers against double", "[ops]") {
  for (const auto& [N, O, I] :
       {std::tuple{300, 70, 33}, std::tuple{257, 272, 200}, std::tuple{1031, 17, 450},
        std::tuple{16, 520, 400}, std::tuple{40, 640, 450}}) {
    const Values x = exact(normals(size_t(N * I), 1)), w = exact(normals(size_t(O * I), 2)),
                 dy = exact(normals(size_t(N * O), 3)), dw0 = exact(normals(size_t(O * I), 4));
    const auto run = [&, n = N, o = O, i = I](Bench& b, bool fresh) {
      const Tensor y = b.real({n, o}, Values(dy.size(), NAN)), tx = b.real({n, i}, x),
                   dx = b.real({n, i}, Values(x.size(), NAN)), tw = b.real({o, i}, w),
                   dw = b.real({o, i}, fresh ? Values(w.size(), NAN) : dw0, b->master_dtype());
      b->linear_forward(y, tx, tw, {});
      b->linear_backward(dx, {dw, fresh}, {}, b.real({n, o}, dy), tx, tw);
      return std::array{b.read(y), b.read(dx), b.read(dw)};
    };
    Bench ref(reference_ops());
    for (bool fresh : {false, true}) {
      const auto expected = run(ref, fresh);
      for (const Backend& backend : backends()) {
        INFO(backend.name << ", N " << N << ", O " << O << ", I " << I << ", fresh " << fresh);
        Bench b(backend.open());
        const auto got = run(b, fresh), again = run(b, fresh);
        for (size_t k = 0; k < got.size(); ++k) {
          CHECK(relative_error(got[k], expected[k]) < backend.reduced);
          CHECK(got[k] == again[k]);
        }
      }
    }
  }
}

TEST_CASE("linear: shapes that do not fit are refused", "[ops]") {
  Bench b(reference_ops());
  CHECK_THROWS_AS(b->linear_forward(b.zeros({2, 3}, DType::f64), b.zeros({2, 4}, DType::f64),
                                    b.zeros({3, 5}, DType::f64), {}),
                  Error);
}

// The CPU backend gives the same bits on one thread and on several: sums over rows go through a
// fixed number of partial sums, whatever the threads do. (The last bits of matrix products are
// BLAS's own affair.)
#ifdef _OPENMP
#include <omp.h>

#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

constexpr int64_t kB = 3, kT = 80, kD = 256, kN = kB * kT;  // enough work to be shared out
const Dropout kDrop{0.2f, 3, 4, 5, 6};

// All results of a pass through the operations, end to end.
Values everything(int threads) {
  omp_set_num_threads(threads);
  Bench b(make_cpu_ops(DType::f32));
  Values all;
  const auto keep = [&](Tensor t) {
    const Values v = b.read(t);
    all.insert(all.end(), v.begin(), v.end());
  };
  const Tensor x = b.real({kN, kD}, normals(kN * kD, 1)),
               dy = b.real({kN, kD}, normals(kN * kD, 2));
  const Tensor w = b.real({kD}, normals(kD, 3)),
               gate = b.real({kN, 3 * kD}, normals(kN * 3 * kD, 4));
  const Tensor ids = b.ids(integers(kN, 5, 0, 19));
  Tensor table = b.zeros({20, kD}, DType::f32), out = b.empty({kN, kD}, DType::f32);
  b->embedding_backward(table, dy, ids, 1, kDrop);
  keep(table);
  Tensor stats = b.empty({kN, 2}, DType::f32), dw = b.zeros({kD}, DType::f32),
         db = b.zeros({kD}, DType::f32), dx = b.empty({kN, kD}, DType::f32);
  b->norm_forward(out, stats, x, w, w, Norm::layer, 1e-5f);
  b->norm_backward(dx, dw, db, dy, x, w, stats, Norm::layer);
  for (Tensor t : {out, dx, dw, db}) keep(t);
  b->linear_backward({}, {}, db, dy, {}, b.zeros({kD, kD}, DType::f32));
  keep(db);
  Tensor sums = b.zeros({2}, DType::f64);
  b->sum(sums.slice(0, 1), gate);
  b->square_sum(sums.slice(1, 1), gate);
  keep(sums);
  SeqKernel& kernel = b->seq("hgru2");
  const SeqShape s{kB, kT, kD, 32};
  std::vector<Tensor> saved;
  for (const SavedSpec& spec : kernel.saved(s)) saved.push_back(b.empty(spec.shape, spec.dtype));
  SeqInputs in;
  in.x = gate;
  SeqGrads grads;
  grads.dx = b.empty({kN, 3 * kD}, DType::f32);
  grads.dbound = b.zeros({kD}, DType::f32);
  kernel.forward(s, {}, out, {}, in, saved);
  kernel.backward(s, {}, grads, dy, {}, in, saved);
  for (Tensor t : {out, grads.dx, grads.dbound}) keep(t);
  return all;
}

}  // namespace

TEST_CASE("cpu: results do not depend on the number of threads", "[ops]") {
  const int before = omp_get_max_threads();
  const Values one = everything(1), two = everything(2), five = everything(5);
  omp_set_num_threads(before);
  make_cpu_ops(DType::f32);  // BLAS follows OpenMP again
  CHECK(one == two);
  CHECK(one == five);
}

// Parts of a product end at multiples of 16: odd sizes, fewer rows or columns than threads, and
// products too small to share out.
TEST_CASE("cpu: matrix products are the same on any number of threads", "[ops]") {
  struct Size {
    int64_t rows, in, out;
  };
  const int before = omp_get_max_threads();
  for (const auto& [rows, in, out] :
       {Size{1, 700, 611}, {3, 257, 500}, {333, 65, 47}, {500, 300, 1}, {77, 1, 9}}) {
    INFO(rows << " x " << in << " x " << out);
    const Values x = exact(normals(size_t(rows * in), 1)), w = exact(normals(size_t(out * in), 2)),
                 dy = exact(normals(size_t(rows * out), 3));
    const auto results = [&](Bench& b) {
      const DType type = b->act_dtype();
      Tensor y = b.empty({rows, out}, type), dx = b.empty({rows, in}, type),
             dw = b.zeros({out, in}, type);
      const Tensor tx = b.real({rows, in}, x), tw = b.real({out, in}, w),
                   tdy = b.real({rows, out}, dy);
      b->linear_forward(y, tx, tw, {});
      b->linear_backward(dx, dw, {}, tdy, tx, tw);
      return std::vector<Values>{b.read(y), b.read(dx), b.read(dw)};
    };
    omp_set_num_threads(1);
    Bench exactly(reference_ops());
    const std::vector<Values> expected = results(exactly);
    for (int threads : {1, 2, 3, 6}) {
      INFO(threads << " threads");
      omp_set_num_threads(threads);
      Bench bench(make_cpu_ops(DType::f32));
      const std::vector<Values> got = results(bench);
      for (size_t i = 0; i < got.size(); ++i) CHECK(relative_error(got[i], expected[i]) < 1e-6);
      CHECK(got == results(bench));
    }
  }
  omp_set_num_threads(before);
  make_cpu_ops(DType::f32);  // BLAS follows OpenMP again
}
#endif

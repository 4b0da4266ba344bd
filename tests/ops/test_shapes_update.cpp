// What runs over flat arrays: the optimizer's update with its sums, lower bounds, copies and casts,
// at odd, even and large lengths, against loops in double, twice with equal bits; and what a GPU
// refuses. Twin of kernels/*; test_shapes.cpp has the operations of a layer.
#include <algorithm>
#include <cmath>

#include "ops/shape_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

void check_update(Ops& ops, int64_t n, bool ok) {
  Buffers buffers(ops);
  Random random(static_cast<uint64_t>(n));
  const AdamStep step{3e-4, 0.9, 0.95, 1e-8, 0.1, 7};
  Values w = random.normals(n), m = random.normals(n, 0.1), v = random.normals(n),
         g = random.normals(n);
  for (double& x : v) x = 0.01 * x * x;
  const Tensor tg = buffers.put(g, {n}, DType::f32), tw = buffers.put(w, {n}, DType::f32);
  const Tensor tm = buffers.put(m, {n}, DType::f32), tv = buffers.put(v, {n}, DType::f32);
  const bool separate = ops.act_dtype() == DType::bf16;
  const Tensor tc = separate ? buffers.make({n}, DType::bf16) : tw;
  Values zero{0}, poison{ok ? 1.0 : std::nan("")}, sums{0};
  double squares = 2.5, total = 2.5;
  for (double x : g) squares += x * x, total += x;
  const Tensor tsq = buffers.make({1}, DType::f64), tsum = buffers.make({1}, DType::f64);
  const Tensor tnll = buffers.put(poison, {1}, DType::f64),
               tcontrol = buffers.make({3}, DType::f64);
  const std::string shape = fmt::format("n={} ok={}", n, ok);
  const Values start{2.5};
  compare(ops, buffers, "square_sum", shape, {{"out", tsq, start, {squares}, 1e-13}},
          [&] { ops.square_sum(tsq, tg); });
  compare(ops, buffers, "sum", shape, {{"out", tsum, start, {total}, 1e-10}},
          [&] { ops.sum(tsum, tg); });
  const double norm = std::sqrt(squares), factor = std::min(1.0, 1.0 / (norm + 1e-6));
  compare(ops, buffers, "clip_control", shape,
          {{"control", tcontrol, {}, {norm, factor, ok ? 1.0 : 0.0}, 1e-13}},
          [&] { ops.clip_control(tcontrol, tsq, tnll, 1.0); });
  Values w1 = w, m1 = m, v1 = v, c0(size_t(n), 0.5), c1 = c0;
  for (int64_t i = 0; ok && i < n; ++i) {
    const double gi = g[i] * factor;
    m1[i] = step.beta1 * m[i] + (1 - step.beta1) * gi;
    v1[i] = step.beta2 * v[i] + (1 - step.beta2) * gi * gi;
    const double mh = m1[i] / (1 - std::pow(step.beta1, step.t)),
                 vh = v1[i] / (1 - std::pow(step.beta2, step.t));
    w1[i] = w[i] - step.lr * (mh / (std::sqrt(vh) + step.eps) + step.weight_decay * w[i]);
    c1[i] = round_to(DType::bf16, w1[i]);
  }
  std::vector<Output> outputs{
      {"master", tw, w, w1, 1e-7}, {"m", tm, m, m1, 1e-6}, {"v", tv, v, v1, 1e-6}};
  if (separate) outputs.push_back({"compute", tc, c0, c1, 2e-4});
  compare(ops, buffers, "adamw", shape, outputs,
          [&] { ops.adamw(tw, tc, tm, tv, tg, step, tcontrol); });
}

void check_lower_bound(Ops& ops, int64_t L, int64_t D) {
  Buffers buffers(ops);
  Random random(uint64_t(L * 7 + D));
  Values gamma = random.normals(L * D), dbeta = random.normals(L * D),
         dgamma0 = random.normals(L * D);
  for (double& v : dgamma0) v = float(v);
  const Tensor tg = buffers.put(gamma, {L, D}, DType::f32),
               tdb = buffers.put(dbeta, {L, D}, DType::f32);
  Values beta(size_t(L * D), 0), dgamma = dgamma0;
  for (int64_t d = 0; d < D; ++d) {
    double sum = 0, dot = 0;
    Values s(static_cast<size_t>(L)), ds(static_cast<size_t>(L), 0);
    for (int64_t l = 0; l < L; ++l) sum += s[l] = std::exp(gamma[l * D + d]);
    for (int64_t l = 0; l < L; ++l) s[l] /= sum;
    for (int64_t l = 1; l < L; ++l) beta[l * D + d] = beta[(l - 1) * D + d] + s[l];
    for (int64_t j = 1; j < L; ++j)
      for (int64_t l = j; l < L; ++l) ds[j] += dbeta[l * D + d];
    for (int64_t l = 0; l < L; ++l) dot += s[l] * ds[l];
    for (int64_t l = 0; l < L; ++l) dgamma[l * D + d] += s[l] * (ds[l] - dot);
  }
  const std::string shape = fmt::format("L={} D={}", L, D);
  const Tensor tbeta = buffers.make({L, D}, DType::f32), tdg = buffers.make({L, D}, DType::f32);
  compare(ops, buffers, "lower_bound_forward", shape, {{"beta", tbeta, {}, beta, 1e-6}},
          [&] { ops.lower_bound_forward(tbeta, tg); });
  compare(ops, buffers, "lower_bound_backward", shape, {{"dgamma", tdg, dgamma0, dgamma, 1e-6}},
          [&] { ops.lower_bound_backward(tdg, tdb, tg); });
}

void check_memory(Ops& ops) {
  Buffers buffers(ops);
  Random random(3);
  const DType types[] = {DType::f32, DType::f64, DType::bf16};
  for (const int64_t n : {int64_t(1), int64_t(1001), int64_t(700001)})  // the last is not staged
    for (const DType from : types)
      for (const DType to : types) {
        Values values = random.normals(n), want;
        const Tensor src = buffers.put(values, {n}, from), dst = buffers.make({n}, to);
        for (double v : values) want.push_back(round_to(to, v));
        compare(ops, buffers, "cast", fmt::format("{} to {}", name_of(from), name_of(to)),
                {{"dst", dst, {}, want, 0}}, [&] { ops.cast(dst, src); });
        if (from == to)
          compare(ops, buffers, "copy", name_of(from), {{"dst", dst, {}, want, 0}},
                  [&] { ops.copy(dst, src); });
        compare(ops, buffers, "zero", name_of(to), {{"dst", dst, {}, Values(want.size(), 0), 0}},
                [&] { ops.zero(dst); });
      }
}

void check_flat(Ops& ops) {
  check_memory(ops);
  for (const int64_t D : {1, 7, 192, 768, 1365}) check_lower_bound(ops, D == 1 ? 1 : 15, D);
  for (const int64_t n : {1, 7, 1000, 4099, 300000})
    for (const bool ok : {true, false}) check_update(ops, n, ok);
}

}  // namespace

TEST_CASE("shapes: updates, lower bounds and copies at odd and even lengths", "[ops][small]") {
  check_backends(check_flat);
}

TEST_CASE("shapes: updates, lower bounds and copies on a GPU", "[ops][gpu]") {
  if (!cuda_available()) {
    WARN("skipped: no GPU is visible, or this build has no CUDA");
    return;
  }
  check_backends(check_flat);
}

TEST_CASE("shapes: what a GPU cannot do is refused", "[ops][gpu]") {
  if (!cuda_available()) {
    WARN("skipped: no GPU is visible, or this build has no CUDA");
    return;
  }
  const std::unique_ptr<Ops> ops = make_cuda_ops(DType::bf16, 0);
  CHECK_THROWS_AS(ops->alloc(size_t(1) << 44, "a far too large tensor"), Error);
  CHECK_THROWS_AS(make_cuda_ops(DType::f64, 0), Error);
}

// Twin of kernels/cuda/gemv.cu and hgru2_step.cu: what a decoding step is made of, for few rows,
// against double; and recordings.
#include <tuple>

#include "ops/op_test.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

Values as_bf16(Values v) {
  for (double& x : v) x = double(bf16_to_float(float_to_bf16(float(x))));
  return v;
}

// The list of op_test.h, and the GPU's bf16 on inputs that bf16 holds exactly. Its results are
// rounded to 8 bits; a norm's or GLU's output is rounded once more before the product.
struct Target {
  std::string name;
  std::function<std::unique_ptr<Ops>()> open;
  double tolerance;
};
std::vector<Target> targets() {
  std::vector<Target> all;
  for (const Backend& b : backends()) all.push_back({b.name, b.open, b.recurrent});
  if (cuda_available())
    all.push_back({"cuda bf16", [] { return make_cuda_ops(DType::bf16, 0); }, 6e-3});
  return all;
}

struct LinearCase {
  int64_t N, I, O;
  Values x, branch, w, b, norm_w, norm_b, gu;
  LinearCase(int64_t n, int64_t i, int64_t o, unsigned seed) : N(n), I(i), O(o) {
    const auto fill = [&](int64_t count, double mean, double sd) {
      return as_bf16(normals(size_t(count), ++seed, mean, sd));
    };
    x = fill(N * I, 0.3, 1), branch = fill(N * I, 0, 1);
    w = fill(O * I, 0, 0.1), b = fill(O, 0, 1);
    norm_w = fill(I, 1, 0.2), norm_b = fill(I, 0, 0.2), gu = fill(N * 2 * I, 0, 1);
  }
};

Values linear(Bench& b, const LinearCase& c, bool bias) {
  const Tensor y = b.empty({c.N, c.O}, b->act_dtype());
  b->linear_forward(y, b.real({c.N, c.I}, c.x), b.real({c.O, c.I}, c.w),
                    bias ? b.real({c.O}, c.b) : Tensor());
  return b.read(y);
}

struct Normed {
  Values y, sum;
};
Normed norm_linear(Bench& b, const LinearCase& c, Norm kind, bool with_branch) {
  const DType act = b->act_dtype(), master = b->master_dtype();
  NormInput in;
  in.normed = b.empty({c.N, c.I}, act), in.stats = b.empty({c.N, 2}, b->stat_dtype());
  in.x = b.real({c.N, c.I}, c.x);
  if (with_branch) in.branch = b.real({c.N, c.I}, c.branch), in.sum = b.empty({c.N, c.I}, act);
  in.w = b.real({c.I}, c.norm_w, master);
  if (kind == Norm::layer) in.b = b.real({c.I}, c.norm_b, master);
  in.kind = kind, in.eps = 1e-5f;
  const Tensor y = b.empty({c.N, c.O}, act);
  b->norm_linear_forward(y, in, b.real({c.O, c.I}, c.w), b.real({c.O}, c.b));
  return {b.read(y), with_branch ? b.read(in.sum) : Values()};
}

Values glu_linear(Bench& b, const LinearCase& c, Act act) {
  const Tensor y = b.empty({c.N, c.O}, b->act_dtype()), h = b.empty({c.N, c.I}, b->act_dtype());
  b->glu_linear_forward(y, h, b.real({c.N, 2 * c.I}, c.gu), act, b.real({c.O, c.I}, c.w), {});
  return b.read(y);
}

}  // namespace

namespace {

void check_linear(int64_t N, int64_t I, int64_t O) {
  const LinearCase c(N, I, O, unsigned(N * 1000 + I));
  Bench ref(reference_ops());
  for (const Target& t : targets()) {
    INFO(t.name << " N=" << N << " I=" << I << " O=" << O);
    Bench b(t.open());
    CHECK(relative_error(linear(b, c, true), linear(ref, c, true)) < t.tolerance);
    CHECK(relative_error(linear(b, c, false), linear(ref, c, false)) < t.tolerance);
    for (Norm kind : {Norm::rms, Norm::layer})
      for (bool branch : {false, true}) {
        const Normed got = norm_linear(b, c, kind, branch);
        const Normed want = norm_linear(ref, c, kind, branch);
        CHECK(relative_error(got.y, want.y) < t.tolerance);
        if (branch) CHECK(relative_error(got.sum, want.sum) < t.tolerance);
      }
    for (Act act : {Act::silu, Act::identity, Act::sigmoid})
      CHECK(relative_error(glu_linear(b, c, act), glu_linear(ref, c, act)) < t.tolerance);
  }
}

}  // namespace

// Widths of whole vectors and not, few outputs and more than a wave of CTAs, rows up to one more
// than the kernels for few rows take. [small]: for compute-sanitizer.
TEST_CASE("decode: linear layers of few rows, narrow", "[ops][gpu][small]") {
  for (const auto& [N, I, O] : {std::tuple{2, 16, 24}, std::tuple{4, 13, 7}, std::tuple{9, 64, 33},
                                std::tuple{1, 264, 40}, std::tuple{8, 72, 130}})
    check_linear(N, I, O);
}

TEST_CASE("decode: linear layers of few rows, alone and behind a norm or GLU", "[ops][gpu]") {
  for (const auto& [N, I, O] :
       {std::tuple{1, 768, 96}, std::tuple{3, 264, 9000}, std::tuple{5, 2048, 40},
        std::tuple{8, 768, 4608}, std::tuple{1, 1365, 130}, std::tuple{1, 256, 20000},
        std::tuple{8, 6912, 16}})
    check_linear(N, I, O);
}

namespace {

struct Stepped {
  Values y, h;
};
Stepped step(Bench& b, const SeqShape& s, const SeqOptions& o, bool reset) {
  const Values x = as_bf16(normals(size_t(s.N() * 3 * s.D), 1));
  const Values h0 = as_bf16(normals(size_t(s.B * s.H() * s.n * s.n), 2));
  const Values bound = as_bf16(Values(size_t(s.D), 0.25));
  const Tensor h = b.real(b->seq("hgru2").state_shape(s), h0, b->stat_dtype());
  const Tensor y = b.empty({s.N(), s.D}, b->act_dtype());
  SeqInputs in;
  in.x = b.real({s.N(), 3 * s.D}, x);
  in.bound = b.real({s.D}, bound, b->master_dtype());
  std::vector<uint8_t> cuts(static_cast<size_t>(s.N()), 0);
  cuts[0] = 1;
  if (reset) in.reset = b.bytes(cuts);
  b->seq("hgru2").step(s, o, y, h, in);
  return {b.read(y), b.read(h)};
}

}  // namespace

TEST_CASE("decode: a step of HGRU2 against double", "[ops][gpu][small]") {
  for (const auto& [B, D, n] :
       {std::tuple{1, 256, 128}, std::tuple{3, 64, 16}, std::tuple{2, 96, 48},
        std::tuple{2, 24, 12}, std::tuple{1, 256, 256}, std::tuple{9, 64, 64}})
    for (bool reset : {false, true})
      for (const auto& [out, in] :
           {std::pair{Act::silu, Act::identity}, std::pair{Act::sigmoid, Act::silu}}) {
        const SeqShape s{B, 1, D, n};
        const SeqOptions o{out, in, 0.3f};
        Bench ref(reference_ops());
        const Stepped want = step(ref, s, o, reset);
        for (const Target& t : targets()) {
          INFO(t.name << " B=" << B << " D=" << D << " n=" << n << " reset=" << reset);
          Bench b(t.open());
          const Stepped got = step(b, s, o, reset);
          CHECK(relative_error(got.y, want.y) < t.tolerance);
          CHECK(relative_error(got.h, want.h) < 2e-6);  // states are fp32 everywhere
        }
      }
}

TEST_CASE("decode: a recording runs nothing itself and replays on what its tensors then hold",
          "[ops][gpu]") {
  const LinearCase c(2, 64, 32, 5);
  for (const Target& t : targets()) {
    INFO(t.name);
    Bench b(t.open());
    const Tensor x = b.real({2, 64}, c.x), w = b.real({32, 64}, c.w);
    const Tensor mid = b.zeros({2, 32}, b->act_dtype()), y = b.zeros({2, 64}, b->act_dtype());
    const Tensor wt = b.real({64, 32}, c.w);
    const auto work = [&] {
      b->linear_forward(mid, x, w, {});
      b->linear_forward(y, mid, wt, {});
    };
    work();
    const Values first = b.read(y);
    b->zero(y);
    const std::unique_ptr<Recording> recording = b->record(work);
    CHECK(b.read(y) == Values(2 * 64, 0));
    recording->replay();
    CHECK(b.read(y) == first);
    b->zero(x);
    recording->replay();
    recording->replay();
    CHECK(b.read(y) == Values(2 * 64, 0));
    b->copy(x, b.real({2, 64}, c.x));
    recording->replay();
    CHECK(b.read(y) == first);
  }
}

#include <algorithm>
#include <set>

#include "bench.h"
#include "core/rng.h"

namespace hgrn::bench {
namespace {

constexpr size_t kNumbers = (size_t(1) << 22) + 36;  // not in step with the rows of any tensor

// Tensors on the device filled with random numbers (never zeros: they hide and flatter).
class Pool {
 public:
  explicit Pool(Ops& ops) : ops_(ops) {}
  ~Pool() {
    for (void* p : blocks_) ops_.free(p);
  }
  Tensor empty(Shape shape, DType dtype) {
    Tensor t(nullptr, dtype, shape);
    t.data = ops_.alloc(t.bytes(), "a benchmark");
    blocks_.push_back(t.data);
    return t;
  }
  Tensor make(Shape shape, DType dtype, double scale = 1) {
    const Tensor t = empty(shape, dtype);
    // Of a large tensor the numbers repeat: a billion of them would take a minute to make.
    std::vector<float> host(std::min(size_t(t.numel()), kNumbers));
    const uint64_t key = blocks_.size();
    for (size_t i = 0; i < host.size(); i += 4) {
      const Philox r = philox(key, 1, i);
      for (size_t j = 0; j < 4 && i + j < host.size(); ++j)
        host[i + j] = float(scale * (3.46 * double(uniform01(r.v[j])) - 1.73));
    }
    const Tensor flat = t.view({t.numel()});
    const int64_t made = int64_t(host.size());
    upload(flat.slice(0, made), host);
    for (int64_t at = made; at < t.numel(); at += made) {
      const int64_t count = std::min(made, t.numel() - at);
      ops_.copy(flat.slice(at, count), flat.slice(0, count));
    }
    return t;
  }
  Tensor ids(const std::vector<int32_t>& host) {
    const Tensor t = empty({int64_t(host.size())}, DType::i32);
    ops_.upload(t, host.data());
    return t;
  }

 private:
  void upload(Tensor t, const std::vector<float>& host) {
    if (t.dtype == DType::bf16) {
      std::vector<uint16_t> narrow(host.size());
      for (size_t i = 0; i < host.size(); ++i) narrow[i] = float_to_bf16(host[i]);
      ops_.upload(t, narrow.data());
    } else if (t.dtype == DType::f64) {
      const std::vector<double> wide(host.begin(), host.end());
      ops_.upload(t, wide.data());
    } else {
      ops_.upload(t, host.data());
    }
  }
  Ops& ops_;
  std::vector<void*> blocks_;
};

std::vector<int32_t> random_tokens(int64_t count, int64_t limit) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = int32_t(philox(3, 2, i).v[0] % uint64_t(limit));
  return tokens;
}

// That of a training step.
Dropout model_dropout(const Config& c) {
  Dropout d;
  d.p = float(c.model.dropout), d.seed = 1;
  return d;
}

// Median microseconds of one of several calls that follow each other, on the device's own clock.
double median_us(Ops& ops, const std::function<void()>& f) {
  constexpr int kWarmup = 2, kRuns = 11;
  for (int i = 0; i < kWarmup; ++i) f();
  ops.synchronize();
  ops.forget_marks();
  std::vector<int64_t> marks = {ops.mark()};
  for (int i = 0; i < kRuns; ++i) {
    f();
    marks.push_back(ops.mark());
  }
  ops.synchronize();
  std::vector<double> us;
  for (int i = 0; i < kRuns; ++i)
    us.push_back(1e3 * ops.elapsed_ms(marks[size_t(i)], marks[size_t(i) + 1]));
  return median(std::move(us));
}

struct Timer {
  Ops& ops;
  const std::string& only;
  std::vector<OpTime>& out;
  void operator()(const std::string& name, const Shape& shape, double flops, double bytes,
                  const std::function<void()>& f) const {
    if (!only.empty() && name.find(only) == std::string::npos) return;
    out.push_back({name, shape.str(), median_us(ops, f), flops, bytes});
    if (flops > 0) return;
    Pool pool(ops);
    const double size = std::min(bytes, 4e9);  // that of a larger one by proportion
    const Tensor from = pool.make({int64_t(size / 8)}, DType::f32);
    const Tensor to = pool.make(from.shape, DType::f32);
    out.back().copy_us = median_us(ops, [&] { ops.copy(to, from); }) * bytes / size;
  }
};

void time_linear(Ops& ops, const Timer& timer, const char* name, int64_t N, int64_t O, int64_t I) {
  Pool pool(ops);
  const DType act = ops.act_dtype();
  const double a = double(size_of(act)), f = 2.0 * double(N) * double(O) * double(I);
  const Tensor x = pool.make({N, I}, act), y = pool.make({N, O}, act);
  const Tensor w = pool.make({O, I}, act, 0.02), dw = pool.make({O, I}, ops.master_dtype());
  const double bytes = a * double(N * I + N * O + O * I);
  timer(std::string(name) + " forward", {N, O, I}, f, bytes,
        [&] { ops.linear_forward(y, x, w, {}); });
  timer(std::string(name) + " backward", {N, O, I}, 2 * f, 2 * bytes + 8.0 * double(O * I),
        [&] { ops.linear_backward(x, dw, {}, y, x, w); });
}

void time_hgru2(Ops& ops, const Timer& timer, const Config& c) {
  Pool pool(ops);
  const SeqShape s{c.train.micro_batch, c.data.seq_len, c.model.hidden_size, c.model.expand_ratio};
  SeqKernel& k = ops.seq("hgru2");
  const DType act = ops.act_dtype();
  const SeqOptions o{c.model.output_activation, c.model.input_activation, 1};
  const Tensor x = pool.make({s.N(), 3 * s.D}, act), dx = pool.make({s.N(), 3 * s.D}, act);
  const Tensor y = pool.make({s.N(), s.D}, act), dy = pool.make({s.N(), s.D}, act);
  const Tensor beta = pool.make({s.D}, ops.master_dtype(), 0.0);
  const Tensor dbeta = pool.make({s.D}, ops.master_dtype());
  std::vector<Tensor> saved;
  for (const SavedSpec& spec : k.saved(s)) saved.push_back(pool.make(spec.shape, spec.dtype));
  const SeqInputs in{x, beta, {}, {}, {}};
  const double heads = double(s.N() * s.H()), n = double(s.n), a = double(size_of(act));
  const double state = a * n * n / 64;
  timer("hgru2 forward", {s.B, s.T, s.H(), s.n}, heads * 4 * n * n, heads * (4 * n * a + state),
        [&] { k.forward(s, o, y, {}, in, saved); });
  timer("hgru2 backward", {s.B, s.T, s.H(), s.n}, heads * 8 * n * n, heads * (7 * n * a + state),
        [&] {
          k.backward(s, o, {dx, dbeta, {}, {}}, dy, {}, in, saved);
        });
}

void time_rowwise(Ops& ops, const Timer& timer, const Config& c) {
  Pool pool(ops);
  const int64_t N = c.train.micro_batch * c.data.seq_len, D = c.model.hidden_size;
  const int64_t F = Block::stored_width(ops, c.model);
  const DType act = ops.act_dtype(), master = ops.master_dtype();
  const double row = double(N * D) * double(size_of(act));
  const Tensor x = pool.make({N, D}, act), b = pool.make({N, D}, act), y = pool.make({N, D}, act);
  const Tensor sum = pool.make({N, D}, act), stats = pool.make({N, 2}, ops.stat_dtype());
  const Tensor w = pool.make({D}, master), dw = pool.make({D}, master);
  const Norm kind = c.model.norm;
  const Dropout drop = model_dropout(c);
  const Tensor dbranch = drop.p > 0 ? x : Tensor();
  timer("norm forward", {N, D}, 0, 2 * row,
        [&] { ops.norm_forward(y, stats, x, w, {}, kind, 1e-6f); });
  timer("norm backward", {N, D}, 0, 3 * row,
        [&] { ops.norm_backward(y, dw, {}, b, x, w, stats, kind); });
  timer("norm backward + y", {N, D}, 0, 4 * row, [&] {
    ops.norm_backward(y, dw, {}, b, x, w, stats, kind, {sum, {}});
  });
  timer("residual_norm forward", {N, D}, 0, 4 * row,
        [&] { ops.residual_norm_forward(sum, y, stats, x, b, w, {}, kind, 1e-6f, drop); });
  const double both = dbranch ? row : 0;  // written a second time, dropped out
  timer("residual_norm backward", {N, D}, 0, 4 * row + both,
        [&] { ops.residual_norm_backward(y, dbranch, dw, {}, b, sum, w, stats, kind, drop); });
  const Tensor again = pool.make({N, D}, act);
  timer("residual_norm backward + y", {N, D}, 0, 5 * row + both, [&] {
    ops.residual_norm_backward(y, dbranch, dw, {}, b, sum, w, stats, kind, drop, {again, {}});
  });
  const Tensor gu = pool.make({N, 2 * F}, act), h = pool.make({N, F}, act);
  const Tensor dgu = pool.make({N, 2 * F}, act);
  const double glu = double(N * F) * double(size_of(act));
  timer("glu forward", {N, F}, 0, 3 * glu, [&] { ops.glu_forward(h, gu, c.model.hidden_act); });
  timer("glu backward", {N, F}, 0, 5 * glu,
        [&] { ops.glu_backward(dgu, h, gu, c.model.hidden_act); });
  const Tensor h_again = pool.make({N, F}, act);
  timer("glu backward + h", {N, F}, 0, 6 * glu,
        [&] { ops.glu_backward(dgu, h, gu, c.model.hidden_act, h_again); });
  if (!c.model.bias) return;
  const Tensor db = pool.make({3 * D}, master), dqfi = pool.make({N, 3 * D}, act);
  timer("bias gradient out", {N, D}, 0, row,
        [&] { ops.linear_backward({}, {}, db.slice(0, D), x, {}, {}); });
  timer("bias gradient q,f,i", {N, 3 * D}, 0, 3 * row,
        [&] { ops.linear_backward({}, {}, db, dqfi, {}, {}); });
}

void time_ends(Ops& ops, const Timer& timer, const Config& c) {
  Pool pool(ops);
  const int64_t N = c.train.micro_batch * c.data.seq_len, D = c.model.hidden_size;
  const int64_t V = c.model.vocab_size, m = ops.vocab_multiple(), Vp = (V + m - 1) / m * m;
  const DType act = ops.act_dtype(), master = ops.master_dtype();
  const double a = double(size_of(act));
  const std::vector<int32_t> tokens = random_tokens(N, V);
  // Of the table the rows of tokens that occur are read, or read and written; a fresh gradient is
  // written whole.
  const double different = double(std::set<int32_t>(tokens.begin(), tokens.end()).size());
  const Tensor ids = pool.ids(tokens), x = pool.make({N, D}, act);
  const Tensor w = pool.make({Vp, D}, act), dw = pool.make({Vp, D}, master);
  const double rows = a * (double(N) + different) * double(D);
  const Dropout drop = model_dropout(c);
  timer("embedding forward", {N, D}, 0, rows, [&] { ops.embedding_forward(x, ids, w, 1, drop); });
  const int64_t size = ops.embedding_order_size(N, Vp, D);
  const Tensor order = size > 0 ? pool.ids(std::vector<int32_t>(size_t(size))) : Tensor();
  if (order) {
    ops.embedding_forward(x, ids, w, 1, drop, order);  // for backward
    timer("embedding forward + order", {N, D}, 0, rows,
          [&] { ops.embedding_forward(x, ids, w, 1, drop, order); });
  }
  timer("embedding backward", {N, D}, 0, a * double(N * D) + 8 * different * double(D),
        [&] { ops.embedding_backward(dw, x, ids, 1, drop, order); });
  timer("embedding backward, fresh", {N, D}, 0, a * double(N * D) + 4 * double(Vp * D),
        [&] { ops.embedding_backward(Grad(dw, true), x, ids, 1, drop, order); });
  const int64_t slice = std::min<int64_t>(N, 4096);
  const Tensor logits = pool.make({slice, Vp}, act), nll = pool.make({slice}, ops.stat_dtype());
  timer("cross_entropy", {slice, V}, 0, 2 * a * double(slice * V),
        [&] { ops.cross_entropy(nll, logits, ids.slice(0, slice), V, /*backward=*/true, 1e-4); });
}

void time_update(Ops& ops, const Timer& timer, const Config& c) {
  Pool pool(ops);
  const LanguageModel model(ops, c.model);
  const int64_t P = model.params().total();
  const DType master = ops.master_dtype();
  const bool narrow = ops.act_dtype() != master;
  const Tensor w = pool.make({P}, master), m = pool.make({P}, master), g = pool.make({P}, master);
  const Tensor v = pool.make({P}, master);
  ops.zero(v);  // second moments are not negative
  const Tensor compute = narrow ? pool.empty({P}, ops.act_dtype()) : w;
  const Tensor rest = narrow ? pool.empty({P}, DType::i16) : Tensor();
  if (narrow) ops.split(compute, rest, w);
  const Tensor square = pool.make({1}, DType::f64), nll = pool.make({1}, DType::f64);
  const Tensor control = pool.make({3}, DType::f64);
  timer("square_sum", {P}, 0, 4.0 * double(P), [&] {
    ops.zero(square);
    ops.square_sum(square, g);
  });
  ops.zero(square);
  ops.square_sum(square, g);
  ops.zero(nll);
  ops.clip_control(control, square, nll, 1);
  timer("adamw", {P}, 0, 28.0 * double(P), [&] {
    ops.adamw(narrow ? rest : w, compute, m, v, g, {1e-4, 0.9, 0.95, 1e-8, 0.1, 1}, control);
  });
}

}  // namespace

std::vector<OpTime> time_ops(Ops& ops, const Config& c, const std::string& only) {
  std::vector<OpTime> out;
  const Timer timer{ops, only, out};
  const int64_t N = c.train.micro_batch * c.data.seq_len;
  const int64_t D = c.model.hidden_size, F = Block::stored_width(ops, c.model);
  time_ends(ops, timer, c);
  time_rowwise(ops, timer, c);
  time_linear(ops, timer, "linear q,f,i", N, 3 * D, D);
  time_linear(ops, timer, "linear out", N, D, D);
  time_linear(ops, timer, "linear gate,up", N, 2 * F, D);
  time_linear(ops, timer, "linear down", N, D, F);
  time_hgru2(ops, timer, c);
  time_update(ops, timer, c);
  return out;
}

}  // namespace hgrn::bench

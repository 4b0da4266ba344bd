// Timings of the CUDA operations (cuda_ops_check time), each the median of 20 runs between two
// events, over two sets of buffers in turn, each larger than the L2 cache.
// op | shape | us | TFLOP/s | GB/s | share of the limit: the larger of FLOP / 790 TFLOP/s and bytes
// / 3.0 TB/s over the time. Bytes: each input read once, each output written once.
#include <algorithm>
#include <cstdio>

#include "cuda/cuda_check.h"
#include "cuda_ops_check.h"

namespace hgrn::check_tool {
namespace {

constexpr double kFlopLimit = 790e12, kByteLimit = 3.0e12;

class Bench {
 public:
  explicit Bench(CudaOps& ops) : ops_(ops), noise_(ops) {
    for (DType t : {DType::f32, DType::bf16}) {
      Random random(1);
      Host values = random.normals(kBlock);
      (t == DType::f32 ? noise32_ : noise16_) = noise_.put(values, {kBlock}, t);
    }
    for (int i = 0; i < 2 * kRuns; ++i) CUDA_CHECK(cudaEventCreate(&events_[i]));
  }
  ~Bench() {
    for (cudaEvent_t e : events_) cudaEventDestroy(e);
  }

  // Random values, the same block again and again.
  Tensor noise(Buffers& buffers, Shape shape, DType dtype) {
    const Tensor t = buffers.make(shape, dtype);
    const Tensor block = dtype == DType::f32 ? noise32_ : noise16_;
    for (int64_t at = 0; at < t.numel(); at += kBlock) {
      const int64_t n = std::min(kBlock, t.numel() - at);
      ops_.copy(t.view({t.numel()}).slice(at, n), block.slice(0, n));
    }
    return t;
  }

  // make(buffers) takes a set's buffers and returns the call.
  template <class Make>
  void time(const char* op, const std::string& shape, double flops, double bytes, Make&& make) {
    Buffers a(ops_), b(ops_);
    const std::function<void()> call[2] = {make(a), make(b)};
    for (int i = 0; i < 4; ++i) call[i % 2]();
    for (int i = 0; i < kRuns; ++i) {
      CUDA_CHECK(cudaEventRecord(events_[2 * i], ops_.stream()));
      call[i % 2]();
      CUDA_CHECK(cudaEventRecord(events_[2 * i + 1], ops_.stream()));
    }
    ops_.synchronize();
    std::vector<float> ms(kRuns);
    for (int i = 0; i < kRuns; ++i)
      CUDA_CHECK(cudaEventElapsedTime(&ms[i], events_[2 * i], events_[2 * i + 1]));
    std::nth_element(ms.begin(), ms.begin() + kRuns / 2, ms.end());
    const double seconds = ms[kRuns / 2] * 1e-3;
    const double limit = std::max(flops / kFlopLimit, bytes / kByteLimit);
    std::printf("%-26s | %-24s | %8.1f | %6.1f | %6.0f | %5.2f\n", op, shape.c_str(), seconds * 1e6,
                flops / seconds / 1e12, bytes / seconds / 1e9, limit / seconds);
    std::fflush(stdout);
  }

 private:
  static constexpr int kRuns = 20;
  static constexpr int64_t kBlock = 1 << 20;
  CudaOps& ops_;
  Buffers noise_;
  Tensor noise32_, noise16_;
  cudaEvent_t events_[2 * kRuns] = {};
};

constexpr DType kAct = DType::bf16, kF32 = DType::f32;

void time_linear(CudaOps& ops, Bench& bench, const char* what, int64_t N, int64_t I, int64_t O,
                 bool bias = false) {
  const std::string shape = fmt::format("{} {}x{}x{}", what, N, I, O);
  const double flops = 2.0 * double(N) * double(I) * double(O);
  const double x = 2.0 * double(N * I), y = 2.0 * double(N * O), w = 2.0 * double(I * O);
  bench.time(bias ? "linear_forward + bias" : "linear_forward", shape, flops, x + y + w,
             [&](Buffers& b) {
               const Tensor ty = b.make({N, O}, kAct), tx = bench.noise(b, {N, I}, kAct);
               const Tensor tw = bench.noise(b, {O, I}, kAct),
                            tb = bias ? bench.noise(b, {O}, kAct) : Tensor();
               return [=, &ops] { ops.linear_forward(ty, tx, tw, tb); };
             });
  bench.time("linear_backward dx", shape, flops, x + y + w, [&](Buffers& b) {
    const Tensor dx = b.make({N, I}, kAct), dy = bench.noise(b, {N, O}, kAct);
    const Tensor tw = bench.noise(b, {O, I}, kAct);
    return [=, &ops] { ops.linear_backward(dx, Tensor(), Tensor(), dy, Tensor(), tw); };
  });
  bench.time("linear_backward dw", shape, flops, x + y + 4 * w, [&](Buffers& b) {
    const Tensor dw = bench.noise(b, {O, I}, kF32), dy = bench.noise(b, {N, O}, kAct);
    const Tensor tx = bench.noise(b, {N, I}, kAct);
    return [=, &ops] { ops.linear_backward(Tensor(), dw, Tensor(), dy, tx, Tensor()); };
  });
  if (!bias) return;
  bench.time("linear_backward db", shape, 0, y, [&](Buffers& b) {
    const Tensor db = bench.noise(b, {O}, kF32), dy = bench.noise(b, {N, O}, kAct);
    return [=, &ops] { ops.linear_backward(Tensor(), Tensor(), db, dy, Tensor(), Tensor()); };
  });
}

void time_norm(CudaOps& ops, Bench& bench, int64_t N, int64_t D, Norm kind, float p) {
  const bool layer = kind == Norm::layer;
  const std::string shape = fmt::format("{}x{} {} p={}", N, D, layer ? "layer" : "rms", p);
  const double pass = 2.0 * double(N * D);
  Dropout drop;
  drop.p = p;
  struct Set {
    Tensor x, branch, y, stats, w, b, dw, db, dsum;
  };
  const auto make = [&](Buffers& b) {
    Set s{bench.noise(b, {N, D}, kAct), bench.noise(b, {N, D}, kAct),
          bench.noise(b, {N, D}, kAct), bench.noise(b, {N, 2}, kF32),
          bench.noise(b, {D}, kF32),    Tensor(),
          bench.noise(b, {D}, kF32),    Tensor(),
          bench.noise(b, {N, D}, kAct)};
    if (layer) s.b = bench.noise(b, {D}, kF32), s.db = bench.noise(b, {D}, kF32);
    return s;
  };
  if (p == 0) {
    bench.time("norm_forward", shape, 0, 2 * pass, [&](Buffers& b) {
      return
          [s = make(b), kind, &ops] { ops.norm_forward(s.y, s.stats, s.x, s.w, s.b, kind, 1e-6f); };
    });
    bench.time("norm_backward", shape, 0, 3 * pass, [&](Buffers& b) {
      return [s = make(b), kind, &ops] {
        ops.norm_backward(s.branch, s.dw, s.db, s.y, s.x, s.w, s.stats, kind);
      };
    });
  }
  bench.time("residual_norm_forward", shape, 0, 4 * pass, [&](Buffers& b) {
    return [s = make(b), kind, drop, &ops] {
      ops.residual_norm_forward(s.dsum, s.y, s.stats, s.x, s.branch, s.w, s.b, kind, 1e-6f, drop);
    };
  });
  bench.time("residual_norm_backward", shape, 0, (p > 0 ? 5 : 4) * pass, [&](Buffers& b) {
    return [s = make(b), kind, drop, &ops] {
      ops.residual_norm_backward(s.dsum, drop.p > 0 ? s.branch : Tensor(), s.dw, s.db, s.y, s.x,
                                 s.w, s.stats, kind, drop);
    };
  });
}

void time_glu(CudaOps& ops, Bench& bench, int64_t N, int64_t F, Act act) {
  const std::string shape = fmt::format("{}x{}", N, F);
  const double pass = 2.0 * double(N * F);
  bench.time("glu_forward", shape, 0, 3 * pass, [&](Buffers& b) {
    const Tensor h = b.make({N, F}, kAct), gu = bench.noise(b, {N, 2 * F}, kAct);
    return [=, &ops] { ops.glu_forward(h, gu, act); };
  });
  bench.time("glu_backward", shape, 0, 5 * pass, [&](Buffers& b) {
    const Tensor dgu = b.make({N, 2 * F}, kAct), gu = bench.noise(b, {N, 2 * F}, kAct);
    const Tensor dh = bench.noise(b, {N, F}, kAct);
    return [=, &ops] { ops.glu_backward(dgu, dh, gu, act); };
  });
}

void time_embedding(CudaOps& ops, Bench& bench, int64_t N, int64_t D, int64_t V) {
  Random random(9);
  Host tokens(static_cast<size_t>(N));
  std::vector<bool> seen(static_cast<size_t>(V));
  double unique = 0;
  for (double& t : tokens) {  // roughly Zipf: as frequent as words
    t = std::floor(std::pow(double(V), double(random.bits()) / 4294967296.0)) - 1;
    if (!seen[size_t(t)]) ++unique, seen[size_t(t)] = true;
  }
  const std::string shape = fmt::format("{}x{} V={}", N, D, V);
  const double pass = 2.0 * double(N * D), row = double(D);
  bench.time("embedding_forward", shape, 0, pass + unique * row * 2, [&](Buffers& b) {
    const Tensor x = b.make({N, D}, kAct), w = bench.noise(b, {V, D}, kAct);
    const Tensor t = b.put(tokens, {N}, DType::i32);
    return [=, &ops] { ops.embedding_forward(x, t, w, 1, Dropout()); };
  });
  bench.time("embedding_backward", shape, 0, pass + unique * row * 8, [&](Buffers& b) {
    const Tensor dx = bench.noise(b, {N, D}, kAct), dw = bench.noise(b, {V, D}, kF32);
    const Tensor t = b.put(tokens, {N}, DType::i32);
    return [=, &ops] { ops.embedding_backward(dw, dx, t, 1, Dropout()); };
  });
}

void time_cross_entropy(CudaOps& ops, Bench& bench, int64_t rows, int64_t V, int64_t Vp) {
  Random random(4);
  Host targets(static_cast<size_t>(rows));
  for (double& t : targets) t = double(random.below(V));
  for (const bool backward : {true, false})
    bench.time(backward ? "cross_entropy" : "cross_entropy (no grad)",
               fmt::format("{}x{}", rows, Vp), 0, (backward ? 4.0 : 2.0) * double(rows * Vp),
               [&](Buffers& b) {
                 const Tensor nll = b.make({rows}, kF32), t = b.put(targets, {rows}, DType::i32);
                 const Tensor logits = bench.noise(b, {rows, Vp}, kAct);
                 return [=, &ops] { ops.cross_entropy(nll, logits, t, V, backward, 1e-3); };
               });
}

void time_update(CudaOps& ops, Bench& bench, int64_t n) {
  const std::string shape = fmt::format("{}", n);
  bench.time("square_sum", shape, 0, 4.0 * double(n), [&](Buffers& b) {
    const Tensor g = bench.noise(b, {n}, kF32), out = b.make({1}, DType::f64);
    ops.zero(out);
    return [=, &ops] { ops.square_sum(out, g); };
  });
  bench.time("adamw", shape, 0, 30.0 * double(n), [&](Buffers& b) {
    Host control{1, 1, 1};
    const Tensor w = bench.noise(b, {n}, kF32), c = b.make({n}, kAct),
                 g = bench.noise(b, {n}, kF32);
    const Tensor m = bench.noise(b, {n}, kF32), v = b.make({n}, kF32);
    const Tensor tc = b.put(control, {3}, DType::f64);
    ops.zero(v);
    return [=, &ops] { ops.adamw(w, c, m, v, g, AdamStep{1e-4, 0.9, 0.95, 1e-8, 0.1, 100}, tc); };
  });
  bench.time("zero (gradients)", shape, 0, 4.0 * double(n), [&](Buffers& b) {
    const Tensor g = b.make({n}, kF32);
    return [=, &ops] { ops.zero(g); };
  });
}

void time_model(CudaOps& ops, Bench& bench, int64_t N, int64_t D, int64_t F, int64_t params) {
  const int64_t Vp = 50304, slice = 8192;
  time_embedding(ops, bench, N, D, Vp);
  time_linear(ops, bench, "qfi", N, D, 3 * D);
  time_linear(ops, bench, "out", N, D, D);
  time_linear(ops, bench, "gate-up", N, D, 2 * F);
  time_linear(ops, bench, "down", N, F, D);
  time_linear(ops, bench, "logits", slice, D, Vp);
  time_norm(ops, bench, N, D, Norm::rms, 0);
  time_glu(ops, bench, N, F, Act::silu);
  time_cross_entropy(ops, bench, slice, 50257, Vp);
  time_update(ops, bench, params);
}

}  // namespace

void run_timings(CudaOps& ops) {
  Bench bench(ops);
  std::printf("%-26s | %-24s | %8s | %6s | %6s | share\n", "op", "shape", "us", "TFLOP/s", "GB/s");
  const int64_t n = int64_t(1) << 28;
  bench.time("copy", "512 MiB", 0, 4.0 * double(n), [&](Buffers& b) {
    const Tensor from = bench.noise(b, {n}, kAct), to = b.make({n}, kAct);
    return [=, &ops] { ops.copy(to, from); };
  });
  time_linear(ops, bench, "square", 8192, 8192, 8192);
  time_model(ops, bench, 26 * 2048, 768, 2048, 144'812'544);     // 150M
  time_model(ops, bench, 10 * 2048, 2048, 5632, 1'027'919'872);  // 1B
  // WikiText-103: LayerNorm, dropout, biases, an odd GLU width
  time_linear(ops, bench, "wt gate-up", 128 * 512, 512, 2730, true);
  time_linear(ops, bench, "wt down", 128 * 512, 1365, 512, true);
  time_norm(ops, bench, 128 * 512, 512, Norm::layer, 0);
  time_norm(ops, bench, 128 * 512, 512, Norm::layer, 0.1f);
  time_glu(ops, bench, 128 * 512, 1365, Act::identity);
}

}  // namespace hgrn::check_tool

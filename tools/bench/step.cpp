#include <algorithm>
#include <chrono>

#include "bench.h"
#include "core/rng.h"
#include "timed_ops.h"

namespace hgrn::bench {

namespace {
constexpr int kBreakdownSteps = 5;

// What two marks around nothing measure.
double mark_cost_ms(Ops& ops) {
  constexpr int kMarks = 101;
  ops.synchronize();
  ops.forget_marks();
  for (int i = 0; i < kMarks; ++i) ops.mark();
  ops.synchronize();
  std::vector<double> ms;
  for (int i = 1; i < kMarks; ++i) ms.push_back(ops.elapsed_ms(i - 1, i));
  std::sort(ms.begin(), ms.end());
  return ms[ms.size() / 2];
}
}  // namespace

double median_ms(Ops& ops, int warmup, int runs, const std::function<void()>& f) {
  std::vector<double> ms;
  for (int i = -warmup; i < runs; ++i) {
    ops.synchronize();
    const auto start = std::chrono::steady_clock::now();
    f();
    ops.synchronize();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    if (i >= 0) ms.push_back(took.count());
  }
  std::sort(ms.begin(), ms.end());
  return ms[ms.size() / 2];
}

StepTime time_step(Ops& backend, const Config& config, int steps, int64_t micro_batches) {
  const MemoryInfo before = backend.memory();
  TimedOps ops(backend);
  LanguageModel model(ops, config.model, config.optim.decay == DecayKind::all);
  Optimizer optimizer(ops, config.optim);
  WeightStore weights;
  Tensor nll_sum;
  Arena arena("weights and optimizer");
  void* memory = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    weights.take(arena, ops, model.params(), /*with_grad=*/true);
    optimizer.take(arena, model.params());
    nll_sum = arena.take("loss", {1}, DType::f64);
    if (pass == 0) arena.bind(memory = ops.alloc(arena.peak(), arena.name()));
  }
  weights.set(ops, initial_weights(model.params(), config.train.seed));
  optimizer.zero_state();
  ops.zero(weights.weights().grad);  // padding
  model.use(weights.weights());
  const int64_t B = config.train.micro_batch, T = config.data.seq_len;
  model.prepare({.B = B, .T = T, .train = true, .recompute = config.train.recompute});

  std::vector<int32_t> tokens(size_t(B * T + 1));
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = int32_t(philox(1, 0, i).v[0] % uint64_t(config.model.vocab_size));
  int64_t t = 0;
  Dropout drop;
  drop.p = float(config.model.dropout);
  StepTime r;
  r.tokens = B * T * micro_batches;
  const auto forward_backward = [&](bool may_record) {
    drop.step = uint64_t(++t);
    model.begin_step();
    ops.zero(nll_sum);
    for (int64_t i = 0; i < micro_batches; ++i) {
      drop.row0 = i * B * T;
      model.forward_backward({B, T, tokens.data(), tokens.data() + 1, nullptr},
                             1.0 / double(r.tokens), drop, nll_sum, may_record);
    }
  };
  const auto step = [&] {
    forward_backward(false);
    check(optimizer.step(weights.weights(), nll_sum, 1e-5, t).ok, "the step is not finite");
  };
  // The trainer's way on a GPU; a mark a step.
  const auto ahead_ms = [&] {
    constexpr int kWarmup = 3;
    ops.forget_marks();
    std::vector<int64_t> marks;
    forward_backward(true);
    for (int i = 0; i <= steps + kWarmup; ++i) {
      const int64_t update = optimizer.start_step(weights.weights(), nll_sum, 1e-5, t, true);
      marks.push_back(ops.mark());
      forward_backward(true);
      check(optimizer.verdict(update).ok, "the step is not finite");
    }
    ops.synchronize();
    std::vector<double> spans;
    for (size_t i = kWarmup + 1; i < marks.size(); ++i)
      spans.push_back(ops.elapsed_ms(marks[i - 1], marks[i]));
    std::sort(spans.begin(), spans.end());
    return spans[spans.size() / 2];
  };
  ops.enable(false);
  r.waiting_ms = median_ms(ops, 3, steps, step);
  r.ms = ops.asynchronous() ? ahead_ms() : r.waiting_ms;
  // The breakdown is of other steps: marks between the operations cost a little themselves.
  ops.enable(true);
  std::vector<std::vector<OpShare>> runs;
  std::vector<double> whole;
  for (int i = 0; i < kBreakdownSteps; ++i) {
    ops.start();
    const int64_t from = ops.mark();
    step();
    const int64_t to = ops.mark();
    runs.push_back(ops.finish());
    whole.push_back(ops.elapsed_ms(from, to));
  }
  const size_t middle =
      size_t(std::min_element(whole.begin(), whole.end()) - whole.begin());  // the least disturbed
  r.breakdown = std::move(runs[middle]);
  ops.enable(false);
  const double cost = mark_cost_ms(ops);
  r.mark_us = 1e3 * cost;
  for (OpShare& o : r.breakdown) o.ms = std::max(0.0, o.ms - cost * double(o.calls));
  r.breakdown_ms = whole[middle];
  r.tokens_per_s = double(r.tokens) / r.ms * 1e3;
  if (ops.peak_flops() > 0)
    r.mfu = 6.0 * double(model.params().count()) * r.tokens_per_s / ops.peak_flops();
  const MemoryInfo m = ops.memory();
  r.memory_gib = double(m.total - m.free) / double(1 << 30);
  r.context_gib = double(before.total - before.free) / double(1 << 30);
  ops.free(memory);
  return r;
}

}  // namespace hgrn::bench

#include <algorithm>
#include <chrono>

#include "bench.h"
#include "core/rng.h"
#include "timed_ops.h"

namespace hgrn::bench {

namespace {
constexpr int kBreakdownSteps = 5;

// What marks around an operation add to what it takes in a step. Where the host waits for each
// operation: what two marks around nothing measure. Else also what a device loses that ends one
// kernel before it starts the next: a small kernel with marks, less the same one in a recorded row.
double mark_cost_ms(Ops& ops) {
  constexpr int kCalls = 100, kRounds = 9;
  if (!ops.asynchronous()) {
    ops.forget_marks();
    for (int i = 0; i <= kCalls; ++i) ops.mark();
    std::vector<double> ms;
    for (int i = 1; i <= kCalls; ++i) ms.push_back(ops.elapsed_ms(i - 1, i));
    return median(std::move(ms));
  }
  const Shape shape{int64_t(1) << 16};
  const size_t bytes = size_t(shape.numel()) * (sizeof(float) + sizeof(uint16_t));
  void* const memory = ops.alloc(bytes, "a small operation");
  const Tensor from(memory, DType::f32, shape);
  const Tensor to(static_cast<float*>(memory) + shape.numel(), DType::bf16, shape);
  ops.zero(from);
  ops.cast(to, from);
  std::vector<double> marked, bare;
  {
    const auto row = ops.record([&] {
      for (int i = 0; i < kCalls; ++i) ops.cast(to, from);
    });
    for (int round = 0; round < kRounds; ++round) {
      ops.synchronize();
      ops.forget_marks();
      row->replay();  // so that the device has work while the host goes ahead
      ops.mark();
      row->replay();
      ops.mark();
      for (int i = 0; i < kCalls; ++i) {
        ops.mark();
        ops.cast(to, from);
        ops.mark();
      }
      ops.synchronize();
      bare.push_back(ops.elapsed_ms(0, 1) / kCalls);
      for (int i = 0; i < kCalls; ++i) marked.push_back(ops.elapsed_ms(2 * i + 2, 2 * i + 3));
    }
  }
  ops.free(memory);
  return std::max(0.0, median(std::move(marked)) - median(std::move(bare)));
}
}  // namespace

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

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
  return median(std::move(ms));
}

namespace {

// A model with its optimizer on random tokens, a step at a time.
class StepRun {
 public:
  StepRun(TimedOps& ops, const Config& config, int64_t micro_batches)
      : ops_(ops),
        model_(ops, config.model, config.optim.decay == DecayKind::all),
        optimizer_(ops, config.optim),
        micro_batches_(micro_batches),
        B_(config.train.micro_batch),
        T_(config.data.seq_len) {
    Arena arena("weights and optimizer");
    for (int pass = 0; pass < 2; ++pass) {
      weights_.take(arena, ops, model_.params(), /*with_grad=*/true);
      optimizer_.take(arena, model_.params());
      if (pass == 0) arena.bind(memory_ = ops.alloc(arena.peak(), arena.name()));
    }
    weights_.set(ops, initial_weights(model_.params(), config.train.seed));
    ops.zero(weights_.weights().grad);  // padding
    optimizer_.zero_state();
    model_.use(weights_.weights());
    model_.prepare({.B = B_, .T = T_, .train = true, .recompute = config.train.recompute});
    ids_.resize(size_t(B_ * T_ + 1));
    for (size_t i = 0; i < ids_.size(); ++i)
      ids_[i] = int32_t(philox(1, 0, i).v[0] % uint64_t(config.model.vocab_size));
    drop_.p = float(config.model.dropout);
  }
  ~StepRun() { ops_.free(memory_); }
  StepRun(const StepRun&) = delete;
  StepRun& operator=(const StepRun&) = delete;

  int64_t tokens() const { return B_ * T_ * micro_batches_; }
  int64_t parameters() const { return model_.params().count(); }

  void forward_backward(bool may_record) {
    drop_.step = uint64_t(++step_);
    model_.begin_step();
    ops_.zero(optimizer_.numbers().all);
    for (int64_t i = 0; i < micro_batches_; ++i) {
      drop_.row0 = i * B_ * T_;
      model_.forward_backward({B_, T_, ids_.data(), ids_.data() + 1, nullptr},
                              1.0 / double(tokens()), drop_, optimizer_.numbers().nll_sum(),
                              may_record);
    }
  }
  int64_t start_update() { return optimizer_.start_step(weights_.weights(), 1e-5, step_); }
  void end_update(int64_t update) {
    check(optimizer_.verdict(update).ok, "the step is not finite");
  }
  void waiting_step() {
    forward_backward(false);
    end_update(start_update());
  }

 private:
  TimedOps& ops_;
  LanguageModel model_;
  Optimizer optimizer_;
  WeightStore weights_;
  const int64_t micro_batches_, B_, T_;
  void* memory_ = nullptr;
  std::vector<int32_t> ids_;
  Dropout drop_;
  int64_t step_ = 0;
};

// Milliseconds of steps as the trainer runs them on a GPU, behind `warmup` more; a mark a step.
std::vector<double> ahead_ms(TimedOps& ops, StepRun& run, int warmup, int steps) {
  ops.forget_marks();
  std::vector<int64_t> marks;
  run.forward_backward(true);
  for (int i = 0; i <= steps + warmup; ++i) {
    const int64_t update = run.start_update();
    marks.push_back(ops.mark());
    run.forward_backward(true);
    run.end_update(update);
  }
  ops.synchronize();
  std::vector<double> spans;
  for (size_t i = size_t(warmup) + 1; i < marks.size(); ++i)
    spans.push_back(ops.elapsed_ms(marks[i - 1], marks[i]));
  return spans;
}

// Of steps of their own: marks between the operations cost a little themselves. Others as the
// trainer runs them go between, since a card's clock falls while it is at work.
void break_down(TimedOps& ops, StepRun& run, StepTime& r) {
  constexpr int kBetween = 3;
  std::vector<std::vector<OpShare>> runs;
  std::vector<double> whole, between;
  for (int i = 0; i < kBreakdownSteps; ++i) {
    if (ops.asynchronous())
      for (double ms : ahead_ms(ops, run, /*warmup=*/1, kBetween)) between.push_back(ms);
    ops.enable(true);
    ops.start();
    const int64_t from = ops.mark();
    run.waiting_step();
    const int64_t to = ops.mark();
    runs.push_back(ops.finish());
    whole.push_back(ops.elapsed_ms(from, to));
    ops.enable(false);
  }
  r.breakdown_ms = median(whole);
  const size_t middle =
      size_t(std::find(whole.begin(), whole.end(), r.breakdown_ms) - whole.begin());
  r.breakdown = std::move(runs[middle]);
  r.between_ms = between.empty() ? r.ms : median(std::move(between));
  const double cost = mark_cost_ms(ops);
  r.mark_us = 1e3 * cost;
  for (OpShare& o : r.breakdown) o.ms = std::max(0.0, o.ms - cost * double(o.calls));
}

}  // namespace

StepTime time_step(Ops& backend, const Config& config, int steps, int64_t micro_batches) {
  const MemoryInfo before = backend.memory();
  TimedOps ops(backend);
  ops.enable(false);
  StepRun run(ops, config, micro_batches);
  StepTime r;
  r.tokens = run.tokens();
  r.waiting_ms = median_ms(ops, 3, steps, [&] { run.waiting_step(); });
  r.ms = ops.asynchronous() ? median(ahead_ms(ops, run, /*warmup=*/3, steps)) : r.waiting_ms;
  break_down(ops, run, r);
  r.tokens_per_s = double(r.tokens) / r.ms * 1e3;
  if (ops.peak_flops() > 0)
    r.mfu = 6.0 * double(run.parameters()) * r.tokens_per_s / ops.peak_flops();
  const MemoryInfo m = ops.memory();
  r.memory_gib = double(m.total - m.free) / double(1 << 30);
  r.context_gib = double(before.total - before.free) / double(1 << 30);
  return r;
}

}  // namespace hgrn::bench

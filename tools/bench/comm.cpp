// What communication costs a training step, and how much of it is hidden under computing. The same
// step is timed three ways in one process, through the GradSync and Optimizer of the trainer:
// whole; silent, where gradients and weights stay at home and all else is as it was (parts, casts,
// AdamW on what the rank owns, and the few numbers on which ranks agree, which keep them in step:
// what that costs is the slower GPU's, not the wires'); and its collectives alone, one after
// another, with nothing to hide under.
//   shown = whole - silent    hidden = 1 - shown / alone
// What communication takes from computing that goes on beside it (multiprocessors, bandwidth) makes
// the whole step longer, so it counts as shown. Whole and silent steps are timed in turns, so that
// a card that warms up meets both.
#include <algorithm>
#include <chrono>
#include <cstdint>

#include "bench.h"
#include "core/rng.h"
#include "train/grad_sync.h"
#include "train/ranks.h"

namespace hgrn::bench {
namespace {

// Passes collectives on, or leaves the large ones out.
class Switch final : public Comm {
 public:
  explicit Switch(Comm& comm) : Comm(comm.rank(), comm.world()), comm_(comm) {}
  bool on = true;
  std::string describe() const override { return comm_.describe(); }
  Ticket all_reduce(Tensor x) override {
    return post(x, [&] { return comm_.all_reduce(x); });
  }
  Ticket reduce_scatter(Tensor x) override {
    return post(x, [&] { return comm_.reduce_scatter(x); });
  }
  Ticket all_gather(Tensor x) override {
    return post(x, [&] { return comm_.all_gather(x); });
  }
  Ticket broadcast(Tensor x, int root) override {
    return post(x, [&] { return comm_.broadcast(x, root); });
  }
  void wait(Ticket ticket) override { comm_.wait(ticket); }
  void agree(Tensor x) override {
    post(x, [&] { return comm_.agree(x), Ticket(0); });
  }
  void barrier() override { comm_.barrier(); }
  void throw_if_failed() override { comm_.throw_if_failed(); }
  int64_t calls = 0, bytes = 0;
  double host_ms = 0;  // that the calls kept the host

 private:
  static constexpr size_t kFewBytes = 256;  // agreements, which are always passed on
  template <class F>
  Ticket post(Tensor x, F&& call) {
    if (!on && x.bytes() > kFewBytes) return 0;
    if (x.numel() > 0) ++calls, bytes += int64_t(x.bytes());
    const auto began = std::chrono::steady_clock::now();
    const Ticket ticket = call();
    host_ms +=
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - began).count();
    return ticket;
  }
  Comm& comm_;
};

class Steps {
 public:
  Steps(Ranks& ranks, Ops& ops, const Config& config)
      : ranks_(ranks),
        ops_(ops),
        config_(config),
        comm_(ranks.comm()),
        model_(ops, config.model, config.optim.decay == DecayKind::all),
        optimizer_(ops, config.optim),
        sync_(comm_, ops, model_, config.train) {
    Arena arena("weights and optimizer"), shared("weights and gradients that ranks exchange");
    for (int pass = 0; pass < 2; ++pass) {
      weights_.take(arena, ops, model_.params(), /*with_grad=*/true,
                    ranks.alone() ? nullptr : &shared, sync_.updated());
      optimizer_.take(arena, model_.params(), sync_.updated());
      sync_.take(shared);
      if (pass > 0) continue;
      arena.bind(memory_ = ops.alloc(arena.peak(), arena.name()));
      if (shared.peak() == 0) continue;
      shared_memory_ = ranks.alloc_shared(shared.peak(), sync_.largest_sum_bytes(), shared.name());
      shared.bind(shared_memory_.get());
    }
    state_bytes = arena.peak() + shared.peak();
    weights_.set(ops, initial_weights(model_.params(), config.train.seed));
    optimizer_.zero_state();
    ops.zero(weights_.weights().grad);
    model_.use(weights_.weights());
    model_.set_hooks({[this](int stage) { sync_.before_forward(stage); },
                      [this](int stage) { sync_.after_backward(stage); }});
    const int64_t B = config.train.micro_batch, T = config.data.seq_len;
    model_.prepare({.B = B, .T = T, .train = true, .recompute = config.train.recompute});
    tokens_.resize(size_t(B * T + 1));
    for (size_t i = 0; i < tokens_.size(); ++i)
      tokens_[i] = int32_t(philox(uint64_t(ranks.rank()) + 1, 0, i).v[0] %
                           uint64_t(config.model.vocab_size));
  }
  ~Steps() {  // after an error collectives may still write there, until the process ends
    if (done_)
      ops_.free(memory_);
    else
      shared_memory_.release();
  }

  // Medians of `runs` steps of each kind, on the slowest rank.
  void time(int runs, CommTime& t) {
    std::vector<double> whole, silent, alone;
    const int half = (runs + 1) / 2;
    std::vector<double> waiting;
    series(true, 3, whole, [this] { step(); });
    whole.clear();
    for (int turn = 0; turn < 2; ++turn) {
      comm_.host_ms = 0;
      series(true, half, whole, [this] { step(); });
      t.host_ms = comm_.host_ms / (half + 1);  // and the step before those that are timed
      if (!ranks_.alone())
        series(
            false, half, silent, [this] { step(); }, &waiting);
    }
    t.whole_ms = slowest(whole);
    done_ = ranks_.alone();
    if (done_) return;
    std::vector<double> casts;
    series(true, runs, alone, [this] { collectives(); });
    series(false, runs, casts, [this] { collectives(); });
    t.silent_ms = slowest(silent);
    t.agreement_ms = mean_of_ranks(waiting);
    t.alone_ms = slowest(alone) - slowest(casts);
    comm_.calls = comm_.bytes = 0;
    comm_.on = true;
    collectives();
    t.calls = comm_.calls;
    t.bytes = comm_.bytes;
    settle();
    done_ = true;
  }

  size_t state_bytes = 0;

 private:
  using Clock = std::chrono::steady_clock;

  // A step of Trainer::train_step(): where calls return before their work is done, the next one is
  // begun before the host waits for this one.
  void step() {
    if (!std::exchange(ahead_, false)) forward_backward();
    sync_.finish();
    optimizer_.sum_squares(weights_.weights());
    const int64_t from = ops_.mark();
    agree();
    agreements_.emplace_back(from, ops_.mark());
    optimizer_.decide(1e-5, count_);
    sync_.update_weights(weights_.weights(),
                         [this](FlatRange range) { optimizer_.update(weights_.weights(), range); });
    const int64_t numbers = optimizer_.numbers_later();
    if (ops_.asynchronous()) {
      forward_backward();
      ahead_ = true;
    }
    const StepVerdict verdict = optimizer_.verdict(numbers);
    comm_.throw_if_failed();
    check(verdict.ok, "the step is not finite");
  }

  void forward_backward() {
    const TrainConfig& t = config_.train;
    const int64_t share = t.global_batch / ranks_.world();
    const double scale = 1.0 / double(t.global_batch * config_.data.seq_len);
    model_.begin_step();
    ops_.zero(optimizer_.numbers().all);
    Dropout drop;
    drop.p = float(config_.model.dropout);
    drop.step = uint64_t(++count_);
    for (int64_t done = 0; done < share; done += t.micro_batch) {
      if (done + t.micro_batch == share) sync_.last_micro_batch(weights_.weights().grad);
      model_.forward_backward(
          {t.micro_batch, config_.data.seq_len, tokens_.data(), tokens_.data() + 1, nullptr}, scale,
          drop, optimizer_.numbers().nll_sum());
    }
  }

  // The collectives of a step, in its order. The gradients that are summed again and again stay
  // finite: fp32 and bf16 reach to 1e38.
  void collectives() {
    sync_.last_micro_batch(weights_.weights().grad);
    for (int stage = int(config_.model.num_hidden_layers); stage > 0; --stage)
      sync_.after_backward(stage);
    for (int stage : {-1, 0}) sync_.after_backward(stage);
    sync_.finish();
    agree();
    sync_.update_weights(weights_.weights(), [](FlatRange) {});
    sync_.before_forward(INT32_MAX);
    optimizer_.verdict(optimizer_.numbers_later());
    comm_.throw_if_failed();
  }

  void agree() {
    if (!ranks_.alone()) comm_.agree(optimizer_.numbers().agreed(sync_.sharded()));
  }

  void settle() {
    ahead_ = false;
    sync_.drop();
    sync_.before_forward(INT32_MAX);
    ops_.synchronize();
    comm_.barrier();
  }

  // Steps follow each other as in a run: the next forward starts while weights are gathered.
  // waiting: how long the device stood at the agreement of each step.
  template <class F>
  void series(bool on, int runs, std::vector<double>& ms, F&& f,
              std::vector<double>* waiting = nullptr) {
    settle();
    comm_.on = on;
    agreements_.clear();
    ops_.forget_marks();
    f();  // the first meets the pause
    auto last = Clock::now();
    for (int i = 0; i < runs; ++i) {
      f();
      const auto now = Clock::now();
      ms.push_back(std::chrono::duration<double, std::milli>(now - last).count());
      last = now;
    }
    settle();
    if (!waiting) return;
    for (size_t i = 1; i < agreements_.size(); ++i)  // the first meets the pause
      waiting->push_back(ops_.elapsed_ms(agreements_[i].first, agreements_[i].second));
  }

  double mean_of_ranks(const std::vector<double>& ms) {
    double sum = 0;
    for (double v : ms) sum += v / double(ms.size());
    const std::vector<double> all = ranks_.gather(sum);
    double mean = 0;
    for (double v : all) mean += v / double(all.size());
    return mean;
  }

  double slowest(std::vector<double> ms) {
    const std::vector<double> all = ranks_.gather(median(std::move(ms)));
    return *std::max_element(all.begin(), all.end());
  }

  Ranks& ranks_;
  Ops& ops_;
  const Config config_;
  Switch comm_;
  LanguageModel model_;
  Optimizer optimizer_;
  GradSync sync_;
  WeightStore weights_;
  void* memory_ = nullptr;
  Ranks::Memory shared_memory_;
  std::vector<int32_t> tokens_;
  std::vector<std::pair<int64_t, int64_t>> agreements_;  // marks
  int64_t count_ = 0;
  bool ahead_ = false, done_ = false;
};

}  // namespace

CommTime time_comm(Ranks& ranks, Ops& ops, const Config& config, int runs) {
  check_batch(config.train, ranks.world());
  CommTime t;
  t.ranks = ranks.world();
  t.zero = ranks.alone() ? 0 : int(config.train.zero);
  t.tokens = config.train.global_batch * config.data.seq_len;
  Steps steps(ranks, ops, config);
  steps.time(runs, t);
  t.state_gib = double(steps.state_bytes) / double(1 << 30);
  if (ops.peak_flops() > 0) {
    const MemoryInfo m = ops.memory();
    t.memory_gib = double(m.total - m.free) / double(1 << 30);
  }
  t.tokens_per_s = double(t.tokens) / t.whole_ms * 1e3;
  return t;
}

}  // namespace hgrn::bench

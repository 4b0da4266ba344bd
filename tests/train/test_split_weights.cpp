// bf16 training keeps a master weight in two halves (model/weights.h): what the host gives comes
// back bit for bit, and any number of ranks, with ZeRO-1 or without, ends with the weights of one.
// On the CPU, whose activations are fp32, by a backend that says bf16 and is asked for updates
// alone.
#include <cstdlib>

#include "cpu/cpu_ops.h"
#include "model/weights.h"
#include "ops/comm_test.h"
#include "train/grad_sync.h"
#include "train/optimizer.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

class NarrowOps final : public CpuOps {
 public:
  NarrowOps() : CpuOps(DType::f32) {}
  DType act_dtype() const override { return DType::bf16; }
};

constexpr int kLayers = 3;

ModelConfig model_config(bool bias) {
  ModelConfig c;
  c.vocab_size = 61;
  c.hidden_size = 24;
  c.num_hidden_layers = kLayers;
  c.expand_ratio = 8;
  c.intermediate_size = 40;
  c.bias = bias;
  return c;
}

// Bits that bf16 does not hold; padding is zero.
std::vector<float> start_of(const ParamTable& table) {
  std::vector<float> w = initial_weights(table, 3);
  for (const Param& p : table.params())
    for (int64_t i = 0; i < p.shape.numel(); ++i) w[size_t(p.at(i))] += 0.001f * float(i % 97);
  return w;
}

// The memory of a rank and the steps of a run, on gradients that `world` ranks sum to the same.
class Run {
 public:
  Run(Ops& ops, Comm* comm, const ModelConfig& config, bool decay_all, int zero)
      : ops_(ops), comm_(comm), model(ops, config, decay_all), optimizer_(ops, optim()) {
    TrainConfig train;
    train.zero = zero;
    if (comm) sync_ = std::make_unique<GradSync>(*comm, ops, model, train);
    Arena arena("test");
    for (int pass = 0; pass < 2; ++pass) {
      store.take(arena, ops, model.params(), /*with_grad=*/true, nullptr, ranges());
      optimizer_.take(arena, model.params(), ranges());
      if (pass == 0) arena.bind(memory_ = ops.alloc(arena.peak(), "test"));
    }
    ops.zero(store.weights().grad);
    optimizer_.zero_state();
  }
  ~Run() { ops_.free(memory_); }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  void step(int t) {
    const Weights& w = store.weights();
    std::vector<float> grad(size_t(model.params().total()), 0.0f);
    const int world = comm_ ? comm_->world() : 1, rank = comm_ ? comm_->rank() : 0;
    // Multiples of 2^-10, so that any order of sums is exact: one rank's are the sum of all.
    for (const Param& p : model.params().params())
      for (int64_t i = 0; i < p.shape.numel(); ++i) {
        const auto of = [&](int r) { return float((i * 7 + t * 5 + r * 3) % 64 - 31) / 1024; };
        float& g = grad[size_t(p.at(i))];
        if (world > 1)
          g = of(rank);
        else
          for (int r = 0; r < summed; ++r) g += of(r);
      }
    ops_.upload(w.grad, grad.data());
    ops_.zero(optimizer_.numbers().all);
    if (!comm_) {
      optimizer_.start_step(w, 1e-3, t);
      return;
    }
    sync_->last_micro_batch(w.grad);
    for (int stage = kLayers + 1; stage >= -1; --stage) sync_->after_backward(stage);
    sync_->finish();
    optimizer_.sum_squares(w);
    comm_->agree(optimizer_.numbers().agreed(sync_->sharded()));
    optimizer_.decide(1e-3, t);
    sync_->update_weights(w, [&](FlatRange range) { optimizer_.update(w, range); });
    sync_->before_forward(INT32_MAX);
  }
  std::vector<float> master(bool wanted = true) {
    if (!comm_) return store.get(ops_);
    return store.get(
        ops_, [this](Tensor flat) { sync_->gather_whole(flat); }, wanted);
  }
  std::vector<uint16_t> compute() const {
    std::vector<uint16_t> host(size_t(model.params().total()));
    ops_.download(host.data(), store.weights().compute);
    return host;
  }
  std::vector<float> wide() const {  // what operations read in fp32
    const Tensor t = store.weights().master;
    std::vector<float> host(size_t(t.numel()));
    ops_.download(host.data(), t);
    return host;
  }
  bool gradients_are_zero() const {
    std::vector<float> host(size_t(model.params().total()));
    ops_.download(host.data(), store.weights().grad);
    return std::all_of(host.begin(), host.end(), [](float g) { return g == 0; });
  }

  int summed = 1;  // how many ranks' gradients one rank has

 private:
  Ops& ops_;
  Comm* const comm_;

 public:
  LanguageModel model;
  WeightStore store;

 private:
  static OptimConfig optim() {
    OptimConfig c;
    c.clip_norm = 0.5;
    c.weight_decay = 0.1;
    return c;
  }
  std::vector<FlatRange> ranges() const {
    return sync_ ? sync_->updated() : std::vector<FlatRange>{};
  }
  Optimizer optimizer_;
  std::unique_ptr<GradSync> sync_;
  void* memory_ = nullptr;
};

std::vector<std::unique_ptr<Ops>> narrow_backends() {
  std::vector<std::unique_ptr<Ops>> all;
  all.push_back(std::make_unique<NarrowOps>());
  if (cuda_available()) all.push_back(make_cuda_ops(DType::bf16, 0));
  return all;
}

}  // namespace

TEST_CASE("split weights: what was set comes back, and evaluation reads the same", "[train][gpu]") {
  for (const std::unique_ptr<Ops>& ops : narrow_backends())
    for (bool bias : {false, true})
      for (bool decay_all : {false, true}) {
        INFO(ops->describe() << ", bias " << bias << ", all decay " << decay_all);
        Run run(*ops, nullptr, model_config(bias), decay_all, 0);
        const ParamTable& table = run.model.params();
        const std::vector<float> start = start_of(table);
        run.store.set(*ops, start);
        CHECK(run.gradients_are_zero());
        CHECK(run.store.get(*ops) == start);
        CHECK(run.gradients_are_zero());
        // Two bytes an element, where operations read bf16: nearly all of them.
        const Weights& w = run.store.weights();
        CHECK(w.master_first == table.wide_first());
        CHECK(w.rest.data.numel() == table.wide_first());
        CHECK(table.wide_first() > table.total() * 3 / 4);
        for (const Param& p : table.params())
          if (p.read_as == ReadAs::master) CHECK(p.offset >= table.wide_first());

        WeightStore eval;
        void* memory = nullptr;
        Arena arena("test");
        for (int pass = 0; pass < 2; ++pass) {
          eval.take(arena, *ops, table, /*with_grad=*/false);
          if (pass == 0) arena.bind(memory = ops->alloc(arena.peak(), "test"));
        }
        eval.set(*ops, start);
        const std::vector<uint16_t> trained = run.compute();
        std::vector<uint16_t> read(trained.size());
        ops->download(read.data(), eval.weights().compute);
        for (const Param& p : table.params())
          if (p.read_as == ReadAs::compute)
            for (int64_t i = 0; i < p.shape.numel(); ++i)
              REQUIRE(read[size_t(p.at(i))] == trained[size_t(p.at(i))]);
        std::vector<float> wide(size_t(eval.weights().master.numel()));
        ops->download(wide.data(), eval.weights().master);
        CHECK(wide == run.wide());
        CHECK_THROWS_AS(eval.get(*ops), Error);
        ops->free(memory);
      }
}

TEST_CASE("split weights: ranks end with the weights of one", "[train][gpu]") {
  for (Engine e : engines()) {
    const bool gloo = std::string(e.name) == "gloo";
    if (gloo) e.ops = [](int) -> std::unique_ptr<Ops> { return std::make_unique<NarrowOps>(); };
    for (int world : e.worlds)
      for (int zero : {0, 1})
        for (int kind = 0; kind < 4; ++kind) {
          const bool bias = kind & 1, decay_all = kind & 2;
          // Many buckets, or those of a model as small as this.
          if (world % 2) ::setenv("HGRN_BUCKET_ELEMENTS", "2000", 1);
          INFO(e.name << ", " << world << " ranks, ZeRO " << zero << ", bias " << bias
                      << ", all decay " << decay_all);
          std::unique_ptr<Ops> alone = e.ops(0);
          Run one(*alone, nullptr, model_config(bias), decay_all, 0);
          one.summed = world;
          const std::vector<float> start = start_of(one.model.params());
          one.store.set(*alone, start);
          for (int t = 1; t <= 3; ++t) one.step(t);
          const std::vector<uint16_t> compute = one.compute();
          const std::vector<float> wide = one.wide(), want = one.master();
          CHECK(want != start);

          struct Seen {
            std::vector<float> master, wide;
            std::vector<uint16_t> compute;
            int64_t halves = 0;
            bool zero = false, empty = false;
          };
          std::vector<Seen> seen(size_t(world), Seen{});
          each_rank(
              e, world,
              [&](Rank& me, int r) {
                Ops& ops = me.bench->ops();
                Run run(ops, me.comm.get(), model_config(bias), decay_all, zero);
                Seen& s = seen[size_t(r)];
                run.store.set(ops, start);
                for (int t = 1; t <= 2; ++t) run.step(t);
                // A save in between changes nothing.
                s.empty = run.master(/*wanted=*/r == 0).empty();
                run.step(3);
                s.compute = run.compute(), s.wide = run.wide();
                s.halves = run.store.weights().rest.data.numel();
                s.master = run.master();
                s.zero = run.gradients_are_zero();
              },
              [&](const std::vector<Rank>& ranks) {
                no_errors(ranks);
                int64_t halves = 0;
                for (const Seen& s : seen) {
                  CHECK(s.master == want);
                  CHECK(s.compute == compute);
                  CHECK(s.wide == wide);
                  CHECK(s.zero);
                  CHECK(s.empty == (&s != &seen[0]));
                  halves += s.halves;
                }
                const int64_t all = one.model.params().wide_first();
                CHECK(halves == (zero == 1 && world > 1 ? all : all * world));
              });
          ::unsetenv("HGRN_BUCKET_ELEMENTS");
        }
  }
}

// Several CPU ranks: the same training as one, bit for bit the same twice, and checkpoints that any
// number of ranks goes on from.
#include <algorithm>

#include <nlohmann/json.hpp>

#include "catch.h"
#include "launch/run_ranks.h"
#include "train/grad_sync.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

void check_close(const std::vector<double>& got, const std::vector<double>& want, double epsilon) {
  REQUIRE(got.size() == want.size());
  for (size_t i = 0; i < want.size(); ++i) CHECK(got[i] == Approx(want[i]).epsilon(epsilon));
}

// Twelve sequences a step divide by one to four ranks.
const std::vector<std::string> kTwelve = {"train.global_batch=12", "train.micro_batch=1",
                                          "train.eval_every=6"};

std::vector<std::string> with(std::vector<std::string> set, const std::string& more) {
  set.push_back(more);
  return set;
}

}  // namespace

TEST_CASE("ranks: one, two and four train alike; two runs are the same bits", "[train]") {
  NEEDS_GLOO();
  const RankRuns r;
  CHECK(train(r.args("one", kTwelve)) == Exit::ok);
  const std::vector<double> want = r.losses("one");
  REQUIRE(want.size() == 12);
  for (int ranks : {2, 4}) {
    const std::string n = std::to_string(ranks);
    CHECK(r.launch(ranks, "ranks" + n, kTwelve).wait() == 0);
    INFO(slurp(r.log("ranks" + n)));
    check_close(r.losses("ranks" + n), want, 2e-5);
    CHECK(r.launch(ranks, "again" + n, kTwelve).wait() == 0);
    CHECK(r.losses("ranks" + n) == r.losses("again" + n));
    CHECK(r.file("ranks" + n, "00000012").size() > 1000);
    for (const std::string& name :
         {std::string("model.safetensors"), "optimizer-00001-of-0000" + n + ".safetensors"})
      CHECK(r.file("ranks" + n, "00000012", name) == r.file("again" + n, "00000012", name));
  }
  // Validation is split over the ranks and covers every token once.
  double valid[2] = {0, 0};
  int i = 0;
  for (const char* run : {"one", "ranks4"}) {
    std::istringstream in(slurp(r.folder / (std::string(run) + "/metrics.jsonl")));
    for (std::string line; std::getline(in, line);) {
      const auto j = nlohmann::json::parse(line);
      if (!j.contains("valid_loss")) continue;
      CHECK(j["valid_tokens"] == 300);
      valid[i] = j["valid_loss"];
    }
    ++i;
  }
  CHECK(valid[0] > 0);
  CHECK(valid[1] == Approx(valid[0]).epsilon(2e-5));
}

TEST_CASE("ranks: sharded and whole optimizers agree, bf16 gradients come close", "[train]") {
  NEEDS_GLOO();
  const RankRuns r;
  CHECK(r.launch(2, "zero1", kTwelve).wait() == 0);
  CHECK(r.launch(2, "zero0", with(kTwelve, "train.zero=0")).wait() == 0);
  check_close(r.losses("zero0"), r.losses("zero1"), 2e-5);
  CHECK(r.launch(2, "bf16", with(kTwelve, "train.reduce_dtype=bf16")).wait() == 0);
  check_close(r.losses("bf16"), r.losses("zero1"), 2e-2);
  CHECK(r.losses("bf16") != r.losses("zero1"));  // it did go through 16 bits
  CHECK(r.launch(2, "all", with(kTwelve, "optim.decay=all")).wait() == 0);
  CHECK(train(r.args("all1", with(kTwelve, "optim.decay=all"))) == Exit::ok);
  check_close(r.losses("all"), r.losses("all1"), 2e-5);
}

TEST_CASE("ranks: one, two and three go on from a checkpoint of two", "[train]") {
  NEEDS_GLOO();
  const RankRuns r;
  CHECK(train(r.args("whole", kTwelve)) == Exit::ok);
  const std::vector<double> want = r.losses("whole");
  std::vector<std::string> half = {"--", "train"};
  {
    std::vector<std::string> words = {"launch", "--nproc-per-node", "2", "--"};
    for (const std::string& w : r.train_words("half", kTwelve)) words.push_back(w);
    words.insert(words.end(), {"--steps", "6"});
    CHECK(Process(program(), words, RankRuns::env(), r.log("half")).wait() == 0);
  }
  CHECK(r.file("half", "00000006", "optimizer-00001-of-00002.safetensors").size() > 1000);
  for (int ranks : {1, 2, 3}) {
    const std::string out = "on" + std::to_string(ranks);
    std::filesystem::copy(r.folder / "half", r.folder / out,
                          std::filesystem::copy_options::recursive);
    CHECK(r.launch(ranks, out, kTwelve).wait() == 0);
    INFO(slurp(r.log(out)));
    // Dropout and order of samples count from the global sample: another batch would show.
    check_close(r.losses(out), want, 2e-5);
  }
}

TEST_CASE("ranks: recomputation, stopping and rollback work over ranks", "[train]") {
  NEEDS_GLOO();
  const RankRuns r;
  CHECK(r.launch(2, "plain", kTwelve).wait() == 0);
  for (const char* recompute : {"elementwise", "block"}) {
    CHECK(
        r.launch(2, recompute, with(kTwelve, std::string("train.recompute=") + recompute)).wait() ==
        0);
    check_close(r.losses(recompute), r.losses("plain"), 1e-4);
  }
  std::vector<std::string> wild = {"optim.lr=1e30", "optim.warmup_steps=0", "optim.clip_norm=0",
                                   "train.steps=8", "train.micro_batch=1"};
  Process skip = r.launch(2, "skip", with(wild, "train.on_nonfinite=skip"));
  CHECK(skip.wait() == 0);
  Process abort = r.launch(2, "abort", with(wild, "train.on_nonfinite=abort"));
  CHECK(abort.wait() == 4);  // the same verdict on all ranks
  wild.push_back("train.checkpoint_every=1");
  Process rollback = r.launch(2, "rollback", with(wild, "train.on_nonfinite=rollback"));
  CHECK(rollback.wait() == 4);
  INFO(rollback.output());
  CHECK(rollback.says("rolled back"));
  CHECK(rollback.says("after 3 rollbacks"));
}

TEST_CASE("ranks: running ahead changes no byte and no policy", "[train]") {
  NEEDS_GLOO();
  const RankRuns r;
  const Env on = {{"HGRN_RUN_AHEAD", "1"}};
  const struct {
    const char* name;
    std::vector<std::string> set;
    int code;
  } cases[] = {
      {"sharded", {}, 0},
      {"whole", {"train.zero=0"}, 0},
      {"bf16", {"train.reduce_dtype=bf16"}, 0},
      {"looked at", {"train.monitor_every=3", "train.checkpoint_every=5"}, 0},
      {"spikes left out",
       {"train.spike_zscore=0.5", "train.spike_window=8", "train.on_spike=skip"},
       0},
      {"wild, rolled back",
       {"optim.lr=1e30", "optim.warmup_steps=0", "optim.clip_norm=0", "train.checkpoint_every=1",
        "train.on_nonfinite=rollback"},
       4},
  };
  int number = 0;
  for (const auto& c : cases) {
    INFO(c.name);
    const std::string n = std::to_string(number++), waits = "waits" + n, ahead = "ahead" + n;
    std::vector<std::string> set = kTwelve;
    set.insert(set.end(), c.set.begin(), c.set.end());
    CHECK(r.launch(2, waits, set).wait() == c.code);
    Process run = r.launch(2, ahead, set, {}, on);
    CHECK(run.wait() == c.code);
    INFO(run.output());
    CHECK(r.losses(ahead) == r.losses(waits));
    if (c.code != 0) {
      CHECK(run.says("after 3 rollbacks"));
      continue;
    }
    for (const char* name : {"model.safetensors", "optimizer-00001-of-00002.safetensors"}) {
      CHECK(r.file(ahead, "00000012", name).size() > 1000);
      CHECK(r.file(ahead, "00000012", name) == r.file(waits, "00000012", name));
    }
  }
}

TEST_CASE("ranks: a signal saves the step that ends, what is ahead is dropped", "[train]") {
  NEEDS_GLOO();
  const RankRuns r;
  const Env on = {{"HGRN_RUN_AHEAD", "1"}};
  const std::vector<std::string> steady = with(kTwelve, "optim.schedule=constant");
  Process run = r.launch(2, "stopped", with(steady, "train.steps=1000000"), {}, on);
  REQUIRE(run.wait_for_text("step       3/", 60));
  run.signal(SIGTERM);
  CHECK(run.wait() == 75);
  INFO(run.output());
  const size_t done = r.losses("stopped").size();
  const std::vector<std::string> more = with(steady, "train.steps=" + std::to_string(done + 4));
  CHECK(r.launch(2, "stopped", more, {}, on).wait() == 0);
  CHECK(r.launch(2, "whole", more).wait() == 0);
  CHECK(r.losses("stopped").size() == done + 4);
  CHECK(r.losses("stopped") == r.losses("whole"));
}

// ---- buckets

namespace {

struct Lm {
  std::unique_ptr<Ops> ops = make_cpu_ops(DType::f32);
  LanguageModel model;
  Lm(bool decay_all, bool tied, int layers = 3) : model(*ops, config(tied, layers), decay_all) {}
  static ModelConfig config(bool tied, int layers) {
    ModelConfig c;
    c.vocab_size = 50;
    c.hidden_size = 16;
    c.num_hidden_layers = layers;
    c.expand_ratio = 8;
    c.intermediate_size = 24;
    c.tie_word_embeddings = tied;
    if (layers == 1) c.use_lower_bound = false, c.bias = true;  // few places to cut at
    return c;
  }
};

// Notes what is asked of it.
class NotingComm final : public Comm {
 public:
  NotingComm(int rank, int world) : Comm(rank, world) {}
  std::string describe() const override { return "notes"; }
  Ticket all_reduce(Tensor x) override { return note(x); }
  Ticket reduce_scatter(Tensor x) override { return note(x); }
  Ticket all_gather(Tensor x) override { return note(x); }
  Ticket broadcast(Tensor x, int) override { return note(x); }
  void wait(Ticket ticket) override { waited = std::max(waited, ticket); }
  void barrier() override {}
  std::vector<Tensor> seen;
  Ticket waited = 0;

 private:
  Ticket note(Tensor x) {
    if (x.numel() > 0) seen.push_back(x);
    return Ticket(seen.size());
  }
};

}  // namespace

TEST_CASE("ranks: buckets cover every weight once and wait for no later stage", "[train]") {
  for (bool decay_all : {false, true})
    for (const auto& [tied, layers] : {std::pair{false, 3}, {true, 3}, {true, 1}})
      for (int64_t target : {1, 1000, 3000, 1 << 30})
        for (int world : {1, 2, 3, 8}) {
          const Lm lm(decay_all, tied, layers);
          const ParamTable& table = lm.model.params();
          const std::vector<Bucket> buckets = make_buckets(lm.model, world, target);
          std::vector<int> hits(size_t(table.total()), 0);
          for (const Bucket& b : buckets) {
            CHECK(b.begin % 128 == 0);
            CHECK(b.part % 128 == 0);
            for (int64_t cut : {table.decayed(), table.wide_first()})
              CHECK((b.end <= cut || b.begin >= cut));
            for (int r = 0; r < world; ++r) {
              const FlatRange own = b.owned(r, world);
              for (int64_t i = own.begin; i < own.end; ++i) ++hits[size_t(i)];
            }
            for (size_t id = 0; id < table.params().size(); ++id) {
              const Param& p = table.params()[id];
              if (p.offset >= b.begin && p.offset < b.end) {
                CHECK(p.offset + p.stored.numel() <= b.end);
                CHECK(lm.model.stage_of(ParamId(id)) >= b.stage);
                // Stage -1 is complete before stage 0.
                CHECK((lm.model.stage_of(ParamId(id)) < 0) == (b.stage < 0));
              }
            }
          }
          CHECK(std::all_of(hits.begin(), hits.end(), [](int h) { return h == 1; }));
          for (size_t i = 1; i < buckets.size(); ++i)
            CHECK(buckets[i - 1].stage >= buckets[i].stage);
          if (target == 1) CHECK(buckets.front().stage >= layers - 1);
        }
}

TEST_CASE("ranks: what is complete last travels in small buckets", "[train]") {
  ModelConfig c;  // configs/hgrn2_150m.json
  c.vocab_size = 50257;
  c.hidden_size = 768;
  c.num_hidden_layers = 15;
  c.expand_ratio = 128;
  c.intermediate_size = 2048;
  const std::unique_ptr<Ops> ops = make_cpu_ops(DType::f32);
  const LanguageModel model(*ops, c, /*decay_all=*/false);
  const int64_t layer = int64_t(c.hidden_size) * (4 * c.hidden_size + 3 * c.intermediate_size);
  const std::vector<Bucket> buckets = make_buckets(model, 2, int64_t(32) << 20);
  CHECK(buckets.size() <= 8);
  int64_t before = INT64_MAX / 2;
  for (const Bucket& b : buckets) {
    const int64_t size = b.end - b.begin;
    INFO("stage " << b.stage << ": " << size);
    CHECK(size <= (int64_t(32) << 20) + layer + c.vocab_size * c.hidden_size * (b.stage < 0));
    if (b.stage < 0 || b.begin >= model.params().decayed()) continue;
    CHECK(size <= before + layer);
    before = size;
    if (b.stage == 0) CHECK(size <= layer);
  }
}

TEST_CASE("ranks: buckets travel while backward goes on, weights while forward does", "[train]") {
  const Lm lm(false, /*tied=*/false);
  ::setenv("HGRN_BUCKET_ELEMENTS", "1000", 1);
  for (bool zero : {false, true}) {
    NotingComm comm(1, 2);
    TrainConfig config;
    config.zero = zero ? 1 : 0;
    GradSync sync(comm, *lm.ops, lm.model, config);
    std::vector<float> grad(size_t(lm.model.params().total()));
    const Tensor flat(grad.data(), DType::f32, {int64_t(grad.size())});
    sync.after_backward(2);
    CHECK(comm.seen.empty());  // an earlier micro-batch
    sync.last_micro_batch(flat);
    size_t before = 0;
    for (int stage : {3, 2, 1, -1}) {  // something goes after each stage; nothing waits
      sync.after_backward(stage);
      CHECK(comm.seen.size() > before);
      before = comm.seen.size();
    }
    CHECK(comm.waited == 0);
    sync.after_backward(0);
    int64_t sent = 0;
    for (const Tensor& t : comm.seen) sent += t.numel();
    CHECK(sent == int64_t(grad.size()));
    sync.finish();
    CHECK(comm.waited == Comm::Ticket(comm.seen.size()));
    // Gradients that are not wanted: the next may be written once these have arrived.
    comm.seen.clear();
    comm.waited = 0;
    sync.last_micro_batch(flat);
    sync.after_backward(3);
    CHECK(comm.waited == 0);
    sync.drop();
    CHECK(comm.waited == Comm::Ticket(comm.seen.size()));
    comm.waited = 0;
    sync.finish();
    CHECK(comm.waited == 0);  // nothing is under way any more
    Weights w;
    w.table = &lm.model.params();
    w.master = w.compute = flat;
    comm.seen.clear();
    comm.waited = 0;
    std::vector<int> updates(grad.size(), 0);
    size_t calls = 0, left_before_last = 0;
    sync.update_weights(w, [&](FlatRange r) {
      ++calls;
      for (int64_t i = r.begin; i < r.end; ++i) ++updates[size_t(i)];
      for (const Tensor& t : comm.seen) {  // no part leaves before its update
        const int64_t first = t.ptr<float>() - grad.data();
        CHECK((r.end <= first || first + t.numel() <= r.begin));
      }
      left_before_last = comm.seen.size();
    });
    std::vector<int> once(grad.size(), 0);
    for (const FlatRange& r : sync.updated())
      std::fill(once.begin() + r.begin, once.begin() + r.end, 1);
    CHECK(updates == once);
    if (!zero) {
      CHECK(calls == 1);
      CHECK(comm.seen.empty());
      continue;
    }
    CHECK(calls == sync.buckets().size());
    CHECK(left_before_last > 0);
    CHECK(left_before_last + 2 >= comm.seen.size());  // a bucket's parts, and what is left of it
    Comm::Ticket last = 0;
    for (int stage : {-1, 0, 1, 2, 3}) {  // each stage waits for its own weights, not for all
      sync.before_forward(stage);
      CHECK(comm.waited > last);
      last = comm.waited;
    }
    CHECK(last == Comm::Ticket(comm.seen.size()));
  }
  ::unsetenv("HGRN_BUCKET_ELEMENTS");
}

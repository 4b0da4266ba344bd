// The training loop end to end on small real runs: resume bit for bit, micro-batches, learning,
// non-finite policies, what a resumed run may change, fallback over damaged checkpoints.
#include "train/trainer.h"

#include <cmath>
#include <csignal>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "catch.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

std::vector<nlohmann::json> metrics(const RunFolder& r, const std::string& run) {
  std::vector<nlohmann::json> lines;
  std::istringstream in(slurp(r.folder / (run + "/metrics.jsonl")));
  for (std::string line; std::getline(in, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

std::vector<double> losses(const RunFolder& r, const std::string& run) {
  std::vector<double> out;
  for (const auto& j : metrics(r, run))
    if (j.contains("loss")) out.push_back(j["loss"].is_null() ? NAN : j["loss"].get<double>());
  return out;
}

}  // namespace

TEST_CASE("trainer: 2N steps equal N, stop, resume, N, byte for byte", "[train]") {
  // Dropout, resets and shuffling are on: everything random must come back as it was.
  const RunFolder r(R"(, "dropout": 0.2)");
  const std::vector<std::string> set = {"data.reset_at_eos=true"};
  CHECK(train(r.args("whole", set)) == Exit::ok);
  TrainArgs half = r.args("halves", set);
  half.stop_after = 6;
  CHECK(train(half) == Exit::ok);
  CHECK(train(r.args("halves", set)) == Exit::ok);
  for (const char* name : {"model.safetensors", "optimizer-00000-of-00001.safetensors",
                           "trainer.json", "config.json"}) {
    INFO(name);
    const std::string a = r.file("whole", "00000012", name);
    CHECK(a.size() > 100);
    CHECK(a == r.file("halves", "00000012", name));
  }
  CHECK(losses(r, "whole") == losses(r, "halves"));
}

TEST_CASE("trainer: a batch that does not fit the memory names one that does", "[train]") {
  const RunFolder r;
  const std::string huge = std::to_string(1 << 20);
  const Thrown e = thrown_by([&] {
    train(r.args("run", {"train.global_batch=" + huge, "train.micro_batch=" + huge,
                         "model.num_hidden_layers=64"}));
  });
  CHECK(e.code == Exit::failed);
  CHECK(e.has("train.micro_batch: " + huge + " sequences of 20 tokens need "));
  CHECK(e.has("the largest that fits and divides train.global_batch is "));
  CHECK(e.has("; or set train.recompute to \"block\""));
}

TEST_CASE("trainer: the loss falls, the metrics say so", "[train]") {
  const RunFolder r;
  CHECK(train(r.args("run", {"train.steps=60", "train.eval_every=30"})) == Exit::ok);
  const std::vector<double> l = losses(r, "run");
  REQUIRE(l.size() == 60);
  CHECK(l.front() == Approx(std::log(32)).epsilon(0.05));
  CHECK(l.back() < l.front() - 0.5);
  int64_t evaluations = 0;
  for (const auto& j : metrics(r, "run")) {
    if (j.contains("valid_loss")) {
      ++evaluations;
      CHECK(j["valid_tokens"] == 300);  // the last partial row is not dropped
      CHECK(j["valid_ppl"].get<double>() == Approx(std::exp(j["valid_loss"].get<double>())));
    } else {
      for (const char* key : {"step", "tokens", "loss", "grad_norm", "lr", "step_ms",
                              "tokens_per_s", "mfu", "memory_gib", "eta_s", "skipped"})
        CHECK(j.contains(key));
      CHECK(j["tokens"] == j["step"].get<int64_t>() * 80);
    }
  }
  CHECK(evaluations == 2);
}

TEST_CASE("trainer: micro-batches and recomputation change nothing but rounding", "[train]") {
  const RunFolder r(R"(, "dropout": 0.1)");
  train(r.args("micro2"));
  train(r.args("micro1", {"train.micro_batch=1"}));
  train(r.args("micro4", {"train.micro_batch=4"}));
  train(r.args("elementwise", {"train.recompute=elementwise"}));
  train(r.args("block", {"train.recompute=block"}));
  const std::vector<double> want = losses(r, "micro2");
  REQUIRE(want.size() == 12);
  for (const char* run : {"micro1", "micro4", "elementwise", "block"}) {
    const std::vector<double> got = losses(r, run);
    REQUIRE(got.size() == want.size());
    for (size_t i = 0; i < want.size(); ++i) CHECK(got[i] == Approx(want[i]).epsilon(1e-4));
  }
  CHECK(r.file("elementwise", "00000012") == r.file("micro2", "00000012"));
}

TEST_CASE("trainer: a resumed run may change paths and counts, not the mathematics", "[train]") {
  const RunFolder r;
  TrainArgs first = r.args("run");
  first.stop_after = 3;
  train(first);
  const Thrown t = thrown_by([&] { train(r.args("run", {"optim.lr=5e-3"})); });
  CHECK(t.code == Exit::usage);
  CHECK(t.has("optim.lr"));
  CHECK(train(r.args("run", {"train.steps=5", "train.micro_batch=4"})) == Exit::ok);
  CHECK(r.file("run", "00000005").size() > 100);
}

TEST_CASE(
    "trainer: resume falls back over a damaged checkpoint and says nothing is there only "
    "when nothing is",
    "[train]") {
  const RunFolder r;
  train(r.args("run", {"train.checkpoint_every=4"}));  // 4, 8, 12
  const std::string newest = r.folder / "run/checkpoints/step-00000012/model.safetensors";
  std::string bytes = slurp(newest);
  bytes[bytes.size() / 2] = char(bytes[bytes.size() / 2] ^ 1);
  spill(newest, bytes);
  CHECK(train(r.args("run")) == Exit::ok);  // from step 8
  CHECK(losses(r, "run").size() == 12);
  for (const char* step : {"4", "8"})
    spill(r.folder / ("run/checkpoints/step-0000000" + std::string(step) + "/MANIFEST.json"), "{");
  spill(r.folder / "run/checkpoints/step-00000012/MANIFEST.json", "");
  CHECK(thrown_by([&] { train(r.args("run")); }).code == Exit::data);
}

TEST_CASE("trainer: --resume never keeps the old run beside the new one", "[train]") {
  const RunFolder r;
  train(r.args("run", {"train.steps=2"}));
  TrainArgs again = r.args("run", {"train.steps=3"});
  again.resume = "never";
  CHECK(train(again) == Exit::ok);
  int64_t kept = 0;
  for (const auto& entry : std::filesystem::directory_iterator(r.folder / "run"))
    kept += entry.path().filename().string().find(".before-") != std::string::npos;
  CHECK(kept == 3);  // checkpoints, metrics and event files
  CHECK(losses(r, "run").size() == 3);
}

TEST_CASE("trainer: --init-from takes weights only, from a checkpoint of the same model",
          "[train]") {
  const RunFolder r;
  train(r.args("first"));
  TrainArgs tuned = r.args("second", {"train.steps=0"});
  tuned.init_from = r.folder / "first/checkpoints/step-00000012";
  CHECK(train(tuned) == Exit::ok);
  CHECK(r.file("second", "00000000") == r.file("first", "00000012"));
  tuned.out = r.folder / "of_run";
  tuned.init_from = r.folder / "first";  // its newest checkpoint
  CHECK(train(tuned) == Exit::ok);
  CHECK(r.file("of_run", "00000000") == r.file("first", "00000012"));
  TrainArgs other = r.args("third", {"model.expand_ratio=4"});
  other.init_from = tuned.init_from;
  const Thrown t = thrown_by([&] { train(other); });
  CHECK(t.code == Exit::data);
  CHECK(t.has("expand_ratio"));
}

TEST_CASE("trainer: non-finite gradients are left out, abort, or roll back", "[train]") {
  const RunFolder r;
  // A learning rate that ends every run in infinities within a few steps.
  const std::vector<std::string> wild = {"optim.lr=1e30", "optim.warmup_steps=0",
                                         "optim.clip_norm=0", "train.steps=8"};
  auto with = [&](const char* policy) {
    std::vector<std::string> set = wild;
    set.push_back(std::string("train.on_nonfinite=") + policy);
    return set;
  };
  CHECK(train(r.args("skip", with("skip"))) == Exit::ok);
  const auto lines = metrics(r, "skip");
  REQUIRE(lines.size() == 8);
  CHECK(lines.back()["skipped"].get<int64_t>() > 0);
  CHECK(lines.back()["loss"].is_null());  // a NaN never enters a statistic

  const Thrown t = thrown_by([&] { train(r.args("abort", with("abort"))); });
  CHECK(t.code == Exit::nonfinite);
  CHECK(t.has("on_nonfinite"));

  std::vector<std::string> set = with("rollback");
  set.push_back("train.checkpoint_every=1");
  const Thrown b = thrown_by([&] { train(r.args("rollback", set)); });
  CHECK(b.code == Exit::nonfinite);  // every try diverges again: it gives up, naming the count
  CHECK(b.has("rollbacks"));
}

TEST_CASE("trainer: a signal saves at the next step and the same command goes on", "[train]") {
  const RunFolder r;
  for (int number : {SIGTERM, SIGINT, SIGUSR1}) {
    const std::string run = "signal" + std::to_string(number);
    {
      Trainer t(r.args(run));
      raise(number);
      CHECK(t.run() == Exit::stopped);
    }
    CHECK(r.file(run, "00000001").size() > 100);
    CHECK(train(r.args(run)) == Exit::ok);
    CHECK(losses(r, run).size() == 12);
  }
}

TEST_CASE("trainer: two writers into one run folder are refused", "[train]") {
  const RunFolder r;
  const Trainer first(r.args("run"));
  const Thrown t = thrown_by([&] { Trainer second(r.args("run")); });
  CHECK(t.code == Exit::failed);
  CHECK(t.has("run"));
}

TEST_CASE("trainer: bad data is named", "[train]") {
  const RunFolder r;
  write_shard(r.folder / "bad_000000.bin", std::vector<int32_t>(200, 32));  // ids end at 31
  const Thrown t =
      thrown_by([&] { train(r.args("run", {"data.train=" + (r.folder / "bad_*.bin")})); });
  CHECK(t.code == Exit::data);
  CHECK(t.has("bad_000000.bin"));
  const Thrown none = thrown_by([&] { train(r.args("run2", {"data.train=/no/such_*.bin"})); });
  CHECK(none.code == Exit::data);
  CHECK(none.has("/no/such_*.bin"));
}

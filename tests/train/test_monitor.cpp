// What a run tells about its inside, and that telling changes nothing.
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "catch.h"
#include "eval/generate.h"
#include "launch/run_ranks.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

std::vector<nlohmann::json> lines(const RunFolder& r, const std::string& file) {
  std::vector<nlohmann::json> out;
  std::istringstream in(slurp(r.folder / file));
  for (std::string line; std::getline(in, line);) out.push_back(nlohmann::json::parse(line));
  return out;
}

std::vector<int64_t> steps_of(const std::vector<nlohmann::json>& all) {
  std::vector<int64_t> steps;
  for (const auto& j : all) steps.push_back(j["step"].get<int64_t>());
  return steps;
}

// The tokens of these runs as letters, so that a run can make samples. 256 tokens of vocabulary.
struct ByteRun : RunFolder {
  ByteRun() {
    std::string config = slurp(folder / "config.json");
    const size_t at = config.find("\"vocab_size\": 32");
    config.replace(at, 16, "\"vocab_size\": 257");
    config.replace(config.find("\"eos_token_id\": 0"), 17, "\"eos_token_id\": 256");
    config.replace(config.find("\"seq_len\""), 9, "\"tokenizer\": \"byte\", \"seq_len\"");
    spill(folder / "config.json", config);
  }
  TrainArgs sampled(const std::string& out, std::vector<std::string> overrides) const {
    TrainArgs a = args(out, std::move(overrides));
    a.monitor.sampler = sample_ids;
    return a;
  }
};

}  // namespace

TEST_CASE("monitor: norms by layer add up to the norm, gates lie above their bounds", "[train]") {
  const RunFolder r;
  for (const char* recompute : {"none", "elementwise", "block"}) {
    const std::string out = recompute;
    REQUIRE(train(r.args(out, {"train.monitor_every=3",
                               std::string("train.recompute=") + recompute})) == Exit::ok);
    const auto metrics = lines(r, out + "/metrics.jsonl"), layers = lines(r, out + "/layers.jsonl");
    CHECK(steps_of(layers) == std::vector<int64_t>{3, 6, 9, 12});
    for (const auto& j : layers) {
      double squares = std::pow(j["embedding_grad_norm"].get<double>(), 2) +
                       std::pow(j["head_grad_norm"].get<double>(), 2);
      REQUIRE(j["grad_norm"].size() == 2);
      for (const auto& v : j["grad_norm"]) {
        CHECK(v.get<double>() > 0);
        squares += std::pow(v.get<double>(), 2);
      }
      const double norm = metrics[j["step"].get<size_t>() - 1]["grad_norm"].get<double>();
      CHECK(std::sqrt(squares) == Approx(norm).epsilon(1e-6));
      // Layer 0 has no bound: near 1/2 at the start; layer 1's bound is near 1/2: near 3/4.
      REQUIRE(j["forget_gate"].size() == 2);
      CHECK(j["forget_gate"][0].get<double>() == Approx(0.5).margin(0.05));
      CHECK(j["forget_gate"][1].get<double>() == Approx(0.75).margin(0.05));
    }
  }
  // Recomputed activations are the same activations.
  for (const char* recompute : {"elementwise", "block"})
    CHECK(slurp(r.folder / "none/layers.jsonl") ==
          slurp(r.folder / (std::string(recompute) + "/layers.jsonl")));
}

TEST_CASE("monitor: a run is the same with and without it", "[train]") {
  const ByteRun r;
  const std::vector<std::string> off = {"train.monitor_every=0", "train.sample_every=0",
                                        "model.dropout=0.1"};
  const std::vector<std::string> on = {"train.monitor_every=1", "train.sample_every=2",
                                       "train.sample_prompt=ab", "model.dropout=0.1"};
  REQUIRE(train(r.args("off", off)) == Exit::ok);
  REQUIRE(train(r.sampled("on", on)) == Exit::ok);
  CHECK(r.file("off", "00000012") == r.file("on", "00000012"));
  CHECK_FALSE(std::filesystem::exists(r.folder / "off/layers.jsonl"));
  CHECK_FALSE(std::filesystem::exists(r.folder / "off/samples.jsonl"));
  const auto samples = lines(r, "on/samples.jsonl");
  CHECK(steps_of(samples) == std::vector<int64_t>{2, 4, 6, 8, 10, 12});
  CHECK(samples[0]["prompt"] == "ab");
  CHECK(samples[0]["text"].get<std::string>().size() > 20);
}

TEST_CASE("monitor: a resumed run tells no step twice", "[train]") {
  const ByteRun r;
  const std::vector<std::string> set = {"train.monitor_every=2", "train.sample_every=2",
                                        "train.checkpoint_every=4"};
  TrainArgs first = r.sampled("run", set);
  first.stop_after = 4;
  REQUIRE(train(first) == Exit::ok);
  // As if it had gone on after its last checkpoint and then been killed within a line.
  for (const char* name : {"metrics.jsonl", "layers.jsonl", "samples.jsonl"}) {
    const std::string path = r.folder / ("run/" + std::string(name));
    spill(path, slurp(path) + "{\"step\":6}\n{\"st");
  }
  REQUIRE(train(r.sampled("run", set)) == Exit::ok);
  CHECK(steps_of(lines(r, "run/metrics.jsonl")).size() == 12);
  CHECK(steps_of(lines(r, "run/layers.jsonl")) == std::vector<int64_t>{2, 4, 6, 8, 10, 12});
  CHECK(steps_of(lines(r, "run/samples.jsonl")) == std::vector<int64_t>{2, 4, 6, 8, 10, 12});
  int64_t events = 0;
  for (const auto& entry : std::filesystem::directory_iterator(r.folder / "run"))
    events += entry.path().filename().string().rfind("events.out.tfevents.", 0) == 0;
  CHECK(events == 2);
}

TEST_CASE("monitor: a sample that cannot be made does not end the run", "[train]") {
  const ByteRun r;
  TrainArgs a = r.args("run", {"train.sample_every=2"});
  int asked = 0;
  a.monitor.sampler = [&](LanguageModel&, const std::vector<int32_t>&, int64_t,
                          uint64_t) -> std::vector<int32_t> {
    ++asked;
    fail(Exit::failed, "no memory for it");
  };
  REQUIRE(train(a) == Exit::ok);
  CHECK(asked == 1);
  REQUIRE(train(r.args("plain", {"train.sample_every=0"})) == Exit::ok);
  CHECK(r.file("run", "00000012") == r.file("plain", "00000012"));
}

TEST_CASE("monitor: ranks tell once, and norms add up over their parts", "[train]") {
  NEEDS_GLOO();
  const RankRuns r;
  for (const char* zero : {"0", "1"}) {
    const std::string out = std::string("zero") + zero;
    std::vector<std::string> words = {"launch", "--nproc-per-node", "2", "--"};
    for (const std::string& w : r.train_words(out, {"train.monitor_every=4", "train.eval_every=6",
                                                    std::string("train.zero=") + zero}))
      words.push_back(w);
    words.insert(words.end(), {"--prometheus", r.folder / (out + ".prom")});
    Process ranks(program(), words, r.env(), r.log(out));
    INFO(ranks.output());
    REQUIRE(ranks.wait() == 0);
    const auto layers = lines(r, out + "/layers.jsonl"), metrics = lines(r, out + "/metrics.jsonl");
    CHECK(steps_of(layers) == std::vector<int64_t>{4, 8, 12});
    CHECK(metrics.size() == 14);  // 12 steps, 2 evaluations: from one rank
    for (const auto& j : layers) {
      double squares = std::pow(j["embedding_grad_norm"].get<double>(), 2) +
                       std::pow(j["head_grad_norm"].get<double>(), 2);
      for (const auto& v : j["grad_norm"]) squares += std::pow(v.get<double>(), 2);
      for (const auto& m : metrics)
        if (m["step"] == j["step"] && m.contains("grad_norm"))
          CHECK(std::sqrt(squares) == Approx(m["grad_norm"].get<double>()).epsilon(1e-6));
      for (const auto& gate : j["forget_gate"]) CHECK(gate.is_number());
    }
    int64_t events = 0;
    for (const auto& entry : std::filesystem::directory_iterator(r.folder / out))
      events += entry.path().filename().string().rfind("events.out.tfevents.", 0) == 0;
    CHECK(events == 1);
    CHECK(slurp(r.folder / (out + ".prom")).find("hgrn_train_step{") != std::string::npos);
  }
}

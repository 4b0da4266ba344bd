// Loss spikes: the score against its definition, what may enter the window, and both policies in
// real runs whose data turn to noise for a step.
#include "train/loss_spike.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "catch.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

void feed(LossSpikes& s, double loss) {
  s.applied(loss, s.judge(loss));
}

// Losses around 3 with a spread, never the same twice.
double usual(int i) {
  return 3 + 0.05 * std::sin(12.9898 * i);
}

using Series = std::map<std::string, std::vector<double>>;
Series state_of(const LossSpikes& s) {
  Series out;
  s.save(out);
  return out;
}

}  // namespace

TEST_CASE("spikes: the score is that of median and MAD", "[train]") {
  LossSpikes s(6, 8);
  for (double x : {1.0, 2.0, 4.0}) {
    feed(s, x);
    CHECK(std::isnan(s.judge(100).z));  // too few to judge
    CHECK_FALSE(s.judge(100).spike);
  }
  feed(s, 8);
  // Median 3; deviations 2 1 1 5, their median 1.5.
  CHECK(s.judge(10).median == 3);
  CHECK(s.judge(10).z == Approx(7 / (1.4826 * 1.5)));
  CHECK(s.judge(-20).z < -6);
  CHECK_FALSE(s.judge(-20).spike);  // a loss that falls is none
  feed(s, 3);
  CHECK(s.judge(10).median == 3);  // an odd count: 1 2 3 4 8, deviations 2 1 0 1 5
  CHECK(s.judge(10).z == Approx(7 / 1.4826));
  CHECK_FALSE(s.judge(3 + 5.9 * 1.4826).spike);
  CHECK(s.judge(3 + 6.1 * 1.4826).spike);
}

TEST_CASE("spikes: the window forgets the oldest, and equal losses do not make all else a spike",
          "[train]") {
  LossSpikes s(6, 8);
  for (int i = 0; i < 8; ++i) feed(s, 100);
  for (int i = 0; i < 8; ++i) feed(s, 2);
  CHECK(s.judge(2).median == 2);
  CHECK_FALSE(s.judge(2.0001).spike);
  CHECK(s.judge(2.1).spike);
  CHECK(std::isfinite(LossSpikes(6, 8).judge(0).median));
  LossSpikes zeros(6, 8);
  for (int i = 0; i < 8; ++i) feed(zeros, 0);
  CHECK(zeros.judge(1).spike);
  CHECK_FALSE(zeros.judge(0).spike);
}

TEST_CASE("spikes: nothing that is not finite or was left out enters the window", "[train]") {
  LossSpikes s(6, 16), clean(6, 16);
  for (int i = 0; i < 60; ++i) {
    feed(s, usual(i));
    feed(clean, usual(i));
    for (double bad : {double(NAN), double(INFINITY), -double(INFINITY)}) {
      const LossSpikes::Verdict v = s.judge(bad);
      CHECK_FALSE(v.spike);
      CHECK(std::isnan(v.z));
      s.applied(bad, v);  // even if a caller says so
      CHECK_FALSE(s.left_out(v));
    }
    CHECK_FALSE(s.left_out(s.judge(usual(i))));  // left out for another reason: a gradient
  }
  CHECK(state_of(s) == state_of(clean));
  CHECK(s.spikes() == 0);
  const LossSpikes::Verdict v = s.judge(50);
  CHECK(v.spike);
  CHECK_FALSE(s.left_out(v));
  CHECK(s.spikes() == 1);
  CHECK(state_of(s).at("loss_window") == state_of(clean).at("loss_window"));
  CHECK(s.judge(50).z == v.z);
}

TEST_CASE("spikes: a new level of the loss is not left out for ever", "[train]") {
  LossSpikes s(6, 16);
  for (int i = 0; i < 16; ++i) feed(s, usual(i));
  for (int i = 1; i < LossSpikes::kMaxInARow; ++i) CHECK_FALSE(s.left_out(s.judge(9)));
  CHECK(s.left_out(s.judge(9)));
  CHECK_FALSE(s.judge(9).spike);  // the window is empty
  for (int i = 0; i < 16; ++i) feed(s, 6 + usual(i));
  CHECK_FALSE(s.judge(9).spike);
  CHECK(s.judge(12).spike);
  // An update in between starts the count again.
  for (int round = 0; round < 3; ++round) {
    for (int i = 1; i < LossSpikes::kMaxInARow; ++i) CHECK_FALSE(s.left_out(s.judge(20)));
    feed(s, 6 + usual(round));
  }
}

TEST_CASE("spikes: state comes back bit for bit, and damaged state is refused", "[train]") {
  LossSpikes a(6, 12);
  for (int i = 0; i < 40; ++i) {
    const double loss = i % 13 == 12 ? 30.0 + i : usual(i) / 3;
    const LossSpikes::Verdict v = a.judge(loss);
    if (v.spike)
      a.left_out(v);
    else
      a.applied(loss, v);
  }
  CHECK(a.spikes() == 3);
  LossSpikes b(6, 12);
  b.load(state_of(a), "t");
  CHECK(state_of(b) == state_of(a));
  for (int i = 40; i < 80; ++i) {
    feed(a, usual(i));
    feed(b, usual(i));
    CHECK(a.judge(4).z == b.judge(4).z);
  }
  CHECK(state_of(b) == state_of(a));

  CHECK(state_of(LossSpikes(0, 12)).empty());
  const auto refused = [](const Series& series) {
    const Thrown t = thrown_by([&] { LossSpikes(6, 12).load(series, "some.json"); });
    return t.code == Exit::data && t.has("some.json");
  };
  CHECK(refused({{"loss_window", std::vector<double>(13, 1.0)}}));
  CHECK(refused({{"loss_window", {1, NAN}}}));
  CHECK(refused({{"loss_spikes", {1}}}));
  CHECK(refused({{"loss_spikes", {1, -1}}}));
  CHECK(refused({{"loss_spikes", {1, 0.5}}}));
  CHECK(refused({{"loss_spikes", {NAN, 0}}}));
}

// ---- in a run

namespace {

constexpr int64_t kNoise = 70;  // the step whose batch is noise

// In order, 4 sequences of 20 tokens a step: text, one step of noise, text again.
struct NoisyRun : RunFolder {
  NoisyRun() {
    std::vector<int32_t> tokens = learnable_tokens(80 * 100 + 1, 31, 1);
    const std::vector<int32_t> text = tokens;
    for (int64_t i = 0; i < 80; ++i)
      tokens[size_t((kNoise - 1) * 80 + i)] = int32_t(31 - text[size_t(7 * i)] % 16);
    write_shard(folder / "noisy.bin", tokens);
  }
  TrainArgs noisy(const std::string& out, std::vector<std::string> more = {}) const {
    more.insert(more.end(), {"data.train=" + (folder / "noisy.bin"), "data.shuffle=false",
                             "train.steps=90", "train.spike_window=32"});
    return args(out, more);
  }
  std::vector<nlohmann::json> metrics(const std::string& run) const {
    std::vector<nlohmann::json> lines;
    std::istringstream in(slurp(folder / (run + "/metrics.jsonl")));
    for (std::string line; std::getline(in, line);) lines.push_back(nlohmann::json::parse(line));
    return lines;
  }
};

}  // namespace

TEST_CASE("trainer: a loss spike is told, and left out where asked", "[train]") {
  const NoisyRun r;
  CHECK(train(r.noisy("off")) == Exit::ok);
  CHECK(train(r.noisy("warn", {"train.spike_zscore=6"})) == Exit::ok);
  CHECK(train(r.noisy("skip", {"train.spike_zscore=6", "train.on_spike=skip"})) == Exit::ok);
  const auto off = r.metrics("off"), warn = r.metrics("warn"), skip = r.metrics("skip");
  REQUIRE(off.size() == 90);
  REQUIRE(warn.size() == 90);
  REQUIRE(skip.size() == 90);

  CHECK_FALSE(off.back().contains("spikes"));
  CHECK(warn[10]["loss_z"].is_null());  // the window is too short
  CHECK(warn[kNoise - 2]["spikes"] == 0);
  CHECK(warn[kNoise - 1]["spikes"] == 1);
  CHECK(warn[kNoise - 1]["loss_z"].get<double>() > 6);
  CHECK(warn.back()["skipped"] == 0);
  CHECK(r.file("warn", "00000090") == r.file("off", "00000090"));  // it only tells
  CHECK(slurp(r.folder / "warn/log.txt").find("step 70: loss") != std::string::npos);

  for (int64_t i = 0; i < kNoise; ++i) CHECK(skip[size_t(i)]["loss"] == off[size_t(i)]["loss"]);
  CHECK(skip[kNoise - 1]["skipped"] == 1);
  CHECK(skip[kNoise]["loss"] != off[kNoise]["loss"]);  // the update was left out
  CHECK(skip.back()["skipped"] == 1);
  CHECK(skip.back()["loss_z"].get<double>() < 6);
}

TEST_CASE("trainer: an update that is left out changes no weight and no moment", "[train]") {
  const NoisyRun r;
  const std::vector<std::string> set = {"train.spike_zscore=6", "train.on_spike=skip",
                                        "train.checkpoint_every=1", "train.keep_checkpoints=100"};
  TrainArgs a = r.noisy("run", set);
  a.stop_after = kNoise + 1;
  CHECK(train(a) == Exit::ok);
  for (const char* name : {"model.safetensors", "optimizer-00000-of-00001.safetensors"}) {
    CHECK(r.file("run", "00000069", name) == r.file("run", "00000070", name));
    CHECK(r.file("run", "00000070", name) != r.file("run", "00000071", name));
  }
}

TEST_CASE("trainer: the spike window goes through a checkpoint bit for bit", "[train]") {
  const NoisyRun r;
  const std::vector<std::string> set = {"train.spike_zscore=6", "train.on_spike=skip"};
  CHECK(train(r.noisy("whole", set)) == Exit::ok);
  for (int64_t stop : {10, 50, 69, 70, 90}) {  // the last resumes at once from each
    TrainArgs part = r.noisy("parts", set);
    part.stop_after = stop;
    CHECK(train(part) == Exit::ok);
  }
  for (const char* name : {"model.safetensors", "trainer.json"})
    CHECK(r.file("whole", "00000090", name) == r.file("parts", "00000090", name));
  CHECK(r.file("whole", "00000090", "trainer.json").find("loss_window") != std::string::npos);
  const auto whole = r.metrics("whole"), parts = r.metrics("parts");
  REQUIRE(whole.size() == parts.size());
  for (size_t i = 0; i < whole.size(); ++i) {
    CHECK(whole[i]["loss_z"] == parts[i]["loss_z"]);
    CHECK(whole[i]["spikes"] == parts[i]["spikes"]);
  }
  const Thrown t = thrown_by([&] { train(r.noisy("parts", {"train.spike_zscore=7"})); });
  CHECK(t.code == Exit::usage);  // it decides about updates
}

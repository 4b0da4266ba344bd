// A run whose host stays ahead of the device, with forward and backward recorded, is the run of a
// host that waits: the same bytes in checkpoints, the same numbers told, the same policies.
#include <csignal>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <sstream>

#include "catch.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

class Switches {
 public:
  Switches(bool ahead, bool record) {
    ::setenv("HGRN_RUN_AHEAD", ahead ? "1" : "0", 1);
    ::setenv("HGRN_CUDA_GRAPH", record ? "1" : "0", 1);
  }
  ~Switches() {
    ::unsetenv("HGRN_RUN_AHEAD");
    ::unsetenv("HGRN_CUDA_GRAPH");
  }
  Switches(const Switches&) = delete;
  Switches& operator=(const Switches&) = delete;
};

// Lines of metrics.jsonl without what depends on the clock, and without evaluations, which a run
// that stops makes at its end.
std::vector<nlohmann::json> told(const RunFolder& r, const std::string& run) {
  std::vector<nlohmann::json> lines;
  std::istringstream in(slurp(r.folder / (run + "/metrics.jsonl")));
  for (std::string line; std::getline(in, line);) {
    lines.push_back(nlohmann::json::parse(line));
    if (lines.back().contains("valid_loss")) {
      lines.pop_back();
      continue;
    }
    for (const char* key : {"step_ms", "tokens_per_s", "mfu", "eta_s", "memory_gib"})
      lines.back().erase(key);
  }
  return lines;
}

struct Case {
  const char* name;
  std::vector<std::string> set;
};

const std::vector<Case>& cases() {
  static const std::vector<Case> list = {
      {"plain", {}},
      {"one micro-batch", {"train.micro_batch=4"}},
      {"resets", {"data.reset_at_eos=true"}},
      {"recompute", {"train.recompute=block"}},
      {"elementwise", {"train.recompute=elementwise"}},
      {"looked at", {"train.monitor_every=3", "train.eval_every=5", "train.checkpoint_every=4"}},
      {"spikes told", {"train.spike_zscore=0.5", "train.spike_window=8"}},
      {"spikes left out",
       {"train.spike_zscore=0.5", "train.spike_window=8", "train.on_spike=skip"}},
      {"wild, skipped",
       {"optim.lr=1e30", "optim.warmup_steps=0", "optim.clip_norm=0", "train.on_nonfinite=skip"}},
  };
  return list;
}

void compare(const RunFolder& r, const std::string& a, const std::string& b, const char* step) {
  for (const char* name :
       {"model.safetensors", "optimizer-00000-of-00001.safetensors", "trainer.json"}) {
    INFO(name);
    const std::string bytes = r.file(a, step, name);
    CHECK(bytes.size() > 100);
    CHECK(bytes == r.file(b, step, name));
  }
  CHECK(told(r, a) == told(r, b));
}

std::vector<Device> devices() {
  if (cuda_available()) return {Device::cpu, Device::cuda};
  return {Device::cpu};
}

TrainArgs args_on(const RunFolder& r, Device device, const std::string& run,
                  std::vector<std::string> set) {
  if (device == Device::cuda) {
    set.push_back("train.precision=bf16");
    set.push_back("model.hidden_size=64");
    set.push_back("model.expand_ratio=64");
  }
  TrainArgs a = r.args(run, std::move(set));
  a.device = device;
  return a;
}

}  // namespace

TEST_CASE("trainer: running ahead and recording change no byte", "[train][gpu]") {
  for (Device device : devices())
    for (const char* dropout : {"", R"(, "dropout": 0.2)"})
      for (const Case& c : cases()) {
        INFO((device == Device::cuda ? "cuda, " : "cpu, ") << c.name << dropout);
        const RunFolder r(dropout);
        {
          const Switches off(false, false);
          CHECK(train(args_on(r, device, "waits", c.set)) == Exit::ok);
        }
        {
          const Switches on(true, true);
          CHECK(train(args_on(r, device, "ahead", c.set)) == Exit::ok);
        }
        compare(r, "waits", "ahead", "00000012");
        if (exists(r.folder / "waits/layers.jsonl"))
          CHECK(slurp(r.folder / "waits/layers.jsonl") == slurp(r.folder / "ahead/layers.jsonl"));
        // A stop drops what was ahead; each half may run in its own way.
        {
          const Switches on(true, true);
          TrainArgs half = args_on(r, device, "halves", c.set);
          half.stop_after = 7;
          CHECK(train(half) == Exit::ok);
        }
        const Switches mixed(true, false);
        CHECK(train(args_on(r, device, "halves", c.set)) == Exit::ok);
        compare(r, "waits", "halves", "00000012");
      }
}

TEST_CASE("trainer: policies end a run that is ahead as they end one that waits", "[train][gpu]") {
  const std::vector<std::string> wild = {"optim.lr=1e30", "optim.warmup_steps=0",
                                         "optim.clip_norm=0", "train.checkpoint_every=3"};
  for (Device device : devices())
    for (const char* policy : {"abort", "rollback"}) {
      INFO((device == Device::cuda ? "cuda, " : "cpu, ") << policy);
      const RunFolder r;
      std::vector<std::string> set = wild;
      set.push_back(std::string("train.on_nonfinite=") + policy);
      Thrown thrown[2];
      for (bool ahead : {false, true}) {
        const Switches s(ahead, ahead);
        const std::string run = ahead ? "ahead" : "waits";
        thrown[ahead] = thrown_by([&] { train(args_on(r, device, run, set)); });
      }
      CHECK(thrown[1].code == Exit::nonfinite);
      const auto steps_of = [](std::string text) { return text.substr(0, text.find(':')); };
      CHECK(steps_of(thrown[0].text) == steps_of(thrown[1].text));
      CHECK(told(r, "waits") == told(r, "ahead"));
    }
}

TEST_CASE("trainer: a signal saves the step that ends, not the one ahead", "[train][gpu]") {
  for (Device device : devices()) {
    const RunFolder r;
    const Switches on(true, true);
    {
      Trainer t(args_on(r, device, "stopped", {}));
      raise(SIGTERM);
      CHECK(t.run() == Exit::stopped);
    }
    CHECK(r.file("stopped", "00000001").size() > 100);
    CHECK(train(args_on(r, device, "stopped", {})) == Exit::ok);
    CHECK(train(args_on(r, device, "whole", {})) == Exit::ok);
    compare(r, "whole", "stopped", "00000012");
  }
}

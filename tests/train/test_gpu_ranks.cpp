// Several GPUs through NCCL: the same training as on one, bit for bit the same twice, checkpoints
// that any number of GPUs goes on from, and an end to a run whose rank dies or hangs in a
// collective. Skipped with a message where fewer than two GPUs are; scripts/check_gpus.sh runs them
// all.
#include <csignal>

#include <algorithm>
#include <cmath>

#include "catch.h"
#include "launch/run_ranks.h"

using namespace hgrn;
using namespace hgrn::test;

// The rest of the test is left out, with a message, where two GPUs and NCCL are not.
#define NEEDS_TWO_GPUS()                                                                \
  if (!hgrn::nccl_built() || hgrn::cuda_device_count() < 2) {                           \
    WARN("skipped: two GPUs are wanted, and a build with NCCL; " << cuda_device_count() \
                                                                 << " visible");        \
    return;                                                                             \
  }

namespace {

// Shapes that the kernels for Hopper take, and several buckets.
struct GpuRuns : RankRuns {
  GpuRuns() {
    device = "cuda";
    for (int i = 0; i < 2; ++i)
      write_shard(folder / ("gpu_00000" + std::to_string(i) + ".bin"),
                  learnable_tokens(200001, 251, uint64_t(i + 5)));
    spill(folder / "config.json", R"({
      "model": {"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 2, "expand_ratio": 128,
                "intermediate_size": 512, "eos_token_id": 0, "dropout": 0.1},
      "data": {"train": ")" + (folder / "gpu_*.bin") +
                                      R"(", "seq_len": 256},
      "optim": {"lr": 1e-3, "warmup_steps": 3, "schedule": "cosine"},
      "train": {"steps": 16, "global_batch": 12, "micro_batch": 3, "precision": "bf16",
                "log_every": 1, "eval_every": 0, "checkpoint_every": 0}})");
  }
  // The losses of a run that must end well.
  std::vector<double> train(int ranks, const std::string& out,
                            const std::vector<std::string>& set = {}, const Env& more = {}) const {
    Process p = launch(ranks, out, set, {}, more);
    const int code = p.wait(120);
    INFO(p.output());
    CHECK(code == 0);
    return losses(out);
  }
  bool same_files(const std::string& a, const std::string& b, const std::string& step) const {
    for (const std::string& name :
         {std::string("model.safetensors"), std::string("optimizer-00000-of-00002.safetensors"),
          std::string("optimizer-00001-of-00002.safetensors")}) {
      const std::string bytes = file(a, step, name);
      if (bytes.size() < 1000 || bytes != file(b, step, name)) return false;
    }
    return true;
  }
};

// The largest relative difference of two curves.
double apart(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size() || a.empty()) return INFINITY;
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::fabs(a[i] / b[i] - 1));
  return worst;
}

const std::vector<std::string> kForever = {"train.steps=1000000", "train.checkpoint_every=5"};

}  // namespace

TEST_CASE("gpus: one and two train alike, two runs are the same bits", "[train][gpus]") {
  NEEDS_TWO_GPUS();
  const GpuRuns r;
  const std::vector<double> one = r.train(1, "one"), two = r.train(2, "two"),
                            again = r.train(2, "again");
  REQUIRE(one.size() == 16);
  CHECK(one.back() < one.front() - 0.2);  // it learns
  WARN("bf16: at most " << 100 * apart(one, two) << " % between one GPU and two");
  CHECK(apart(one, two) < 2e-3);
  CHECK(two == again);
  CHECK(r.same_files("two", "again", "00000016"));
}

TEST_CASE("gpus: fp32, sharded or whole optimizers, gradients in bf16", "[train][gpus]") {
  NEEDS_TWO_GPUS();
  const GpuRuns r;
  const std::vector<std::string> fp32 = {"train.precision=fp32"};
  const std::vector<double> one = r.train(1, "one", fp32), two = r.train(2, "two", fp32);
  WARN("fp32: at most " << 100 * apart(one, two) << " % between one GPU and two");
  CHECK(apart(one, two) < 5e-4);
  const std::vector<double> zero1 = r.train(2, "zero1"),
                            zero0 = r.train(2, "zero0", {"train.zero=0"}),
                            bf16 = r.train(2, "bf16", {"train.reduce_dtype=bf16"});
  // NCCL's own sums, which take over where copies cannot be had.
  const std::vector<double> kernels = r.train(2, "kernels", {}, {{"HGRN_NCCL_COPY_ENGINES", "0"}});
  CHECK(apart(kernels, zero1) < 5e-4);
  CHECK(slurp(r.log("kernels")).find("by copy engines") == std::string::npos);
  CHECK(slurp(r.log("zero1")).find("by copy engines") != std::string::npos);
  WARN("ZeRO 0 and 1: at most " << 100 * apart(zero0, zero1)
                                << " %; gradients in bf16: " << 100 * apart(bf16, zero1) << " %");
  CHECK(apart(zero0, zero1) < 5e-4);
  CHECK(apart(bf16, zero1) < 2e-2);
  CHECK(bf16 != zero1);  // they did go through 16 bits
}

TEST_CASE("gpus: one goes on from a checkpoint of two, and two from one's", "[train][gpus]") {
  NEEDS_TWO_GPUS();
  const GpuRuns r;
  const std::vector<double> want = r.train(2, "whole");
  for (int first : {2, 1}) {
    const std::string out = "from" + std::to_string(first);
    {
      std::vector<std::string> words = {"launch", "--nproc-per-node", std::to_string(first), "--"};
      for (const std::string& w : r.train_words(out)) words.push_back(w);
      words.insert(words.end(), {"--steps", "8"});
      Process p(program(), words, RankRuns::env(), r.log(out));
      const int code = p.wait(120);
      INFO(p.output());
      CHECK(code == 0);
    }
    // Dropout and order of samples count from the global sample: another batch would show.
    const std::vector<double> got = r.train(3 - first, out);
    INFO(first << " first: " << 100 * apart(got, want) << " % apart");
    CHECK(apart(got, want) < 2e-3);
  }
}

TEST_CASE("gpus: SIGTERM saves on all at one step; the run goes on from there", "[train][gpus]") {
  NEEDS_TWO_GPUS();
  const GpuRuns r;
  std::vector<std::string> forever = kForever;
  forever.push_back("optim.schedule=constant");
  Process p = r.launch(2, "run", forever);
  REQUIRE(p.wait_for_text("step       3/", 60));
  p.signal(SIGTERM);
  CHECK(p.wait(30) == 75);
  INFO(p.output());
  CHECK(p.says("stopped by signal 15"));
  CHECK(r.nobody_left("run"));
  const int done = int(r.losses("run").size());
  const std::vector<std::string> more = {"train.steps=" + std::to_string(done + 4),
                                         "optim.schedule=constant"};
  const std::vector<double> on = r.train(2, "run", more), whole = r.train(2, "whole", more);
  CHECK(int(on.size()) == done + 4);
  CHECK(on == whole);
}

TEST_CASE("gpus: kill -9 of any rank ends the other, named, within ten seconds", "[train][gpus]") {
  NEEDS_TWO_GPUS();
  for (const char* const copies : {"1", "0"}) {
    INFO("HGRN_NCCL_COPY_ENGINES " << copies);
    const GpuRuns r;
    for (int victim : {0, 1}) {
      const std::string out = "run" + std::to_string(victim);
      Process p = r.launch(2, out, kForever, {}, {{"HGRN_NCCL_COPY_ENGINES", copies}});
      REQUIRE(p.wait_for_text("step       4/", 60));
      const auto ranks = rank_pids(r.folder / out);
      REQUIRE(ranks.size() == 2);
      const double began = monotonic_s();
      ::kill(ranks.at(victim), SIGKILL);
      CHECK(p.wait(20) == 1);
      const double took = monotonic_s() - began;
      WARN("rank " << victim << " killed: all ended after " << took << " s");
      CHECK(took < 10);
      INFO(p.output());
      CHECK(p.says("rank " + std::to_string(victim) + " (pid"));    // by the launcher
      CHECK(p.says("rank " + std::to_string(victim) + " of 2 ("));  // by the other rank
      CHECK(r.nobody_left(out));
    }
  }
}

TEST_CASE("gpus: killed ranks start again from the newest checkpoint, to the same bits",
          "[train][gpus]") {
  NEEDS_TWO_GPUS();
  const GpuRuns r;
  const std::vector<std::string> set = {"train.steps=400", "train.checkpoint_every=20"};
  r.train(2, "whole", set);
  Process p = r.launch(2, "run", set, {"--max-restarts", "3"});
  for (int victim : {1, 0}) {
    const std::string from = victim == 1 ? "step  41/" : "step 141/";
    REQUIRE(p.wait_for_text(from, 60));
    const auto ranks = rank_pids(r.folder / "run");
    REQUIRE(ranks.size() == 2);
    ::kill(ranks.at(victim), SIGKILL);
  }
  CHECK(p.wait(60) == 0);
  INFO(p.output());
  CHECK(p.says("restart 2 of 3"));
  CHECK(r.same_files("run", "whole", "00000400"));
}

TEST_CASE("gpus: a rank that stands still is found and named", "[train][gpus]") {
  NEEDS_TWO_GPUS();
  const GpuRuns r;
  Process p = r.launch(2, "run", kForever, {}, {{"HGRN_RANK_TIMEOUT", "2"}});
  REQUIRE(p.wait_for_text("step       4/", 60));
  const auto ranks = rank_pids(r.folder / "run");
  REQUIRE(ranks.size() == 2);
  ::kill(ranks.at(1), SIGSTOP);
  CHECK(p.wait(25) == 1);
  INFO(p.output());
  CHECK(p.says("rank 1 of 2 ("));
  CHECK(p.says("has said nothing for 2 s"));
  CHECK(r.nobody_left("run"));
}

// The process is seen to live, so nothing but the collective tells that it makes no progress.
TEST_CASE("gpus: a collective that does not end is given up", "[train][gpus]") {
  NEEDS_TWO_GPUS();
  for (const char* const copies : {"1", "0"}) {
    INFO("HGRN_NCCL_COPY_ENGINES " << copies);
    const GpuRuns r;
    Process p = r.launch(2, "run", kForever, {},
                         {{"HGRN_RANK_TIMEOUT", "600"},
                          {"HGRN_COLLECTIVE_TIMEOUT", "4"},
                          {"HGRN_NCCL_COPY_ENGINES", copies}});
    REQUIRE(p.wait_for_text("step       4/", 60));
    const auto ranks = rank_pids(r.folder / "run");
    REQUIRE(ranks.size() == 2);
    ::kill(ranks.at(1), SIGSTOP);
    CHECK(p.wait(30) == 1);
    INFO(p.output());
    CHECK(p.says("rank 0 of 2: a collective failed: it did not end within 4 s"));
    CHECK(r.nobody_left("run"));
  }
}

TEST_CASE("gpus: torchrun --no-python starts them", "[train][gpus]") {
  NEEDS_TWO_GPUS();
  std::vector<std::string> words = {"torchrun"};
  if (!has_program("torchrun")) {
    if (std::system("python3 -c 'import torch.distributed.run' >/dev/null 2>&1") != 0) {
      WARN("skipped: torchrun is not installed (python3-torch)");
      return;
    }
    words = {"python3", "-m", "torch.distributed.run"};
  }
  const GpuRuns r;
  words.insert(words.end(), {"--no-python", "--nproc-per-node=2", "--master-addr=127.0.0.1",
                             "--master-port=" + std::to_string(free_port()), program()});
  for (const std::string& w : r.train_words("run")) words.push_back(w);
  Process p(words[0], {words.begin() + 1, words.end()}, RankRuns::env(), r.log("run"));
  CHECK(p.wait(120) == 0);
  INFO(p.output());
  CHECK(p.says(", 2 ranks"));
  CHECK(r.losses("run").size() == 16);
}

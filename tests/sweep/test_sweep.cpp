#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "catch.h"
#include "launch/process.h"
#include "sweep/sweep.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

SweepOptions options_of(const RunFolder& f, std::vector<std::string> grid) {
  SweepOptions o;
  o.config = f.folder / "config.json";
  o.grid = std::move(grid);
  o.out = f.folder / "sweep";
  o.device = Device::cpu;
  return o;
}

std::vector<nlohmann::json> rows_of(const std::string& path) {
  std::vector<nlohmann::json> rows;
  std::istringstream in(slurp(path));
  for (std::string line; std::getline(in, line);) rows.push_back(nlohmann::json::parse(line));
  return rows;
}

Process start(const RunFolder& f, const std::vector<std::string>& more, const std::string& log) {
  std::vector<std::string> words = {"sweep", "--config",         f.folder / "config.json",
                                    "--out", f.folder / "sweep", "--device",
                                    "cpu"};
  words.insert(words.end(), more.begin(), more.end());
  return Process(HGRN_BINARY, words, {}, f.folder / log);
}

}  // namespace

TEST_CASE("sweep: a grid is every combination, the first key slowest", "[sweep]") {
  const RunFolder f;
  const auto runs = sweep_runs(
      options_of(f, {"optim.lr=1e-4,3e-4", "optim.betas=[0.9,0.95],[0.9,0.98]", "train.seed=7"}));
  REQUIRE(runs.size() == 4);
  CHECK(runs[0].overrides ==
        std::vector<std::string>{"optim.lr=1e-4", "optim.betas=[0.9,0.95]", "train.seed=7"});
  CHECK(runs[1].values[1].second == "[0.9,0.98]");
  CHECK(runs[2].values[0].second == "3e-4");
  CHECK(runs[0].steps == 12);
  for (const SweepRun& run : runs) {
    CHECK(run.name.find_first_of("/[], ") == std::string::npos);
    CHECK(std::count_if(runs.begin(), runs.end(),
                        [&](const SweepRun& other) { return other.name == run.name; }) == 1);
  }
  // The same combination keeps its name in a larger grid, so that its run is found again.
  const auto more = sweep_runs(
      options_of(f, {"optim.lr=3e-4,1e-4", "optim.betas=[0.9,0.98],[0.9,0.95]", "train.seed=7"}));
  CHECK(more[3].name == runs[0].name);
  CHECK(sweep_runs(options_of(f, {"optim.lr=1e-4"}))[0].name == "optim.lr=1e-4");
}

TEST_CASE("sweep: a wrong grid is refused before anything runs", "[sweep]") {
  const RunFolder f;
  const auto refused = [&](std::vector<std::string> grid, const std::string& part) {
    const Thrown t = thrown_by([&] { sweep_runs(options_of(f, std::move(grid))); });
    INFO(t.text);
    CHECK(t.code == Exit::usage);
    CHECK(t.has(part));
  };
  refused({}, "--grid");
  refused({"optim.lr"}, "KEY=VALUE");
  refused({"optim.lr=1e-3,,2e-3"}, "empty");
  refused({"optim.lr=1e-3,1e-3"}, "twice");
  refused({"optim.lr=1", "optim.lr=2"}, "already");
  refused({"optim.lrr=1,2"}, "did you mean lr?");
  refused({"train.micro_batch=2,3"}, "global_batch");
  std::string many = "train.seed=0";
  for (int i = 1; i < 101; ++i) many += "," + std::to_string(i);
  refused({many, "data" + many.substr(5)}, "more than 10000");
}

TEST_CASE("sweep: failures do not stop the rest, and only they run again", "[sweep]") {
  const RunFolder f;
  const std::vector<std::string> grid = {"--grid",
                                         "optim.lr=1e-2,1e30,3e-3",
                                         "--set",
                                         "train.on_nonfinite=abort",
                                         "train.eval_every=6",
                                         "--jobs",
                                         "2"};
  Process first = start(f, grid, "first");
  CHECK(first.wait() == 1);
  CHECK(first.says("failed with code 4"));
  auto rows = rows_of(f.folder / "sweep/results.jsonl");
  REQUIRE(rows.size() == 3);
  CHECK(rows[0]["state"] == "done");
  CHECK(rows[1]["state"] == "failed");
  CHECK(rows[1]["code"] == 4);
  CHECK(rows[1]["error"].get<std::string>().find("on_nonfinite") != std::string::npos);
  CHECK(rows[2]["state"] == "done");
  CHECK(rows[2]["values"]["optim.lr"] == 3e-3);
  for (const int i : {0, 2}) {
    CHECK(rows[size_t(i)]["step"] == 12);
    CHECK(rows[size_t(i)]["tokens"] == 12 * 4 * 20);
    CHECK(rows[size_t(i)]["tokens_per_s"] > 0);
    CHECK(rows[size_t(i)]["valid_ppl"].get<double>() ==
          Approx(std::exp(rows[size_t(i)]["valid_loss"].get<double>())).epsilon(1e-9));
  }
  // The same numbers as the run says itself, the best loss on top of the table.
  const auto own = rows_of(rows[0]["dir"].get<std::string>() + "/metrics.jsonl");
  CHECK(own.back()["valid_loss"] == rows[0]["valid_loss"]);
  const std::string best = rows[0]["valid_loss"] < rows[2]["valid_loss"] ? "1e-2" : "3e-3";
  std::istringstream table(first.output().substr(first.output().rfind("optim.lr  ")));
  std::string line;
  std::getline(table, line);
  CHECK(line.find("valid loss") != std::string::npos);
  std::getline(table, line);
  CHECK(line.find(best) != std::string::npos);
  const std::string csv = slurp(f.folder / "sweep/results.csv");
  CHECK(std::count(csv.begin(), csv.end(), '\n') == 4);
  CHECK(csv.rfind("run,optim.lr,state,code,", 0) == 0);

  Process again = start(f, grid, "again");
  CHECK(again.wait() == 1);
  CHECK(again.says("3 runs, 2 finished before"));
  CHECK(!again.says("optim.lr=1e-2: started"));
  // A longer schedule goes on from what is there; another model does not pass for the same run.
  Process other = start(
      f,
      {"--grid", "optim.lr=1e-2,3e-3", "--set", "optim.clip_norm=0.5", "train.on_nonfinite=abort"},
      "other");
  CHECK(other.wait() == 2);
  CHECK(other.says("optim.clip_norm"));
  Process report = start(f,
                         {"--grid", "optim.lr=1e-2,3e-3", "--set", "train.on_nonfinite=abort",
                          "train.eval_every=6", "--report"},
                         "report");
  CHECK(report.wait() == 0);
  CHECK(report.says("12/12"));
}

TEST_CASE("sweep: a signal lets all runs save; the same command finishes them", "[sweep]") {
  const RunFolder f;
  const std::vector<std::string> grid = {
      "--grid", "train.seed=1,2,3", "--set", "train.steps=4000", "train.log_every=1", "--jobs",
      "2"};
  const auto started = [&](Process& p) {
    return eventually(30, [&] {
      return slurp(f.folder / "sweep/runs/train.seed=2/metrics.jsonl").size() > 200 || !p.running();
    });
  };
  Process first = start(f, grid, "first");
  REQUIRE(started(first));
  first.signal(SIGTERM);
  CHECK(first.wait() == 75);
  auto rows = rows_of(f.folder / "sweep/results.jsonl");
  CHECK(rows[0]["state"] == "stopped");
  CHECK(rows[1]["state"] == "stopped");
  CHECK(rows[2]["state"] == "pending");
  CHECK(rows[1]["step"] > 0);
  CHECK(rows[1]["step"] < 4000);
  CHECK(processes_with(f.folder / "sweep").empty());

  // A killed sweep leaves no process behind, and its runs go on from their checkpoints.
  Process second = start(f, grid, "second");
  REQUIRE(eventually(30, [&] { return processes_with(f.folder / "sweep/runs").size() == 2; }));
  second.signal(SIGKILL);
  CHECK(second.wait() == -SIGKILL);
  CHECK(eventually(10, [&] { return processes_with(f.folder / "sweep").empty(); }));

  Process third = start(
      f,
      {"--grid", "train.seed=1,2,3", "--set", "train.steps=60", "train.log_every=1", "--jobs", "2"},
      "third");
  CHECK(third.wait() == 0);
  rows = rows_of(f.folder / "sweep/results.jsonl");
  for (const auto& row : rows) CHECK(row["state"] == "done");
  CHECK(slurp(f.folder / "sweep/logs/train.seed=2.log").find("resumed from") != std::string::npos);
}

TEST_CASE("sweep: the Slurm array is a script that runs one combination", "[sweep]") {
  const RunFolder f;
  const std::vector<std::string> grid = {"--grid", "optim.lr=1e-2,3e-3", "--slurm",
                                         f.folder / "array.sh"};
  Process write = start(f, grid, "write");
  REQUIRE(write.wait() == 0);
  const std::string script = slurp(f.folder / "array.sh");
  CHECK(script.find("#SBATCH --array=0,1\n") != std::string::npos);
  CHECK(script.find("--gpus") == std::string::npos);  // --device cpu

  std::filesystem::create_directory(f.folder / "bin");
  spill(f.folder / "bin/scontrol", "#!/bin/sh\necho \"scontrol $*\"\n");
  std::filesystem::permissions(f.folder / "bin/scontrol", std::filesystem::perms::owner_all);
  const Env task = {{"SLURM_ARRAY_TASK_ID", "1"},
                    {"SLURM_ARRAY_JOB_ID", "77"},
                    {"SLURM_PROCID", "0"},
                    {"PATH", (f.folder / "bin") + ":" + std::getenv("PATH")}};
  Process run("bash", {f.folder / "array.sh"}, task, f.folder / "task");
  CHECK(run.wait() == 0);
  INFO(run.output());
  CHECK(slurp(f.folder / "sweep/runs/optim.lr=3e-3/metrics.jsonl").size() > 0);
  CHECK(!std::filesystem::exists(f.folder / "sweep/runs/optim.lr=1e-2"));
  Env none = task;
  none["SLURM_ARRAY_TASK_ID"] = "7";
  Process wrong("bash", {f.folder / "array.sh"}, none, f.folder / "wrong");
  CHECK(wrong.wait() == 2);

  // What is finished is not submitted again; a signal from Slurm queues the task again.
  Process rest = start(
      f,
      {"--grid", "optim.lr=1e-2,3e-3", "--set", "train.steps=12", "--slurm", f.folder / "array.sh"},
      "rest");
  REQUIRE(rest.wait() == 0);
  CHECK(slurp(f.folder / "array.sh").find("#SBATCH --array=0\n") != std::string::npos);
  Process endless = start(f,
                          {"--grid", "optim.lr=2e-2", "--set", "train.steps=100000",
                           "train.log_every=1", "--slurm", f.folder / "long.sh"},
                          "endless");
  REQUIRE(endless.wait() == 0);
  Env zero = task;
  zero["SLURM_ARRAY_TASK_ID"] = "0";
  Process signalled("bash", {f.folder / "long.sh"}, zero, f.folder / "signalled");
  REQUIRE(eventually(
      30, [&] { return slurp(f.folder / "sweep/runs/optim.lr=2e-2/metrics.jsonl").size() > 200; }));
  signalled.signal(SIGUSR1);
  CHECK(signalled.wait() == 0);
  CHECK(signalled.says("scontrol requeue 77_0"));
}

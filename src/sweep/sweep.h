// `hgrn sweep`: one training run for each combination of some config values, side by side on the
// GPUs of this machine (or a number of CPU processes), or as a Slurm array. It can be called again:
// finished runs are left alone, others go on from their newest checkpoint.
//
//   OUT/runs/NAME/      run folders, as `hgrn train` makes them; NAME spells the values
//   OUT/logs/NAME.log   what the run said
//   OUT/results.jsonl, results.csv   a row a run, renewed whenever one ends
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "ops/ops.h"

namespace hgrn {

struct SweepOptions {
  std::string config;
  std::vector<std::string> overrides;  // "section.key=value", for all runs
  std::vector<std::string> grid;       // "section.key=value,value,..."; a comma within [] or {} or
                                       // quotes belongs to a value
  std::string out;
  Device device = Device::automatic;
  int jobs = 0;         // runs side by side; 0: one a GPU, or 1 on the CPU
  std::string slurm;    // write this array script and start nothing
  bool report = false;  // only gather the results
};

struct SweepRun {
  std::string name;                                         // a folder's name
  std::vector<std::pair<std::string, std::string>> values;  // key and value, in the grid's order
  std::vector<std::string> overrides;                       // all of them, "section.key=value"
  std::string dir, log;
  int64_t steps = 0;        // train.steps
  std::string config_json;  // resolved
};

// The combinations, the first key slowest; every config is checked. Exit::usage names the grid or
// the run that is wrong.
std::vector<SweepRun> sweep_runs(const SweepOptions& options);

enum class RunState { pending, running, done, stopped, failed };
const char* name_of(RunState state);

struct SweepResult {
  RunState state = RunState::pending;
  int code = -1;                          // exit code, 128 + signal, -1: unknown
  std::string error;                      // the last "error: ..." that it said
  int64_t step = 0, tokens = 0;           // reached
  double train_loss = 0, valid_loss = 0;  // the last ones; NaN: none
  double best_valid_loss = 0;
  double tokens_per_s = 0;  // median over its log lines
  double seconds = 0;       // of all its starts
};

// From the run folder and, for what no run folder tells (code, error, seconds), `before`.
SweepResult gather_result(const SweepRun& run, const SweepResult& before);

// What the results file of an earlier call holds, by run; absent ones are pending.
std::vector<SweepResult> read_results(const std::string& out, const std::vector<SweepRun>& runs);
void write_results(const std::string& out, const std::vector<SweepRun>& runs,
                   const std::vector<SweepResult>& results);
// The best validation loss first.
std::string results_table(const std::vector<SweepRun>& runs,
                          const std::vector<SweepResult>& results);

// An array job with a task a run that is not finished.
std::string slurm_script(const SweepOptions& options, const std::vector<SweepRun>& runs,
                         const std::vector<SweepResult>& results);

// Runs what is not finished. Exit::ok: all are; Exit::stopped: a signal came, all have saved;
// Exit::failed: some failed, the others are finished.
Exit run_sweep(const SweepOptions& options, const std::vector<SweepRun>& runs,
               std::vector<SweepResult>& results);

// All of it. Prints nothing: `table` is for stdout.
Exit sweep(const SweepOptions& options, std::string& table);

}  // namespace hgrn

// A run as its folder tells it: metrics.jsonl, layers.jsonl, samples.jsonl, config.json and the
// results of `hgrn eval --json`. Damage is left out and counted, never fatal.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace hgrn {

// Logged steps, one entry each in every column. NaN: not finite, or unknown.
struct StepColumns {
  std::vector<double> step, tokens;
  std::vector<double> time_s;  // of training: evaluation, saving and pauses left out
  std::vector<double> loss, grad_norm, lr, tokens_per_s, mfu;
  size_t size() const { return step.size(); }
};

struct EvalColumns {
  std::vector<double> step, tokens, time_s, loss;
  size_t size() const { return step.size(); }
};

struct LayerColumns {  // of the last look inside the model
  int64_t step = 0;
  std::vector<double> forget_gate, grad_norm;
};

struct SampleText {
  int64_t step = 0;
  std::string prompt, text;
};

// One number of an evaluation: "eval.json", "perplexity, blocks of 512", "ppl", 45.8 +- 0.6.
struct EvalValue {
  std::string file, what, metric;
  double value = 0, stderr_ = 0;  // NaN: unknown
  int64_t step = -1;              // of the checkpoint; -1: unknown
};

struct RunData {
  std::string path;  // as given
  std::string name;  // short, different from those of the other runs
  StepColumns steps;
  EvalColumns valid;
  LayerColumns layers;
  std::vector<SampleText> samples;  // a few over the run, the last one included
  std::vector<EvalValue> evals;
  std::vector<std::pair<std::string, std::string>> config;  // "optim.lr" -> "0.001"
  int64_t skipped = 0;                                      // updates left out, by the last line
  int64_t planned_steps = -1;                               // train.steps
  std::vector<std::string> notes;  // what was left out of the files, one sentence each
};

// `path`: a run folder or its metrics.jsonl. Exit::data where it holds no metrics.
RunData read_run(const std::string& path);
// Distinct names; evaluations of `eval_files` go to the run that their checkpoint lies in.
std::vector<RunData> read_runs(const std::vector<std::string>& paths,
                               const std::vector<std::string>& eval_files);

// For tests: what read_run does with the lines of metrics.jsonl.
class MetricLines {
 public:
  explicit MetricLines(RunData& run) : run_(run) {}
  void add(const std::string& line);
  void finish();

 private:
  void go_back_to(double step, bool eval);
  RunData& run_;
  int64_t damaged_ = 0, repeated_ = 0, not_finite_ = 0;
  bool last_damaged_ = false;
};

}  // namespace hgrn

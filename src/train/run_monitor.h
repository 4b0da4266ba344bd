// All that a run tells while it trains: log lines, metrics.jsonl, TensorBoard, Prometheus, the
// terminal, text samples. The trainer hands over numbers; what becomes of them is decided here.
// Only rank 0 has sinks; the calls marked so are made by all ranks.
#pragma once
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "monitor/nvml.h"
#include "monitor/sink.h"
#include "text/tokenizer.h"
#include "train/layer_probe.h"

namespace hgrn {

struct MonitorOptions {
  std::string prometheus;  // file; empty: none
  bool plain = false;      // no live view, even on a terminal
  // Goes on from a prompt with a model that is not laid out yet (eval's decoding): ids to ids.
  std::function<std::vector<int32_t>(LanguageModel& model, const std::vector<int32_t>& prompt,
                                     int64_t tokens, uint64_t seed)>
      sampler;
};

class RunMonitor {
 public:
  struct Run {
    const Config& config;
    std::string out;  // folder
    Ops& ops;
    LanguageModel& model;
    GradSync& sync;
    Ranks& ranks;
    const WeightStore& weights;
    const Tokenizer* tokenizer;  // may be null
    int64_t eos;                 // may be -1
  };
  RunMonitor(const Run& run, const MonitorOptions& options);
  void take(Arena& arena);  // all ranks
  // What was told after `step` is dropped.
  void open(int64_t step);

  // Around each step, all ranks.
  void last_micro_batch(int64_t step);  // is about to start
  // Whether gates are read in the last micro-batch of the step, and gradients behind it.
  bool looks_inside(int64_t step) const { return due(run_.config.train.monitor_every, step); }
  void after_backward(int stage) { probe_.after_backward(stage); }
  // `m`: step, tokens, loss, norm, lr and counters; the rest is filled in here.
  void step_done(StepMetrics m, double seconds);

  void evaluated(const EvalMetrics& m);
  void phase(std::string_view name);
  void rolled_back(int64_t step);

 private:
  bool due(int64_t every, int64_t step) const { return every > 0 && step % every == 0; }
  void set_speed(StepMetrics& m, double seconds, int64_t steps) const;
  void log_step(StepMetrics m);
  void ask_gpu();
  void sample(int64_t step);
  template <class Record>
  void tell(void (MetricSink::*call)(Record), Record record) {
    for (const auto& sink : sinks_) (sink.get()->*call)(record);
  }

  const Run run_;
  MonitorOptions options_;
  LayerProbe probe_;
  std::vector<std::unique_ptr<MetricSink>> sinks_;
  bool live_ = false;
  std::optional<Nvml> nvml_;
  std::chrono::steady_clock::time_point asked_{};
  double window_seconds_ = 0;  // since the last log line, evaluation and saving left out
  int64_t window_steps_ = 0;
};

}  // namespace hgrn

// TensorBoard event file of a run, beside its metrics.jsonl: `tensorboard --logdir runs`.
// docs/monitoring.md lists the tags. Every start of a run opens a file of its own, whose first
// events tell readers to drop what earlier files hold from there on.
#pragma once
#include <string>
#include <string_view>

#include "core/file.h"
#include "monitor/sink.h"

namespace hgrn {

class SummaryBuilder;

class TensorBoardFile final : public MetricSink {
 public:
  // `config_text` is shown at the step where the run starts.
  TensorBoardFile(const std::string& run_dir, int64_t resumed_step, const std::string& config_text);
  const std::string& path() const { return path_; }

  void logged(const StepMetrics& m) override;
  void evaluated(const EvalMetrics& m) override;
  void layers(const LayerMetrics& m) override;
  void sampled(const TextSample& s) override;
  void gpu(const GpuStatus& g) override { gpu_ = g; }
  void rolled_back(int64_t step) override;

 private:
  void write(int64_t step, const SummaryBuilder& values);
  void append(std::string_view event);
  std::string path_;
  Fd fd_;
  uint64_t size_ = 0;  // whole records
  bool complained_ = false;
  GpuStatus gpu_;
};

// Moves event files of a run to a folder of their own, where they show as another run.
void set_event_files_aside(const std::string& run_dir, const std::string& to);

}  // namespace hgrn

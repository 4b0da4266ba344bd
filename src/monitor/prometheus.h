// A text file for node_exporter's textfile collector: `hgrn train --prometheus FILE`. The names are
// in docs/monitoring.md. The file is replaced whole, at most once a second.
#pragma once
#include <chrono>
#include <optional>
#include <string>

#include "monitor/sink.h"

namespace hgrn {

class PrometheusFile final : public MetricSink {
 public:
  // `run`, `device`: labels. Exit::usage where the folder is missing or cannot be written.
  PrometheusFile(std::string path, std::string run, std::string device);
  // The last state stays in the file, as a run that no longer runs.
  ~PrometheusFile() override;

  void every_step(const StepMetrics& m) override;
  void logged(const StepMetrics& m) override;
  void evaluated(const EvalMetrics& m) override;
  void gpu(const GpuStatus& g) override { gpu_ = g; }

  std::string text(bool running, double unix_seconds) const;

 private:
  void write(bool running);
  const std::string path_, run_, device_;
  std::optional<StepMetrics> step_;
  std::optional<EvalMetrics> eval_;
  double memory_gib_ = 0;
  GpuStatus gpu_;
  std::chrono::steady_clock::time_point written_{};
  bool complained_ = false;
};

}  // namespace hgrn

// What a run writes down as JSON lines (fields in docs/formats.md), and its log line.
#pragma once
#include <cstdint>
#include <string>

#include "monitor/sink.h"

namespace hgrn {

// A file of JSON objects, one a line, each with a "step".
class StepLines {
 public:
  // Lines after `resumed_step` (of a run that went further before it was stopped) are dropped, by
  // an atomic rewrite. The file is made at the first line.
  StepLines(std::string path, int64_t resumed_step);
  ~StepLines();
  StepLines(const StepLines&) = delete;
  StepLines& operator=(const StepLines&) = delete;
  void append(const std::string& line);
  void drop_after(int64_t step);

 private:
  const std::string path_;
  int fd_ = -1;
};

// metrics.jsonl, layers.jsonl and samples.jsonl of a run folder.
class MetricsFile final : public MetricSink {
 public:
  MetricsFile(const std::string& run_dir, int64_t resumed_step);
  void logged(const StepMetrics& m) override;
  void evaluated(const EvalMetrics& m) override;
  void layers(const LayerMetrics& m) override;
  void sampled(const TextSample& s) override;
  void rolled_back(int64_t step) override;

 private:
  StepLines metrics_, layers_, samples_;
};

// Renames what an earlier run told (JSON lines, event files) so that a new one can start here.
void set_metrics_aside(const std::string& run_dir, const std::string& suffix);

std::string log_line(const StepMetrics& m);

}  // namespace hgrn

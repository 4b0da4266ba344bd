// What a run tells: metrics.jsonl (one object a line; fields in docs/formats.md) and the log line.
#pragma once
#include <cstdint>
#include <string>

namespace hgrn {

struct StepMetrics {
  int64_t step = 0, steps = 0, tokens = 0;
  double loss = 0;       // mean nll (nats a token) over the global batch
  double grad_norm = 0;  // before clipping
  double lr = 0;
  double step_ms = 0, tokens_per_s = 0;
  double mfu = -1;  // share of the card's dense peak; < 0: unknown
  double memory_gib = 0;
  double eta_s = 0;
  int64_t skipped = 0;  // steps whose update was left out, so far
  int64_t spikes = -1;  // loss spikes so far; < 0: not looked for
  double loss_z = 0;    // robust z-score of the loss; NaN: too few losses yet
};

struct EvalMetrics {
  int64_t step = 0;
  double valid_loss = 0;
  int64_t valid_tokens = 0;
};

class MetricsFile {
 public:
  // Appends to DIR/metrics.jsonl. Lines after `resumed_step` (of a run that went further before it
  // was stopped) are dropped, by an atomic rewrite.
  MetricsFile(const std::string& run_dir, int64_t resumed_step);
  ~MetricsFile();
  MetricsFile(const MetricsFile&) = delete;
  MetricsFile& operator=(const MetricsFile&) = delete;
  void write(const StepMetrics& m);
  void write(const EvalMetrics& m);

 private:
  void append(const std::string& line);
  std::string path_;
  int fd_ = -1;
};

std::string log_line(const StepMetrics& m);
std::string duration(double seconds);  // "1:02:03", "4:05"

}  // namespace hgrn

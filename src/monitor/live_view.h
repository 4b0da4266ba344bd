// The run on a terminal: a block of lines below the log with bar, times, loss curve, speed and GPU.
// docs/monitoring.md tells how to read it.
#pragma once
#include <chrono>
#include <string>
#include <vector>

#include "monitor/sink.h"

namespace hgrn {

struct ViewStyle {
  int columns = 80;
  bool colour = false;
  bool utf8 = true;
};

// A curve in bounded memory: neighbours are averaged once there are too many of them.
class Curve {
 public:
  void add(double v);  // what is not finite is left out
  // The later half of the curve as `columns` levels of 0..7, the lowest and highest mean of a
  // column being 0 and 7; empty where there are fewer than two values.
  std::vector<int> levels(int columns) const;

 private:
  std::vector<double> means_;
  double sum_ = 0;
  int64_t count_ = 0, per_mean_ = 1;
};

// Levels of 0..7 as characters.
std::string sparkline(const std::vector<int>& levels, bool utf8);

struct ViewState {
  std::string run, device, phase;
  StepMetrics step;      // loss, norm, lr and counters of the last step; speed of the last few
  double elapsed_s = 0;  // since this start
  EvalMetrics eval;      // step 0: none yet
  GpuStatus gpu;
  Curve losses;
};

// One string a line, each at most style.columns - 1 wide.
std::vector<std::string> render(const ViewState& state, const ViewStyle& style);

// Draws through log_status(), at most ten times a second.
class LiveView final : public MetricSink {
 public:
  LiveView(std::string run, std::string device);
  ~LiveView() override;  // takes the block away

  void every_step(const StepMetrics& m) override;
  void logged(const StepMetrics& m) override;
  void evaluated(const EvalMetrics& m) override;
  void gpu(const GpuStatus& g) override { state_.gpu = g; }
  void phase(std::string_view name) override;
  void rolled_back(int64_t) override { state_.losses = {}; }

 private:
  using Clock = std::chrono::steady_clock;
  void draw();
  ViewState state_;
  double step_s_ = 0;  // of one step, exponentially smoothed
  Clock::time_point started_ = Clock::now(), drawn_{};
};

}  // namespace hgrn

// Where a run's records go: metrics.jsonl, TensorBoard, Prometheus, the terminal. Only rank 0 has
// sinks. A sink never ends a run for a file that is only looked at.
#pragma once
#include <string_view>

#include "monitor/records.h"

namespace hgrn {

class MetricSink {
 public:
  virtual ~MetricSink() = default;
  virtual void every_step(const StepMetrics&) {}  // speed and time are those of this step alone
  virtual void logged(const StepMetrics&) {}      // every train.log_every steps
  virtual void evaluated(const EvalMetrics&) {}
  virtual void layers(const LayerMetrics&) {}  // every train.monitor_every steps
  virtual void sampled(const TextSample&) {}   // every train.sample_every steps
  virtual void gpu(const GpuStatus&) {}        // now and then
  virtual void phase(std::string_view) {}      // what the run does now: "evaluating"
  virtual void rolled_back(int64_t) {}         // what came after this step did not happen
};

}  // namespace hgrn

// What a run has to tell, as plain records. The trainer fills them, sinks (sink.h) show them.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

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

// A look inside the model, every train.monitor_every steps. Norms are of the gradient before
// clipping; their squares add up to the square of StepMetrics::grad_norm.
struct LayerMetrics {
  int64_t step = 0;
  double embedding_grad_norm = 0;   // with what layers share: lower bounds, a tied head
  std::vector<double> grad_norm;    // of each layer
  double head_grad_norm = 0;        // final norm and an untied head
  std::vector<double> forget_gate;  // mean over some tokens and all channels; NaN: no such gate
};

struct TextSample {
  int64_t step = 0;
  std::string prompt, text;
};

// The GPU of this rank as its driver sees it. Values below 0 are unknown.
struct GpuStatus {
  double memory_used = -1, memory_total = -1;  // bytes
  double power_w = -1, power_limit_w = -1;
  double temperature_c = -1;
  double utilization = -1;  // share of the last sample period with a kernel running
};

std::string duration(double seconds);  // "1:02:03", "4:05"
std::string short_count(double v);     // "844k", "1.97M"; "-" where it is not finite

}  // namespace hgrn

#include "train/run_monitor.h"

#include <cmath>
#include <filesystem>

#include "core/log.h"
#include "monitor/live_view.h"
#include "monitor/prometheus.h"
#include "monitor/tensorboard.h"
#include "train/metrics.h"

namespace hgrn {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int64_t kSampleTokens = 128;
constexpr std::chrono::seconds kGpuPeriod{2};  // a question to the driver may take milliseconds

std::string name_of_run(const std::string& out) {
  const std::filesystem::path p = std::filesystem::path(out).lexically_normal();
  return (p.has_filename() ? p : p.parent_path()).filename().string();
}

}  // namespace

RunMonitor::RunMonitor(const Run& run, const MonitorOptions& options)
    : run_(run), options_(options), probe_(run.ops, run.model, run.sync, run.ranks) {
  if (!run_.ranks.first() || options_.prometheus.empty()) return;
  sinks_.push_back(
      std::make_unique<PrometheusFile>(options_.prometheus, run_.out, run_.ops.describe()));
}

void RunMonitor::take(Arena& arena) {
  probe_.take(arena);
}

void RunMonitor::open(int64_t step) {
  if (!run_.ranks.first()) return;
  sinks_.push_back(std::make_unique<MetricsFile>(run_.out, step));
  sinks_.push_back(std::make_unique<TensorBoardFile>(run_.out, step, config_to_json(run_.config)));
  // Ranks share a terminal at best: a block of one would be torn by the others' lines.
  live_ = !options_.plain && run_.ranks.alone() && terminal_moves();
  const std::string device = run_.ops.describe();
  if (live_)
    sinks_.push_back(
        std::make_unique<LiveView>(name_of_run(run_.out), device.substr(0, device.find(','))));
  nvml_.emplace(run_.ops.pci_bus_id());
}

void RunMonitor::last_micro_batch(int64_t step) {
  if (run_.ranks.first() && due(run_.config.train.monitor_every, step)) probe_.arm();
}

// The speed of `steps` steps that took so long together.
void RunMonitor::set_speed(StepMetrics& m, double seconds, int64_t steps) const {
  const TrainConfig& t = run_.config.train;
  const double tokens = double(t.global_batch * run_.config.data.seq_len);
  m.steps = t.steps;
  m.step_ms = 1e3 * seconds / double(steps);
  m.tokens_per_s = tokens * double(steps) / seconds;
  if (run_.ops.peak_flops() > 0)
    m.mfu = 6.0 * double(run_.model.params().count()) * m.tokens_per_s /
            (run_.ops.peak_flops() * run_.ranks.world());
  m.eta_s = double(t.steps - m.step) * m.step_ms / 1e3;
}

void RunMonitor::step_done(StepMetrics m, double seconds) {
  const TrainConfig& t = run_.config.train;
  window_seconds_ += seconds;
  ++window_steps_;
  if (due(t.monitor_every, m.step)) {
    LayerMetrics layers = probe_.read(run_.weights.weights().grad);
    layers.step = m.step;
    tell<const LayerMetrics&>(&MetricSink::layers, layers);
  }
  ask_gpu();
  if (!sinks_.empty()) {
    set_speed(m, seconds, 1);
    tell<const StepMetrics&>(&MetricSink::every_step, m);
  }
  if (t.log_every > 0 && (m.step % t.log_every == 0 || m.step == t.steps)) log_step(m);
  if (due(t.sample_every, m.step)) sample(m.step);
}

void RunMonitor::log_step(StepMetrics m) {
  set_speed(m, window_seconds_, window_steps_);
  const MemoryInfo memory = run_.ops.memory();
  m.memory_gib = double(memory.total - memory.free) / double(1 << 30);
  // The live view shows it; the last one stays on the terminal.
  if (live_ && m.step != m.steps)
    log_to_file_only(log_line(m));
  else
    log_info("{}", log_line(m));
  tell<const StepMetrics&>(&MetricSink::logged, m);
  window_seconds_ = 0;
  window_steps_ = 0;
}

void RunMonitor::ask_gpu() {
  if (!nvml_ || Clock::now() - asked_ < kGpuPeriod) return;
  asked_ = Clock::now();
  if (const std::optional<GpuStatus> s = nvml_->read())
    tell<const GpuStatus&>(&MetricSink::gpu, *s);
}

void RunMonitor::evaluated(const EvalMetrics& m) {
  log_info("step {}  valid loss {:.4f}  ppl {:.3f}  ({} tokens)", m.step, m.valid_loss,
           std::exp(m.valid_loss), m.valid_tokens);
  tell<const EvalMetrics&>(&MetricSink::evaluated, m);
}

void RunMonitor::phase(std::string_view name) {
  tell<std::string_view>(&MetricSink::phase, name);
}

void RunMonitor::rolled_back(int64_t step) {
  tell<int64_t>(&MetricSink::rolled_back, step);
}

// A few sentences from the model as it is, with memory of their own that goes again. The run does
// not depend on it: where memory does not suffice, it goes on without.
void RunMonitor::sample(int64_t step) {
  const TrainConfig& t = run_.config.train;
  if (!run_.ranks.first() || !run_.tokenizer || !options_.sampler) return;
  std::vector<int32_t> prompt;
  if (run_.eos >= 0) prompt.push_back(int32_t(run_.eos));
  run_.tokenizer->encode(t.sample_prompt, prompt);
  if (prompt.empty()) {
    log_warn("no text samples: the tokenizer has no end-of-text token; set train.sample_prompt");
    options_.sampler = nullptr;
    return;
  }
  phase("sampling");
  run_.sync.before_forward(INT32_MAX);  // all weights are there
  std::vector<int32_t> ids;
  try {
    ModelConfig config = run_.config.model;
    config.eos_token_id = run_.eos;  // the tokenizer's, where the config names none
    LanguageModel model(run_.ops, config);
    model.use(run_.weights.weights());
    ids = options_.sampler(model, prompt, kSampleTokens, t.seed);
  } catch (const Error& e) {
    log_warn("no text samples from here on: {}", e.what());
    options_.sampler = nullptr;
  }
  run_.model.lend_scratch();  // the other model had lent its own
  while (!ids.empty() && (ids.back() == run_.eos || ids.back() >= run_.tokenizer->vocab_size()))
    ids.pop_back();
  if (!options_.sampler) return;
  tell<const TextSample&>(&MetricSink::sampled,
                          {step, t.sample_prompt, run_.tokenizer->decode(ids)});
}

}  // namespace hgrn

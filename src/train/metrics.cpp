#include "train/metrics.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "core/check.h"
#include "core/file.h"
#include "monitor/tensorboard.h"

namespace hgrn {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

// JSON has no NaN: null says that there is no number.
ordered_json number(double v) {
  return std::isfinite(v) ? ordered_json(v) : ordered_json();
}

constexpr uint64_t kMaxMetricsBytes = uint64_t(4) << 30;

std::string lines_up_to(const std::string& text, int64_t step) {
  std::string kept;
  for (size_t at = 0; at < text.size();) {
    size_t end = text.find('\n', at);
    if (end == std::string::npos) break;  // a line that a crash cut short
    const std::string line = text.substr(at, end - at);
    const json j = json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (j.is_object() && j.contains("step") && j["step"].is_number() &&
        j["step"].get<int64_t>() <= step)
      kept += line + "\n";
    at = end + 1;
  }
  return kept;
}

}  // namespace

StepLines::StepLines(std::string path, int64_t resumed_step) : path_(std::move(path)) {
  drop_after(resumed_step);
}

StepLines::~StepLines() {
  if (fd_ >= 0) close(fd_);
}

void StepLines::drop_after(int64_t step) {
  if (!exists(path_)) return;
  if (fd_ >= 0) close(fd_);  // the rewrite puts another file under the name
  fd_ = -1;
  const std::string before = read_file(path_, kMaxMetricsBytes);
  const std::string kept = lines_up_to(before, step);
  if (kept != before) write_file_atomic(path_, kept);
}

void StepLines::append(const std::string& line) {
  if (fd_ < 0) {
    fd_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    check(fd_ >= 0, "{}: cannot open for writing ({}); choose another --out", path_,
          std::strerror(errno));
  }
  const std::string text = line + "\n";
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = ::write(fd_, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    check(n > 0, "{}: cannot write ({}); free some space and start again, the run resumes", path_,
          std::strerror(errno));
    done += size_t(n);
  }
}

MetricsFile::MetricsFile(const std::string& run_dir, int64_t resumed_step)
    : metrics_(run_dir + "/metrics.jsonl", resumed_step),
      layers_(run_dir + "/layers.jsonl", resumed_step),
      samples_(run_dir + "/samples.jsonl", resumed_step) {}

void MetricsFile::rolled_back(int64_t step) {
  for (StepLines* lines : {&metrics_, &layers_, &samples_}) lines->drop_after(step);
}

void MetricsFile::logged(const StepMetrics& m) {
  ordered_json j;
  j["step"] = m.step;
  j["tokens"] = m.tokens;
  j["loss"] = number(m.loss);
  j["grad_norm"] = number(m.grad_norm);
  j["lr"] = m.lr;
  j["step_ms"] = m.step_ms;
  j["tokens_per_s"] = m.tokens_per_s;
  j["mfu"] = m.mfu >= 0 ? ordered_json(m.mfu) : ordered_json();
  j["memory_gib"] = m.memory_gib;
  j["eta_s"] = m.eta_s;
  j["skipped"] = m.skipped;
  if (m.spikes >= 0) {
    j["spikes"] = m.spikes;
    j["loss_z"] = number(m.loss_z);
  }
  metrics_.append(j.dump());
}

void MetricsFile::evaluated(const EvalMetrics& m) {
  ordered_json j;
  j["step"] = m.step;
  j["valid_loss"] = number(m.valid_loss);
  j["valid_ppl"] = number(std::exp(m.valid_loss));
  j["valid_tokens"] = m.valid_tokens;
  metrics_.append(j.dump());
}

void MetricsFile::layers(const LayerMetrics& m) {
  const auto numbers = [](const std::vector<double>& values) {
    ordered_json all = ordered_json::array();
    for (double v : values) all.push_back(number(v));
    return all;
  };
  ordered_json j;
  j["step"] = m.step;
  j["embedding_grad_norm"] = number(m.embedding_grad_norm);
  j["grad_norm"] = numbers(m.grad_norm);
  j["head_grad_norm"] = number(m.head_grad_norm);
  j["forget_gate"] = numbers(m.forget_gate);
  layers_.append(j.dump());
}

void MetricsFile::sampled(const TextSample& s) {
  ordered_json j;
  j["step"] = s.step;
  j["prompt"] = s.prompt;
  j["text"] = s.text;
  // Bytes that are not UTF-8 become U+FFFD.
  samples_.append(j.dump(-1, ' ', false, ordered_json::error_handler_t::replace));
}

void set_metrics_aside(const std::string& run_dir, const std::string& suffix) {
  for (const char* name : {"metrics.jsonl", "layers.jsonl", "samples.jsonl"})
    if (const std::string path = run_dir + "/" + name; exists(path))
      rename_path(path, path + suffix);
  set_event_files_aside(run_dir, run_dir + "/events" + suffix);
}

std::string log_line(const StepMetrics& m) {
  std::string line =
      fmt::format("step {:>{}}/{}  loss {:.4f}  norm {:.3f}  lr {:.2e}  {:.0f} tok/s  {:.0f} ms",
                  m.step, std::to_string(m.steps).size(), m.steps, m.loss, m.grad_norm, m.lr,
                  m.tokens_per_s, m.step_ms);
  if (m.mfu >= 0) line += fmt::format("  mfu {:.1f}%", 100 * m.mfu);
  if (m.skipped > 0) line += fmt::format("  skipped {}", m.skipped);
  if (m.spikes > 0) line += fmt::format("  spikes {}", m.spikes);
  return line + "  eta " + duration(m.eta_s);
}

}  // namespace hgrn

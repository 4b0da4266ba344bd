#include "train/metrics.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "core/check.h"
#include "core/file.h"

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

MetricsFile::MetricsFile(const std::string& run_dir, int64_t resumed_step)
    : path_(run_dir + "/metrics.jsonl") {
  if (exists(path_)) {
    const std::string before = read_file(path_, kMaxMetricsBytes);
    const std::string kept = lines_up_to(before, resumed_step);
    if (kept != before) write_file_atomic(path_, kept);
  }
  fd_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  check(fd_ >= 0, "{}: cannot open for writing ({}); choose another --out", path_,
        std::strerror(errno));
}

MetricsFile::~MetricsFile() {
  close(fd_);
}

void MetricsFile::append(const std::string& line) {
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

void MetricsFile::write(const StepMetrics& m) {
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
  append(j.dump());
}

void MetricsFile::write(const EvalMetrics& m) {
  ordered_json j;
  j["step"] = m.step;
  j["valid_loss"] = number(m.valid_loss);
  j["valid_ppl"] = number(std::exp(m.valid_loss));
  j["valid_tokens"] = m.valid_tokens;
  append(j.dump());
}

std::string duration(double seconds) {
  const int64_t s = int64_t(std::llround(std::max(0.0, seconds)));
  if (s >= 3600) return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
  return fmt::format("{}:{:02}", s / 60, s % 60);
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

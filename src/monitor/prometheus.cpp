#include "monitor/prometheus.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>

#include "core/check.h"
#include "core/file.h"
#include "core/log.h"
#include "core/version.h"

namespace hgrn {
namespace {

using Clock = std::chrono::steady_clock;

double unix_now() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// A label's value in the exposition format.
std::string escaped(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '\\' || c == '"') out.push_back('\\');
    out += c == '\n' ? std::string("\\n") : std::string(1, c);
  }
  return out;
}

std::string number(double v) {
  if (std::isnan(v)) return "NaN";
  if (std::isinf(v)) return v > 0 ? "+Inf" : "-Inf";
  return fmt::format("{}", v);
}

std::string folder_of(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

}  // namespace

PrometheusFile::PrometheusFile(std::string path, std::string run, std::string device)
    : path_(std::move(path)), run_(std::move(run)), device_(std::move(device)) {
  const std::string folder = folder_of(path_);
  check(is_folder(folder) && ::access(folder.c_str(), W_OK) == 0 && !is_folder(path_), Exit::usage,
        "--prometheus {}: {} is not a folder that can be written; name a file in node_exporter's "
        "--collector.textfile.directory",
        path_, folder);
  if (!path_.ends_with(".prom"))
    log_warn("--prometheus {}: node_exporter reads only names that end in .prom", path_);
}

PrometheusFile::~PrometheusFile() {
  write(/*running=*/false);
}

void PrometheusFile::every_step(const StepMetrics& m) {
  step_ = m;
  if (Clock::now() - written_ >= std::chrono::seconds(1)) write(/*running=*/true);
}

void PrometheusFile::logged(const StepMetrics& m) {
  memory_gib_ = m.memory_gib;
}

void PrometheusFile::evaluated(const EvalMetrics& m) {
  eval_ = m;
}

std::string PrometheusFile::text(bool running, double unix_seconds) const {
  std::string out;
  const std::string run = fmt::format("run=\"{}\"", escaped(run_));
  const auto put = [&](const char* name, const char* type, const char* help, double v,
                       const std::string& more = "") {
    out += fmt::format("# HELP {} {}\n# TYPE {} {}\n{}{{{}{}}} {}\n", name, help, name, type, name,
                       run, more, number(v));
  };
  put("hgrn_train_info", "gauge", "Program and device of the run; always 1.", 1,
      fmt::format(",version=\"{}\",device=\"{}\"", escaped(version()), escaped(device_)));
  put("hgrn_train_running", "gauge", "1 while the run trains, 0 after it ended.", running);
  put("hgrn_train_updated_timestamp_seconds", "gauge", "Unix time at which this file was written.",
      std::floor(unix_seconds));
  if (step_) {
    const StepMetrics& m = *step_;
    put("hgrn_train_step", "gauge", "Steps done.", double(m.step));
    put("hgrn_train_steps_planned", "gauge", "Steps of the whole run, train.steps.",
        double(m.steps));
    put("hgrn_train_tokens_total", "counter", "Tokens seen.", double(m.tokens));
    put("hgrn_train_skipped_steps_total", "counter", "Steps whose update was left out.",
        double(m.skipped));
    if (m.spikes >= 0)
      put("hgrn_train_loss_spikes_total", "counter", "Loss spikes met.", double(m.spikes));
    put("hgrn_train_loss", "gauge", "Mean loss of the last step, nats a token.", m.loss);
    put("hgrn_train_grad_norm", "gauge", "Norm of the last gradient, before clipping.",
        m.grad_norm);
    put("hgrn_train_learning_rate", "gauge", "Learning rate of the last step.", m.lr);
    put("hgrn_train_step_duration_seconds", "gauge", "Time of the last step.", m.step_ms / 1e3);
    put("hgrn_train_tokens_per_second", "gauge", "Speed of the last step, all ranks together.",
        m.tokens_per_s);
    if (m.mfu >= 0)
      put("hgrn_train_mfu_ratio", "gauge", "Share of the device's dense peak.", m.mfu);
    put("hgrn_train_eta_seconds", "gauge", "Time to train.steps at this speed.", m.eta_s);
    if (memory_gib_ > 0)
      put("hgrn_train_memory_used_bytes", "gauge", "Device memory in use (CPU: the machine's).",
          memory_gib_ * double(1 << 30));
  }
  if (eval_) {
    put("hgrn_valid_loss", "gauge", "Last validation loss, nats a token.", eval_->valid_loss);
    put("hgrn_valid_step", "gauge", "Step of the last validation.", double(eval_->step));
  }
  if (gpu_.power_w >= 0)
    put("hgrn_gpu_power_watts", "gauge", "Power that rank 0's GPU draws.", gpu_.power_w);
  if (gpu_.temperature_c >= 0)
    put("hgrn_gpu_temperature_celsius", "gauge", "Temperature of rank 0's GPU.",
        gpu_.temperature_c);
  if (gpu_.utilization >= 0)
    put("hgrn_gpu_utilization_ratio", "gauge", "Share of time with a kernel on rank 0's GPU.",
        gpu_.utilization);
  return out;
}

// Without fsync, unlike checkpoints: after a crash of the machine nobody wants the old numbers. The
// temporary name does not end in .prom, so the collector never reads it.
void PrometheusFile::write(bool running) {
  written_ = Clock::now();
  const std::string temporary = fmt::format("{}.tmp-{}", path_, ::getpid());
  const std::string bytes = text(running, unix_now());
  const Fd fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  bool ok = bool(fd);
  for (size_t done = 0; ok && done < bytes.size();) {
    const ssize_t n = ::write(fd.get(), bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    ok = n > 0;
    done += ok ? size_t(n) : 0;
  }
  ok = ok && ::rename(temporary.c_str(), path_.c_str()) == 0;
  if (ok) {
    complained_ = false;
    return;
  }
  const int err = errno;
  ::unlink(temporary.c_str());
  if (!complained_)
    log_warn("--prometheus {}: cannot write ({}); tried again every second", path_,
             std::strerror(err));
  complained_ = true;
}

}  // namespace hgrn

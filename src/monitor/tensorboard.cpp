#include "monitor/tensorboard.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <vector>

#include "core/log.h"
#include "monitor/event_record.h"

namespace hgrn {
namespace {

namespace fs = std::filesystem;
constexpr std::string_view kPrefix = "events.out.tfevents.";

double unix_seconds() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

std::vector<std::string> event_files(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code ec;
  for (const auto& entry : fs::directory_iterator(folder, ec))
    if (const std::string name = entry.path().filename().string(); name.rfind(kPrefix, 0) == 0)
      names.push_back(name);
  return names;
}

// TensorBoard reads a folder's files in the order of their names, so the second in the name must
// lie behind those of all earlier files, whatever the clock says.
std::string new_name(const std::string& folder) {
  int64_t second = int64_t(unix_seconds());
  for (const std::string& name : event_files(folder))
    second = std::max(second, int64_t(std::atoll(name.c_str() + kPrefix.size())) + 1);
  char host[256] = "localhost";
  if (::gethostname(host, sizeof host - 1) != 0) std::strcpy(host, "localhost");
  return fmt::format("{}{:010}.{}.{}", kPrefix, second, host, ::getpid());
}

// In Markdown an indented block is shown as it is, whatever stands in it.
std::string as_code(std::string_view text) {
  std::string out = "    ";
  for (size_t i = 0; i < text.size(); ++i) {
    out.push_back(text[i]);
    if (text[i] == '\n' && i + 1 < text.size()) out += "    ";
  }
  return out;
}

}  // namespace

void set_event_files_aside(const std::string& run_dir, const std::string& to) {
  const std::vector<std::string> names = event_files(run_dir);
  if (names.empty()) return;
  make_dirs(to);
  for (const std::string& name : names) rename_path(run_dir + "/" + name, to + "/" + name);
}

TensorBoardFile::TensorBoardFile(const std::string& run_dir, int64_t resumed_step,
                                 const std::string& config_text)
    : path_(run_dir + "/" + new_name(run_dir)) {
  fd_ = Fd(::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  if (!fd_) {
    log_warn("{}: cannot open for writing ({}); the run goes on without TensorBoard", path_,
             std::strerror(errno));
    return;
  }
  append(version_event(unix_seconds()));
  rolled_back(resumed_step);
  SummaryBuilder values;
  values.text("config", as_code(config_text));
  write(resumed_step, values);
}

void TensorBoardFile::logged(const StepMetrics& m) {
  SummaryBuilder values;
  values.scalar("train/loss", m.loss)
      .scalar("train/grad_norm", m.grad_norm)
      .scalar("train/lr", m.lr)
      .scalar("train/tokens", double(m.tokens))
      .scalar("train/skipped", double(m.skipped))
      .scalar("speed/tokens_per_s", m.tokens_per_s)
      .scalar("speed/step_ms", m.step_ms)
      .scalar("memory/used_gib", m.memory_gib);
  if (m.mfu >= 0) values.scalar("speed/mfu", m.mfu);
  if (m.spikes >= 0) values.scalar("train/spikes", double(m.spikes));
  if (gpu_.power_w >= 0) values.scalar("gpu/power_w", gpu_.power_w);
  if (gpu_.temperature_c >= 0) values.scalar("gpu/temperature_c", gpu_.temperature_c);
  if (gpu_.utilization >= 0) values.scalar("gpu/utilization", gpu_.utilization);
  write(m.step, values);
}

void TensorBoardFile::evaluated(const EvalMetrics& m) {
  SummaryBuilder values;
  values.scalar("valid/loss", m.valid_loss).scalar("valid/ppl", std::exp(m.valid_loss));
  write(m.step, values);
}

void TensorBoardFile::layers(const LayerMetrics& m) {
  SummaryBuilder values;
  // Equal widths, so that TensorBoard's order of names is the order of layers.
  const size_t width = std::to_string(m.grad_norm.empty() ? 0 : m.grad_norm.size() - 1).size();
  values.scalar("grad_norm/embedding", m.embedding_grad_norm);
  for (size_t l = 0; l < m.grad_norm.size(); ++l)
    values.scalar(fmt::format("grad_norm/layer_{:0{}}", l, width), m.grad_norm[l]);
  values.scalar("grad_norm/head", m.head_grad_norm);
  for (size_t l = 0; l < m.forget_gate.size(); ++l)
    if (!std::isnan(m.forget_gate[l]))
      values.scalar(fmt::format("forget_gate/layer_{:0{}}", l, width), m.forget_gate[l]);
  write(m.step, values);
}

void TensorBoardFile::sampled(const TextSample& s) {
  SummaryBuilder values;
  values.text("sample", as_code(s.prompt + s.text));
  write(s.step, values);
}

void TensorBoardFile::rolled_back(int64_t step) {
  append(restart_event(unix_seconds(), step + 1));
}

void TensorBoardFile::write(int64_t step, const SummaryBuilder& values) {
  append(summary_event(unix_seconds(), step, values));
}

// One write for one record, at once: a kill loses nothing that was told. A record that does not
// fit the disk is taken back, so that readers never meet half of one.
void TensorBoardFile::append(std::string_view event) {
  if (!fd_) return;
  const std::string record = tf_record(event);
  size_t done = 0;
  while (done < record.size()) {
    const ssize_t n = ::write(fd_.get(), record.data() + done, record.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    done += size_t(n);
  }
  if (done == record.size()) {
    size_ += done;
    return;
  }
  const int err = errno;
  if (::ftruncate(fd_.get(), off_t(size_)) != 0 || ::lseek(fd_.get(), off_t(size_), SEEK_SET) < 0)
    fd_.reset();
  if (!complained_)
    log_warn("{}: cannot write ({}); events are left out until it can be written again", path_,
             std::strerror(err));
  complained_ = true;
}

}  // namespace hgrn

#include "monitor/live_view.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "core/log.h"

namespace hgrn {
namespace {

constexpr size_t kMaxMeans = 4096;
constexpr double kGiB = double(1 << 30);

class Painter {
 public:
  explicit Painter(const ViewStyle& s) : style_(s) {}
  std::string dim(const std::string& text) const { return in("2", text); }
  std::string bold(const std::string& text) const { return in("1", text); }
  std::string warn(const std::string& text) const { return in("33", text); }

  std::string bar(double share, int columns) const {
    const int full = int(std::clamp(share, 0.0, 1.0) * columns);
    std::string done, rest;
    for (int i = 0; i < columns; ++i)
      (i < full ? done : rest) += style_.utf8 ? "━" : i < full ? "#" : "-";
    // Without colours the two parts must differ in shape.
    if (style_.utf8 && !style_.colour) {
      rest.clear();
      for (int i = full; i < columns; ++i) rest += "─";
    }
    return in("32", done) + in("2", rest);
  }
  std::string curve(const std::vector<int>& levels) const {
    return in("36", sparkline(levels, style_.utf8));
  }
  std::string degrees() const { return style_.utf8 ? " °C" : " C"; }

 private:
  std::string in(const char* code, const std::string& text) const {
    if (!style_.colour || text.empty()) return text;
    return fmt::format("\x1b[{}m{}\x1b[0m", code, text);
  }
  const ViewStyle& style_;
};

// Parts of a line, two spaces apart; what does not fit at the end is left out. One part may
// stretch.
class Line {
 public:
  explicit Line(int columns) : columns_(columns) {}
  void add(const std::string& part) {
    if (!part.empty()) parts_.push_back(part);
  }
  // The last of the parts behind it give way where it has not its least width.
  template <class Draw>  // draw(columns)
  void stretch(int least, int most, const Draw& draw, std::vector<std::string> after) {
    std::erase(after, "");
    const auto room = [&] {
      int used = width();
      for (const std::string& part : after) used += 2 + display_width(part);
      return std::min(most, columns_ - used - 2);
    };
    while (room() < least && !after.empty()) after.pop_back();
    if (room() >= least) add(draw(room()));
    for (const std::string& part : after) add(part);
  }
  std::string str() const {
    std::string out;
    int used = 0;
    for (const std::string& part : parts_) {
      const int needed = display_width(part) + (out.empty() ? 0 : 2);
      if (used + needed > columns_ && !out.empty()) break;
      if (!out.empty()) out += "  ";
      out += part;
      used += needed;
    }
    return cut_to(out, columns_);
  }

 private:
  int width() const {
    int used = 0;
    for (const std::string& part : parts_) used += display_width(part) + (used ? 2 : 0);
    return used;
  }
  const int columns_;
  std::vector<std::string> parts_;
};

std::string progress_line(const ViewState& s, const Painter& p, int columns) {
  const double share = s.step.steps > 0 ? double(s.step.step) / double(s.step.steps) : 0;
  Line line(columns);
  line.add(p.bold(cut_to(s.run, 24)));
  line.stretch(
      8, 40, [&](int room) { return p.bar(share, room); },
      {fmt::format("{:.1f}%", 100 * share), fmt::format("step {}/{}", s.step.step, s.step.steps),
       s.step.step > 0 ? "eta " + p.bold(duration(s.step.eta_s)) : "",
       s.phase.empty() ? "" : p.warn(s.phase), p.dim("elapsed " + duration(s.elapsed_s))});
  return line.str();
}

std::string loss_line(const ViewState& s, const Painter& p, int columns) {
  Line line(columns);
  line.add("loss " + p.bold(fmt::format("{:.4f}", s.step.loss)));
  std::vector<std::string> after;
  after.push_back(fmt::format("norm {:.3f}", s.step.grad_norm));
  if (s.eval.step > 0)
    after.push_back(fmt::format("valid {} {}", p.bold(fmt::format("{:.4f}", s.eval.valid_loss)),
                                p.dim(fmt::format("at {}", s.eval.step))));
  if (s.step.skipped > 0) after.push_back(p.warn(fmt::format("skipped {}", s.step.skipped)));
  if (s.step.spikes > 0) after.push_back(p.warn(fmt::format("spikes {}", s.step.spikes)));
  after.push_back(fmt::format("lr {:.2e}", s.step.lr));
  line.stretch(
      4, 40, [&](int room) { return p.curve(s.losses.levels(room)); }, after);
  return line.str();
}

std::string speed_line(const ViewState& s, const Painter& p, int columns) {
  Line line(columns);
  line.add(p.bold(short_count(s.step.tokens_per_s)) + " tok/s");
  line.add(fmt::format("{:.{}f} ms/step", s.step.step_ms, s.step.step_ms < 10 ? 1 : 0));
  if (s.step.mfu >= 0) line.add(fmt::format("mfu {:.1f}%", 100 * s.step.mfu));
  line.add(short_count(double(s.step.tokens)) + " tokens");
  if (s.gpu.memory_used < 0 && s.step.memory_gib > 0)
    line.add(fmt::format("memory {:.1f} GiB", s.step.memory_gib));
  line.add(p.dim(s.device));
  return line.str();
}

std::string gpu_line(const GpuStatus& g, const Painter& p, int columns) {
  Line line(columns);
  line.add("gpu");
  if (g.memory_used >= 0)
    line.add(fmt::format("memory {:.1f}/{:.1f} GiB", g.memory_used / kGiB, g.memory_total / kGiB));
  if (g.power_w >= 0)
    line.add(g.power_limit_w > 0 ? fmt::format("{:.0f}/{:.0f} W", g.power_w, g.power_limit_w)
                                 : fmt::format("{:.0f} W", g.power_w));
  if (g.temperature_c >= 0) line.add(fmt::format("{:.0f}{}", g.temperature_c, p.degrees()));
  if (g.utilization >= 0) line.add(fmt::format("{:.0f}% busy", 100 * g.utilization));
  return line.str();
}

}  // namespace

std::string sparkline(const std::vector<int>& levels, bool utf8) {
  static constexpr const char* kBlocks[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  static constexpr const char* kAscii[] = {"_", ".", "-", "~", "=", "+", "*", "#"};
  std::string out;
  for (int level : levels) out += (utf8 ? kBlocks : kAscii)[level];
  return out;
}

void Curve::add(double v) {
  if (!std::isfinite(v)) return;
  sum_ += v;
  if (++count_ < per_mean_) return;
  means_.push_back(sum_ / double(count_));
  sum_ = 0;
  count_ = 0;
  if (means_.size() < kMaxMeans) return;
  for (size_t i = 0; i < means_.size() / 2; ++i)
    means_[i] = (means_[2 * i] + means_[2 * i + 1]) / 2;
  means_.resize(means_.size() / 2);
  per_mean_ *= 2;
}

std::vector<int> Curve::levels(int columns) const {
  const size_t first = means_.size() / 2, n = means_.size() - first;
  if (n < 2 || columns < 1) return {};
  const size_t shown = std::min(n, size_t(columns));
  std::vector<double> column(shown);
  for (size_t c = 0; c < shown; ++c) {
    const size_t from = first + c * n / shown, to = first + (c + 1) * n / shown;
    double sum = 0;
    for (size_t i = from; i < to; ++i) sum += means_[i];
    column[c] = sum / double(to - from);
  }
  const auto [low, high] = std::minmax_element(column.begin(), column.end());
  const double span = *high - *low, least = *low;
  std::vector<int> out;
  for (double v : column) out.push_back(span > 0 ? std::min(7, int((v - least) / span * 8)) : 0);
  return out;
}

std::vector<std::string> render(const ViewState& s, const ViewStyle& style) {
  const int columns = std::max(1, style.columns - 1);
  const Painter p(style);
  std::vector<std::string> lines = {progress_line(s, p, columns)};
  if (s.step.step > 0) {
    lines.push_back(loss_line(s, p, columns));
    lines.push_back(speed_line(s, p, columns));
  }
  if (s.gpu.memory_used >= 0 || s.gpu.power_w >= 0) lines.push_back(gpu_line(s.gpu, p, columns));
  return lines;
}

LiveView::LiveView(std::string run, std::string device) {
  state_.run = std::move(run);
  state_.device = std::move(device);
}

LiveView::~LiveView() {
  log_status({});
}

void LiveView::every_step(const StepMetrics& m) {
  const double memory = state_.step.memory_gib, flops_share = m.mfu;
  state_.step = m;
  state_.step.memory_gib = memory;
  state_.losses.add(m.loss);
  state_.phase.clear();
  constexpr double kKeep = 0.9;  // a window of about ten steps
  step_s_ = step_s_ == 0 ? m.step_ms / 1e3 : kKeep * step_s_ + (1 - kKeep) * m.step_ms / 1e3;
  if (step_s_ > 0) {
    const double ratio = m.step_ms / 1e3 / step_s_;
    state_.step.step_ms = 1e3 * step_s_;
    state_.step.tokens_per_s = m.tokens_per_s * ratio;
    state_.step.mfu = flops_share >= 0 ? flops_share * ratio : flops_share;
    state_.step.eta_s = double(m.steps - m.step) * step_s_;
  }
  if (Clock::now() - drawn_ >= std::chrono::milliseconds(100)) draw();
}

void LiveView::logged(const StepMetrics& m) {
  state_.step.memory_gib = m.memory_gib;
}

void LiveView::evaluated(const EvalMetrics& m) {
  state_.eval = m;
}

void LiveView::phase(std::string_view name) {
  state_.phase = name;
  draw();
}

void LiveView::draw() {
  drawn_ = Clock::now();
  state_.elapsed_s = std::chrono::duration<double>(drawn_ - started_).count();
  log_status(
      render(state_, {terminal_size(STDERR_FILENO).columns, terminal_colour(), terminal_utf8()}));
}

}  // namespace hgrn

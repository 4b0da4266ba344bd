#include "core/log.h"

#include <spdlog/sinks/base_sink.h>
#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <mutex>

#include "core/check.h"

namespace hgrn {
namespace {

// A terminal: colours, and a block of status lines below the log. The cursor rests at the start of
// the line under the block, so whatever ends the program leaves the terminal in order.
class TerminalSink final : public spdlog::sinks::base_sink<std::mutex> {
 public:
  void status(std::vector<std::string> lines) {
    const std::lock_guard<std::mutex> lock(mutex_);
    status_ = std::move(lines);
    redraw("");
  }

 protected:
  void sink_it_(const spdlog::details::log_msg& msg) override {
    spdlog::memory_buf_t buffer;
    formatter_->format(msg, buffer);
    std::string line(buffer.data(), buffer.size());
    const char* colour = msg.level >= spdlog::level::err    ? "\x1b[31m"
                         : msg.level >= spdlog::level::warn ? "\x1b[33m"
                                                            : nullptr;
    if (colour && terminal_colour() && msg.color_range_end > msg.color_range_start)
      line.insert(msg.color_range_end, "\x1b[0m").insert(msg.color_range_start, colour);
    redraw(line);
  }
  void flush_() override { std::fflush(stderr); }

 private:
  void redraw(const std::string& above) {
    std::string text = erased() + above;
    text += drawn();
    std::fwrite(text.data(), 1, text.size(), stderr);
    std::fflush(stderr);
  }
  // A terminal that became narrower has wrapped what was drawn.
  std::string erased() {
    if (widths_.empty()) return {};
    const int columns = terminal_size(STDERR_FILENO).columns;
    int rows = 0;
    for (int width : widths_) rows += std::max(1, (width + columns - 1) / columns);
    widths_.clear();
    return fmt::format("\r\x1b[{}A\x1b[J", rows);
  }
  std::string drawn() {
    if (status_.empty() || ::tcgetpgrp(STDERR_FILENO) != ::getpgrp()) return {};
    const TerminalSize size = terminal_size(STDERR_FILENO);
    std::string out;
    for (const std::string& line : status_) {
      if (int(widths_.size()) + 1 >= size.rows) break;
      const std::string shown = cut_to(line, size.columns - 1);
      widths_.push_back(display_width(shown));
      out += shown + "\n";
    }
    return out;
  }
  std::vector<std::string> status_;
  std::vector<int> widths_;  // of the lines that are on the terminal now
};

// Null where stderr is no terminal that moves its cursor.
const std::shared_ptr<TerminalSink>& terminal() {
  static const std::shared_ptr<TerminalSink> sink =
      terminal_moves() ? std::make_shared<TerminalSink>() : nullptr;
  return sink;
}

spdlog::logger& logger() {
  static std::shared_ptr<spdlog::logger> instance = [] {
    spdlog::sink_ptr sink = terminal();
    if (!sink) sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
    auto l = std::make_shared<spdlog::logger>("hgrn", std::move(sink));
    l->set_pattern("%H:%M:%S %^%v%$");
    l->flush_on(spdlog::level::info);
    return l;
  }();
  return *instance;
}

spdlog::level::level_enum level_of(LogLevel level) {
  switch (level) {
    case LogLevel::debug: return spdlog::level::debug;
    case LogLevel::info: return spdlog::level::info;
    case LogLevel::warn: return spdlog::level::warn;
    case LogLevel::error: return spdlog::level::err;
  }
  return spdlog::level::info;
}

}  // namespace

void log_init(int rank, int world_size, bool prefixed) {
  logger().set_level(rank == 0 ? spdlog::level::info : spdlog::level::warn);
  if (world_size > 1 && !prefixed)
    logger().set_pattern(fmt::format("%H:%M:%S [rank {}] %^%v%$", rank));
}

void log_to_file(const std::string& path) {
  try {
    auto sink = std::make_shared<spdlog::sinks::basic_file_sink_mt>(path, /*truncate=*/false);
    sink->set_pattern("%Y-%m-%dT%H:%M:%S%z %l %v");
    logger().sinks().push_back(std::move(sink));
  } catch (const spdlog::spdlog_ex& e) {
    fail(Exit::failed, "{}: cannot write the log ({}); choose another --out", path, e.what());
  }
}

void log_message(LogLevel level, std::string_view text) {
  logger().log(level_of(level), "{}", text);
}

void log_to_file_only(std::string_view text) {
  if (!logger().should_log(spdlog::level::info)) return;
  const spdlog::details::log_msg msg(logger().name(), spdlog::level::info,
                                     spdlog::string_view_t(text.data(), text.size()));
  const auto& sinks = logger().sinks();
  for (size_t i = 1; i < sinks.size(); ++i) {  // the first is stderr
    sinks[i]->log(msg);
    sinks[i]->flush();
  }
}

void log_status(std::vector<std::string> lines) {
  if (terminal()) terminal()->status(std::move(lines));
}

void log_flush() {
  logger().flush();
}

}  // namespace hgrn

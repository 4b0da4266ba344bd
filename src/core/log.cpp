#include "core/log.h"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <cstdlib>

#include "core/check.h"

namespace hgrn {
namespace {

bool use_colour() {
  const char* no_colour = std::getenv("NO_COLOR");
  return stderr_is_terminal() && !(no_colour && *no_colour);
}

spdlog::logger& logger() {
  static std::shared_ptr<spdlog::logger> instance = [] {
    auto sink = std::make_shared<spdlog::sinks::stderr_color_sink_mt>(
        use_colour() ? spdlog::color_mode::always : spdlog::color_mode::never);
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

bool stderr_is_terminal() {
  return isatty(STDERR_FILENO) == 1;
}

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

void log_flush() {
  logger().flush();
}

}  // namespace hgrn

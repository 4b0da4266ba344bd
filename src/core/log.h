// The log: stderr, and a file once log_to_file() was called. stdout carries results only.
#pragma once
#include <fmt/core.h>

#include <string>
#include <string_view>
#include <vector>

#include "core/terminal.h"

namespace hgrn {

enum class LogLevel { debug, info, warn, error };

// Rank 0 logs from `info` on, the others from `warn` on, with their rank in front unless
// `prefixed`: then the launcher writes it.
void log_init(int rank, int world_size, bool prefixed = false);
void log_to_file(const std::string& path);
void log_message(LogLevel level, std::string_view text);
void log_to_file_only(std::string_view text);  // as info, but not on stderr
void log_flush();

// Lines that stay below the log on a terminal: log lines go above them. Only where
// terminal_moves(); while another job has the terminal they are not drawn. No lines: taken away.
void log_status(std::vector<std::string> lines);

template <class... Args>
void log_info(fmt::format_string<Args...> text, Args&&... args) {
  log_message(LogLevel::info, fmt::format(text, std::forward<Args>(args)...));
}
template <class... Args>
void log_warn(fmt::format_string<Args...> text, Args&&... args) {
  log_message(LogLevel::warn, fmt::format(text, std::forward<Args>(args)...));
}

}  // namespace hgrn

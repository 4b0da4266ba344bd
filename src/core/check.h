// Errors: one exception type. Its text says what is wrong, where, and how to mend it; its code is
// the exit code of the program. Nothing below main() prints an error or exits.
#pragma once
#include <fmt/core.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace hgrn {

// Exit codes of the program; README.md lists them for users.
enum class Exit : int {
  ok = 0,
  failed = 1,     // failed while running
  usage = 2,      // wrong usage, flag or config
  data = 3,       // a file is missing, damaged or does not match
  nonfinite = 4,  // non-finite loss or gradient, and the policy is to abort
  stopped = 75,   // stopped by a signal after saving: run again to go on
};

class Error : public std::runtime_error {
 public:
  Error(Exit code, const std::string& what) : std::runtime_error(what), code_(code) {}
  Exit code() const { return code_; }

 private:
  Exit code_;
};

template <class... Args>
[[noreturn]] void fail(Exit code, fmt::format_string<Args...> text, Args&&... args) {
  throw Error(code, fmt::format(text, std::forward<Args>(args)...));
}

// check(ok, Exit::data, "what {}, do this", x): the text is only built when the check fails.
template <class... Args>
void check(bool ok, Exit code, fmt::format_string<Args...> text, Args&&... args) {
  if (!ok) [[unlikely]]
    throw Error(code, fmt::format(text, std::forward<Args>(args)...));
}

// For a caller's mistake inside the program (a wrong shape handed to an operation): Exit::failed.
template <class... Args>
void check(bool ok, fmt::format_string<Args...> text, Args&&... args) {
  if (!ok) [[unlikely]]
    throw Error(Exit::failed, fmt::format(text, std::forward<Args>(args)...));
}

}  // namespace hgrn

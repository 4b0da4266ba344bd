// Tests of what the environment switches.
#pragma once
#include <cstdlib>
#include <optional>
#include <string>

namespace hgrn::test {

// A variable of the environment has this value while it lives (nullptr: is not set), and then what
// it had before.
class EnvSetting {
 public:
  EnvSetting(const char* name, const char* value) : name_(name) {
    if (const char* const before = std::getenv(name)) before_ = before;
    put(value);
  }
  ~EnvSetting() { put(before_ ? before_->c_str() : nullptr); }
  EnvSetting(const EnvSetting&) = delete;
  EnvSetting& operator=(const EnvSetting&) = delete;

 private:
  void put(const char* value) {
    if (value)
      ::setenv(name_, value, 1);
    else
      ::unsetenv(name_);
  }
  const char* name_;
  std::optional<std::string> before_;
};

}  // namespace hgrn::test

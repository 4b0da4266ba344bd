#include "monitor/records.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace hgrn {

std::string duration(double seconds) {
  if (!std::isfinite(seconds)) return "?";
  const int64_t s = int64_t(std::llround(std::clamp(seconds, 0.0, 1e12)));
  if (s >= 3600) return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
  return fmt::format("{}:{:02}", s / 60, s % 60);
}

}  // namespace hgrn

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

std::string short_count(double v) {
  if (!std::isfinite(v)) return "-";
  constexpr const char* kUnits[] = {"", "k", "M", "G", "T"};
  int unit = 0;
  while (std::abs(v) >= 999.5 && unit < 4) v /= 1000, ++unit;
  if (unit == 0) return fmt::format("{:.0f}", v);
  return fmt::format("{:.{}f}{}", v, v < 9.995 ? 2 : v < 99.95 ? 1 : 0, kUnits[unit]);
}

}  // namespace hgrn

#include "report/curves.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace hgrn {

std::vector<size_t> group_ends(size_t size, size_t points) {
  std::vector<size_t> ends;
  const size_t count = std::min(size, points);
  for (size_t i = 1; i <= count; ++i) ends.push_back(size * i / count - 1);
  return ends;
}

Grouped grouped(const std::vector<double>& values, const std::vector<size_t>& ends) {
  Grouped g;
  size_t i = 0;
  for (const size_t end : ends) {
    double sum = 0, least = INFINITY, largest = -INFINITY;
    int64_t n = 0;
    for (; i <= end; ++i) {
      if (!std::isfinite(values[i])) continue;
      sum += values[i];
      least = std::min(least, values[i]);
      largest = std::max(largest, values[i]);
      ++n;
    }
    g.mean.push_back(n > 0 ? sum / double(n) : NAN);
    g.least.push_back(n > 0 ? least : NAN);
    g.largest.push_back(n > 0 ? largest : NAN);
  }
  return g;
}

std::vector<double> at_ends(const std::vector<double>& values, const std::vector<size_t>& ends) {
  std::vector<double> out;
  for (const size_t end : ends) out.push_back(values[end]);
  return out;
}

}  // namespace hgrn

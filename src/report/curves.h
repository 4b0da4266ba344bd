// Long columns made short without losing an extreme: neighbours become one point of mean, least and
// largest.
#pragma once
#include <cstddef>
#include <vector>

namespace hgrn {

// The last index of each of at most `points` groups, equal in size but for rounding.
std::vector<size_t> group_ends(size_t size, size_t points);

struct Grouped {
  std::vector<double> mean, least, largest;  // NaN where no value of the group is finite
};
Grouped grouped(const std::vector<double>& values, const std::vector<size_t>& ends);
std::vector<double> at_ends(const std::vector<double>& values, const std::vector<size_t>& ends);

}  // namespace hgrn

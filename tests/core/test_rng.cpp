#include <cmath>
#include <vector>

#include "catch.h"
#include "core/rng.h"

using namespace hgrn;

namespace {

bool same(const Philox& a, const Philox& b) {
  for (int i = 0; i < 4; ++i)
    if (a.v[i] != b.v[i]) return false;
  return true;
}

}  // namespace

// The known answers that the generator's authors publish with it.
TEST_CASE("philox: ten rounds and seven give the published numbers", "[core]") {
  const uint64_t ones = ~uint64_t(0);
  CHECK(same(philox(0, 0, 0), {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}));
  CHECK(same(philox(ones, ones, ones), {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}));
  // Digits of pi, a word each: no two words may be swapped.
  const uint64_t key = 0x299f31d0a4093822, high = 0x0370734413198a2e, low = 0x85a308d3243f6a88;
  CHECK(same(philox(key, high, low), {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}));
  CHECK(same(philox<kDropoutRounds>(key, high, low),
             {{0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}}));
  CHECK(same(philox<kDropoutRounds>(0, 0, 0), {{0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}}));
  CHECK(same(philox<kDropoutRounds>(ones, ones, ones),
             {{0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}}));
}

// 2^20 elements: means of keeps and of neighbours that are both kept, over columns and over rows,
// within five standard deviations of as many draws that have nothing to do with each other.
TEST_CASE("dropout: what is kept is as often as asked, and apart from its neighbours", "[core]") {
  const Dropout drop{0.1f, 42, 7, 1, 0};
  const int64_t rows = 1024, columns = 1024;
  std::vector<bool> kept;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) kept.push_back(drop.factor(drop.key(), r, c) != 0);
  const double p = 1 - double(drop.threshold()) / 65536;
  const auto near = [](double count, double n, double share) {
    return std::abs(count - n * share) < 5 * std::sqrt(n * share * (1 - share));
  };
  double all = 0, across = 0, down = 0;
  for (int64_t i = 0; i < rows * columns; ++i) {
    const size_t at = size_t(i);
    all += kept[at];
    if (i % columns + 1 < columns) across += kept[at] && kept[at + 1];
    if (i / columns + 1 < rows) down += kept[at] && kept[at + size_t(columns)];
  }
  CHECK(near(all, double(rows * columns), p));
  CHECK(near(across, double(rows * (columns - 1)), p * p));
  CHECK(near(down, double((rows - 1) * columns), p * p));
}

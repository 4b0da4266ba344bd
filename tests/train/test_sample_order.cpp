#include "train/sample_order.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <numbers>
#include <set>

#include "catch.h"
#include "core/file.h"
#include "core/rng.h"
#include "text/shard_files.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

std::vector<uint64_t> listed(uint64_t n, uint64_t key) {
  const Permutation permutation(n, key);
  std::vector<uint64_t> values;
  for (uint64_t i = 0; i < n; ++i) values.push_back(permutation(i));
  return values;
}

}  // namespace

TEST_CASE("a permutation is a bijection for every size", "[train]") {
  std::vector<uint64_t> sizes = {1000, 1023, 1024, 1025, 4096, 4097, 65'537, 100'000};
  for (uint64_t n = 1; n <= 130; ++n) sizes.push_back(n);
  for (uint64_t n : sizes)
    for (uint64_t key : {uint64_t(0), uint64_t(1), uint64_t(0xdeadbeefcafe)}) {
      std::vector<bool> seen(n, false);
      for (uint64_t value : listed(n, key)) {
        REQUIRE(value < n);
        REQUIRE_FALSE(seen[value]);
        seen[value] = true;
      }
    }
}

TEST_CASE("a permutation of a huge set stays inside it and does not repeat", "[train]") {
  const uint64_t n = (uint64_t(1) << 40) + 3;
  const Permutation permutation(n, 5);
  std::set<uint64_t> seen;
  for (uint64_t i = 0; i < 20'000; ++i) seen.insert(permutation(n - 1 - i));
  CHECK(seen.size() == 20'000);
  CHECK(*seen.rbegin() < n);
}

TEST_CASE("keys give different permutations, and all of a small set's occur about as often",
          "[train]") {
  CHECK(listed(1000, 1) != listed(1000, 2));
  std::map<std::vector<uint64_t>, int> occurred;
  constexpr int kDraws = 24'000;
  for (uint64_t key = 0; key < kDraws; ++key) ++occurred[listed(4, mix64(key))];
  CHECK(occurred.size() == 24);
  // A network of 6 rounds on 4 bits' worth of functions is not uniform, but nearly: within a third.
  for (const auto& [order, times] : occurred) CHECK(std::abs(times - kDraws / 24) < kDraws / 72);
}

TEST_CASE("neighbours do not stay neighbours", "[train]") {
  const std::vector<uint64_t> order = listed(10'000, 7);
  int close = 0;
  double sum_product = 0;
  for (size_t i = 0; i + 1 < order.size(); ++i) {
    close += std::abs(double(order[i]) - double(order[i + 1])) <= 10;
    sum_product += (double(order[i]) - 4999.5) * (double(order[i + 1]) - 4999.5);
  }
  // By chance 20 of 9,999 pairs would be that close; the correlation's deviation is 0.01.
  CHECK(close < 50);
  CHECK(std::abs(sum_product / 9999 / (10'000.0 * 10'000 / 12)) < 0.04);
}

TEST_CASE("a mixture is within one sample of its shares at every prefix", "[train]") {
  std::vector<std::vector<double>> cases = {
      {1},
      {1, 1},
      {0.7, 0.2, 0.1},
      {3, 1},
      {1, 1, 1, 1, 1, 1, 1},
      {5, 1e-3, 2},
      {std::numbers::pi, std::numbers::e},
      {1, 1000},
      {0.5, 0.3, 0.1, 0.1},
      {1e300, 2e300},
      {1e-9, 1},
      {10, 1, 1, 1, 1, 1, 1, 1, 1, 1},
  };
  std::vector<double> random;
  for (uint64_t i = 0; i < 12; ++i) random.push_back(0.01 + uniform01(uint32_t(mix64(i))));
  cases.push_back(random);
  for (const std::vector<double>& weights : cases) {
    const Mixture mixture(weights);
    const int K = int(weights.size());
    double sum = 0;
    for (double w : weights) sum += w;
    std::vector<double> share;
    for (int k = 0; k < K; ++k) {
      share.push_back(double(mixture.quota(k)) / double(mixture.period()));
      CHECK(std::abs(share.back() - weights[size_t(k)] / sum) <= 1.0 / Mixture::kMaxPeriod);
    }
    std::vector<int64_t> dealt(weights.size(), 0);
    double worst = 0;
    const int64_t n = std::min<int64_t>(2 * mixture.period() + 1000, 300'000);
    for (int64_t g = 0; g < n; ++g) {
      const Mixture::Pick pick = mixture.pick(g);
      REQUIRE(pick.index == dealt[size_t(pick.source)]);
      ++dealt[size_t(pick.source)];
      for (int k = 0; k < K; ++k)
        worst =
            std::max(worst, std::abs(double(dealt[size_t(k)]) - double(g + 1) * share[size_t(k)]));
    }
    INFO("sources " << K << " period " << mixture.period() << " worst " << worst);
    CHECK(worst < 1);
  }
}

TEST_CASE("a mixture's integer shares are exact where the weights allow it", "[train]") {
  const std::vector<double> weights = {0.7, 0.2, 0.1};
  const Mixture mixture(weights);
  CHECK(mixture.period() == 10);
  CHECK(mixture.quota(0) == 7);
  // Far out, where any drift would show.
  const int64_t g = int64_t(1) << 50;
  int64_t dealt = 0;
  for (int64_t i = 0; i < 10; ++i) dealt += mixture.pick(g + i).source == 1;
  CHECK(dealt == 2);
  CHECK(std::abs(double(mixture.pick(g).index) /
                     (double(g) * weights[size_t(mixture.pick(g).source)]) -
                 1) < 1e-12);
  const std::vector<double> tiny = {1, 1e-12};
  CHECK(Mixture(tiny).quota(1) == 1);  // never starved
}

TEST_CASE("weights that are not positive numbers are refused", "[train]") {
  for (double bad : {0.0, -1.0, double(NAN), double(INFINITY)}) {
    const std::vector<double> weights = {1, bad};
    CHECK(error_of([&] { Mixture{weights}; }).code() == Exit::usage);
  }
  CHECK(error_of([&] { Mixture{std::span<const double>{}}; }).code() == Exit::usage);
}

TEST_CASE("every epoch of a source shows each sequence once, in another order", "[train]") {
  const std::vector<double> weights = {2, 1};
  const SampleOrder order({50, 7}, weights, 3, true);
  std::map<std::pair<int, int64_t>, std::vector<int64_t>> epochs;
  for (int64_t g = 0; g < 450; ++g) {
    const SampleOrder::Sample s = order.at(g);
    epochs[{s.source, s.epoch}].push_back(s.sequence);
  }
  CHECK(epochs.size() == 6 + 22);  // 300 samples of 50, 150 of 7: the last epoch has begun
  for (const auto& [key, sequences] : epochs) {
    const size_t n = key.first == 0 ? 50 : 7;
    const std::set<int64_t> once(sequences.begin(), sequences.end());
    CHECK(once.size() == sequences.size());
    CHECK(*once.rbegin() < int64_t(n));
    if (key != std::pair(1, int64_t(21))) CHECK(sequences.size() == n);
  }
  CHECK(epochs[{0, 0}] != epochs[{0, 1}]);
  const SampleOrder same({50, 7}, weights, 3, true), other({50, 7}, weights, 4, true);
  int equal = 0;
  for (int64_t g = 0; g < 450; ++g) {
    CHECK(same.at(g).sequence == order.at(g).sequence);
    equal += other.at(g).sequence == order.at(g).sequence;
  }
  CHECK(equal < 100);
}

TEST_CASE("the order is pinned: a change of it would break resumed runs", "[train]") {
  const std::vector<double> weights = {2, 1};
  const SampleOrder order({1000, 10}, weights, 42, true);
  std::vector<int64_t> sources, sequences;
  for (int64_t g : {0, 1, 2, 3, 4, 5, 6, 1'000'000}) {
    sources.push_back(order.at(g).source);
    sequences.push_back(order.at(g).sequence);
  }
  CHECK(sources == std::vector<int64_t>{0, 1, 0, 0, 1, 0, 0, 1});
  CHECK(sequences == std::vector<int64_t>{526, 5, 284, 117, 0, 512, 268, 8});
}

// tools/sample_order.py: an implementation of its own, for peers that train on the same batches.
TEST_CASE("the order is the one that tools/sample_order.py gives", "[train]") {
  const std::string path = HGRN_SOURCE_DIR "/tests/golden/order/order.json";
  const auto runs = nlohmann::json::parse(read_file(path, 1 << 20));
  REQUIRE(runs.size() >= 9);
  for (const auto& run : runs) {
    INFO(path << ": sequences " << run["sequences"].dump() << ", seed " << run["seed"].dump());
    const auto weights = run["weights"].get<std::vector<double>>();
    const SampleOrder order(run["sequences"].get<std::vector<int64_t>>(), weights,
                            run["seed"].get<uint64_t>(), run["shuffle"].get<bool>());
    int64_t g = run["first"];
    for (const auto& want : run["samples"]) {
      INFO("sample " << g);
      const SampleOrder::Sample got = order.at(g++);
      REQUIRE(got.source == want[0].get<int>());
      REQUIRE(got.epoch == want[1].get<int64_t>());
      REQUIRE(got.sequence == want[2].get<int64_t>());
    }
  }
}

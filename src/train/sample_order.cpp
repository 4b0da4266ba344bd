#include "train/sample_order.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "core/check.h"
#include "core/rng.h"

namespace hgrn {

// ---- permutation

Permutation::Permutation(uint64_t n, uint64_t key) : n_(n), half_bits_(1) {
  check(n >= 1 && n <= (uint64_t(1) << 62), "a permutation of {} elements", n);
  while ((uint64_t(1) << (2 * half_bits_)) < n) ++half_bits_;
  for (uint64_t& round : round_key_) round = key = mix64(key);
}

uint64_t Permutation::encrypt(uint64_t x) const {
  const uint64_t mask = (uint64_t(1) << half_bits_) - 1;
  uint64_t left = x >> half_bits_, right = x & mask;
  for (uint64_t key : round_key_) {
    const uint64_t next = left ^ (mix64(right ^ key) & mask);
    left = right;
    right = next;
  }
  return left << half_bits_ | right;
}

uint64_t Permutation::operator()(uint64_t i) const {
  check(i < n_, "element {} of a permutation of {}", i, n_);
  // The network permutes 2^(2 half_bits) < 4n values: following its cycle from i comes back into
  // [0, n) after less than 4 steps on average, and different i come back to different values.
  do i = encrypt(i);
  while (i >= n_);
  return i;
}

// ---- mixture

namespace {

// Weights as whole samples a period. The smallest period that holds them exactly is taken: after
// it the counts are the shares, and nothing drifts however long the run.
std::vector<int64_t> quotas(std::span<const double> weights, int64_t max_period) {
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<int64_t> quota(weights.size());
  for (int64_t period = 1; period <= max_period; ++period) {
    int64_t total = 0;
    bool exact = true;
    for (size_t k = 0; k < weights.size() && exact; ++k) {
      const double share = weights[k] / sum * double(period);
      quota[k] = std::llround(share);
      total += quota[k];
      exact = quota[k] >= 1 && std::abs(share - double(quota[k])) < 1e-8;  // rounding of doubles
    }
    if (exact && total == period) return quota;
  }
  // Largest remainder over the longest period, at least one sample each.
  std::vector<std::pair<double, size_t>> remainder;
  int64_t left = max_period;
  for (size_t k = 0; k < weights.size(); ++k) {
    const double share = weights[k] / sum * double(max_period);
    quota[k] = std::max<int64_t>(1, int64_t(share));
    remainder.emplace_back(double(quota[k]) - share, k);
    left -= quota[k];
  }
  std::sort(remainder.begin(), remainder.end());
  for (size_t i = 0; left > 0; i = (i + 1) % remainder.size(), --left) ++quota[remainder[i].second];
  while (left < 0) {  // the sources lifted to one sample are paid for by the largest
    --*std::max_element(quota.begin(), quota.end());
    ++left;
  }
  return quota;
}

}  // namespace

// Tijdeman's rule, in integers. With K sources, M = period, m_k = quota and x_k dealt so far,
// sample n (from 1) goes, among the sources whose share runs ahead of their count by enough, m_k n
// - M x_k >= M / (2K-2), to the one that has to be served first: the smallest (M (2K-3)/(2K-2) -
// (m_k n - M x_k)) / m_k.
Mixture::Mixture(std::span<const double> weights) {
  const int64_t sources = int64_t(weights.size());
  check(sources >= 1 && sources <= 1024, Exit::usage,
        "data.train has {} sources; give 1 to 1024 of them", sources);
  for (double w : weights)
    check(std::isfinite(w) && w > 0, Exit::usage,
          "data.train: weight {} is not a positive number; leave a source out to switch it off", w);
  if (sources == 1) {
    quota_ = {1};
    return;
  }
  quota_ = quotas(weights, kMaxPeriod);
  period_ = std::accumulate(quota_.begin(), quota_.end(), int64_t(0));
  source_.resize(size_t(period_));
  index_.resize(size_t(period_));
  std::vector<int64_t> dealt(size_t(sources), 0);
  const int64_t scale = 2 * sources - 2;
  for (int64_t n = 1; n <= period_; ++n) {
    size_t best = size_t(sources);
    int64_t best_slack = 0;
    for (size_t k = 0; k < size_t(sources); ++k) {
      const int64_t ahead = quota_[k] * n - period_ * dealt[k];
      if (ahead * scale < period_) continue;
      const int64_t slack = (scale - 1) * period_ - scale * ahead;
      // slack / quota as a comparison of products: below 2^11 2^20 2^20, far from overflow
      if (best == size_t(sources) || slack * quota_[best] < best_slack * quota_[k])
        best = k, best_slack = slack;
    }
    check(best < size_t(sources), "the mixture has no source for sample {}", n);
    source_[size_t(n - 1)] = uint16_t(best);
    index_[size_t(n - 1)] = uint32_t(dealt[best]++);
  }
}

Mixture::Pick Mixture::pick(int64_t g) const {
  if (source_.empty()) return {0, g};
  const size_t r = size_t(g % period_);
  return {source_[r], g / period_ * quota_[source_[r]] + index_[r]};
}

// ---- order

SampleOrder::SampleOrder(std::vector<int64_t> sequences, std::span<const double> weights,
                         uint64_t seed, bool shuffle)
    : sequences_(std::move(sequences)), mixture_(weights), seed_(seed), shuffle_(shuffle) {
  check(sequences_.size() == weights.size(), "{} sources but {} weights", sequences_.size(),
        weights.size());
  for (int64_t s : sequences_) check(s >= 1, Exit::data, "a data source has no sequence");
}

SampleOrder::Sample SampleOrder::at(int64_t g) const {
  check(g >= 0, "sample {} of a run", g);
  const auto [source, index] = mixture_.pick(g);
  const int64_t n = sequences_[size_t(source)];
  Sample sample{source, index / n, index % n};
  if (shuffle_) {
    const uint64_t key = mix64(mix64(mix64(seed_) ^ uint64_t(source)) ^ uint64_t(sample.epoch));
    sample.sequence = int64_t(Permutation(uint64_t(n), key)(uint64_t(sample.sequence)));
  }
  return sample;
}

}  // namespace hgrn

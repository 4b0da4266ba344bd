// Which sequence is sample g of a training run? A pure function of (number of sequences of each
// source, weights, seed, shuffle, g), so that ranks, micro-batches and restarts cannot change it.
//
//   mixture      g -> (source k, i-th sample of that source)
//   epochs       i -> (epoch e = i / S_k, position i % S_k), S_k sequences in source k
//   permutation  position -> sequence, by a keyed bijection of [0, S_k) that differs by epoch
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace hgrn {

// A keyed pseudo-random bijection of [0, n), computed without a table: a Feistel network on the
// smallest even number of bits that holds n, walked until it lands inside (Black and Rogaway,
// "Ciphers with arbitrary finite domains", 2002).
class Permutation {
 public:
  Permutation(uint64_t n, uint64_t key);  // 1 <= n <= 2^62
  uint64_t operator()(uint64_t i) const;  // i < n

 private:
  uint64_t encrypt(uint64_t x) const;

  uint64_t n_;
  int half_bits_;
  uint64_t round_key_[6];
};

// Deals samples to sources in proportion to their weights. Weights become integers over a common
// denominator of at most kMaxPeriod: exactly where they are such a ratio (0.7 : 0.2 : 0.1), else
// rounded to the nearest share of kMaxPeriod. At every prefix of the stream each source's count
// differs from that share by less than one sample (Tijdeman, "The chairman assignment problem",
// 1980), and after each period by none.
class Mixture {
 public:
  static constexpr int64_t kMaxPeriod = int64_t(1) << 20;
  struct Pick {
    int source;
    int64_t index;  // how many earlier samples went to that source
  };

  explicit Mixture(std::span<const double> weights);  // > 0 and finite, else Exit::usage
  Pick pick(int64_t g) const;
  int64_t period() const { return period_; }
  int64_t quota(int source) const { return quota_[size_t(source)]; }  // samples a period

 private:
  int64_t period_ = 1;
  std::vector<int64_t> quota_;
  std::vector<uint16_t> source_;  // (period): empty when there is one source
  std::vector<uint32_t> index_;   // (period): samples of that source earlier in the period
};

// The order of one run.
class SampleOrder {
 public:
  struct Sample {
    int source;
    int64_t epoch;     // of that source
    int64_t sequence;  // in [0, sequences of that source)
  };

  SampleOrder(std::vector<int64_t> sequences, std::span<const double> weights, uint64_t seed,
              bool shuffle);
  Sample at(int64_t g) const;

 private:
  std::vector<int64_t> sequences_;
  Mixture mixture_;
  uint64_t seed_;
  bool shuffle_;
};

}  // namespace hgrn

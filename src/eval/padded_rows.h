// Rows of unequal length that end together, laid out segment by segment: shorter rows are padded in
// front, and the state of each starts at its first token.
// Test: tests/eval/test_generate.cpp, test_tasks.cpp
#pragma once
#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace hgrn {

class PaddedRows {
 public:
  explicit PaddedRows(std::vector<std::span<const int32_t>> rows) : rows_(std::move(rows)) {
    for (const auto& row : rows_) {
      longest_ = std::max(longest_, int64_t(row.size()));
      shortest_ = std::min(shortest_, int64_t(row.size()));
    }
  }

  int64_t count() const { return int64_t(rows_.size()); }
  int64_t longest() const { return longest_; }
  bool padded() const { return shortest_ < longest_; }

  // Columns [at, at + T) of all rows, as inputs and reset.
  void lay_out(int64_t at, int64_t T) {
    inputs.assign(size_t(count() * T), 0);
    reset.assign(size_t(count() * T), 0);
    for (int64_t b = 0; b < count(); ++b) {
      const std::span<const int32_t> row = rows_[size_t(b)];
      const int64_t pad = longest_ - int64_t(row.size());
      for (int64_t t = std::max<int64_t>(0, pad - at); t < T; ++t)
        inputs[size_t(b * T + t)] = row[size_t(at + t - pad)];
      if (pad >= at && pad < at + T) reset[size_t(b * T + pad - at)] = 1;
    }
  }

  std::vector<int32_t> inputs /*(B,T)*/;
  std::vector<uint8_t> reset /*(B,T)*/;

 private:
  std::vector<std::span<const int32_t>> rows_;
  int64_t longest_ = 0, shortest_ = INT64_MAX;
};

}  // namespace hgrn

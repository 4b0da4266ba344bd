#include "train/loss_spike.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"

namespace hgrn {
namespace {

constexpr double kNormalMad = 1.4826;
// Losses that lie closer together than this share of their median count as this far apart: the
// last digits of a loss that hardly moves are no spikes.
constexpr double kSpreadFloor = 1e-3;
constexpr const char* kWindow = "loss_window";
constexpr const char* kCounts = "loss_spikes";  // spikes, in a row

double median_of(std::vector<double> values) {
  const auto middle = values.begin() + std::ptrdiff_t(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*std::max_element(values.begin(), middle) + *middle) / 2;
}

bool is_count(double x) {
  return x >= 0 && x < 9e15 && std::floor(x) == x;
}

}  // namespace

LossSpikes::Verdict LossSpikes::judge(double loss) const {
  Verdict verdict;
  if (!on() || !std::isfinite(loss) || losses_.size() < (window_ + 1) / 2) return verdict;
  verdict.median = median_of(losses_);
  std::vector<double> deviations;
  deviations.reserve(losses_.size());
  for (double x : losses_) deviations.push_back(std::fabs(x - verdict.median));
  const double spread =
      std::max({kNormalMad * median_of(std::move(deviations)),
                kSpreadFloor * std::fabs(verdict.median), std::numeric_limits<double>::min()});
  verdict.z = (loss - verdict.median) / spread;
  verdict.spike = verdict.z > threshold_;
  return verdict;
}

void LossSpikes::applied(double loss, const Verdict& verdict) {
  if (!on()) return;
  spikes_ += verdict.spike;
  in_a_row_ = 0;
  if (!std::isfinite(loss)) return;
  if (losses_.size() == window_) losses_.erase(losses_.begin());
  losses_.push_back(loss);
}

bool LossSpikes::left_out(const Verdict& verdict) {
  if (!on() || !verdict.spike) return false;
  ++spikes_;
  if (++in_a_row_ < kMaxInARow) return false;
  in_a_row_ = 0;
  losses_.clear();
  return true;
}

void LossSpikes::save(std::map<std::string, std::vector<double>>& series) const {
  if (!on()) return;
  series[kWindow] = losses_;
  series[kCounts] = {double(spikes_), double(in_a_row_)};
}

void LossSpikes::load(const std::map<std::string, std::vector<double>>& series,
                      const std::string& where) {
  if (!on()) return;
  losses_.clear();
  spikes_ = in_a_row_ = 0;
  if (const auto it = series.find(kWindow); it != series.end()) {
    losses_ = it->second;
    check(losses_.size() <= window_ && std::all_of(losses_.begin(), losses_.end(),
                                                   [](double x) { return std::isfinite(x); }),
          Exit::data, "{}: series {} does not fit train.spike_window {}; the file is damaged",
          where, kWindow, window_);
  }
  if (const auto it = series.find(kCounts); it != series.end()) {
    check(it->second.size() == 2 && is_count(it->second[0]) && is_count(it->second[1]), Exit::data,
          "{}: series {} is not two counts; the file is damaged", where, kCounts);
    spikes_ = int64_t(it->second[0]);
    in_a_row_ = int64_t(it->second[1]);
  }
}

}  // namespace hgrn

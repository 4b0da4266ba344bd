// Loss spikes: a step whose loss lies far above those of the steps before it, told by a robust
// z-score, z = (loss - median) / (1.4826 MAD), over a window of accepted losses. Median and MAD
// (median absolute deviation) do not move when a few spikes are in the window; 1.4826 makes the
// MAD of normal noise its standard deviation. A loss that is not finite, or whose update was left
// out, never enters the window.
#pragma once
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

namespace hgrn {

class LossSpikes {
 public:
  // `threshold`: the z above which a loss is a spike; 0: off. `window`: losses looked back on; no
  // verdict before half of them are there.
  LossSpikes(double threshold, int64_t window) : threshold_(threshold), window_(size_t(window)) {}
  bool on() const { return threshold_ > 0; }

  struct Verdict {
    double z = std::numeric_limits<double>::quiet_NaN();  // NaN: none yet, or loss not finite
    double median = 0;                                    // nats a token
    bool spike = false;
  };
  Verdict judge(double loss) const;

  // What became of the step that was judged; one of the two, once a step.
  void applied(double loss, const Verdict& verdict);  // the loss enters the window if finite
  // Nothing enters. Returns true where the window was cleared: so many spikes in a row were left
  // out that the loss has a new level, and the run must not leave out updates for ever.
  bool left_out(const Verdict& verdict);

  int64_t spikes() const { return spikes_; }  // so far

  // All state, for the checkpoint and back. Off: nothing is saved, and what is given is ignored.
  // Exit::data (naming `where`) for values that save() cannot have made.
  void save(std::map<std::string, std::vector<double>>& series) const;
  void load(const std::map<std::string, std::vector<double>>& series, const std::string& where);

  static constexpr int64_t kMaxInARow = 16;

 private:
  double threshold_;
  size_t window_;
  std::vector<double> losses_;  // accepted, oldest first
  int64_t spikes_ = 0;
  int64_t in_a_row_ = 0;  // spikes left out since the last update
};

}  // namespace hgrn

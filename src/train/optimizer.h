// AdamW over the flat buffers of a WeightStore, cut where decay ends and where whole masters begin:
// two calls whatever the model, or one a bucket where each rank updates its own part (ZeRO-1). The
// verdict on a step (finite or not, clip factor) is taken on the device before anything is written,
// from the same numbers on all ranks.
#pragma once
#include <vector>

#include "core/arena.h"
#include "core/flat_range.h"
#include "model/config.h"
#include "model/weights.h"

namespace hgrn {

// The few numbers of a step, side by side on the device: ranks sum them at once, and the host has
// them by one download.
struct StepNumbers {
  Tensor all /*(6) f64*/;
  Tensor nll_sum() const { return all.slice(0, 1); }     // the loss's numerator
  Tensor stop() const { return all.slice(1, 1); }        // signals that asked ranks to stop
  Tensor square_sum() const { return all.slice(2, 1); }  // of the gradient
  Tensor control() const { return all.slice(3, 3); }     // Ops::clip_control()
  // What is summed over the ranks. Where each has the whole gradient, its squares are the same.
  Tensor agreed(bool sharded) const { return all.slice(0, sharded ? 3 : 2); }
};

struct StepVerdict {
  double nll_sum = 0, stop = 0;  // as in StepNumbers
  double grad_norm = 0;          // before clipping
  double clip_factor = 1;
  bool ok = false;  // loss and gradient are finite
};

class Optimizer {
 public:
  Optimizer(Ops& ops, const OptimConfig& config) : ops_(ops), config_(config) {}
  // The moments of `ranges` (ascending; default: all), which are what this rank updates.
  void take(Arena& arena, const ParamTable& table, std::vector<FlatRange> ranges = {});
  void zero_state();
  // nll_sum() and stop() are the caller's to fill.
  const StepNumbers& numbers() const { return numbers_; }

  // A step with the gradients in w.grad, in order. `t` counts applied updates from 1.
  void sum_squares(const Weights& w);  // square_sum() = of what this rank updates
  // Several ranks sum numbers().agreed() here.
  void decide(double lr, int64_t t);               // control(): whether the sums are finite
  void update(const Weights& w, FlatRange range);  // which this rank updates; not where not finite
  int64_t numbers_later() const { return ops_.download_later(numbers_.all); }
  StepVerdict verdict(int64_t later) const;  // waits for the device

  // All of that on one rank.
  StepVerdict step(const Weights& w, double lr, int64_t t) { return verdict(start_step(w, lr, t)); }
  int64_t start_step(const Weights& w, double lr, int64_t t);  // up to numbers_later()

  // Host copies of the moments of `ranges`, one after another (default: all that are here).
  std::vector<float> get_m(const std::vector<FlatRange>& ranges = {}) const {
    return get(m_, ranges);
  }
  std::vector<float> get_v(const std::vector<FlatRange>& ranges = {}) const {
    return get(v_, ranges);
  }
  void set(const std::vector<float>& m, const std::vector<float>& v);

 private:
  std::vector<float> get(const RangedTensor& moment, const std::vector<FlatRange>& ranges) const;
  Ops& ops_;
  const OptimConfig config_;
  int64_t decayed_ = 0;  // elements, before the others
  RangedTensor m_, v_;   // of what this rank updates
  StepNumbers numbers_;
  AdamStep adam_{};  // of this step
};

}  // namespace hgrn

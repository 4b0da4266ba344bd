// AdamW over the flat buffers of a WeightStore: decayed weights first, then the others; two calls
// whatever the model, or one a bucket where each rank updates its own part (ZeRO-1). The verdict on
// a step (finite or not, clip factor) is taken on the device before anything is written, from the
// same numbers on all ranks.
#pragma once
#include <vector>

#include "core/arena.h"
#include "model/config.h"
#include "model/weights.h"
#include "ops/comm.h"
#include "train/flat_range.h"

namespace hgrn {

struct StepVerdict {
  double grad_norm = 0;  // before clipping
  double clip_factor = 1;
  bool ok = false;  // loss and gradient are finite
};

class Optimizer {
 public:
  Optimizer(Ops& ops, const OptimConfig& config) : ops_(ops), config_(config) {}
  // The moments of `ranges` (ascending; default: all), which are what this rank updates. Where
  // they are a part, `comm` sums the gradient's norm over the ranks.
  void take(Arena& arena, const ParamTable& table, std::vector<FlatRange> ranges = {},
            Comm* comm = nullptr);
  void zero_state();

  // One update with the gradients in w.grad; nll_sum is the loss's numerator, which must be finite
  // too. `t` counts applied updates from 1. `apply` false: the verdict alone, nothing is written.
  StepVerdict step(const Weights& w, Tensor nll_sum, double lr, int64_t t, bool apply = true) {
    return verdict(start_step(w, nll_sum, lr, t, apply));
  }
  // The same in two: what was started, and, once it is done, what came of it.
  int64_t start_step(const Weights& w, Tensor nll_sum, double lr, int64_t t, bool apply);
  StepVerdict verdict(int64_t started);

  // Host copies of the moments of `ranges`, one after another (default: all that are here).
  std::vector<float> get_m(const std::vector<FlatRange>& ranges = {}) const {
    return get(m_, ranges);
  }
  std::vector<float> get_v(const std::vector<FlatRange>& ranges = {}) const {
    return get(v_, ranges);
  }
  void set(const std::vector<float>& m, const std::vector<float>& v);

 private:
  std::vector<float> get(Tensor t, const std::vector<FlatRange>& ranges) const;
  Tensor moment(Tensor t, FlatRange range) const;
  Ops& ops_;
  const OptimConfig config_;
  std::vector<FlatRange> ranges_;
  Comm* comm_ = nullptr;
  Tensor m_ /*(sum of ranges)*/, v_ /*(sum of ranges)*/;
  Tensor square_sum_ /*(1) f64*/, control_ /*(3) f64*/;
};

}  // namespace hgrn

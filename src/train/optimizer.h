// AdamW over the flat buffers of a WeightStore: decayed weights first, then the others; two calls
// whatever the model. The verdict on a step (finite or not, clip factor) is taken on the device
// before anything is written.
#pragma once
#include <vector>

#include "core/arena.h"
#include "model/config.h"
#include "model/weights.h"

namespace hgrn {

struct StepVerdict {
  double grad_norm = 0;  // before clipping
  double clip_factor = 1;
  bool ok = false;  // loss and gradient are finite
};

class Optimizer {
 public:
  Optimizer(Ops& ops, const OptimConfig& config) : ops_(ops), config_(config) {}
  void take(Arena& arena, const ParamTable& table);
  void zero_state();

  // One update with the gradients in w.grad; nll_sum is the loss's numerator, which must be finite
  // too. `t` counts applied updates from 1. `apply` false: the verdict alone, nothing is written.
  StepVerdict step(const Weights& w, Tensor nll_sum, double lr, int64_t t, bool apply = true);

  // Host copies of the moments, flat as the weights.
  std::vector<float> get_m() const { return get(m_); }
  std::vector<float> get_v() const { return get(v_); }
  void set(const std::vector<float>& m, const std::vector<float>& v);

 private:
  std::vector<float> get(Tensor t) const;
  Ops& ops_;
  const OptimConfig config_;
  Tensor m_ /*(total)*/, v_ /*(total)*/;
  Tensor square_sum_ /*(1) f64*/, control_ /*(3) f64*/;
};

}  // namespace hgrn

// A look inside the model at one step: norms of the gradient by stage, mean forget gate by layer.
// It reads what the step has computed anyway and changes nothing, so a run is the same with it.
#pragma once
#include <vector>

#include "core/arena.h"
#include "model/lm.h"
#include "monitor/records.h"
#include "train/grad_sync.h"
#include "train/ranks.h"

namespace hgrn {

class LayerProbe {
 public:
  LayerProbe(Ops& ops, LanguageModel& model, const GradSync& sync, Ranks& ranks);
  void take(Arena& arena);

  // From here to the end of the micro-batch that follows, after_backward() looks at the gates.
  void arm();
  void after_backward(int stage);
  // After the gradients are summed over the ranks and before they are zeroed. All ranks call it.
  LayerMetrics read(Tensor grad);

 private:
  struct Range {
    FlatRange elements;
    int stage;  // of LanguageModel::Hooks
  };
  Ops& ops_;
  LanguageModel& model_;
  Ranks& ranks_;
  const bool sharded_;
  std::vector<Range> ranges_;  // of the gradient on this rank, with padding, which is zero
  std::vector<double> gates_;
  bool armed_ = false;
  Tensor square_sums_ /*(L+2) f64*/;
};

}  // namespace hgrn

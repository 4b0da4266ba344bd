#include "train/layer_probe.h"

#include <algorithm>
#include <cmath>

namespace hgrn {

LayerProbe::LayerProbe(Ops& ops, LanguageModel& model, const GradSync& sync, Ranks& ranks)
    : ops_(ops), model_(model), ranks_(ranks), sharded_(sync.sharded()) {
  // Each stage's stretches of the flat buffers, one for each group of weights that lie together.
  const ParamTable& table = model.params();
  std::vector<std::pair<int64_t, int>> starts;  // offset, stage
  for (ParamId id = 0; id < ParamId(table.params().size()); ++id)
    starts.push_back({table.params()[size_t(id)].offset, model.stage_of(id)});
  std::sort(starts.begin(), starts.end());
  std::vector<Range> whole;
  for (size_t i = 0; i < starts.size(); ++i) {
    const auto [begin, stage] = starts[i];
    const int64_t end = i + 1 < starts.size() ? starts[i + 1].first : table.total();
    if (!whole.empty() && whole.back().stage == stage)
      whole.back().elements.end = end;
    else
      whole.push_back({{begin, end}, stage});
  }
  for (const Range& r : whole)
    for (const FlatRange& mine : sync.updated()) {
      const FlatRange part{std::max(mine.begin, r.elements.begin),
                           std::min(mine.end, r.elements.end)};
      if (part.begin < part.end) ranges_.push_back({part, r.stage});
    }
}

void LayerProbe::take(Arena& arena) {
  square_sums_ = arena.take("layer norms", {model_.config().num_hidden_layers + 2}, DType::f64);
}

void LayerProbe::arm() {
  armed_ = true;
  gates_.assign(size_t(model_.config().num_hidden_layers), NAN);
}

void LayerProbe::after_backward(int stage) {
  if (!armed_) return;
  if (stage >= 0 && size_t(stage) < gates_.size())
    gates_[size_t(stage)] = model_.mean_forget_gate(stage);
  if (stage == 0) armed_ = false;  // the last to be complete
}

LayerMetrics LayerProbe::read(Tensor grad) {
  ops_.zero(square_sums_);
  for (const Range& r : ranges_)
    ops_.square_sum(square_sums_.slice(r.stage + 1, 1),
                    grad.slice(r.elements.begin, r.elements.end - r.elements.begin));
  if (sharded_) ranks_.comm().wait(ranks_.comm().all_reduce(square_sums_));
  std::vector<double> sums(size_t(square_sums_.numel()));
  ops_.download(sums.data(), square_sums_);
  LayerMetrics m;
  for (double& v : sums) v = std::sqrt(v);
  m.embedding_grad_norm = sums.front();
  m.head_grad_norm = sums.back();
  m.grad_norm.assign(sums.begin() + 1, sums.end() - 1);
  m.forget_gate = gates_;
  return m;
}

}  // namespace hgrn

#include "train/optimizer.h"

namespace hgrn {

void Optimizer::take(Arena& arena, const ParamTable& table) {
  m_ = arena.take("optimizer moments", {table.total()}, ops_.master_dtype());
  v_ = arena.take("optimizer moments", {table.total()}, ops_.master_dtype());
  square_sum_ = arena.take("optimizer scalars", {1}, DType::f64);
  control_ = arena.take("optimizer scalars", {3}, DType::f64);
}

void Optimizer::zero_state() {
  ops_.zero(m_);
  ops_.zero(v_);
}

StepVerdict Optimizer::step(const Weights& w, Tensor nll_sum, double lr, int64_t t, bool apply) {
  ops_.zero(square_sum_);
  ops_.square_sum(square_sum_, w.grad);
  ops_.clip_control(control_, square_sum_, nll_sum, config_.clip_norm);

  const int64_t decayed = w.table->decayed(), rest = w.table->total() - decayed;
  AdamStep adam{lr, config_.betas[0], config_.betas[1], config_.eps, config_.weight_decay, t};
  auto update = [&](int64_t first, int64_t count) {
    if (count == 0 || !apply) return;
    ops_.adamw(w.master.slice(first, count), w.compute.slice(first, count), m_.slice(first, count),
               v_.slice(first, count), w.grad.slice(first, count), adam, control_);
  };
  update(0, decayed);
  adam.weight_decay = 0;
  update(decayed, rest);

  double control[3];
  ops_.download(control, control_);
  return {control[0], control[1], control[2] != 0};
}

void Optimizer::set(const std::vector<float>& m, const std::vector<float>& v) {
  check(int64_t(m.size()) == m_.numel() && v.size() == m.size(), "moments of another size");
  ops_.upload(m_, m.data());
  ops_.upload(v_, v.data());
}

std::vector<float> Optimizer::get(Tensor t) const {
  std::vector<float> host(size_t(t.numel()));
  ops_.download(host.data(), t);
  return host;
}

}  // namespace hgrn

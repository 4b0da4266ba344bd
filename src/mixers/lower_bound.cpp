#include "mixers/lower_bound.h"

namespace hgrn {

void LowerBound::add_params(ParamTable& table) {
  if (!config_.use_lower_bound) return;
  gamma_ = table.add({.name = "model.lower_bounds",
                      .shape = {config_.L, config_.D},
                      .init = config_.gamma_init,
                      .decay = config_.decay_of(/*matrix=*/false),
                      .read_as = ReadAs::master});
}

void LowerBound::take(Arena& arena) {
  if (!config_.use_lower_bound) return;
  beta_ = arena.take("lower bounds", {config_.L, config_.D}, ops_.master_dtype());
  dbeta_ = arena.take("lower bounds", {config_.L, config_.D}, ops_.master_dtype());
}

void LowerBound::begin_forward(const Weights& w) {
  if (config_.use_lower_bound) ops_.lower_bound_forward(beta_, w.w(gamma_));
}

void LowerBound::begin_backward() {
  if (config_.use_lower_bound) ops_.zero(dbeta_);
}

void LowerBound::end_backward(const Weights& w) {
  if (config_.use_lower_bound) ops_.lower_bound_backward(w.dw(gamma_), dbeta_, w.w(gamma_));
}

Tensor LowerBound::row(Tensor t, int layer) const {
  if (!t) return {};
  return t.slice(layer, 1).view({config_.D});
}

}  // namespace hgrn

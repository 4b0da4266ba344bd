// The memory of a model's weights: fp32 master copy, the copy that operations read (the same
// buffer where activations are fp32), and gradients. Without gradients (evaluation, generation) of
// the master copy only what operations read of it: norm weights and Gamma.
#pragma once
#include <vector>

#include "core/arena.h"
#include "core/params.h"
#include "ops/ops.h"

namespace hgrn {

class WeightStore {
 public:
  // Takes the buffers from the arena (unbound: only counted).
  // `shared`: another one for what ranks exchange, compute weights and gradients.
  void take(Arena& arena, const Ops& ops, const ParamTable& table, bool with_grad,
            Arena* shared = nullptr);

  const Weights& weights() const { return weights_; }
  // Flat host values, table.total() of them; the compute copy follows.
  void set(Ops& ops, const std::vector<float>& master);
  std::vector<float> get(Ops& ops) const;  // needs the whole master copy

  // The same a parameter at a time, so that no flat copy is needed: zero all, then give each one's
  // values (its true shape, without padded rows).
  void set_zero(Ops& ops);
  void set(Ops& ops, ParamId id, const float* values);

 private:
  Weights weights_;
};

// The weights at the start of a run: each from its name and the seed alone, so that layout, ranks
// and device do not matter. Padded vocabulary rows are zero.
std::vector<float> initial_weights(const ParamTable& table, uint64_t seed);

}  // namespace hgrn

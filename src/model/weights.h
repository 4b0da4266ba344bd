// The memory of a model's weights and gradients. Where activations are bf16, the master weights
// that operations read as bf16 are split: the weight that is read is the upper half, the lower lies
// apart, on the rank that updates it alone, and without training nowhere. core/params.h has the
// buffers. (Megatron's optimizer calls the lower halves parameter remainders.)
#pragma once
#include <functional>
#include <vector>

#include "core/arena.h"
#include "core/params.h"
#include "ops/ops.h"

namespace hgrn {

// Their row in a plan of memory.
constexpr const char* kLowerHalves = "lower halves of master weights";

class WeightStore {
 public:
  // Takes the buffers from the arena (unbound: only counted).
  // `shared`: another one for what ranks exchange, compute weights and gradients.
  // `updated`: what this rank updates, ascending (default: all).
  void take(Arena& arena, const Ops& ops, const ParamTable& table, bool with_grad,
            Arena* shared = nullptr, std::vector<FlatRange> updated = {});

  const Weights& weights() const { return weights_; }
  // Flat host values, table.total() of them. Where masters are split, these and get() use the
  // gradients' memory on the way: gradients are zero afterwards.
  void set(Ops& ops, const std::vector<float>& master);
  // gather: makes a flat buffer whole of which each rank has what it updates; for several ranks,
  // which all call get(). Those that want nothing get nothing.
  std::vector<float> get(Ops& ops, const std::function<void(Tensor)>& gather = {},
                         bool wanted = true);

  // Without gradients, a parameter at a time, so that no flat copy is needed: zero all, then give
  // each one's values (its true shape, without padded rows).
  void set_zero(Ops& ops);
  void set(Ops& ops, ParamId id, const float* values);

 private:
  Weights weights_;
};

// The weights at the start of a run: each from its name and the seed alone, so that layout, ranks
// and device do not matter. Padded vocabulary rows are zero.
std::vector<float> initial_weights(const ParamTable& table, uint64_t seed);

}  // namespace hgrn

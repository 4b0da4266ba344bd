// The gradient of a weight as an operation receives it: where it goes, and whether what stands
// there counts. A type of its own, so that no operation can take one for a plain tensor and add to
// what was never written.
#pragma once
#include "core/tensor.h"

namespace hgrn {

struct Grad {
  Tensor to;
  bool fresh = false;  // to = the gradient, whatever stood there (NaN too); else to += it

  Grad() = default;
  Grad(Tensor t) : to(t) {}
  Grad(Tensor t, bool f) : to(t), fresh(f) {}
  explicit operator bool() const { return bool(to); }
};

}  // namespace hgrn

// A backend that can be laid out but not run: it has the dtypes, the vocabulary padding and the
// saved tensors of a real one, so that `hgrn plan` counts a GPU's memory on a machine without one.
#pragma once
#include <memory>

#include "ops/ops.h"

namespace hgrn {

// act: bf16 or fp32 as on a GPU, f32 with cpu = true as on the CPU.
std::unique_ptr<Ops> make_plan_ops(DType act, bool cpu);

}  // namespace hgrn

// The sum of what ranks have sent each other: the arithmetic of a reduce-scatter whose transport is
// copies (comm_nccl.cpp).
#pragma once
#include <cuda_runtime.h>

#include "core/tensor.h"

namespace hgrn {

constexpr int64_t kSumAlign = 8;  // elements that a part is a multiple of

// own (n) = sum over r of parts (world, n), in the order of r, in fp32; f32 or bf16. own and parts
// are 16-byte aligned, n a multiple of kSumAlign.
void sum_parts(Tensor own, const void* parts, int world, cudaStream_t stream);

}  // namespace hgrn

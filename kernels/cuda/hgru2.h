// The HGRU2 sequence kernel of the CUDA backend (src/ops/seq_kernel.h).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "ops/seq_kernel.h"

namespace hgrn {

// act_dtype: dtype of x, y and their gradients, bf16 or f32; states are f32. Tensor cores serve
// bf16 with n = 64 and 128 (n = 128 where a block has 213 KiB of shared memory: sm_90), plain
// recurrences the rest, n = 1..256. All work goes to `stream`, which outlives the kernel; what
// a call needs lies in saved(), part of which is scratch of each direction. The kernel itself keeps
// a flag a multiprocessor in device memory.
// Without saved tensors, forward does not split few long sequences over the card.
// The gradient of a reset token's gate is zero, as is everything that would flow across it. The
// tensor-core kernels count a lower bound as at least e^-8, so that no gate is less: 1 - f and k
// are smaller by at most 3.4e-4 of themselves.
std::unique_ptr<SeqKernel> make_cuda_hgru2(DType act_dtype, cudaStream_t stream);

// Those flags, once the work on the stream is done, for tools/hgru2_check.cu: a launch relies on
// the one before to have left them 0. Empty where the card's kernels need none. `kernel` is one of
// make_cuda_hgru2().
std::vector<uint32_t> cuda_hgru2_flags(const SeqKernel& kernel);

}  // namespace hgrn

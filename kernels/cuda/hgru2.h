// The HGRU2 sequence kernel of the CUDA backend. CudaOps::seq hands it out.
#pragma once
#include <cuda_runtime.h>

#include <memory>

#include "ops/seq_kernel.h"

namespace hgrn {

// All work goes to `stream`, which outlives the kernel.
std::unique_ptr<SeqKernel> make_cuda_hgru2(cudaStream_t stream);

}  // namespace hgrn

// The last stage of sums over rows that several CTAs share.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace hgrn {

// out (cols) += column sums of partial (rows, cols); fresh: out = them. The order of the sums
// depends on `rows` alone. early: the card can start it early (launch.cuh); on any stream, since it
// reads nothing before its wait.
void add_partial_rows(float* out, const float* partial, int64_t rows, int64_t cols, bool fresh,
                      bool early, cudaStream_t stream);

}  // namespace hgrn

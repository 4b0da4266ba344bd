// own (n) = sum_r parts[r] (n), in the order of the ranks, so that two runs give the same bits. A
// thread adds up kWide neighbours.
// Test: tests/train/test_gpu_ranks.cpp
#include "cuda/sum_parts.h"

#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/vec.cuh"

namespace hgrn {
namespace {

template <class T>
__global__ __launch_bounds__(256) void sum_parts_kernel(T* own, const T* parts, int world,
                                                        int64_t n) {
  const int64_t step = int64_t(gridDim.x) * 256 * kWide;
  for (int64_t i = (int64_t(blockIdx.x) * 256 + threadIdx.x) * kWide; i < n; i += step) {
    float sum[kWide];
    load<kWide>(sum, parts + i);
    for (int r = 1; r < world; ++r) {
      float v[kWide];
      load<kWide>(v, parts + r * n + i);
#pragma unroll
      for (int j = 0; j < kWide; ++j) sum[j] += v[j];
    }
    store<kWide>(own + i, sum);
  }
}

}  // namespace

void sum_parts(Tensor own, const void* parts, int world, cudaStream_t stream) {
  const int64_t n = own.numel();
  check(n % kSumAlign == 0, "sum_parts: {} elements, not a multiple of {}", n, kSumAlign);
  constexpr int64_t kMostBlocks = 1024;
  const int64_t blocks = std::min(kMostBlocks, (n / kWide + 255) / 256);
  dispatch(own.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    sum_parts_kernel<T><<<unsigned(blocks), 256, 0, stream>>>(
        own.ptr<T>(), static_cast<const T*>(parts), world, n);
    CUDA_CHECK(cudaGetLastError());
  });
}

}  // namespace hgrn

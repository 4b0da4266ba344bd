// What the kernels of cross_entropy.cu and cross_entropy_sm90.cu share: the running softmax over a
// row of logits and its gradient, kVec neighbouring columns at a time.
#pragma once
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace hgrn {

constexpr float kLog2e = 1.4426950408889634f;

// run over v, the columns col .. col+kVec-1, of which those from V on do not count.
template <int kVec>
__device__ __forceinline__ void follow(OnlineSoftmax& run, float (&v)[kVec], int64_t col,
                                       int64_t V) {
  if (col + kVec > V) {
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (col + i >= V) v[i] = -INFINITY;
  }
  float top = v[0];
#pragma unroll
  for (int i = 1; i < kVec; ++i) top = fmaxf(top, v[i]);
  if (top > run.m) {
    run.s *= exp2f((run.m - top) * kLog2e);
    run.m = top;
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) run.s += exp2f((v[i] - run.m) * kLog2e);
}

// v := share exp(v - m) - scale [column == target], 0 from V on. share = scale / sum of exp(x - m).
template <int kVec>
__device__ __forceinline__ void to_gradient(float (&v)[kVec], int64_t col, int64_t V, int target,
                                            float m, float share, float scale) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = exp2f((v[i] - m) * kLog2e) * share;
  if (target >= col && target < col + kVec) {
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (col + i == target) v[i] -= scale;
  }
  if (col + kVec > V) {
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (col + i >= V) v[i] = 0;
  }
}

// The same call of CudaOps::cross_entropy with gradient for bf16 rows on sm_90; false where it does
// not apply and nothing was done.
bool cross_entropy_sm90(float* nll, bf16* logits, const int* targets, int64_t rows, int64_t Vp,
                        int64_t V, float scale, int multiprocessors, size_t shared_bytes,
                        cudaStream_t stream);

}  // namespace hgrn

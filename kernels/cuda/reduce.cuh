// Reductions over a warp and over a CTA, in an order that depends on nothing but the launch shape:
// equal calls give equal bits. Every thread gets the result.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace hgrn {

constexpr unsigned kFullMask = 0xffffffffu;

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullMask, v, offset);
  return v;
}

// For a CTA of kThreads threads. `shared` holds kThreads/32 values and may be reused after the
// call, since the last barrier comes after the last read.
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T v, T* shared) {
  constexpr int kWarps = kThreads / 32;
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  T total = shared[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) total += shared[i];
  __syncthreads();
  return total;
}

// A running softmax: maximum m and sum of exp(x - m). Merging is associative up to rounding.
struct OnlineSoftmax {
  float m = -3.402823466e38f, s = 0;

  __device__ __forceinline__ void merge(const OnlineSoftmax& o) {
    const float top = fmaxf(m, o.m);
    s = s * __expf(m - top) + o.s * __expf(o.m - top);
    m = top;
  }
};

template <int kThreads>
__device__ __forceinline__ OnlineSoftmax block_softmax(OnlineSoftmax v, OnlineSoftmax* shared) {
  constexpr int kWarps = kThreads / 32;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    OnlineSoftmax o;
    o.m = __shfl_xor_sync(kFullMask, v.m, offset);
    o.s = __shfl_xor_sync(kFullMask, v.s, offset);
    v.merge(o);
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  OnlineSoftmax total = shared[0];
  for (int i = 1; i < kWarps; ++i) total.merge(shared[i]);
  __syncthreads();
  return total;
}

}  // namespace hgrn

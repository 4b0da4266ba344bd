// Cross-entropy with its gradient, in place.
//   nll[r] = log sum_v exp(x[r,v]) - x[r,target];  x[r,v] = scale (softmax(x[r])[v] - [v ==
//   target])
// x (rows,Vp) f32 or bf16, columns V and above are padding. fp32 arithmetic, one CTA a row.
//
// Memory-bound: a row of 50,304 bf16 (98 KiB) fits an H100's shared memory twice, so that the row
// is read from device memory once, by asynchronous copies that the running softmax follows, and
// written once. A thread reads only what it copied itself: no barrier between copy and use. Longer
// rows, and calls without a gradient, read device memory directly.
//
// Two exponentials an element are as long as its way through memory: the hardware's exp2 (relative
// error 2^-22) is taken as it is, without exp2f's care for denormals.
// Twin: kernels/cpu/cross_entropy.cpp   Test: tests/ops/test_cross_entropy.cpp
#include <cuda_pipeline_primitives.h>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace hgrn {
namespace {

constexpr int kThreads = 512;
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
    run.s *= exp2_approx((run.m - top) * kLog2e);
    run.m = top;
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) run.s += exp2_approx((v[i] - run.m) * kLog2e);
}

// v := share exp(v - m) - scale [column == target], 0 from V on. share = scale / sum of exp(x - m).
template <int kVec>
__device__ __forceinline__ void to_gradient(float (&v)[kVec], int64_t col, int64_t V, int target,
                                            float m, float share, float scale) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = exp2_approx((v[i] - m) * kLog2e) * share;
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

// The row goes into shared memory in four batches; the softmax follows a batch behind the copies.
template <class T, int kVec>
__device__ __forceinline__ OnlineSoftmax copy_and_follow(T* row, const T* x, int64_t Vp,
                                                         int64_t V) {
  constexpr int kBatches = 4;
  const int64_t first = int64_t(threadIdx.x) * kVec, stride = kThreads * kVec;
  const int64_t rounds = (Vp + stride - 1) / stride;
  const int64_t batch = (rounds + kBatches - 1) / kBatches * stride;
#pragma unroll
  for (int b = 0; b < kBatches; ++b) {
    for (int64_t col = b * batch + first; col < min((b + 1) * batch, Vp); col += stride)
      __pipeline_memcpy_async(row + col, x + col, sizeof(T) * kVec);
    __pipeline_commit();
  }
  OnlineSoftmax run;
#pragma unroll
  for (int b = 0; b < kBatches; ++b) {
    __pipeline_wait_prior(kBatches - 1 - b);
    for (int64_t col = b * batch + first; col < min((b + 1) * batch, Vp); col += stride) {
      float v[kVec];
      load<kVec>(v, row + col);
      follow(run, v, col, V);
    }
  }
  return run;
}

template <class T, int kVec>
__device__ __forceinline__ OnlineSoftmax read_and_follow(const T* x, int64_t Vp, int64_t V) {
  constexpr int kAhead = 4;
  const int64_t first = int64_t(threadIdx.x) * kVec, stride = kThreads * kVec;
  OnlineSoftmax run;
  for (int64_t at = first; at < Vp; at += stride * kAhead) {
    Pack<T, kVec> packs[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (at + k * stride < Vp) packs[k].load(x + at + k * stride);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (at + k * stride >= Vp) continue;
      float v[kVec];
      packs[k].unpack(v);
      follow(run, v, at + k * stride, V);
    }
  }
  return run;
}

template <class T, int kVec, bool kShared>
__global__ __launch_bounds__(kThreads) void cross_entropy_kernel(float* nll, T* logits,
                                                                 const int* targets, int64_t Vp,
                                                                 int64_t V, bool backward,
                                                                 float scale) {
  extern __shared__ uint4 dynamic[];  // the row: Vp * sizeof(T) bytes
  __shared__ OnlineSoftmax shared[kThreads / 32];
  T* row = reinterpret_cast<T*>(dynamic);
  T* x = logits + int64_t(blockIdx.x) * Vp;
  const int target = targets[blockIdx.x];
  const int64_t first = int64_t(threadIdx.x) * kVec, stride = kThreads * kVec;
  if (target < 0) {
    if (threadIdx.x == 0) nll[blockIdx.x] = 0;
    const float zeros[kVec] = {};
    if (backward)
      for (int64_t col = first; col < Vp; col += stride) store<kVec>(x + col, zeros);
    return;
  }
  float at_target[1] = {0};
  if (threadIdx.x == 0) load<1>(at_target, x + target);  // before it is overwritten
  OnlineSoftmax total;
  if constexpr (kShared)
    total = copy_and_follow<T, kVec>(row, x, Vp, V);
  else
    total = read_and_follow<T, kVec>(x, Vp, V);
  total = block_softmax<kThreads>(total, shared);
  if (threadIdx.x == 0) nll[blockIdx.x] = logf(total.s) + (total.m - at_target[0]);
  if (!backward) return;
  const float share = scale / total.s;
#pragma unroll 4
  for (int64_t col = first; col < Vp; col += stride) {
    float v[kVec];
    load<kVec>(v, (kShared ? row : x) + col);
    to_gradient(v, col, V, target, total.m, share, scale);
    store<kVec>(x + col, v);
  }
}

}  // namespace

void CudaOps::cross_entropy(Tensor nll, Tensor logits, Tensor targets, int64_t vocab, bool backward,
                            double grad_scale) {
  const int64_t rows = logits.rows(), Vp = logits.cols();
  check(nll.numel() == rows && targets.numel() == rows && vocab > 0 && vocab <= Vp,
        "cross_entropy: nll {}, logits {}, targets {}, vocabulary {}", nll.shape.str(),
        logits.shape.str(), targets.shape.str(), vocab);
  if (rows == 0) return;
  dispatch(logits.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kVec = 16 / int(sizeof(T));
    const size_t row_bytes = size_t(Vp) * sizeof(T);
    const bool wide = Vp % kVec == 0 && reinterpret_cast<uintptr_t>(logits.data) % 16 == 0;
    const bool fits =
        row_bytes + sizeof(OnlineSoftmax) * kThreads / 32 <= prop_.sharedMemPerBlockOptin;
    auto kernel = wide ? cross_entropy_kernel<T, kVec, false> : cross_entropy_kernel<T, 1, false>;
    size_t shared = 0;
    if (wide && fits && backward) {
      kernel = cross_entropy_kernel<T, kVec, true>;
      shared = row_bytes;
      CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    }
    kernel<<<unsigned(rows), kThreads, shared, stream_>>>(nll.ptr<float>(), logits.ptr<T>(),
                                                          targets.ptr<int32_t>(), Vp, vocab,
                                                          backward, float(grad_scale));
    CUDA_CHECK(cudaGetLastError());
  });
}

}  // namespace hgrn

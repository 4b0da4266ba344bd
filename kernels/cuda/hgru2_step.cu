// HGRU2, one token of each row (decoding): h = diag(f) h + k (x) v, y = q^T h, in fp32.
//   q = scale act_o(xq)   f = bound + (1-bound) sigmoid(xf)   k = (1-bound) sigmoid(-xf)
//   v = act_i(xi)
// x (B,3D) = [q|f|i], y (B,D), h (B,H,n,n) with rows c (key channels) and columns v, in place.
// The state's 8 n^2 bytes a head, read and written, bound the time: a CTA takes 16 columns of a
// head, a thread 16 bytes of each 64th row, so that the card is busy at batch 1. The state is read
// before the kernel before ends (launch.cuh): it was written a whole step ago.
// Twin: kernels/cpu/hgru2.cpp   Test: tests/ops/test_decode.cpp
#include "cuda/activation.cuh"
#include "cuda/cuda_check.h"
#include "cuda/hgru2_kernels.h"
#include "cuda/launch.cuh"
#include "cuda/vec.cuh"

namespace hgrn::hgru2 {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 16, kLanes = kColumns / 4;  // threads across the columns
constexpr int kGroups = kThreads / kLanes;           // rows in flight
constexpr int kMaxRows = 256 / kGroups;              // of a thread, n <= 256

template <class E>
__global__ __launch_bounds__(kThreads) void step_kernel(const Call<E> a) {
  __shared__ float q[256], k[256], f[256];
  __shared__ float partial[kThreads / 32][kColumns];
  const int n = a.n, tid = threadIdx.x, column = int(blockIdx.y) * kColumns + tid % kLanes * 4;
  const int64_t bh = blockIdx.x, b = bh / a.H, head = bh % a.H;
  const E* const x = a.x + b * 3 * a.D + head * n;
  float* const state = a.hT + bh * n * n + column;

  float4 h[kMaxRows];
#pragma unroll
  for (int i = 0; i < kMaxRows; ++i) {
    const int row = tid / kLanes + i * kGroups;
    if (row < n) h[i] = *reinterpret_cast<const float4*>(state + int64_t(row) * n);
  }
  const float bound = tid < n && a.bound ? a.bound[head * n + tid] : 0.0f;
  wait_for_previous();
  const bool reset = a.reset && a.reset[b];
  if (tid < n) {
    float xq[1], xf[1];
    load<1>(xq, x + tid);
    load<1>(xf, x + a.D + tid);
    q[tid] = a.query_scale * activate<float>(xq[0], a.output_act);
    k[tid] = (1.0f - bound) * sigmoid<float>(-xf[0]);
    f[tid] = reset ? 0.0f : bound + (1.0f - bound) * sigmoid<float>(xf[0]);
  }
  float v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float xi[1];
    load<1>(xi, x + 2 * a.D + column + j);
    v[j] = activate<float>(xi[0], a.input_act);
  }
  __syncthreads();

  float y[4] = {};
#pragma unroll
  for (int i = 0; i < kMaxRows; ++i) {
    const int row = tid / kLanes + i * kGroups;
    if (row >= n) continue;
    float4& r = h[i];
    r.x = fmaf(f[row], r.x, k[row] * v[0]);
    r.y = fmaf(f[row], r.y, k[row] * v[1]);
    r.z = fmaf(f[row], r.z, k[row] * v[2]);
    r.w = fmaf(f[row], r.w, k[row] * v[3]);
    *reinterpret_cast<float4*>(state + int64_t(row) * n) = r;
    y[0] = fmaf(q[row], r.x, y[0]);
    y[1] = fmaf(q[row], r.y, y[1]);
    y[2] = fmaf(q[row], r.z, y[2]);
    y[3] = fmaf(q[row], r.w, y[3]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int offset = 16; offset >= kLanes; offset /= 2)
      y[j] += __shfl_xor_sync(0xffffffffu, y[j], offset);
    if (tid % 32 < kLanes) partial[tid / 32][tid % 32 * 4 + j] = y[j];
  }
  __syncthreads();
  if (tid < kColumns) {
    float sum[1] = {0};
    for (int w = 0; w < kThreads / 32; ++w) sum[0] += partial[w][tid];
    store<1>(a.y + b * a.D + head * n + int(blockIdx.y) * kColumns + tid, sum);
  }
}

}  // namespace

template <class E>
bool step_token(const Call<E>& c, bool early, cudaStream_t stream) {
  if (c.n % kColumns != 0 || c.n > 256 || reinterpret_cast<uintptr_t>(c.hT) % 16 != 0) return false;
  launch(step_kernel<E>, dim3(unsigned(c.B * c.H), unsigned(c.n / kColumns)), dim3(kThreads), 0,
         stream, early, c);
  return true;
}

template bool step_token(const Call<float>&, bool, cudaStream_t);
template bool step_token(const Call<__nv_bfloat16>&, bool, cudaStream_t);

}  // namespace hgrn::hgru2

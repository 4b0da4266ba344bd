// Casts and the lower bounds of the forget gates.
//   s = softmax of gamma over layers;  beta[l] = s[1] + ... + s[l]                  (paper Eq. 3)
//   ds[j] = sum_{l >= j} dbeta[l], ds[0] = 0;  dgamma += s (ds - sum_j s[j] ds[j])
// gamma, beta (L,D). One thread a channel, in double: L D elements once a step cost nothing.
// Twin: kernels/cpu/elementwise.cpp   Test: tests/ops/test_elementwise.cpp
#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/vec.cuh"

namespace hgrn {
namespace {

constexpr int kThreads = 256;

template <class To, class From>
__device__ __forceinline__ To convert(From v) {
  if constexpr (std::is_same_v<To, bf16> && std::is_same_v<From, double>)
    return __double2bfloat16(v);  // by way of float it would round twice
  else if constexpr (std::is_same_v<To, bf16>)
    return __float2bfloat16_rn(float(v));
  else
    return To(v);
}

// Each thread converts kEach elements a CTA's width apart, so that loads are in flight together.
template <class To, class From>
__global__ __launch_bounds__(kThreads) void cast_kernel(To* dst, const From* src, int64_t n) {
  constexpr int kEach = 8;
  const int64_t first = int64_t(blockIdx.x) * kThreads * kEach + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t at = first + int64_t(i) * kThreads;
    if (at < n) dst[at] = convert<To>(src[at]);
  }
}

__global__ __launch_bounds__(kThreads) void lower_bound_forward_kernel(float* beta,
                                                                       const float* gamma,
                                                                       int64_t L, int64_t D) {
  const int64_t d = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (d >= D) return;
  float top = gamma[d];
  for (int64_t l = 1; l < L; ++l) top = fmaxf(top, gamma[l * D + d]);
  double total = 0;
  for (int64_t l = 0; l < L; ++l) total += exp(double(gamma[l * D + d]) - top);
  double cumulative = 0;
  beta[d] = 0;
  for (int64_t l = 1; l < L; ++l) {
    cumulative += exp(double(gamma[l * D + d]) - top) / total;
    beta[l * D + d] = float(cumulative);
  }
}

__global__ __launch_bounds__(kThreads) void lower_bound_backward_kernel(
    float* dgamma, const float* dbeta, const float* gamma, int64_t L, int64_t D, bool fresh) {
  const int64_t d = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (d >= D) return;
  float top = gamma[d];
  for (int64_t l = 1; l < L; ++l) top = fmaxf(top, gamma[l * D + d]);
  double total = 0;
  for (int64_t l = 0; l < L; ++l) total += exp(double(gamma[l * D + d]) - top);
  double dot = 0, ds = 0;
  for (int64_t l = L - 1; l >= 1; --l) {
    ds += dbeta[l * D + d];
    dot += exp(double(gamma[l * D + d]) - top) / total * ds;
  }
  ds = 0;
  for (int64_t l = L - 1; l >= 0; --l) {
    ds = l > 0 ? ds + dbeta[l * D + d] : 0;
    const double s = exp(double(gamma[l * D + d]) - top) / total;
    dgamma[l * D + d] = (fresh ? 0.0f : dgamma[l * D + d]) + float(s * (ds - dot));
  }
}

template <class F>
void dispatch_float(DType t, F&& f) {
  if (t == DType::f64) return f(std::type_identity<double>{});
  dispatch(t, f);
}

}  // namespace

void CudaOps::cast(Tensor dst, Tensor src) {
  check(dst.numel() == src.numel(), "cast: {} into {}", src.shape.str(), dst.shape.str());
  if (dst.dtype == src.dtype) return copy(dst, src);
  const int64_t n = src.numel();
  if (n == 0) return;
  dispatch_float(dst.dtype, [&](auto to) {
    using To = typename decltype(to)::type;
    dispatch_float(src.dtype, [&](auto from) {
      using From = typename decltype(from)::type;
      const unsigned blocks = unsigned((n + kThreads * 8 - 1) / (kThreads * 8));
      cast_kernel<To, From><<<blocks, kThreads, 0, stream_>>>(dst.ptr<To>(), src.ptr<From>(), n);
      CUDA_CHECK(cudaGetLastError());
    });
  });
}

void CudaOps::lower_bound_forward(Tensor beta, Tensor gamma) {
  check(beta.shape == gamma.shape, "lower_bound_forward: beta {}, gamma {}", beta.shape.str(),
        gamma.shape.str());
  const int64_t L = gamma.rows(), D = gamma.cols();
  if (L == 0 || D == 0) return;
  lower_bound_forward_kernel<<<unsigned((D + kThreads - 1) / kThreads), kThreads, 0, stream_>>>(
      beta.ptr<float>(), gamma.ptr<float>(), L, D);
  CUDA_CHECK(cudaGetLastError());
}

void CudaOps::lower_bound_backward(Grad dgamma, Tensor dbeta, Tensor gamma) {
  check(dgamma.to.shape == gamma.shape && dbeta.shape == gamma.shape,
        "lower_bound_backward: dgamma {}, dbeta {}, gamma {}", dgamma.to.shape.str(),
        dbeta.shape.str(), gamma.shape.str());
  const int64_t L = gamma.rows(), D = gamma.cols();
  if (L == 0 || D == 0) return;
  lower_bound_backward_kernel<<<unsigned((D + kThreads - 1) / kThreads), kThreads, 0, stream_>>>(
      dgamma.to.ptr<float>(), dbeta.ptr<float>(), gamma.ptr<float>(), L, D, dgamma.fresh);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace hgrn

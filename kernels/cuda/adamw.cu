// The update: sums for the loss and the gradient norm, clipping, AdamW.
//   g = grad * factor;  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2
//   master = (1 - lr wd) master - lr/(1-b1^t) m / (sqrt(v/(1-b2^t)) + eps);  compute = cast(master)
// A weight in two halves (core/dtype.h) is joined, updated and split again: 28 bytes an element are
// moved, with a whole fp32 master and its bf16 copy 30.
// The control block {norm, factor, ok} stays on the device: a step needs no wait, and where ok is
// 0 nothing is written. Sums are taken in double, each CTA's part in a slot of its own and the
// slots in order, so that a loss does not depend on who finished first.
// Twin: kernels/cpu/adamw.cpp   Test: tests/ops/test_adamw.cpp
#include <algorithm>
#include <cmath>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace hgrn {
namespace {

constexpr int kThreads = 256;

template <bool kSquares, class T>
__device__ __forceinline__ void accumulate(double& total, T v) {
  if (kSquares)
    total += double(v) * double(v);
  else
    total += double(v);
}

// partial[blockIdx.x] = this CTA's share. f32 inputs are read 16 bytes at a time once aligned.
template <class T, bool kSquares>
__global__ __launch_bounds__(kThreads) void partial_sum_kernel(double* partial, const T* x,
                                                               int64_t n) {
  __shared__ double shared[kThreads / 32];
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  double total[4] = {};
  int64_t done = 0;
  if constexpr (std::is_same_v<T, float>) {
    if (reinterpret_cast<uintptr_t>(x) % 16 == 0) {
      done = n / 4 * 4;
#pragma unroll 4
      for (int64_t i = thread; i < n / 4; i += threads) {
        const float4 v = reinterpret_cast<const float4*>(x)[i];
        accumulate<kSquares>(total[0], v.x), accumulate<kSquares>(total[1], v.y);
        accumulate<kSquares>(total[2], v.z), accumulate<kSquares>(total[3], v.w);
      }
    }
  }
  for (int64_t i = done + thread; i < n; i += threads) accumulate<kSquares>(total[0], x[i]);
  const double sum = block_sum<kThreads>((total[0] + total[1]) + (total[2] + total[3]), shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ __launch_bounds__(kThreads) void add_partial_sums_kernel(double* out,
                                                                    const double* partial, int n) {
  __shared__ double shared[kThreads / 32];
  double total = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) total += partial[i];
  total = block_sum<kThreads>(total, shared);
  if (threadIdx.x == 0) *out += total;
}

__global__ void clip_control_kernel(double* control, const double* square_sum,
                                    const double* nll_sum, double max_norm) {
  const double norm = sqrt(*square_sum);
  control[0] = norm;
  control[1] = max_norm > 0 ? fmin(1.0, max_norm / (norm + 1e-6)) : 1.0;
  control[2] = isfinite(norm) && (!nll_sum || isfinite(*nll_sum)) ? 1.0 : 0.0;
}

struct AdamScalars {
  float keep, beta1, rest1, beta2, rest2, step_size, inverse_root2, eps;
};

// Weights as the update finds and leaves them: fp32 with a copy in T (or none), or two halves.
template <class T>
struct WholeWeights {
  float* master;
  T* compute;
  template <int kVec>
  __device__ __forceinline__ void load(float (&w)[kVec], int64_t at) const {
    hgrn::load<kVec>(w, master + at);
  }
  template <int kVec>
  __device__ __forceinline__ void store(const float (&w)[kVec], int64_t at) const {
    hgrn::store<kVec>(master + at, w);
    if (compute) hgrn::store<kVec>(compute + at, w);
  }
};

struct SplitWeights {
  uint16_t* upper;
  int16_t* lower;  // absent: store() alone, which leaves it out

  template <int kVec>
  struct alignas(2 * kVec) Halves {
    uint16_t v[kVec];
  };
  template <int kVec>
  __device__ __forceinline__ void load(float (&w)[kVec], int64_t at) const {
    const auto a = *reinterpret_cast<const Halves<kVec>*>(upper + at);
    const auto b = *reinterpret_cast<const Halves<kVec>*>(lower + at);
#pragma unroll
    for (int i = 0; i < kVec; ++i) w[i] = join_weight({a.v[i], int16_t(b.v[i])});
  }
  template <int kVec>
  __device__ __forceinline__ void store(const float (&w)[kVec], int64_t at) const {
    Halves<kVec> a, b;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const SplitWeight half = split_weight(w[i]);
      a.v[i] = half.bf16, b.v[i] = uint16_t(half.rest);
    }
    *reinterpret_cast<Halves<kVec>*>(upper + at) = a;
    if (lower) *reinterpret_cast<Halves<kVec>*>(lower + at) = b;
  }
};

template <class W, int kVec>
__global__ __launch_bounds__(kThreads) void adamw_kernel(W weights, float* m, float* v,
                                                         const float* grad, int64_t n,
                                                         AdamScalars s, const double* control) {
  if (control[2] == 0) return;
  const float factor = float(control[1]);
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVec;
  if (at >= n) return;
  float w[kVec], m1[kVec], m2[kVec], g[kVec];
  load<kVec>(g, grad + at), load<kVec>(m1, m + at), load<kVec>(m2, v + at);
  weights.load(w, at);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    g[i] *= factor;
    m1[i] = s.beta1 * m1[i] + s.rest1 * g[i];
    m2[i] = s.beta2 * m2[i] + s.rest2 * (g[i] * g[i]);
    w[i] = s.keep * w[i] - s.step_size * m1[i] / (sqrtf(m2[i]) * s.inverse_root2 + s.eps);
  }
  store<kVec>(m + at, m1), store<kVec>(v + at, m2), weights.store(w, at);
}

// kJoin: master = the weights; else the reverse.
template <bool kJoin, int kVec>
__global__ __launch_bounds__(kThreads) void halves_kernel(float* master, SplitWeights weights,
                                                          int64_t n) {
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVec;
  if (at >= n) return;
  float w[kVec];
  if constexpr (kJoin)
    weights.load(w, at), store<kVec>(master + at, w);
  else
    load<kVec>(w, master + at), weights.store(w, at);
}

// f(std::integral_constant<int, kVec>, CTAs) for a kernel over n elements, 4 a thread where all
// pointers allow it.
template <class F>
void by_width(int64_t n, std::initializer_list<Tensor> tensors, F&& f) {
  bool wide = n % 4 == 0;
  for (const Tensor& t : tensors) wide = wide && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  const int64_t a_block = kThreads * (wide ? 4 : 1);
  const auto blocks = unsigned((n + a_block - 1) / a_block);
  if (wide) return f(std::integral_constant<int, 4>{}, blocks);
  f(std::integral_constant<int, 1>{}, blocks);
}

SplitWeights halves_of(Tensor compute, Tensor rest) {
  return {reinterpret_cast<uint16_t*>(compute.ptr<bf16>()), rest ? rest.ptr<int16_t>() : nullptr};
}

}  // namespace

void CudaOps::reduce_to(Tensor out, Tensor x, bool squares) {
  check(out.numel() == 1, "sum: out {} is not one element", out.shape.str());
  const int64_t n = x.numel();
  if (n == 0) return;
  const int64_t wanted = (n + 4 * kThreads - 1) / (4 * kThreads);
  const int blocks = int(std::min<int64_t>(wanted, int64_t(prop_.multiProcessorCount) * 8));
  auto* partial = reinterpret_cast<double*>(scratch(size_t(blocks) * sizeof(double)));
  if (x.dtype == DType::f64) {
    const auto kernel =
        squares ? partial_sum_kernel<double, true> : partial_sum_kernel<double, false>;
    kernel<<<blocks, kThreads, 0, stream_>>>(partial, x.ptr<double>(), n);
  } else {
    const auto kernel =
        squares ? partial_sum_kernel<float, true> : partial_sum_kernel<float, false>;
    kernel<<<blocks, kThreads, 0, stream_>>>(partial, x.ptr<float>(), n);
  }
  CUDA_CHECK(cudaGetLastError());
  add_partial_sums_kernel<<<1, kThreads, 0, stream_>>>(out.ptr<double>(), partial, blocks);
  CUDA_CHECK(cudaGetLastError());
}

void CudaOps::sum(Tensor out, Tensor x) {
  reduce_to(out, x, false);
}

void CudaOps::square_sum(Tensor out, Tensor x) {
  reduce_to(out, x, true);
}

void CudaOps::clip_control(Tensor control, Tensor square_sum, Tensor nll_sum, double max_norm) {
  check(control.numel() == 3 && square_sum.numel() == 1 && (!nll_sum || nll_sum.numel() == 1),
        "clip_control: control {}, square_sum {}, nll_sum {}", control.shape.str(),
        square_sum.shape.str(), nll_sum.shape.str());
  clip_control_kernel<<<1, 1, 0, stream_>>>(control.ptr<double>(), square_sum.ptr<double>(),
                                            nll_sum ? nll_sum.ptr<double>() : nullptr, max_norm);
  CUDA_CHECK(cudaGetLastError());
}

void CudaOps::adamw(Tensor master, Tensor compute, Tensor m, Tensor v, Tensor grad,
                    const AdamStep& step, Tensor control) {
  const int64_t n = master.numel();
  check(m.numel() == n && v.numel() == n && grad.numel() == n && control.numel() == 3 &&
            (!compute || compute.numel() == n),
        "adamw: master {}, compute {}, m {}, v {}, grad {}, control {}", master.shape.str(),
        compute.shape.str(), m.shape.str(), v.shape.str(), grad.shape.str(), control.shape.str());
  check(step.t >= 1, "adamw: updates count from 1, not {}", step.t);
  if (n == 0) return;
  if (compute.data == master.data) compute = Tensor();
  AdamScalars s;  // in double on the host: 1 - beta2^t cancels in fp32
  s.keep = float(1 - step.lr * step.weight_decay);
  s.beta1 = float(step.beta1), s.rest1 = float(1 - step.beta1);
  s.beta2 = float(step.beta2), s.rest2 = float(1 - step.beta2);
  s.step_size = float(step.lr / (1 - std::pow(step.beta1, double(step.t))));
  s.inverse_root2 = float(1 / std::sqrt(1 - std::pow(step.beta2, double(step.t))));
  s.eps = float(step.eps);
  const auto update = [&](auto weights) {
    using W = decltype(weights);
    by_width(n, {master, m, v, grad, compute}, [&](auto width, unsigned blocks) {
      adamw_kernel<W, decltype(width)::value><<<blocks, kThreads, 0, stream_>>>(
          weights, m.ptr<float>(), v.ptr<float>(), grad.ptr<float>(), n, s, control.ptr<double>());
      CUDA_CHECK(cudaGetLastError());
    });
  };
  if (master.dtype == DType::i16) return update(halves_of(compute, master));
  dispatch(compute ? compute.dtype : DType::f32, [&](auto type) {
    using T = typename decltype(type)::type;
    update(WholeWeights<T>{master.ptr<float>(), compute ? compute.ptr<T>() : nullptr});
  });
}

template <bool kJoin>
void CudaOps::halves(Tensor master, Tensor compute, Tensor rest) {
  const int64_t n = master.numel();
  check(compute.numel() == n && (!rest || rest.numel() == n), "{}: master {}, halves {} and {}",
        kJoin ? "join" : "split", master.shape.str(), compute.shape.str(), rest.shape.str());
  if (n == 0) return;
  by_width(n, {master, compute, rest}, [&](auto width, unsigned blocks) {
    halves_kernel<kJoin, decltype(width)::value>
        <<<blocks, kThreads, 0, stream_>>>(master.ptr<float>(), halves_of(compute, rest), n);
    CUDA_CHECK(cudaGetLastError());
  });
}

void CudaOps::split(Tensor compute, Tensor rest, Tensor master) {
  halves<false>(master, compute, rest);
}

void CudaOps::join(Tensor master, Tensor compute, Tensor rest) {
  check(bool(rest) || master.numel() == 0, "join: the lower halves are absent");
  halves<true>(master, compute, rest);
}

}  // namespace hgrn

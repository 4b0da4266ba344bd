// Linear layers of few rows (decoding): y (N,O) = f(x) w (O,I)^T + b, N = 1..8, where f(x) (N,I) is
// x itself, norm(x + branch), or the GLU act(g) u of [g|u].
//
// The weights are read once and bound the time, so everything else is done on the way: a warp
// takes kOut rows of w, lane after lane 16 bytes, and sums against all N rows of f(x) in shared
// memory, in fp32. Every CTA works out f(x) for itself: D or F elements from the L2 cache cost less
// than another launch. Inside a recorded graph the first weights are under way before the kernel
// before has ended (launch.cuh). The order of sums depends on the shape alone.
// Twin: kernels/cpu/gemm.cpp   Test: tests/ops/test_linear.cpp, tests/ops/test_decode.cpp
#include <algorithm>

#include "cuda/activation.cuh"
#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace hgrn {
namespace {

constexpr int kMaxRows = 8;
constexpr int kMaxSharedBytes = 64 << 10;

enum class Input { plain, norm, glu };

template <class T>
struct GemvArgs {
  T* y;
  const T* w;
  const T* bias;  // may be null
  const T* x;     // (N,I); glu: (N,2I)
  int64_t O;
  int I, N;
  Input input;
  // norm
  T* sum;           // x + branch is written here; null without branch
  const T* branch;  // may be null
  const float* norm_w;
  const float* norm_b;  // may be null
  float eps;
  bool layer;
  // glu
  Act act;
};

// Row n of norm(x + branch) into `out`, by one warp. A lane reads back only what it wrote itself.
template <class T, int kVec>
__device__ __forceinline__ void norm_row(const GemvArgs<T>& a, T* out, int n) {
  const int lane = threadIdx.x % 32, I = a.I;
  const T* x = a.x + int64_t(n) * I;
  float total = 0, squares = 0;
#pragma unroll 4
  for (int col = lane * kVec; col < I; col += 32 * kVec) {
    float v[kVec];
    load<kVec>(v, x + col);
    if (a.branch) {
      float add[kVec];
      load<kVec>(add, a.branch + int64_t(n) * I + col);
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[i] = rounded<T>(v[i] + add[i]);
      if (blockIdx.x == 0) store<kVec>(a.sum + int64_t(n) * I + col, v);
    }
    store<kVec>(out + col, v);
#pragma unroll
    for (int i = 0; i < kVec; ++i) total += v[i], squares += v[i] * v[i];
  }
  float mean = 0;
  if (a.layer) {  // the squares of centred values: E[x^2] - mean^2 would cancel
    mean = warp_sum(total) / float(I);
    squares = 0;
    for (int col = lane * kVec; col < I; col += 32 * kVec) {
      float v[kVec];
      load<kVec>(v, out + col);
#pragma unroll
      for (int i = 0; i < kVec; ++i) squares += (v[i] - mean) * (v[i] - mean);
    }
  }
  const float r = 1.0f / sqrtf(warp_sum(squares) / float(I) + a.eps);
#pragma unroll 4
  for (int col = lane * kVec; col < I; col += 32 * kVec) {
    float v[kVec], w[kVec], b[kVec] = {};
    load<kVec>(v, out + col);
    load<kVec>(w, a.norm_w + col);
    if (a.norm_b) load<kVec>(b, a.norm_b + col);
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = fmaf((v[i] - mean) * r, w[i], b[i]);
    store<kVec>(out + col, v);
  }
}

// f(x) into shared memory, rows of I; rows from N to kRows are zero.
template <class T, int kRows, int kVec>
__device__ __forceinline__ void fill_input(const GemvArgs<T>& a, T* xs) {
  const int I = a.I;
  if (a.input == Input::norm) {
    for (int n = threadIdx.x / 32; n < a.N; n += blockDim.x / 32)
      norm_row<T, kVec>(a, xs + n * I, n);
  } else {
    for (int n = 0; n < a.N; ++n)
      for (int col = threadIdx.x * kVec; col < I; col += blockDim.x * kVec) {
        float v[kVec];
        if (a.input == Input::plain) {
          load<kVec>(v, a.x + int64_t(n) * I + col);
        } else {
          float u[kVec];
          load<kVec>(v, a.x + int64_t(n) * 2 * I + col);
          load<kVec>(u, a.x + int64_t(n) * 2 * I + I + col);
#pragma unroll
          for (int i = 0; i < kVec; ++i) v[i] = activate<T>(v[i], a.act) * u[i];
        }
        store<kVec>(xs + n * I + col, v);
      }
  }
  for (int at = a.N * I + threadIdx.x; at < kRows * I; at += blockDim.x) {
    const float zero[1] = {0};
    store<1>(xs + at, zero);
  }
}

// kAhead packs of each of kOut rows of w.
template <class T, int kOut, int kVec, int kAhead>
struct WeightPacks {
  Pack<T, kVec> pack[kOut][kAhead];

  __device__ __forceinline__ void load(const T* w, int outs, int I, int col) {
#pragma unroll
    for (int j = 0; j < kOut; ++j)
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (j < outs && col + k * 32 * kVec < I)
          pack[j][k].load(w + int64_t(j) * I + col + k * 32 * kVec);
  }
};

template <class T, int kRows, int kOut, int kVec>
__global__ __launch_bounds__(256) void gemv_kernel(const GemvArgs<T> a) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  T* const xs = reinterpret_cast<T*>(dynamic);  // [kRows][I]
  constexpr int kAhead = kVec == 1 ? 8 : kOut == 1 ? 4 : 2;
  constexpr int kStride = 32 * kVec * kAhead;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, I = a.I;
  const int64_t first = (int64_t(blockIdx.x) * (blockDim.x / 32) + warp) * kOut;
  const int outs = int(min(int64_t(kOut), max(int64_t(0), a.O - first)));
  const T* const w = a.w + first * I;

  WeightPacks<T, kOut, kVec, kAhead> next;
  next.load(w, outs, I, lane * kVec);
  wait_for_previous();
  fill_input<T, kRows, kVec>(a, xs);
  __syncthreads();

  float sums[kOut][kRows] = {};
  for (int col = lane * kVec; col < I; col += kStride) {
    const WeightPacks<T, kOut, kVec, kAhead> now = next;
    next.load(w, outs, I, col + kStride);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int at = col + k * 32 * kVec;
      if (at >= I) continue;
      float wv[kOut][kVec];
#pragma unroll
      for (int j = 0; j < kOut; ++j) now.pack[j][k].unpack(wv[j]);
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        float xv[kVec];
        load<kVec>(xv, xs + n * I + at);
#pragma unroll
        for (int j = 0; j < kOut; ++j)
#pragma unroll
          for (int i = 0; i < kVec; ++i) sums[j][n] = fmaf(wv[j][i], xv[i], sums[j][n]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kOut; ++j)
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const float total[1] = {warp_sum(sums[j][n])};
      if (lane != 0 || j >= outs || n >= a.N) continue;
      float bias[1] = {0};
      if (a.bias) load<1>(bias, a.bias + first + j);
      bias[0] += total[0];
      store<1>(a.y + int64_t(n) * a.O + first + j, bias);
    }
}

template <class T, int kRows, int kOut, int kVec>
void launch_gemv(const GemvArgs<T>& a, cudaStream_t stream, bool early) {
  const auto kernel = gemv_kernel<T, kRows, kOut, kVec>;
  const size_t bytes = size_t(kRows) * size_t(a.I) * sizeof(T);
  if (bytes > (48u << 10))
    CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes));
  // Few outputs: small CTAs, so that all multiprocessors read.
  const int threads = a.O < 2048 ? 128 : 256;
  const int64_t outs = int64_t(threads / 32) * kOut;
  launch(kernel, dim3(unsigned((a.O + outs - 1) / outs)), dim3(unsigned(threads)), bytes, stream,
         early, a);
}

// Several outputs a warp share what is read of f(x), where there are enough outputs for all warps.
template <class T, int kRows>
void launch_rows(const GemvArgs<T>& a, bool wide, int sms, cudaStream_t stream, bool early) {
  if (!wide) return launch_gemv<T, kRows, 1, 1>(a, stream, early);
  if (a.O >= int64_t(sms) * (kRows >= 4 ? 32 : 64))
    return launch_gemv<T, kRows, 4, kWide>(a, stream, early);
  launch_gemv<T, kRows, 1, kWide>(a, stream, early);
}

int rounded_rows(int64_t N) {
  return N <= 1 ? 1 : N <= 2 ? 2 : N <= 4 ? 4 : 8;
}

}  // namespace

bool CudaOps::few_rows(int64_t N, int64_t I) const {
  return N >= 1 && N <= kMaxRows && I > 0 &&
         size_t(rounded_rows(N)) * size_t(I) * size_of(act_dtype_) <= size_t(kMaxSharedBytes);
}

// norm and act: at most one of them; h (N,2I) = [g|u] where `act` is given.
void CudaOps::gemv(Tensor y, Tensor x, const NormInput* norm, const Act* act, Tensor w, Tensor b) {
  const bool early = may_start_early(stream_, prop_.major);
  dispatch(act_dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    GemvArgs<T> a{};
    a.y = y.ptr<T>(), a.w = w.ptr<T>(), a.bias = b ? b.ptr<T>() : nullptr, a.x = x.ptr<T>();
    a.O = w.rows(), a.I = int(w.cols()), a.N = int(y.rows());
    a.input = norm ? Input::norm : act ? Input::glu : Input::plain;
    if (norm) {
      a.branch = norm->branch ? norm->branch.ptr<T>() : nullptr;
      a.sum = norm->branch ? norm->sum.ptr<T>() : nullptr;
      a.norm_w = norm->w.ptr<float>(), a.norm_b = norm->b ? norm->b.ptr<float>() : nullptr;
      a.eps = norm->eps, a.layer = norm->kind == Norm::layer;
    }
    if (act) a.act = *act;
    bool wide = false;
    dispatch_width(a.I, {a.w, a.x, a.branch, a.sum, a.norm_w, a.norm_b},
                   [&](auto width) { wide = width() == kWide; });
    const int sms = prop_.multiProcessorCount;
    switch (rounded_rows(a.N)) {
      case 1: return launch_rows<T, 1>(a, wide, sms, stream_, early);
      case 2: return launch_rows<T, 2>(a, wide, sms, stream_, early);
      case 4: return launch_rows<T, 4>(a, wide, sms, stream_, early);
      default: return launch_rows<T, 8>(a, wide, sms, stream_, early);
    }
  });
}

void CudaOps::norm_linear_forward(Tensor y, const NormInput& in, Tensor w, Tensor b) {
  const int64_t N = in.x.rows(), I = in.x.cols();
  if (!few_rows(N, I)) return Ops::norm_linear_forward(y, in, w, b);
  check(w.cols() == I && y.rows() == N && y.cols() == w.rows() && in.w.numel() == I &&
            (!in.branch || (in.branch.numel() == in.x.numel() && in.sum.numel() == in.x.numel() &&
                            in.sum.data != in.x.data)),
        "norm_linear_forward: y {}, x {}, branch {}, w {}", y.shape.str(), in.x.shape.str(),
        in.branch.shape.str(), w.shape.str());
  gemv(y, in.x, &in, nullptr, w, b);
}

void CudaOps::glu_linear_forward(Tensor y, Tensor h, Tensor gu, Act act, Tensor w, Tensor b) {
  const int64_t N = gu.rows(), I = w.cols();
  if (!few_rows(N, I)) return Ops::glu_linear_forward(y, h, gu, act, w, b);
  check(gu.cols() == 2 * I && y.rows() == N && y.cols() == w.rows(),
        "glu_linear_forward: y {}, gu {}, w {}", y.shape.str(), gu.shape.str(), w.shape.str());
  gemv(y, gu, nullptr, &act, w, b);
}

}  // namespace hgrn

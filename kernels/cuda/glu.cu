// Gated linear unit. gu (N,2F) = [g|u], h (N,F) = a(g) u, a = identity, SiLU or sigmoid.
//   du = dh a(g);  dg = dh u a'(g)
//   SiLU: a = g s, a' = s (1 + g (1 - s));  sigmoid: a = s, a' = s (1 - s);  s = 1/(1 + exp(-g))
// Memory-bound: 6 bytes an element forward, 10 backward in bf16. A thread owns a few columns and
// walks down rows, so that no index needs a division.
// At the end, which of the block's products take the GLU with them: glu_gemm_sm90.cu.
// Twin: kernels/cpu/glu.cpp, src/ops/ops.cpp   Test: tests/ops/test_glu.cpp, test_glu_linear.cpp
#include <algorithm>
#include <cstdlib>

#include "cuda/activation.cuh"
#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/glu_gemm.h"
#include "cuda/vec.cuh"

namespace hgrn {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;  // rows a thread has in flight

// a and a' at g.
template <class T, Act kAct>
__device__ __forceinline__ float2 activate_with_slope(float g) {
  if constexpr (kAct == Act::identity) return {g, 1.0f};
  const float s = sigmoid<T>(g);
  return kAct == Act::silu ? float2{g * s, s * (1 + g * (1 - s))} : float2{s, s * (1 - s)};
}

template <class T, int kVec, Act kAct>
__global__ __launch_bounds__(kThreads) void glu_forward_kernel(T* h, const T* gu, int64_t N,
                                                               int64_t F) {
  const int64_t col = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kVec;
  if (col >= F) return;
  const int64_t step = int64_t(gridDim.y) * blockDim.y;
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < N; row += step * kRows) {
    Pack<T, kVec> g[kRows], u[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int64_t r = row + k * step;
      if (r >= N) continue;
      g[k].load(gu + r * 2 * F + col);
      u[k].load(gu + r * 2 * F + F + col);
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int64_t r = row + k * step;
      if (r >= N) continue;
      float gv[kVec], uv[kVec];
      g[k].unpack(gv), u[k].unpack(uv);
#pragma unroll
      for (int i = 0; i < kVec; ++i) uv[i] *= activate<T>(gv[i], kAct);
      store<kVec>(h + r * F + col, uv);
    }
  }
}

// kAgain: h is wanted. A kernel of its own, since h costs registers, which are warps in flight.
template <class T, int kVec, Act kAct, bool kAgain>
__global__ __launch_bounds__(kThreads) void glu_backward_kernel(T* dgu, T* h, const T* dh,
                                                                const T* gu, int64_t N, int64_t F) {
  const int64_t col = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kVec;
  if (col >= F) return;
  const int64_t step = int64_t(gridDim.y) * blockDim.y;
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < N;
       row += step * (kRows / 2)) {
    Pack<T, kVec> g[kRows / 2], u[kRows / 2], d[kRows / 2];
#pragma unroll
    for (int k = 0; k < kRows / 2; ++k) {
      const int64_t r = row + k * step;
      if (r >= N) continue;
      g[k].load(gu + r * 2 * F + col);
      u[k].load(gu + r * 2 * F + F + col);
      d[k].load(dh + r * F + col);
    }
#pragma unroll
    for (int k = 0; k < kRows / 2; ++k) {
      const int64_t r = row + k * step;
      if (r >= N) continue;
      float gv[kVec], uv[kVec], dv[kVec], hv[kVec];
      g[k].unpack(gv), u[k].unpack(uv), d[k].unpack(dv);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float2 a = activate_with_slope<T, kAct>(gv[i]);
        hv[i] = uv[i] * a.x;
        gv[i] = dv[i] * uv[i] * a.y;
        uv[i] = dv[i] * a.x;
      }
      store<kVec>(dgu + r * 2 * F + col, gv);
      store<kVec>(dgu + r * 2 * F + F + col, uv);
      if constexpr (kAgain) store<kVec>(h + r * F + col, hv);
    }
  }
}

template <class F>
void dispatch_act(Act act, F&& f) {
  switch (act) {
    case Act::identity: return f(std::integral_constant<Act, Act::identity>{});
    case Act::silu: return f(std::integral_constant<Act, Act::silu>{});
    case Act::sigmoid: return f(std::integral_constant<Act, Act::sigmoid>{});
  }
  fail(Exit::failed, "glu: unknown activation {}", int(act));
}

struct Grid {
  dim3 blocks, threads;
};

Grid grid_for(int64_t N, int64_t vectors, int rows_a_thread) {
  Grid g;
  const int64_t x = std::min<int64_t>(kThreads, (vectors + 31) / 32 * 32);
  const int64_t y = kThreads / x;
  const int64_t rows = y * rows_a_thread;
  g.threads = dim3(unsigned(x), unsigned(y));
  g.blocks = dim3(unsigned((vectors + x - 1) / x),
                  unsigned(std::min<int64_t>((N + rows - 1) / rows, 65535)));
  return g;
}

}  // namespace

void CudaOps::glu_forward(Tensor h, Tensor gu, Act act) {
  const int64_t N = h.rows(), F = h.cols();
  check(gu.rows() == N && gu.cols() == 2 * F, "glu_forward: h {}, gu {}", h.shape.str(),
        gu.shape.str());
  if (N == 0 || F == 0) return;
  dispatch(act_dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_width(F, {h.data, gu.data}, [&](auto width) {
      dispatch_act(act, [&](auto a) {
        const Grid g = grid_for(N, F / width(), kRows);
        glu_forward_kernel<T, width(), a()>
            <<<g.blocks, g.threads, 0, stream_>>>(h.ptr<T>(), gu.ptr<T>(), N, F);
        CUDA_CHECK(cudaGetLastError());
      });
    });
  });
}

void CudaOps::glu_backward(Tensor dgu, Tensor dh, Tensor gu, Act act, Tensor h) {
  const int64_t N = dh.rows(), F = dh.cols();
  check(gu.rows() == N && gu.cols() == 2 * F && dgu.rows() == N && dgu.cols() == 2 * F &&
            (!h || h.numel() == N * F),
        "glu_backward: dgu {}, dh {}, gu {}, h {}", dgu.shape.str(), dh.shape.str(), gu.shape.str(),
        h.shape.str());
  if (N == 0 || F == 0) return;
  dispatch(act_dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_width(F, {dgu.data, dh.data, gu.data, h.data}, [&](auto width) {
      dispatch_act(act, [&](auto a) {
        const Grid g = grid_for(N, F / width(), kRows / 2);
        const auto kernel = h ? glu_backward_kernel<T, width(), a(), true>
                              : glu_backward_kernel<T, width(), a(), false>;
        kernel<<<g.blocks, g.threads, 0, stream_>>>(dgu.ptr<T>(), h ? h.ptr<T>() : nullptr,
                                                    dh.ptr<T>(), gu.ptr<T>(), N, F);
        CUDA_CHECK(cudaGetLastError());
      });
    });
  });
}

bool CudaOps::fused_glu(int64_t N, int64_t F, int64_t D,
                        std::initializer_list<const void*> data) const {
  // HGRN_FUSED_GLU=0 or 1 in the environment: never, or wherever the kernels can, to compare.
  const char* const forced = std::getenv("HGRN_FUSED_GLU");
  if (forced && forced[0] == '0') return false;
  if (act_dtype_ != DType::bf16 || !glu_gemm::fits(prop_.major, N, F, D)) return false;
  for (const void* p : data)
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  if (forced && forced[0] == '1') return true;
  // The fused kernels won at every size of the models that tools/glu_gemm_check.cu times. Below a
  // tile an SM, cuBLASLt's smaller tiles use the card better.
  return (N + 127) / 128 * ((F + 255) / 256) >= prop_.multiProcessorCount;
}

void CudaOps::linear_glu_forward(Tensor h, Tensor gu, Tensor x, Tensor w, Tensor b, Act act) {
  const int64_t N = x.rows(), D = x.cols(), F = h.cols();
  if (!fused_glu(N, F, D, {h.data, gu.data, x.data, w.data, b.data}))
    return Ops::linear_glu_forward(h, gu, x, w, b, act);
  check(h.rows() == N && gu.rows() == N && gu.cols() == 2 * F && w.rows() == 2 * F &&
            w.cols() == D && (!b || b.numel() == 2 * F),
        "linear_glu_forward: h {}, gu {}, x {}, w {}, b {}", h.shape.str(), gu.shape.str(),
        x.shape.str(), w.shape.str(), b.shape.str());
  check(h.dtype == act_dtype_ && gu.dtype == act_dtype_ && x.dtype == act_dtype_ &&
            w.dtype == act_dtype_ && (!b || b.dtype == act_dtype_),
        "linear_glu_forward: tensors must be {}", name_of(act_dtype_));
  glu_gemm::forward(h.ptr<bf16>(), gu.ptr<bf16>(), x.ptr<bf16>(), w.ptr<bf16>(),
                    b ? b.ptr<bf16>() : nullptr, N, F, D, act, {.sms = prop_.multiProcessorCount},
                    stream_);
}

void CudaOps::glu_linear_backward(Tensor dgu, Tensor dh, Grad dw, Grad db, Grad db_gu, Tensor dy,
                                  Tensor h, Tensor gu, Tensor w, Act act, bool again) {
  const int64_t N = dy.rows(), D = dy.cols(), F = w.cols();
  if (!fused_glu(N, F, D, {dgu.data, dy.data, h.data, gu.data, w.data}))
    return Ops::glu_linear_backward(dgu, dh, dw, db, db_gu, dy, h, gu, w, act, again);
  check(w.rows() == D && dgu.rows() == N && dgu.cols() == 2 * F && h.rows() == N && h.cols() == F &&
            gu.rows() == N && gu.cols() == 2 * F && (!db_gu || db_gu.to.numel() == 2 * F),
        "glu_linear_backward: dgu {}, dy {}, h {}, gu {}, w {}, db_gu {}", dgu.shape.str(),
        dy.shape.str(), h.shape.str(), gu.shape.str(), w.shape.str(), db_gu.to.shape.str());
  check(dgu.dtype == act_dtype_ && dy.dtype == act_dtype_ && h.dtype == act_dtype_ &&
            gu.dtype == act_dtype_ && w.dtype == act_dtype_,
        "glu_linear_backward: dgu, dy, h, gu and w must be {}", name_of(act_dtype_));
  const int64_t rows = glu_gemm::column_sum_rows(N);
  const size_t bytes = size_t(rows * 2 * F) * sizeof(float);
  // Where the plan has no room for them (at the 1B model's widths, from 60 Ki rows on), a pass of
  // their own.
  const bool sums_fit = !planned_scratch_ || bytes <= planned_scratch_.bytes();
  float* const sums = db_gu && sums_fit ? reinterpret_cast<float*>(scratch(bytes)) : nullptr;
  glu_gemm::backward(dgu.ptr<bf16>(), again ? h.ptr<bf16>() : nullptr, sums, dy.ptr<bf16>(),
                     gu.ptr<bf16>(), w.ptr<bf16>(), N, F, D, act,
                     {.sms = prop_.multiProcessorCount}, stream_);
  if (sums) add_rows(db_gu, sums, rows, 2 * F);
  linear_backward({}, dw, db, dy, h, {});
  if (db_gu && !sums) linear_backward({}, {}, db_gu, dgu, {}, {});
}

}  // namespace hgrn

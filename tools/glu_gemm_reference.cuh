// What glu_gemm_check.cu and glu_gemm_time.cu share: shapes, operands, and the same products and
// passes by cuBLAS and elementwise kernels.
#pragma once
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cuda/activation.cuh"
#include "cuda/cuda_check.h"
#include "cuda/vec.cuh"

namespace hgrn::glu_cases {

struct Case {
  const char* name;
  int64_t N, F, D;
  Act act;
  bool bias;
};
inline constexpr Case kModels[] = {
    {"44M", 65536, 1408, 512, Act::identity, true}, {"150M", 53248, 2048, 768, Act::silu, false},
    {"385M", 30720, 2816, 1024, Act::silu, false},  {"1B", 20480, 5632, 2048, Act::silu, false},
    {"2.9B", 16384, 6912, 2560, Act::silu, false},  {"ragged", 20011, 2816, 1024, Act::silu, true},
};

// ---- memory
struct Memory {
  std::vector<void*> blocks;
  ~Memory() {
    for (void* p : blocks) cudaFree(p);
  }
  template <class T>
  T* take(int64_t count) {
    void* p = nullptr;
    CUDA_CHECK(cudaMalloc(&p, size_t(count) * sizeof(T)));
    blocks.push_back(p);
    return static_cast<T*>(p);
  }
};

__device__ inline uint32_t mix(uint64_t v) {
  v = (v ^ (v >> 31)) * 0x7fb5d329728ea185ull;
  v = (v ^ (v >> 27)) * 0x81dadef4bc2dd44dull;
  return uint32_t(v >> 32);
}
// Of unit variance times scale: the sum of four uniform numbers.
static __global__ void fill_kernel(bf16* p, int64_t count, float scale, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x) {
    float sum = 0;
    for (int k = 0; k < 4; ++k) sum += mix((seed * 4 + k) << 40 ^ i * 2654435761ull) * 0x1p-32f;
    p[i] = __float2bfloat16_rn((sum - 2) * 1.7320508f * scale);
  }
}
inline bf16* filled(Memory& memory, int64_t count, double scale, uint64_t seed) {
  bf16* const p = memory.take<bf16>(count);
  fill_kernel<<<1024, 256>>>(p, count, float(scale), seed);
  CUDA_CHECK(cudaGetLastError());
  return p;
}

// ---- references
inline void cublas(cublasStatus_t s) {
  check(s == CUBLAS_STATUS_SUCCESS, "cuBLAS: status {}", int(s));
}
// out (rows, columns) = a (rows, depth) b by cuBLAS, in bf16 or fp32: b (columns, depth), or
// (depth, columns).
inline void product(cublasHandle_t handle, void* out, cudaDataType type, const bf16* a,
                    const bf16* b, int64_t rows, int64_t columns, int64_t depth,
                    bool b_rows_are_depth) {
  const float one = 1, zero = 0;
  cublas(cublasGemmEx(handle, b_rows_are_depth ? CUBLAS_OP_N : CUBLAS_OP_T, CUBLAS_OP_N,
                      int(columns), int(rows), int(depth), &one, b, CUDA_R_16BF,
                      int(b_rows_are_depth ? columns : depth), a, CUDA_R_16BF, int(depth), &zero,
                      out, type, int(columns), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// The elementwise passes as in glu.cu.
__device__ inline float2 slope(float g, Act act) {
  if (act == Act::identity) return {g, 1.0f};
  const float s = sigmoid<bf16>(g);
  return act == Act::silu ? float2{g * s, s * (1 + g * (1 - s))} : float2{s, s * (1 - s)};
}
template <bool kBackward>
__global__ __launch_bounds__(256) void glu_kernel(bf16* out, const bf16* dh, const bf16* gu,
                                                  int64_t N, int64_t F, Act act) {
  const int64_t col = (int64_t(blockIdx.x) * 256 + threadIdx.x) * 8;
  if (col >= F) return;
  for (int64_t row = blockIdx.y; row < N; row += gridDim.y) {
    float g[8], u[8], d[8];
    load<8>(g, gu + row * 2 * F + col);
    load<8>(u, gu + row * 2 * F + F + col);
    if constexpr (kBackward) {
      load<8>(d, dh + row * F + col);
      for (int i = 0; i < 8; ++i) {
        const float2 a = slope(g[i], act);
        g[i] = d[i] * u[i] * a.y;
        u[i] = d[i] * a.x;
      }
      store<8>(out + row * 2 * F + col, g);
      store<8>(out + row * 2 * F + F + col, u);
    } else {
      for (int i = 0; i < 8; ++i) u[i] *= activate<bf16>(g[i], act);
      store<8>(out + row * F + col, u);
    }
  }
}
template <bool kBackward>
void glu(bf16* out, const bf16* dh, const bf16* gu, const Case& c) {
  const dim3 blocks(unsigned((c.F / 8 + 255) / 256), unsigned(std::min<int64_t>(c.N, 16384)));
  glu_kernel<kBackward><<<blocks, 256>>>(out, dh, gu, c.N, c.F, c.act);
  CUDA_CHECK(cudaGetLastError());
}

struct Data {
  Memory memory;
  bf16 *x, *w, *bias, *dy, *down;
  explicit Data(const Case& c) {
    x = filled(memory, c.N * c.D, 1, 1);
    w = filled(memory, 2 * c.F * c.D, 2 / std::sqrt(double(c.D)), 2);
    bias = c.bias ? filled(memory, 2 * c.F, 1, 3) : nullptr;
    dy = filled(memory, c.N * c.D, 1, 4);
    down = filled(memory, c.D * c.F, 1 / std::sqrt(double(c.D)), 5);
  }
};

}  // namespace hgrn::glu_cases

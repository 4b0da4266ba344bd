// Launchers of the products with the GLU in them (glu_gemm_sm90.cu). Internal to kernels/cuda.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ops/seq_kernel.h"

namespace hgrn {

struct WaitReport;

namespace glu_gemm {

// Whether the kernels can take these operands: a Hopper, widths that TMA can stride over.
bool fits(int compute_major, int64_t N, int64_t F, int64_t D);

struct Options {
  int sms = 0;                   // of the card
  WaitReport* report = nullptr;  // HGRN_BOUNDED_WAITS
};

// All pointers are device memory, 16-byte aligned.
// gu (N,2F) = x (N,D) w (2F,D)^T + bias (2F, or null), h (N,F) = act(g) u
void forward(__nv_bfloat16* h, __nv_bfloat16* gu, const __nv_bfloat16* x, const __nv_bfloat16* w,
             const __nv_bfloat16* bias, int64_t N, int64_t F, int64_t D, Act act,
             const Options& options, cudaStream_t stream);
// dgu (N,2F) = the gradient of the GLU at gu (N,2F) for dh (N,F) = dy (N,D) w (D,F);
// h (N,F, or null) = what forward wrote, bit for bit; sums (column_sum_rows(N), 2F, or null): its
// column sums are those of dgu before it is rounded
void backward(__nv_bfloat16* dgu, __nv_bfloat16* h, float* sums, const __nv_bfloat16* dy,
              const __nv_bfloat16* gu, const __nv_bfloat16* w, int64_t N, int64_t F, int64_t D,
              Act act, const Options& options, cudaStream_t stream);
int64_t column_sum_rows(int64_t N);

}  // namespace glu_gemm
}  // namespace hgrn

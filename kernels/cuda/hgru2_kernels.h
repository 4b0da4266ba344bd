// Launchers of the HGRU2 kernels, and what they take. Internal to kernels/cuda.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ops/seq_kernel.h"

namespace hgrn::hgru2 {

// All pointers are device memory; null = absent. E = element type of the activations.
template <class E>
struct Call {
  int64_t B, T, D, H;
  int n;
  Act output_act, input_act;
  float query_scale;
  const E* x;            // (B,T,3D) = [q|f|i]
  const float* bound;    // (D)
  const uint8_t* reset;  // (B,T)
  const float* h0;       // (B,H,n,n)
  void* states;          // saved states, one a 64 tokens
  // forward
  E* y;       // (B,T,D)
  float* hT;  // (B,H,n,n)
  // backward
  const E* dy;            // (B,T,D)
  const float* dhT;       // (B,H,n,n)
  E* dx;                  // (B,T,3D)
  float* dh0;             // (B,H,n,n)
  float* dbound_partial;  // (B,D), null = dbound is not wanted
};

// Tensor cores, bf16, n = 64 or 128. states: (B,H,ceil(T/64)) blocks of n*n bf16 in the order of
// the backward kernel's fragments.
void forward_tensor(const Call<__nv_bfloat16>& call, cudaStream_t stream);
void backward_tensor(const Call<__nv_bfloat16>& call, cudaStream_t stream);

// Plain recurrences, fp32 or bf16, n = 1..256. states: (B,H,ceil(T/64),n,n) fp32.
template <class E>
void forward_plain(const Call<E>& call, cudaStream_t stream);
template <class E>
void backward_plain(const Call<E>& call, cudaStream_t stream);

// dbound[d] += sum over b of partial[b][d], in the order of b.
void add_bound_gradient(float* dbound, const float* partial, int64_t B, int64_t D,
                        cudaStream_t stream);

}  // namespace hgrn::hgru2

// Launchers of the HGRU2 kernels, and what they take. Internal to kernels/cuda.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "ops/seq_kernel.h"

namespace hgrn::hgru2 {

// How a launch lays heads over the card: the first `whole` heads one CTA each, the rest split into
// segments of `chunks` chunks of 64 tokens, one CTA each. segments == 1: all heads are whole.
constexpr int kMaxSegments = 16;
struct Split {
  int whole = 0, segments = 1, chunks = 0;
  int64_t split_heads(int64_t heads) const { return segments > 1 ? heads - whole : 0; }
  int64_t boundaries(int64_t heads) const { return split_heads(heads) * (segments - 1); }
  int64_t ctas(int64_t heads) const { return heads - split_heads(heads) * (1 - segments); }
};
// slots: CTAs of a wave.
Split plan_split(int64_t heads, int64_t T, int64_t slots);

// How the Hopper kernels lay heads over SMs where there are more heads than those: the chunks of
// all heads, in the order of the work, stand in a row that is cut into as many equal runs as there
// are slots, a CTA each: as many as SMs, or fewer where more would make the longest run no shorter
// (128 of 132 for 512 heads of eight chunks: four whole heads each). A run begins inside a head and
// ends inside another, and a head is cut once at most. A CTA does the part at the run's end first,
// whose state the next CTA wants for its last part: by then it is there, because all runs are as
// long. It goes from head to head without a pause: what the next one needs is on its way before
// this one is done. A CTA waits for the one before it alone, which has started by then, as CTAs
// start in the order of their numbers. An SM that another kernel holds makes a run start when the
// first ones end: heads in a CTA each would share that out better, and cost each time what a CTA's
// start costs.
struct Chain {
  int slots = 0;  // CTAs; 0: no chain
};

// CTAs an SM holds of the tensor-core kernels, as their __launch_bounds__ and shared memory say.
constexpr int forward_ctas(int n) {
  return n == 128 ? 2 : 4;
}
constexpr int backward_ctas(int n) {
  return n == 128 ? 1 : 2;
}

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
  Split split;           // tensor cores only
  Chain chain;           // sm90 only, and then nothing is split
  bool sm90;             // the Hopper kernels are wanted and the card is one: hgru2.cu
  // (split.boundaries() or chain.slots - 1, n+1, n), scratch: hgru2_scan.cu, hgru2_range.cuh
  float* boundaries;
  uint32_t* flags;  // (chain.slots), zero between launches
  // forward
  E* y;       // (B,T,D)
  float* hT;  // (B,H,n,n)
  // backward
  const E* dy;            // (B,T,D)
  const float* dhT;       // (B,H,n,n)
  E* dx;                  // (B,T,3D); until they are written, gradients of x may be anything
  float* dh0;             // (B,H,n,n)
  float* dbound_partial;  // (parts(),B,D), null = dbound is not wanted

  __host__ __device__ int parts() const {
    return chain.slots ? 2 : split.segments;
  }  // of a head, at most
  unsigned ctas() const { return unsigned(chain.slots ? chain.slots : split.ctas(B * H)); }
};

// Tensor cores, bf16, n = 64 or 128. states: (B,H,ceil(T/64)) blocks of n*n bf16 in the order of
// the backward kernel's fragments.
int tensor_smem_bytes(int n);  // shared memory a block of the largest of them needs
void forward_tensor(const Call<__nv_bfloat16>& call, cudaStream_t stream);
void backward_tensor(const Call<__nv_bfloat16>& call, cudaStream_t stream);
// n = 128 on Hopper: the same results, faster. The two above call them where Call::sm90 is set.
// Their gates are constants to the compiler: those that a config of ours can name.
inline bool takes_gates_sm90(const SeqOptions& o) {
  return (o.output_act == Act::silu || o.output_act == Act::sigmoid) &&
         (o.input_act == Act::silu || o.input_act == Act::identity);
}
void forward_sm90(const Call<__nv_bfloat16>& call, cudaStream_t stream);
void backward_sm90(const Call<__nv_bfloat16>& call, cudaStream_t stream);

// Fill boundaries, before a forward or backward with split heads.
void scan_forward(const Call<__nv_bfloat16>& call, cudaStream_t stream);
void scan_reverse(const Call<__nv_bfloat16>& call, cudaStream_t stream);

// Plain recurrences, fp32 or bf16, n = 1..256. states: (B,H,ceil(T/64),n,n) fp32.
template <class E>
void forward_plain(const Call<E>& call, cudaStream_t stream);
template <class E>
void backward_plain(const Call<E>& call, cudaStream_t stream);

// One token of each row, hT (B,H,n,n) in place; false, and nothing done, where n is not a multiple
// of 16. early: see launch.cuh.
template <class E>
bool step_token(const Call<E>& call, bool early, cudaStream_t stream);

}  // namespace hgrn::hgru2

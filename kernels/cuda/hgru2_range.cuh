// What a CTA of a Hopper HGRU2 kernel works on, and how a state goes from one CTA to another.
//
// A head is one CTA's, or is cut into segments that start from hgru2_scan.cu's sums, or is cut once
// by a chain (Chain, hgru2_kernels.h). A chain's state is handed over in fp32 through device
// memory: the CTA that is done with the head's first chunks leaves it in a slot of `boundaries` and
// raises that slot's flag; the one with the rest waits for the flag. boundaries: slots - 1 blocks
// of state in the order of the threads' registers, then the flags, which the launcher clears. Twin:
// none (the CPU kernels take a head as a whole)   Test: tools/hgru2_check.cu
#pragma once
#include <type_traits>

#include "cuda/cuda_check.h"
#include "cuda/hgru2_gates.cuh"
#include "cuda/hgru2_kernels.h"
#include "cuda/sm90.cuh"

namespace hgrn::hgru2 {

struct Range {
  int64_t bh, b, head;
  int chunks;              // of the head
  int first, end;          // this CTA's, in the direction of time
  int segment = 0;         // of segments; 0 otherwise
  bool whole = true;       // no other CTA has chunks of this head
  int from = -1, to = -1;  // slots of `boundaries`: where the state comes from and goes to
  int part = 0;            // row of dbound_partial

  // reverse: the head's last chunk is the first that is done.
  __device__ __forceinline__ Range(const Call<__nv_bfloat16>& a, bool reverse) {
    chunks = (int(a.T) + kChunk - 1) / kChunk;
    bh = blockIdx.x;
    first = 0, end = chunks;
    if (a.chain.slots && int(blockIdx.x) >= a.chain.whole) {
      const ChainCta cta = a.chain.cta[int(blockIdx.x) - a.chain.whole];
      bh = a.chain.whole + cta.head;
      first = reverse ? chunks - cta.until : cta.done;
      end = reverse ? chunks - cta.done : cta.until;
      if (cta.done > 0) from = cta.cut, part = 1;
      if (cta.until < chunks) to = cta.cut;
      whole = from < 0 && to < 0;
    } else if (!a.chain.slots && a.split.segments > 1 && int(blockIdx.x) >= a.split.whole) {
      const int cut = int(blockIdx.x) - a.split.whole;
      part = segment = cut % a.split.segments;
      bh = a.split.whole + cut / a.split.segments;
      whole = false;
      first = segment * a.split.chunks;
      end = min(chunks, first + a.split.chunks);
    }
    // The compiler does not see that all this is the same in all lanes; a reduction over the warp
    // ends in a uniform register, of which there are plenty.
    const auto uniform = [](int v) { return __reduce_max_sync(0xffffffffu, v); };
    bh = uniform(int(bh));
    first = uniform(first), end = uniform(end), from = uniform(from), to = uniform(to);
    part = uniform(part), segment = uniform(segment);
    b = uniform(int(bh / a.H)), head = uniform(int(bh % a.H));
  }
};

// The flag of a slot.
__device__ __forceinline__ uint32_t* flag_of(const Call<__nv_bfloat16>& a, int slot) {
  const int64_t block = int64_t(a.n + 1) * a.n;
  return reinterpret_cast<uint32_t*>(a.boundaries + (a.chain.slots - 1) * block) + slot;
}

// A role's accumulators to and from a slot; `thread` of kThreads. All of them call these.
template <int kThreads, int kTiles>
__device__ __forceinline__ void hand_over(const Call<__nv_bfloat16>& a, int slot,
                                          const float (&state)[kTiles][4], int thread,
                                          int barrier) {
  float4* const to = reinterpret_cast<float4*>(a.boundaries + slot * int64_t(a.n + 1) * a.n);
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
    to[j * kThreads + thread] = make_float4(state[j][0], state[j][1], state[j][2], state[j][3]);
  __threadfence();
  barrier_sync(barrier, kThreads);
  if (thread == 0) store_release(flag_of(a, slot), 1);
}
template <int kThreads, int kTiles>
__device__ __forceinline__ void take_over(float (&state)[kTiles][4], const Call<__nv_bfloat16>& a,
                                          int slot, int thread) {
  wait_until_set(flag_of(a, slot));
  const float4* const from =
      reinterpret_cast<const float4*>(a.boundaries + slot * int64_t(a.n + 1) * a.n);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float4 v = __ldcg(from + j * kThreads + thread);
    state[j][0] = v.x, state[j][1] = v.y, state[j][2] = v.z, state[j][3] = v.w;
  }
}

// launch(query gate, values' gate, whether there are resets), as constants: of the gates that
// takes_gates_sm90() lets through.
template <class Launch>
void dispatch_gates(const Call<__nv_bfloat16>& c, const Launch& launch) {
  const auto with_values = [&](auto query, auto values) {
    c.reset ? launch(query, values, std::true_type{}) : launch(query, values, std::false_type{});
  };
  const auto with_query = [&](auto query) {
    if (c.input_act == Act::silu)
      with_values(query, std::integral_constant<Act, Act::silu>{});
    else
      with_values(query, std::integral_constant<Act, Act::identity>{});
  };
  if (c.output_act == Act::silu)
    with_query(std::integral_constant<Act, Act::silu>{});
  else
    with_query(std::integral_constant<Act, Act::sigmoid>{});
}

// Before a launch with a chain.
inline void clear_flags(const Call<__nv_bfloat16>& a, cudaStream_t stream) {
  if (a.chain.slots)
    CUDA_CHECK(cudaMemsetAsync(a.boundaries + (a.chain.slots - 1) * int64_t(a.n + 1) * a.n, 0,
                               a.chain.slots * sizeof(uint32_t), stream));
}

}  // namespace hgrn::hgru2

// What the Hopper HGRU2 kernels share: what a CTA works on, how a state goes from one CTA to
// another, tiles with padded rows.
//
// A CTA works on a head, or on a segment of one that starts from hgru2_scan.cu's sums, or, where
// there are more heads than SMs, on a run of several heads one after the other (Chain,
// hgru2_kernels.h), the first and the last of them in part. The state of a head that is cut so is
// handed over in fp32 through device memory: the CTA that is done with its first chunks leaves it
// in a slot of `boundaries`, in the order of its threads' registers, and raises that slot's flag;
// the one with the rest waits for the flag and lowers it again for the next launch. Twin: none (the
// CPU kernels take a head as a whole)   Test: tools/hgru2_check.cu
#pragma once
#include <type_traits>

#include "cuda/cuda_check.h"
#include "cuda/hgru2_gates.cuh"
#include "cuda/hgru2_kernels.h"
#include "cuda/sm90.cuh"

namespace hgrn::hgru2 {

// The compiler does not see that something is the same in all lanes; a reduction over the warp ends
// in a uniform register, of which there are plenty.
__device__ __forceinline__ int uniform(int v) {
  return __reduce_max_sync(0xffffffffu, v);
}

// A head, or a part of one, that a CTA works on from end to end.
struct Piece {
  int bh, b, head;
  int first, end;          // its chunks, in the direction of time
  int segment = 0;         // of segments; 0 otherwise
  bool whole = true;       // no other CTA has chunks of this head
  int from = -1, to = -1;  // slots of `boundaries`: where the state comes from and goes to
  int part = 0;            // row of dbound_partial
};

// The pieces of a CTA in the order of the work.
class Pieces {
 public:
  // reverse: a head's last chunk is the first that is done.
  __device__ __forceinline__ Pieces(const Call<__nv_bfloat16>& a, bool reverse)
      : chunks((int(a.T) + kChunk - 1) / kChunk), reverse_(reverse) {
    if (!a.chain.slots) return;
    // all i / slots for all chunks there are, in 32 bits: division of 64 is a call, and all roles
    // wait for it. 2^31 chunks of all heads fit no card.
    const int all = int(a.B * a.H) * chunks, each = all / a.chain.slots, rest = all % a.chain.slots;
    const auto boundary = [&](int i) { return each * i + rest * i / a.chain.slots; };
    const int first = boundary(int(blockIdx.x)), last = boundary(int(blockIdx.x) + 1);
    end_head_ = uniform(first / chunks), done_ = uniform(first % chunks);
    start_head_ = uniform(last / chunks), until_ = uniform(last % chunks);
    first_whole_ = end_head_ + (done_ > 0);
    count = (until_ > 0) + start_head_ - first_whole_ + (done_ > 0);
  }

  int chunks;  // of a head
  int count = 1;

  // The start of the run's last head, which another CTA waits for; whole heads; the end of its
  // first one.
  __device__ __forceinline__ Piece at(const Call<__nv_bfloat16>& a, int k) const {
    Piece p;
    p.bh = int(blockIdx.x), p.first = 0, p.end = chunks;
    if (a.chain.slots) {
      const int head = first_whole_ + k - (until_ > 0);
      if (k == 0 && until_ > 0)
        cut(p, start_head_, 0, until_), p.to = int(blockIdx.x);
      else if (head == start_head_)
        cut(p, end_head_, done_, chunks), p.from = int(blockIdx.x) - 1, p.part = 1;
      else
        p.bh = head;
    } else if (a.split.segments > 1 && int(blockIdx.x) >= a.split.whole) {
      const int at = int(blockIdx.x) - a.split.whole;
      p.part = p.segment = at % a.split.segments;
      p.bh = a.split.whole + at / a.split.segments;
      p.whole = false;
      p.first = p.segment * a.split.chunks;
      p.end = min(chunks, p.first + a.split.chunks);
    }
    const int H = int(a.H);
    p.b = uniform(p.bh / H), p.head = uniform(p.bh % H);
    p.bh = uniform(p.bh), p.first = uniform(p.first), p.end = uniform(p.end);
    p.from = uniform(p.from), p.to = uniform(p.to), p.part = uniform(p.part);
    p.segment = uniform(p.segment);
    return p;
  }

 private:
  // done, until: chunks before and behind the piece, in the order of the work.
  __device__ __forceinline__ void cut(Piece& p, int bh, int done, int until) const {
    p.bh = bh, p.whole = false;
    p.first = reverse_ ? chunks - until : done;
    p.end = reverse_ ? chunks - done : until;
  }

  bool reverse_;
  int start_head_ = 0, until_ = 0;                 // the run ends before chunk `until` of that head
  int end_head_ = 0, done_ = 0, first_whole_ = 0;  // and begins with chunk `done` of that one
};

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
  if (thread == 0) store_release(a.flags + slot, 1);
}
template <int kThreads, int kTiles>
__device__ __forceinline__ void take_over(float (&state)[kTiles][4], const Call<__nv_bfloat16>& a,
                                          int slot, int thread) {
  wait_until_set(a.flags + slot);
  const float4* const from =
      reinterpret_cast<const float4*>(a.boundaries + slot * int64_t(a.n + 1) * a.n);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float4 v = __ldcg(from + j * kThreads + thread);
    state[j][0] = v.x, state[j][1] = v.y, state[j][2] = v.z, state[j][3] = v.w;
  }
}

// The end of a CTA, all threads: the flag that it has waited for, if any, is ready for the next
// launch.
__device__ __forceinline__ void lower_flag(const Call<__nv_bfloat16>& a) {
  if (!a.chain.slots) return;
  __syncthreads();
  if (threadIdx.x == 0 && blockIdx.x > 0) a.flags[blockIdx.x - 1] = 0;
}

// Tiles of a sub-chunk whose rows are 16 bytes longer than their 128 columns: the row of a token,
// and lane addresses for ldmatrix and stmatrix, blocks (tile 0, left), (tile 0, right), (tile 1,
// left), (tile 1, right).
constexpr int kPitch = 128 * 2 + 16;
__device__ __forceinline__ int position_of(int token) {
  return 8 * ((token >> 1) & 1) + row_of(token);
}
__device__ __forceinline__ uint32_t padded_tile_major(int lane) {
  return (8 * (lane >> 4) + (lane & 7)) * kPitch + ((lane >> 3) & 1) * 16;
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

}  // namespace hgrn::hgru2

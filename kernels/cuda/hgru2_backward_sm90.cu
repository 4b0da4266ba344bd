// HGRU2 backward on Hopper, n = 128: the mathematics of hgru2_backward.cu (read its head first),
// with warps of two roles beside each other on an SM instead of all warps in step.
//
// One CTA a (b,h), or a segment of one (hgru2_scan.cu): 12 warps, one pass from the last chunk of
// 64 tokens to the first, sub-chunks of 16 tokens.
//
//   State warps 0..7: warp w owns the channels c = 16w..16w+15: their gates, dh[c][:] in fp32
//   registers, h[c][:] of the chunk's sub-chunks, iq, ik, dq, dk, dg. A sub-chunk is
//     gates -> tiles -> iq, ik, dh -> dq, dk, dg -> dx_q, dx_f
//   Helper warps 8..11: what crosses the channels: A and dv, from the tiles of the state warps, and
//     D, which takes nothing from them and is made once a chunk, for all of its sub-chunks; and all
//     traffic with device memory: loads ahead, dx from shared memory.
//
// Where the values pass through a gate (kValueGate), the helpers do that to the pieces that each of
// them has copied, a sub-chunk after the copy and up to a chunk ahead of the use; only the first
// sub-chunk of a chunk arrives too late for that, and there the state warps have gates of their own
// to do first. The derivative goes to dv in the helpers' registers, from the values, copied once
// more (Ungated).
//
// Between the roles, once a chunk: loaded (h, and what the gates need), loaded0 (the same of
// sub-chunk 0, the last to be refilled), values (the rest: v, dy), gradient (D), first (the saved h
// again, for sub-chunk 0). A sub-chunk's q and f are refilled when its gates are done, v and dy
// when its products are; so the state warps go from a chunk's last sub-chunk straight to the gates
// of the next one, and its last copies, q and f, then v and dy of sub-chunk 0, arrive meanwhile.
//
// Between the roles, once a sub-chunk: kTiles (k, q of A and of dv are written, q and f no longer
// read; dx of the sub-chunk behind is written, too), kDhStored (bf16(dh) is written), kState (v,
// dy, D and h are no longer read), stored (dx of the sub-chunk behind is read from shared memory),
// free (the tiles may be written again). State warps enter barriers without waiting; they wait at
// mbarriers, for helpers only, and so do not wait for each other. No state warp enters a barrier a
// second time before the helpers have left it: it has seen free, which they signal behind kState;
// at the last kTiles, which closes the last dx, stored, which they signal behind kTiles.
//
// The products with 128 value columns on one side are wgmmas of the two warpgroups of state warps:
// one operand lies in registers, as for mma.sync, and the tensor cores read the other, x and dy,
// from shared memory themselves. dv and D are wgmmas of the helpers' warpgroup with both operands
// in shared memory, dv transposed: its value columns are the rows, of which a wgmma needs 64. What
// the helpers save so is time in which the state warps would wait.
//
// sum_v h dh, a part of dg: the bf16 tiles of both are in registers anyway and in the same places,
// so they are multiplied there, two steps of columns added up, and a product with ones adds the
// rest in fp32: its rounding is lost in that of the other products. (As the diagonal of h dh^T it
// took four times as many mma.sync, which have half of the rate of wgmma.)
//
// While the last product, dh, runs, the state warps begin with dq and dk; the compiler chooses how
// far they get. Operands read ahead of a wgmma that runs were slower each time, and so was
// everything that costs a few registers more.
//
// Shared memory keeps a sub-chunk's rows in the order of positions (hgru2_gates.cuh): x, dy and dh
// in the layout of wgmma's 128-byte swizzle, tiles of 16 positions in that of 32 bytes, dx in rows
// 16 bytes longer than the data. Either way eight rows of an ldmatrix hit different banks.
// Twin: kernels/cpu/hgru2.cpp   Test: tools/hgru2_check.cu
#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // below sm_90 the kernel is empty, and nothing refers to its parts
#endif

#include "cuda/hgru2_backward_helpers.cuh"
#include "cuda/hgru2_backward_state.cuh"

namespace hgrn::hgru2 {
namespace {

using namespace backward_roles;

template <Act kQueryGate, Act kValueGate, bool kReset>
__global__ __launch_bounds__(kThreads, 1) void backward_kernel(const Call<__nv_bfloat16> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr bool kGated = kValueGate != Act::identity;
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  if (threadIdx.x == 0) {
    const uint32_t smem = smem_address(smem_bytes);
#pragma unroll
    for (int i = 0; i < kMbarriers; ++i) mbarrier_init(smem + kBarriers + i * 8, kHelpers);
  }
  __syncthreads();
  if (threadIdx.x < kStateThreads) {
    registers_grow<state_registers(kGated)>();
    state_warp<kQueryGate, kReset>(a, smem_bytes);
  } else {
    registers_shrink<helper_registers(kGated)>();
    helper_warp<kValueGate, kReset>(a, smem_bytes);
  }
#endif
}

template <Act kQueryGate, Act kValueGate, bool kReset>
void launch(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  const auto kernel = backward_kernel<kQueryGate, kValueGate, kReset>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<c.ctas(), kThreads, kBytes, stream>>>(c);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void backward_sm90(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  static_assert(kBytes <= 227 * 1024);
  clear_flags(c, stream);
  dispatch_gates(c, [&](auto query, auto values, auto reset) {
    launch<query(), values(), reset()>(c, stream);
  });
}

}  // namespace hgrn::hgru2

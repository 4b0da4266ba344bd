// HGRU2 backward on Hopper, n = 128: the mathematics of hgru2_backward.cu (read its head first),
// with warps of two roles beside each other on an SM instead of all warps in step.
//
// One CTA a (b,h), a segment of one (hgru2_scan.cu) or a run of several (hgru2_range.cuh): 12
// warps, one pass from the last chunk of 64 tokens to the first, in steps of two sub-chunks of 16
// tokens, the earlier (e) and the later (l): what is done once for 128 value columns, rounding h
// and dh (see below), storing and reading them, their products, is done once in 32 tokens. With the
// decays over a sub-chunk, total_e and total_l, h before the pair and dh behind it:
//
//   iq = dy h^T, ik = v bf16(dh)^T                 of both sub-chunks
//   iq_l' = total_e iq_l + D_le (k after)_e        ik_e' = total_l ik_e + D_le^T (q before)_l
//   sum h dh of l: total_e sum h dh + sum_s (k after)_e ik_e;   of e: total_l ... (q before)_l iq_l
//   dh = total_e total_l dh + (q before)_e^T dy_e + (q before total_e)_l^T dy_l
//   A_le = (q before)_l (k after)_e^T;   the keys of dv_e are (k after)_e total_l
//
// and the rest as for one sub-chunk, with iq_l' and ik_e'. No factor is above 1 but mid's.
//
//   State warps 0..7: warp w owns the channels c = 16w..16w+15: their gates, dh[c][:] in fp32
//   registers, h[c][:], iq, ik, dq, dk, dg. A pair is
//     iq, ik -> gates e -> dq_e -> gates l -> dh -> dq_l, dk_l, dg_l -> dk_e, dg_e
//   Helper warps 8..11: what crosses the channels: A and dv, from the tiles of the state warps, and
//     D, which takes nothing from them and is made once a chunk, for all of its sub-chunks; and all
//     traffic with device memory: loads ahead, dx from shared memory.
//
// What dk_e and dg_e take of the gates, and what there is of them, waits in shared memory while the
// later sub-chunk has the registers (kStash): made from dq's part first, it is least.
//
// Where the values pass through a gate (kValueGate), the helpers do that to the second pair's of
// the next chunk, a pair after they have copied them; the first pair's, with which a chunk begins,
// and for which the state warps would wait, these take themselves (kFirstGated). The derivatives
// are made with them, and wait in device memory, where dx_i will be, for the dv of their pair
// (Slopes).
//
// Between the roles, once a chunk: kFirstGated (see above), loaded (h, f, v, and q of the second
// pair), values (dy of the second pair, and v of it through its gate), gradient (D, and dy of the
// first pair), first (the saved h again, which the state warps have advanced to the second pair in
// its place, and q of the first pair). A chunk begins with f and v of its first pair, the last that
// the one before is done with: f is taken to registers at the start of a pair, so that f, v and h
// are refilled as soon as the pair's first products are done; q when its gates are, dy when its
// last products are. It makes no difference whether the next chunk is of the same head or of the
// next one. (In a CTA's first chunk q and all of dy come with the values.) h comes in one piece by
// the copy engine, whose bytes count at `loaded` and `first`; q, f, v and dy, whose rows are
// spread, by the helpers' cp.async (by the engine, in boxes of 16 rows, they took 5 % longer:
// docs/benchmarks_history.md). These count at `loaded` and `values` by themselves: no state warp
// waits until a helper has got round to waiting for them. For D helpers wait for all, so that q and
// dy of the first pair are there at `first` and `gradient`.
//
// Between the roles, once a pair: kRead (h, f and v are no longer read; dx_q, dx_f of the pair
// behind are written), kTiles (bf16(dh), k, q of A and of dv are written, q no longer read), kState
// (dy and D are no longer read), stored (dx of the pair behind is read from shared memory), freeDh
// (the tile of dh may be written again), free (the tiles of A, which slopes lay in, and the keys'
// tile, where dv lay last). State warps enter barriers without waiting; they wait at mbarriers, for
// helpers only, and so do not wait for each other, but for the first values that they gate
// (kAmongState). No state warp enters a barrier a second time before the helpers have left it: it
// has seen stored, freeDh and free, which they signal behind kRead, kTiles and kState; gradient,
// behind kFirstGated. The last kRead closes the last dx.
//
// The products with 128 value columns on one side are wgmmas of the two warpgroups of state warps:
// one operand lies in registers, as for mma.sync, and the tensor cores read the other, x and dy,
// from shared memory themselves. A, dv and D are wgmmas of the helpers' warpgroup with both
// operands in shared memory, dv transposed: its value columns are the rows, of which a wgmma
// needs 64. The three blocks of A are on the diagonal of a product of 64 rows and columns, a warp
// each.
//
// bf16(dh) is made twice, the same bits: for these products, and for the tile that dv is made from,
// which may be written only when the helpers have made dv of the pair behind.
//
// sum_v h dh, a part of dg: the bf16 tiles of both are in registers anyway and in the same places,
// so they are multiplied there, two steps of columns added up, and a product with ones adds the
// rest in fp32: its rounding is lost in that of the other products. (As the diagonal of h dh^T it
// took four times as many mma.sync, which have half of the rate of wgmma.)
//
// An mma.sync waits for the wgmmas before it: those with D come first, and dh's run beside dq, dk
// and dg of the later sub-chunk.
//
// Registers that do not fit lie in what shared memory leaves of L1, 28 KB or some 70 bytes a
// thread. Beyond that a reload takes hundreds of cycles, and no one else is there to use them:
// hence the addresses that are made anew (StateAddresses), the products of f that are, and kStash.
// Without resets 40 bytes are left. Helpers, one a scheduler, are bound by latencies: what they do
// to values goes over eight at a time, when dv is not in their registers.
//
// Shared memory keeps a sub-chunk's rows in the order of positions (hgru2_gates.cuh): x, dy and dh
// in the layout of wgmma's 128-byte swizzle, as the operands of A; the keys of dv and A in that of
// 64 bytes, D in that of 32, dx_q and dx_f in rows 16 bytes longer than the data. Either way eight
// rows of an ldmatrix hit different banks.
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
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  if (threadIdx.x == 0) {
    const uint32_t smem = smem_address(smem_bytes);
#pragma unroll
    for (int i = 0; i < kMbarriers; ++i)
      mbarrier_init(smem + kBarriers + i * 8, (i < kCopiedMbarriers ? 2 : 1) * kHelpers);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kStateThreads) {
    registers_grow<kStateRegisters>();
    state_warp<kQueryGate, kValueGate, kReset>(a, smem_bytes);
  } else {
    registers_shrink<kHelperRegisters>();
    helper_warp<kValueGate, kReset>(a, smem_bytes);
  }
  lower_flag(a);
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
  dispatch_gates(c, [&](auto query, auto values, auto reset) {
    launch<query(), values(), reset()>(c, stream);
  });
}

}  // namespace hgrn::hgru2

// HGRU2 backward on Hopper, n = 128: the mathematics of hgru2_backward.cu (read its head first),
// with warps of two roles beside each other on an SM instead of all warps in step.
//
// One CTA a (b,h), or a segment of one (hgru2_scan.cu): 12 warps, one pass from the last chunk of
// 64 tokens to the first, sub-chunks of 16 tokens.
//
//   State warps 0..7: warp w owns the channels c = 16w..16w+15: their gates, dh[c][:] in fp32
//   registers, h[c][:] of the chunk's sub-chunks, iq, ik, dq, dk, dg. A sub-chunk is
//     gates -> tiles -> iq, ik, dh -> dq, dk, dg -> dx_q, dx_f
//   Helper warps 8..11: what crosses the channels, from the tiles of the state warps:
//     A, D, dv; and all traffic with device memory: loads ahead, dx from shared memory.
//
// Where the values pass through a gate (kGated), the helpers do that to the pieces that each of
// them has copied, a sub-chunk after the copy and up to a chunk ahead of the use, while the state
// warps are at their products; only the first sub-chunk of a chunk arrives too late for that, and
// there the state warps have gates of their own to do first. The derivative goes to dv in the
// helpers' registers, from values read again from device memory, a sub-chunk ahead.
//
// Between the roles, once a chunk: loaded (h, and what the gates need), loaded0 (the same of
// sub-chunk 0, the last to be refilled), values (the rest: v, dy). A sub-chunk's q and f are
// refilled when its gates are done, v and dy when its products are; so the state warps go from a
// chunk's last sub-chunk straight to the gates of the next one, and its last copies, q and f, then
// v and dy of sub-chunk 0, arrive meanwhile.
//
// Between the roles, once a sub-chunk: kTiles (k, q of A and of dv are written, q and f no longer
// read; dx of the sub-chunk before is written, too), kState (bf16(dh) is written; v, dy and h are
// no longer read), scores (D is there), free (the tiles may be written again). State warps enter
// barriers without waiting; they wait at mbarriers, for helpers only, and so do not wait for each
// other.
//
// The products with 128 value columns on one side are wgmmas of the two warpgroups of state warps:
// one operand lies in registers, as for mma.sync, and the tensor cores read the other, x and dy,
// from shared memory themselves. What goes through ldmatrix seems to cost about 9 cycles an SM for
// 512 bytes however the warps share it out: the times of three kernels fit that, no counter has
// shown it.
//
// sum_v h dh, a part of dg: the bf16 tiles of both are in registers anyway and in the same places,
// so they are multiplied there, two steps of columns added up, and a product with ones adds the
// rest in fp32: its rounding is lost in that of the other products. (As the diagonal of h dh^T it
// took four times as many mma.sync, which have half of the rate of wgmma.)
//
// Shared memory keeps a sub-chunk's rows in the order of positions (hgru2_gates.cuh): x and dy in
// the layout of wgmma's 128-byte swizzle, dh and dx in rows 16 bytes longer than the data. Either
// way eight rows of an ldmatrix hit different banks.
// Twin: kernels/cpu/hgru2.cpp   Test: tools/hgru2_check.cu
#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // below sm_90 the kernel is empty, and nothing refers to its parts
#endif

#include "cuda/hgru2_range.cuh"
#include "cuda/wgmma.cuh"

namespace hgrn::hgru2 {
namespace {

constexpr int N = 128, kWarps = N / 16, kSubs = kChunk / kSub;
constexpr int kStateThreads = 32 * kWarps, kHelpers = 4, kHelperThreads = 32 * kHelpers;
constexpr int kThreads = kStateThreads + kHelperThreads;
constexpr int kStateRegisters = 208, kHelperRegisters = 88;
// What the block starts with, 168 a thread, is all that there is to share out.
static_assert(kStateThreads * kStateRegisters + kHelperThreads * kHelperRegisters <=
              168 * kThreads);
constexpr uint32_t kOnes = 0x3f803f80u;  // two bf16
constexpr int kGroup = 2;    // steps of 16 value columns whose operands are in registers at once
static_assert(kGroup == 2);  // two are added up before their product with ones
enum Part { kQ, kF, kV, kDy };
enum Barrier { kTiles = 1, kState = 2, kHelper = 3, kHandOver = 4 };

constexpr int kPitch = N * 2 + 16;
constexpr int kTile = kSub * N * 2, kHalf = kTile / 2;  // of x and dy
constexpr int kOutTile = kSub * kPitch;
constexpr int kH = N * N * 2;
constexpr int kNarrow = N * 32;
// Byte offsets in shared memory.
constexpr int kRaw = 0;                            // [4 sub][q, f, v, dy][16 positions][N] bf16
constexpr int kStates = kRaw + kSubs * 4 * kTile;  // [3][N/16][state threads] uint4: h
constexpr int kDh = kStates + 3 * kH;              // [N][N] bf16
constexpr int kKey = kDh + N * kPitch;             // [N][16] bf16: k after
constexpr int kKeyD = kKey + kNarrow;              // [N][16] bf16: k / mid
constexpr int kQueryD = kKeyD + kNarrow;           // [N][16] bf16: q mid
constexpr int kOut = kQueryD + kNarrow;            // [q, f, v][16 positions][N] bf16: dx
constexpr int kScores = kOut + 3 * kOutTile;       // [A, D][16][16] bf16
constexpr int kDiagonal = kScores + 1024;          // [16] float: D_tt
constexpr int kBarriers = kDiagonal + 64;          // loaded, loaded 0, values, first, scores, free
constexpr int kBytes = kBarriers + 6 * 8;
constexpr int kLoaded = kBarriers, kLoaded0 = kBarriers + 8, kValues = kBarriers + 16,
              kFirst = kBarriers + 24, kScored = kBarriers + 32, kFree = kBarriers + 40;

// Row of a token in a tile, and lane addresses for ldmatrix; 16-column step kk is at + 32 kk.
//   tile_major:   blocks (tile 0, left), (tile 0, right), (tile 1, left), (tile 1, right)
//   column_major: blocks (tile 0, left), (tile 1, left), (tile 0, right), (tile 1, right)
// The same in a tile of x or dy: two halves of 64 columns, rows of 128 bytes, 16-byte columns
// spread by the row's last three bits. at_step: 16-column step k.
__device__ __forceinline__ uint32_t row_offset(int row, int column16) {
  return uint32_t((column16 >> 3) * kHalf + row * 128 + (((column16 ^ row) & 7) << 4));
}
__device__ __forceinline__ uint32_t tile_major_lane(int lane) {
  return row_offset(8 * (lane >> 4) + (lane & 7), (lane >> 3) & 1);
}
__device__ __forceinline__ uint32_t column_major_lane(int lane) {
  return row_offset(lane & 15, lane >> 4);
}
__device__ __forceinline__ uint32_t at_step(uint32_t base, int k, int half = kHalf) {
  return (base ^ ((k & 3) * 32)) + (k >> 2) * half;
}
// Such tiles as the B operand of a wgmma: the columns contracted, a token a column of the result;
// or the tokens contracted, a column a column. Of the first tile; columns_at: bytes from there to
// 16 columns of another.
__device__ __forceinline__ uint64_t contract_columns(uint32_t smem) {
  return wgmma_operand(smem + kRaw, 16, 1024);
}
__device__ __forceinline__ uint64_t contract_tokens(uint32_t smem) {
  return wgmma_operand(smem + kRaw, kHalf, 1024);
}
__device__ __forceinline__ constexpr uint32_t columns_at(uint32_t tile, int k) {
  return tile + (k >> 2) * kHalf + (k & 3) * 32;
}
__device__ __forceinline__ int position_of(int token) {
  return 8 * ((token >> 1) & 1) + row_of(token);
}
__device__ __forceinline__ uint32_t padded_tile_major(int lane) {
  return (8 * (lane >> 4) + (lane & 7)) * kPitch + ((lane >> 3) & 1) * 16;
}
__device__ __forceinline__ uint32_t padded_column_major(int lane) {
  return (lane & 15) * kPitch + (lane >> 4) * 16;
}

// What both roles know of their block.
struct Block : Range {
  int first_chunk, last_chunk;
  __device__ __forceinline__ explicit Block(const Call<__nv_bfloat16>& a) : Range(a, true) {
    first_chunk = first, last_chunk = end - 1;
  }
};

// The resets of a chunk, read ahead.
struct Resets {
  uint32_t next[2];
  __device__ __forceinline__ void load(const Call<__nv_bfloat16>& a, int64_t b, int chunk,
                                       int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = chunk * kChunk + 32 * half + lane;
      next[half] = a.reset && chunk >= 0 && t < a.T ? a.reset[b * a.T + t] : 0;
    }
  }
  __device__ __forceinline__ uint64_t bits() const {
    return uint64_t(__ballot_sync(0xffffffffu, next[1] != 0)) << 32 |
           __ballot_sync(0xffffffffu, next[0] != 0);
  }
};

// dh at the end of this block's tokens, from dhT or the segments behind: rows c = own + g (+8),
// columns v = 8j + 2q (+1).
__device__ __forceinline__ void start_dh(float (&dh)[N / 8][4], const Call<__nv_bfloat16>& a,
                                         const Block& block, int own, int g, int q) {
  const auto state_at = [&](int j, int r) { return (own + g + 8 * r) * N + 8 * j + 2 * q; };
  const float* const from = block.last_chunk == block.chunks - 1 ? a.dhT : nullptr;
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float2 v = make_float2(0.0f, 0.0f);
      if (from) v = *reinterpret_cast<const float2*>(from + block.bh * N * N + state_at(j, r));
      dh[j][2 * r] = v.x;
      dh[j][2 * r + 1] = v.y;
    }
#pragma unroll 1
  for (int behind = block.whole ? 0 : a.split.segments - 1; behind > block.segment; --behind) {
    const float* const in =
        a.boundaries +
        ((block.bh - a.split.whole) * (a.split.segments - 1) + behind - 1) * (N + 1) * N;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float decay = in[N * N + own + g + 8 * r];  // hgru2_scan.cu
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float2 v = *reinterpret_cast<const float2*>(in + state_at(j, r));
        dh[j][2 * r] = fmaf(decay, dh[j][2 * r], v.x);
        dh[j][2 * r + 1] = fmaf(decay, dh[j][2 * r + 1], v.y);
      }
    }
  }
}

// kSilu: of the queries.
template <bool kSilu>
__device__ __forceinline__ void state_warp(const Call<__nv_bfloat16>& a,
                                           unsigned char* smem_bytes) {
  const uint32_t smem = smem_address(smem_bytes);
  const Block block(a);
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, q = lane & 3;
  const int own = 16 * warp, T = int(a.T);
  float bound[2], rest[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    bound[r] = a.bound ? a.bound[block.head * N + own + g + 8 * r] : 0.0f;
    rest[r] = 1.0f - bound[r];
  }
  float dh[N / 8][4];
  if (block.from < 0)
    start_dh(dh, a, block, own, g, q);
  else
    take_over<kStateThreads>(dh, a, block.from, tid);
  float dbound[2] = {0.0f, 0.0f};
  const uint32_t tile_major = smem + padded_tile_major(lane);
  const uint32_t own_raw = at_step(smem + tile_major_lane(lane), warp) + kRaw;
  const uint32_t narrow_store = smem + lane_narrow_store(own, lane);
  const uint32_t dh_store = smem + kDh + (own * kPitch + padded_column_major(lane));
  const uint32_t own_states = smem + kStates + tid * 16;
  const uint64_t columns = contract_columns(smem), rows = contract_tokens(smem);
  Resets resets;
  resets.load(a, block.b, block.last_chunk, lane);
  uint32_t chunk_parity = 0, parity = 0;

#pragma unroll 1
  for (int chunk = block.last_chunk; chunk >= block.first_chunk; --chunk) {
    const int t0 = chunk * kChunk;
    const uint64_t reset = resets.bits();
    const auto tokens_of = [&](int sub) {
      return Tokens{uint32_t(reset >> (16 * sub)) & 0xffffu, T - t0 - kSub * sub};
    };
    resets.load(a, block.b, chunk - 1, lane);
    mbarrier_wait(smem + kLoaded, chunk_parity);

    // ---- h before the sub-chunks 1, 2, 3 into slots 0, 1, 2; the saved one waits in slot 2
    {
      uint32_t key_b[kSubs - 1][4];
      float total[kSubs - 1][2];
      // All gates first: their latencies overlap, where the products below are a chain. Sub-chunk 0
      // last, whose f arrives last.
#pragma unroll
      for (int turn = 1; turn < kSubs; ++turn) {
        const int sub = turn % (kSubs - 1);
        if (sub == 0) mbarrier_wait(smem + kLoaded0, chunk_parity);
        const Tokens tokens = tokens_of(sub);
        uint32_t raw[4];
        ldmatrix_trans(raw, own_raw + (sub * 4 + kF) * kTile);
        KeyGates key;
        key_gates(key, raw, bound, rest, q, tokens);
        float k_after[2][4];
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int m = 0; m < 4; ++m) k_after[r][m] = rest[r] * key.close[r][m];
        scale_after(k_after, total[sub], key.f, q, tokens);
        cut_after(k_after, q, tokens);
        pack(key_b[sub], k_after);
      }
      float h[N / 8][4];
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        const uint4 v = ld_shared4(own_states + 2 * kH + k * kStateThreads * 16);
        h[2 * k][0] = low_bf16(v.x), h[2 * k][1] = high_bf16(v.x);
        h[2 * k][2] = low_bf16(v.y), h[2 * k][3] = high_bf16(v.y);
        h[2 * k + 1][0] = low_bf16(v.z), h[2 * k + 1][1] = high_bf16(v.z);
        h[2 * k + 1][2] = low_bf16(v.w), h[2 * k + 1][3] = high_bf16(v.w);
      }
      mbarrier_wait(smem + kValues, chunk_parity);
      fence_async_proxy();
#pragma unroll
      for (int sub = 0; sub < kSubs - 1; ++sub) {
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
          h[j][0] *= total[sub][0], h[j][1] *= total[sub][0];
          h[j][2] *= total[sub][1], h[j][3] *= total[sub][1];
        }
        wgmma_fence();
        wgmma128<true>(h, key_b[sub], wgmma_at(rows, (sub * 4 + kV) * kTile));
        wgmma_commit();
        wgmma_wait_all(h);
        // Apart from the products: stores between them would hold back the next loads.
#pragma unroll
        for (int k = 0; k < kWarps; ++k)
          st_shared(
              own_states + sub * kH + k * kStateThreads * 16,
              make_uint4(pack_bf16(h[2 * k][0], h[2 * k][1]), pack_bf16(h[2 * k][2], h[2 * k][3]),
                         pack_bf16(h[2 * k + 1][0], h[2 * k + 1][1]),
                         pack_bf16(h[2 * k + 1][2], h[2 * k + 1][3])));
      }
    }

#pragma unroll 1
    for (int sub = kSubs - 1; sub >= 0; --sub) {
      const Tokens tokens = tokens_of(sub);
      const uint32_t tile = sub * 4 * kTile;
      const uint64_t sub_columns = wgmma_at(columns, tile), sub_rows = wgmma_at(rows, tile);

      // ---- gates, the tiles of this warp's channels
      KeyGates key;
      Decay decay;
      float query[2][4], slope[2][4];
      uint32_t query_b[4], query_d[4], key_b[4], key_d[4];
      {
        uint32_t xq[4], xf[4];
        ldmatrix_trans(xf, own_raw + tile + kF * kTile);
        ldmatrix_trans(xq, own_raw + tile + kQ * kTile);
        key_gates(key, xf, bound, rest, q, tokens);
        decay_products(decay, key.f, q, tokens);
        query_gates<kSilu>(query, slope, xq, a.output_act, a.query_scale);
        float up[2][4], down[2][4];
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            up[r][m] = query[r][m] * decay.up[r][m];
            down[r][m] = rest[r] * key.close[r][m] * decay.down[r][m];
          }
        pack(query_d, up, decay.outer_mid);
        pack(key_d, down, decay.inner_mid);
        cut_before(up, q, tokens);
        cut_after(down, q, tokens);
        pack(query_b, up, decay.outer_up);
        pack(key_b, down, decay.outer_down);
      }
      mbarrier_wait(smem + kFree, parity ^ 1);
      stmatrix(narrow_store + kQueryD, query_d);
      stmatrix(narrow_store + kKeyD, key_d);
      stmatrix(narrow_store + kKey, key_b);
      barrier_arrive(kTiles, kThreads);
      // The saved state again, for the chunk's first sub-chunk.
      if (sub == 0) mbarrier_wait(smem + kFirst, chunk_parity);

      // ---- iq, ik, sum_v h dh; bf16(dh) for the helpers
      float iq[2][4] = {}, ik[2][4] = {};  // [tile][..]: element [r][m] is [m/2][2r + m%2]
      float cross[2];
      {
        const uint32_t state = own_states + (sub == 0 ? 0 : sub - 1) * kH;
        float sum[4] = {};
#pragma unroll
        for (int k0 = 0; k0 < kWarps; k0 += kGroup) {
          uint32_t h[kGroup][4], d[kGroup][4];
#pragma unroll
          for (int j = 0; j < kGroup; ++j) {
            const int k = k0 + j;
            const uint4 h4 = ld_shared4(state + k * kStateThreads * 16);
            h[j][0] = h4.x, h[j][1] = h4.y, h[j][2] = h4.z, h[j][3] = h4.w;
#pragma unroll
            for (int e = 0; e < 4; ++e)
              d[j][e] = pack_bf16(dh[2 * k + (e >> 1)][2 * (e & 1)],
                                  dh[2 * k + (e >> 1)][2 * (e & 1) + 1]);
          }
#pragma unroll
          for (int j = 0; j < kGroup; ++j) stmatrix(dh_store + (k0 + j) * 32, d[j]);
          uint32_t product[4];
#pragma unroll
          for (int e = 0; e < 4; ++e)
            product[e] = fma_bf16x2(h[0][e], d[0][e], mul_bf16x2(h[1][e], d[1][e]));
          mma(sum, product, kOnes, kOnes);
          wgmma_fence();
#pragma unroll
          for (int j = 0; j < kGroup; ++j) {
            wgmma16<false>(iq, h[j], wgmma_at(sub_columns, columns_at(kDy * kTile, k0 + j)));
            wgmma16<false>(ik, d[j], wgmma_at(sub_columns, columns_at(kV * kTile, k0 + j)));
          }
          wgmma_commit();
          wgmma_wait_all(iq, ik);
        }
        cross[0] = sum[0], cross[1] = sum[2];
      }

      // ---- dh
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        dh[j][0] *= decay.total[0], dh[j][1] *= decay.total[0];
        dh[j][2] *= decay.total[1], dh[j][3] *= decay.total[1];
      }
      wgmma_fence();
      wgmma128<true>(dh, query_b, wgmma_at(sub_rows, kDy * kTile));
      wgmma_commit();
      wgmma_wait_all(dh);
      barrier_arrive(kState, kThreads);
      mbarrier_wait(smem + kScored, parity);

      // ---- the diagonal block, dq, dk, dg
      {
        float gq[2][4] = {}, gk[2][4] = {};
        uint32_t frag[4];
        ldmatrix(frag, smem + kScores + 512 + lane_narrow_row_major(lane));
        mma(gq[0], key_d, frag[0], frag[1]);
        mma(gq[1], key_d, frag[2], frag[3]);
        ldmatrix_trans(frag, smem + kScores + 512 + lane_narrow_column_major(lane));
        mma(gk[0], query_d, frag[0], frag[1]);
        mma(gk[1], query_d, frag[2], frag[3]);
        const uint4 d4 = ld_shared4(smem + kDiagonal + q * 16);
        const float diag[4] = {__uint_as_float(d4.x), __uint_as_float(d4.y), __uint_as_float(d4.z),
                               __uint_as_float(d4.w)};
        float dxq[2][4], dxf[2][4];
        channel_gradients(
            dxq, dxf, dbound, iq, ik, gq, gk, [&](int r) { return cross[r]; }, diag,
            {key, decay, query, slope, rest, query_b, key_b, query_d, key_d}, tokens, q);
        uint32_t packed[4];
        pack(packed, dxq);
        stmatrix_trans(tile_major + warp * 32 + kOut + kQ * kOutTile, packed);
        pack(packed, dxf);
        stmatrix_trans(tile_major + warp * 32 + kOut + kF * kOutTile, packed);
      }
      parity ^= 1;
    }
    chunk_parity ^= 1;
  }
  barrier_arrive(kTiles, kThreads);  // the last dx is written

  if (block.to >= 0) hand_over<kStateThreads>(a, block.to, dh, tid, kHandOver);
  if (a.dh0 && block.first_chunk == 0)
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        *reinterpret_cast<float2*>(a.dh0 + block.bh * N * N + (own + g + 8 * r) * N + 8 * j +
                                   2 * q) = make_float2(dh[j][2 * r], dh[j][2 * r + 1]);
  if (a.dbound_partial)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = dbound[r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      float* const out = a.dbound_partial + block.b * a.D + block.head * N + own + g + 8 * r;
      if (q == 0) {
        out[block.part * a.B * a.D] = sum;
        if (block.whole)
          for (int part = 1; part < a.parts(); ++part) out[part * a.B * a.D] = 0.0f;
      }
    }
}

// A helper thread's part of the copies between device and shared memory: one 16-byte column of the
// tokens token and token + 8 of a sub-chunk. x and dy point at the sub-chunk that is copied next:
// multiplying addresses out took as many instructions as the products of these warps. `left`: its
// tokens from this thread's first on; zeros, for which nothing is read, beyond them.
struct Copies {
  static constexpr int kEight = 4 * 128;  // from the row of token t to that of t + 8; the columns
  static constexpr int kSpread = 4 << 4;  // of the second are spread by a row with bit 2 set
  const __nv_bfloat16 *x, *dy, *const any;
  uint32_t raw, state;
  int64_t D;
  int token, thread;
  // At a chunk's last sub-chunk.
  __device__ __forceinline__ Copies(const Call<__nv_bfloat16>& a, const Block& block, uint32_t smem,
                                    int thread_, int chunk)
      : any(a.x), D(a.D), token(thread_ / 16), thread(thread_) {
    const int column = thread % 16;
    const int64_t row = block.b * a.T + chunk * kChunk + (kSubs - 1) * kSub + token;
    x = a.x + row * 3 * D + block.head * N + column * 8;
    dy = a.dy + row * D + block.head * N + column * 8;
    raw = smem + kRaw + row_offset(position_of(token), column);
    state = smem + kStates + thread * 16;
  }
  // To the sub-chunk `subs` before.
  __device__ __forceinline__ void back(int subs) {
    x -= subs * kSub * 3 * D;
    dy -= subs * kSub * D;
  }
  // Where this thread's piece of q goes; those of f, v, dy are kTile further each.
  __device__ __forceinline__ uint32_t piece(int sub, int half) const {
    return (raw ^ (half * kSpread)) + sub * 4 * kTile + half * kEight;
  }
  __device__ __forceinline__ void copy(uint32_t to, const __nv_bfloat16* from, int half,
                                       int left) const {
    const bool valid = left > 8 * half;
    cp_async16(to, valid ? from : any, valid);
  }
  __device__ __forceinline__ void gates(int sub, int left) const {  // q, f
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const __nv_bfloat16* const from = x + half * 8 * 3 * D;
      copy(piece(sub, half) + kQ * kTile, from, half, left);
      copy(piece(sub, half) + kF * kTile, from + D, half, left);
    }
  }
  __device__ __forceinline__ void values(int sub, int left) const {  // v, dy
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      copy(piece(sub, half) + kV * kTile, x + (half * 8 * 3 + 2) * D, half, left);
      copy(piece(sub, half) + kDy * kTile, dy + half * 8 * D, half, left);
    }
  }
  // The values this thread has copied, and waited for, through their gate.
  __device__ __forceinline__ void gate_values(int sub, Act act) const {
    const uint32_t at[2] = {piece(sub, 0) + kV * kTile, piece(sub, 1) + kV * kTile};
    const uint4 v[2] = {ld_shared4(at[0]), ld_shared4(at[1])};
    st_shared(at[0], activated(v[0], act));
    st_shared(at[1], activated(v[1], act));
  }
  __device__ __forceinline__ void saved_state(const void* states, int64_t index, int slot) const {
    const uint4* const from = static_cast<const uint4*>(states) + index * (kH / 16) + thread;
#pragma unroll
    for (int k = 0; k < kH / 16 / kHelperThreads; ++k)
      cp_async16(state + slot * kH + k * kHelperThreads * 16, from + k * kHelperThreads, true);
  }
};

// A masked, or D: a 16x16 product over 128 channels or value columns, one warp. left, right, out:
// what the lanes address of the tiles.
template <bool kGradient>
__device__ __forceinline__ void score_block(unsigned char* smem_bytes, int lane, uint32_t left_tile,
                                            uint32_t right_tile, uint32_t out,
                                            const Tokens& tokens) {
  float c[2][2][4] = {};  // two sums, for shorter chains of dependent products
#pragma unroll
  for (int k = 0; k < kWarps; ++k) {
    uint32_t left[4], right[4];
    if (kGradient) {
      ldmatrix(left, at_step(left_tile, k));
      ldmatrix(right, at_step(right_tile, k));
    } else {
      ldmatrix_trans(left, left_tile + k * 512);
      ldmatrix_trans(right, right_tile + k * 512);
    }
    mma(c[k & 1][0], left, right[0], right[1]);
    mma(c[k & 1][1], left, right[2], right[3]);
  }
  const int g = lane >> 2, q = lane & 3;
  uint32_t packed[4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int t = token_of(r, g);
    float sum[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int p = 0; p < 2; ++p) sum[i][p] = c[0][i][2 * r + p] + c[1][i][2 * r + p];
      const int s = 4 * q + 2 * i;
      bool keep_x = s + kGradient <= t, keep_y = s + 1 + kGradient <= t;
      if (tokens.reset) {
        keep_x = keep_x && tokens.connected(t, s);
        keep_y = keep_y && tokens.connected(t, s + 1);
      }
      packed[r + 2 * i] = pack_bf16(keep_x ? sum[i][0] : 0.0f, keep_y ? sum[i][1] : 0.0f);
    }
    if (kGradient && q == g >> 1)
      reinterpret_cast<float*>(smem_bytes + kDiagonal)[t] = (g & 1) ? sum[r][1] : sum[r][0];
  }
  stmatrix(out, packed);
}

// dx of a sub-chunk from shared memory, by two warps: 16 bytes each of twelve rows. to: of this
// thread's column in its first token, which is the first of `left`.
__device__ __forceinline__ void store_dx(__nv_bfloat16* to, int64_t D, uint32_t from, int left) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // the token 4 i behind lies 2 i rows further
    if (left <= 4 * i) break;
#pragma unroll
    for (int part = kQ; part <= kV; ++part)
      *reinterpret_cast<uint4*>(to + (i * 4 * 3 + part) * D) =
          ld_shared4(from + part * kOutTile + 2 * i * kPitch);
  }
}

// The values of a sub-chunk before their gate, where a helper thread has dv: 32 columns from that
// of the warp on, in the order of mma.cuh. They are long gone from shared memory when dv is there,
// so they are read again; a sub-chunk's work hides the way to them.
struct Ungated {
  uint32_t v[2][2][2];  // [16 columns][8 columns][token_of(.., g)]
  __device__ __forceinline__ void load(const Call<__nv_bfloat16>& a, const Block& block, int warp,
                                       int lane, int t0) {
    const int g = lane >> 2, q = lane & 3;
    const __nv_bfloat16* const from =
        a.x + ((block.b * a.T + t0) * 3 + 2) * a.D + block.head * N + 32 * warp + 2 * q;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool valid = t0 + token_of(r, g) < a.T;
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          v[j][i][r] = valid ? *reinterpret_cast<const uint32_t*>(from + token_of(r, g) * 3 * a.D +
                                                                  16 * j + 8 * i)
                             : 0;
    }
  }
  // dv times the gate's derivative.
  __device__ __forceinline__ void scale(float (&dv)[2][2][4], Act act) const {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float unused[2], slope[2];
          query_gate<false, true>(unused, slope, v[j][i][r], act, 1.0f);
          dv[j][i][2 * r] *= slope[0];
          dv[j][i][2 * r + 1] *= slope[1];
        }
  }
};

template <bool kGated>
__device__ __forceinline__ void helper_warp(const Call<__nv_bfloat16>& a,
                                            unsigned char* smem_bytes) {
  const uint32_t smem = smem_address(smem_bytes);
  const Block block(a);
  const int thread = threadIdx.x - kStateThreads, lane = thread & 31;
  const int warp = __reduce_max_sync(0xffffffffu, thread >> 5);  // uniform, as in Range
  const int T = int(a.T);
  Copies copies(a, block, smem, thread, block.last_chunk);
  // All copies have arrived but the newest two: q and f of sub-chunk 0, then v and dy.
  const auto gates_loaded = [&] {
    cp_async_wait<2>();
    mbarrier_arrive_warp(smem + kLoaded);
  };
  const auto gates0_loaded = [&] {
    cp_async_wait<1>();
    mbarrier_arrive_warp(smem + kLoaded0);
  };
  // And those; the values from `from` down are not gated yet, those behind are.
  const auto values_loaded = [&](int from) {
    cp_async_wait<0>();
    if (kGated)
#pragma unroll 1
      for (int sub = from; sub >= 0; --sub) copies.gate_values(sub, a.input_act);
    fence_async_proxy();  // wgmma reads what this thread has copied and gated
    mbarrier_arrive_warp(smem + kValues);
  };
  Resets resets;
  resets.load(a, block.b, block.last_chunk, lane);
  // The first chunk, which may end beyond T; those behind it do not.
  const auto left_of = [&](int sub) {
    return T - block.last_chunk * kChunk - sub * kSub - copies.token;
  };
#pragma unroll 1
  for (int sub = kSubs - 1; sub > 0; --sub, copies.back(1)) copies.gates(sub, left_of(sub));
  copies.saved_state(a.states, block.bh * block.chunks + block.last_chunk, 2);
  cp_async_commit();
  copies.gates(0, left_of(0));
  cp_async_commit();
#pragma unroll 1
  for (int sub = 0; sub < kSubs; ++sub, copies.back(-1)) copies.values(sub, left_of(sub));
  copies.back(kSubs + 1);  // from behind the chunk to the last sub-chunk of the one before
  cp_async_commit();
  gates_loaded();
  gates0_loaded();
  values_loaded(kSubs - 1);
  const uint32_t column_major = smem + padded_column_major(lane) + warp * 64;
  const uint32_t raw_columns = smem + column_major_lane(lane);
  const uint32_t narrow_row = smem + lane_narrow_row_major(lane);
  const uint32_t narrow_column = smem + lane_narrow_column_major(lane);
  const uint32_t raw_tiles = smem + tile_major_lane(lane);
  // dx of the sub-chunk behind, which waits in shared memory, goes as far behind x; warps 2 and 3
  // store it, from the token on that is 4 before that of their copies.
  const int staged_token = copies.token - 4;
  const auto staged = [&] { return a.dx + ((copies.x - a.x) + (kChunk + kSub - 4) * 3 * a.D); };
  const uint32_t staged_at = smem + kOut + position_of(staged_token) * kPitch + thread % 16 * 16;

#pragma unroll 1
  for (int chunk = block.last_chunk; chunk >= block.first_chunk; --chunk) {
    const int t0 = chunk * kChunk;
    const bool more = chunk > block.first_chunk;
    const uint64_t reset = resets.bits();
#pragma unroll 1
    for (int sub = kSubs - 1; sub >= 0; --sub) {
      const Tokens tokens{uint32_t(reset >> (16 * sub)) & 0xffffu, T - t0 - kSub * sub};
      const uint32_t tile = kRaw + sub * 4 * kTile;
      Ungated ungated;
      if (kGated) ungated.load(a, block, warp, lane, t0 + kSub * sub);
      barrier_sync(kTiles, kThreads);
      // One warp after the other: of a choice between three the compiler makes a table of jumps.
      if (warp >= 2 && (sub < kSubs - 1 || chunk < block.last_chunk))
        store_dx(staged(), a.D, staged_at, T - t0 - kSub * (sub + 1) - staged_token);
      if (warp == 0)
        score_block<false>(smem_bytes, lane, narrow_row + kQueryD, narrow_column + kKeyD,
                           narrow_column + kScores, tokens);
      if (warp == 1)
        score_block<true>(smem_bytes, lane, raw_columns + tile + kDy * kTile,
                          raw_tiles + tile + kV * kTile, narrow_column + kScores + 512, tokens);
      mbarrier_arrive_warp(smem + kScored);
      // The state warps have the gates' inputs in registers.
      if (more) copies.gates(sub, kSub);
      cp_async_commit();
      // The values refilled in the last turn, while the state warps are at their products. Only the
      // thread that has copied a piece touches it before kValues.
      if (kGated && sub < kSubs - 1 && more) {
        cp_async_wait<1>();
        copies.gate_values(sub + 1, a.input_act);
      }
      barrier_sync(kHelper, kHelperThreads);

      // ---- dv, 32 value columns a warp
      float dv[2][2][4] = {};
      uint32_t left[4], right[4];
      ldmatrix_trans(left, narrow_row + kScores);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        ldmatrix_trans(right, at_step(raw_columns, 2 * warp + j) + tile + kDy * kTile);
        mma(dv[j][0], left, right[0], right[1]);
        mma(dv[j][1], left, right[2], right[3]);
      }
      barrier_sync(kState, kThreads);

      // ---- refill what the state warps have read
      if (sub == 1) {
        copies.saved_state(a.states, block.bh * block.chunks + chunk, 0);
        cp_async_commit();
      }
      if (more) {
        copies.values(sub, kSub);
        if (sub == kSubs - 1) copies.saved_state(a.states, block.bh * block.chunks + chunk - 1, 2);
      }
      cp_async_commit();
      if (more && sub == 0) gates_loaded();

#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        ldmatrix_trans(left, narrow_row + kKey + k * 512);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          ldmatrix_trans(right, column_major + kDh + k * 16 * kPitch + j * 32);
          mma(dv[j][0], left, right[0], right[1]);
          mma(dv[j][1], left, right[2], right[3]);
        }
      }
      mbarrier_arrive_warp(smem + kFree);
      // Always so; the compiler does not know, and takes none of this work ahead of the arrival.
      if (kGated && a.input_act != Act::identity) ungated.scale(dv, a.input_act);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t packed[4] = {
            pack_bf16(dv[j][0][0], dv[j][0][1]), pack_bf16(dv[j][0][2], dv[j][0][3]),
            pack_bf16(dv[j][1][0], dv[j][1][1]), pack_bf16(dv[j][1][2], dv[j][1][3])};
        stmatrix(column_major + kOut + kV * kOutTile + j * 32, packed);
      }
      if (sub == 1) {
        cp_async_wait<1>();
        mbarrier_arrive_warp(smem + kFirst);
      }
      copies.back(1);
    }
    if (!more) continue;
    resets.load(a, block.b, chunk - 1, lane);  // on the way while those copies are
    gates0_loaded();
    values_loaded(0);
  }
  barrier_sync(kTiles, kThreads);
  if (warp >= 2) store_dx(staged(), a.D, staged_at, T - block.first_chunk * kChunk - staged_token);
}

template <bool kSilu, bool kGated>
__global__ __launch_bounds__(kThreads, 1) void backward_kernel(const Call<__nv_bfloat16> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  if (threadIdx.x == 0) {
    const uint32_t smem = smem_address(smem_bytes);
#pragma unroll
    for (int i = 0; i < 6; ++i) mbarrier_init(smem + kBarriers + i * 8, kHelpers);
  }
  __syncthreads();
  if (threadIdx.x < kStateThreads) {
    registers_grow<kStateRegisters>();
    state_warp<kSilu>(a, smem_bytes);
  } else {
    registers_shrink<kHelperRegisters>();
    helper_warp<kGated>(a, smem_bytes);
  }
#endif
}

template <bool kSilu, bool kGated>
void launch(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  const auto kernel = backward_kernel<kSilu, kGated>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<c.ctas(), kThreads, kBytes, stream>>>(c);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void backward_sm90(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  static_assert(kBytes <= 227 * 1024);
  clear_flags(c, stream);
  const bool silu = c.output_act == Act::silu;
  if (c.input_act != Act::identity)
    silu ? launch<true, true>(c, stream) : launch<false, true>(c, stream);
  else
    silu ? launch<true, false>(c, stream) : launch<false, false>(c, stream);
}

}  // namespace hgrn::hgru2

// The state warps of hgru2_backward_sm90.cu, whose head has the roles and what is between them.
#pragma once
#include "cuda/hgru2_backward_roles.cuh"

namespace hgrn::hgru2::backward_roles {

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

// kQueryGate: the queries' gate. kReset: there may be resets; without, the gates are one piece of code
// without branches, in which latencies overlap.
template <Act kQueryGate, bool kReset>
__device__ __forceinline__ void state_warp(const Call<__nv_bfloat16>& a,
                                           unsigned char* smem_bytes) {
  const uint32_t smem = smem_address(smem_bytes);
  const Block block(a);
  const int tid = opaque_thread(), warp = tid >> 5, lane = tid & 31, g = lane >> 2, q = lane & 3;
  const int own = 16 * warp;
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
  const uint32_t dh_store = smem + kDh + row_offset(own + (lane & 15), lane >> 4, kDhHalf);
  const uint32_t own_states = smem + kStates + tid * 16;
  const uint64_t columns = contract_columns(smem), rows = contract_tokens(smem);
  Resets resets;
  if (kReset) resets.load(a, block.b, block.last_chunk, lane);
  uint32_t chunk_parity = 0, parity = 0;

#pragma unroll 1
  for (int chunk = block.last_chunk; chunk >= block.first_chunk; --chunk) {
    const uint64_t reset = kReset ? resets.bits() : 0;
    const auto tokens_of = [&](int sub) {  // those beyond T change nothing (Copies::gates)
      return Tokens{uint32_t(reset >> (16 * sub)) & 0xffffu, kSub};
    };
    if (kReset) resets.load(a, block.b, chunk - 1, lane);
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
        ldmatrix_trans(raw, own_raw + raw_tile(kF, sub));
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
        wgmma128<true>(h, key_b[sub], wgmma_at(rows, raw_tile(kV, sub)));
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
      const uint32_t tile = raw_tile(0, sub);
      const uint64_t sub_columns = wgmma_at(columns, tile), sub_rows = wgmma_at(rows, tile);

      // ---- gates, the tiles of this warp's channels
      KeyGates key;
      Decay decay;
      float query[2][4], slope[2][4];
      OperandTiles tiles;
      {
        uint32_t xq[4], xf[4];
        ldmatrix_trans(xf, own_raw + tile + kF * kPart);
        ldmatrix_trans(xq, own_raw + tile + kQ * kPart);
        key_gates(key, xf, bound, rest, q, tokens);
        decay_products(decay, key.f, q, tokens);
        query_gates<kQueryGate == Act::silu, true>(query, slope, xq, kQueryGate, a.query_scale);
        float up[2][4], down[2][4];
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            up[r][m] = query[r][m] * decay.up[r][m];
            down[r][m] = rest[r] * key.close[r][m] * decay.down[r][m];
          }
        pack_tiles(tiles, up, down, decay, q, tokens);
      }
      mbarrier_wait(smem + kFree, parity ^ 1);
      stmatrix(narrow_store + kQueryD, tiles.query_d);
      stmatrix(narrow_store + kKeyD, tiles.key_d);
      stmatrix(narrow_store + kKey, tiles.key_b);
      barrier_arrive(kTiles, kThreads);
      // The saved state again, for the chunk's first sub-chunk.
      if (sub == 0) mbarrier_wait(smem + kFirst, chunk_parity);

      // ---- iq, ik, sum_v h dh; bf16(dh) for the helpers
      float iq[2][4] = {}, ik[2][4] = {};  // [tile][..]: element [r][m] is [m/2][2r + m%2]
      float cross[2];
      {
        const uint32_t state = own_states + (sub == 0 ? kFirstSlot : sub - 1) * kH;
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
          for (int j = 0; j < kGroup; ++j) stmatrix(at_step(dh_store, k0 + j, kDhHalf), d[j]);
          if (k0 + kGroup == kWarps) barrier_arrive(kDhStored, kThreads);
          uint32_t product[4];
#pragma unroll
          for (int e = 0; e < 4; ++e)
            product[e] = fma_bf16x2(h[0][e], d[0][e], mul_bf16x2(h[1][e], d[1][e]));
          mma(sum, product, kOnes, kOnes);
          wgmma_fence();
#pragma unroll
          for (int j = 0; j < kGroup; ++j) {
            wgmma16<false>(iq, h[j], wgmma_at(sub_columns, columns_at(kDy * kPart, k0 + j)));
            wgmma16<false>(ik, d[j], wgmma_at(sub_columns, columns_at(kV * kPart, k0 + j)));
          }
          wgmma_commit();
          wgmma_wait_all(iq, ik);
        }
        cross[0] = sum[0], cross[1] = sum[2];
      }

#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        dh[j][0] *= decay.total[0], dh[j][1] *= decay.total[0];
        dh[j][2] *= decay.total[1], dh[j][3] *= decay.total[1];
      }
      wgmma_fence();
      wgmma128<true>(dh, tiles.query_b, wgmma_at(sub_rows, kDy * kPart));
      wgmma_commit();
      // ---- the diagonal block; dh
      uint32_t frag[4], frag_t[4];
      float gq[2][4] = {}, gk[2][4] = {};
      if (sub == kSubs - 1) mbarrier_wait(smem + kGradient, chunk_parity);
      const uint32_t gradients = smem + kGradients + (chunk_parity * kSubs + sub) * kScoreBlock;
      ldmatrix(frag, gradients + lane_narrow_row_major(lane));
      ldmatrix_trans(frag_t, gradients + lane_narrow_column_major(lane));
      const uint4 d4 =
          ld_shared4(smem + kDiagonal + (chunk_parity * kChunk + sub * kSub) * 4 + q * 16);
      mma(gq[0], tiles.key_d, frag[0], frag[1]);
      mma(gq[1], tiles.key_d, frag[2], frag[3]);
      mma(gk[0], tiles.query_d, frag_t[0], frag_t[1]);
      mma(gk[1], tiles.query_d, frag_t[2], frag_t[3]);
      wgmma_wait_all(dh);
      barrier_arrive(kState, kThreads);

      // ---- dq, dk, dg
      {
        const float diag[4] = {__uint_as_float(d4.x), __uint_as_float(d4.y), __uint_as_float(d4.z),
                               __uint_as_float(d4.w)};
        float dxq[2][4], dxf[2][4];
        channel_gradients(
            dxq, dxf, dbound, iq, ik, gq, gk, [&](int r) { return cross[r]; }, diag,
            {key, decay, query, slope, rest, tiles}, tokens, q);
        uint32_t packed[4];
        mbarrier_wait(smem + kStored, parity);  // dx of the sub-chunk behind
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

}  // namespace hgrn::hgru2::backward_roles

// The state warps of hgru2_backward_sm90.cu, whose head has the roles and what is between them.
#pragma once
#include "cuda/hgru2_backward_earlier.cuh"

namespace hgrn::hgru2::backward_roles {

// dh at the end of this piece's tokens, from dhT or the segments behind: rows c = own + g (+8),
// columns v = 8j + 2q (+1).
__device__ __forceinline__ void start_dh(float (&dh)[N / 8][4], const Call<__nv_bfloat16>& a,
                                         const Piece& piece, int chunks, int own, int g, int q) {
  const auto state_at = [&](int j, int r) { return (own + g + 8 * r) * N + 8 * j + 2 * q; };
  const float* const from = piece.end == chunks ? a.dhT : nullptr;
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float2 v = make_float2(0.0f, 0.0f);
      if (from)
        v = *reinterpret_cast<const float2*>(from + int64_t(piece.bh) * N * N + state_at(j, r));
      dh[j][2 * r] = v.x;
      dh[j][2 * r + 1] = v.y;
    }
#pragma unroll 1
  for (int behind = piece.whole ? 0 : a.split.segments - 1; behind > piece.segment; --behind) {
    const float* const in =
        a.boundaries +
        (int64_t(piece.bh - a.split.whole) * (a.split.segments - 1) + behind - 1) * (N + 1) * N;
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

// What a state thread addresses, made anew each time: kept, it would be spilled, and a reload takes
// longer than these few instructions.
struct StateAddresses {
  uint32_t smem;
  int tid;
  // The same from a thread's number of which the compiler's last stage, too, does not know that it
  // is the same: opaque() is for those before it.
  __device__ __forceinline__ StateAddresses anew() const {
    return {smem, __shfl_sync(0xffffffffu, tid, tid & 31)};
  }
  // q of this warp's channels in the first sub-chunk, for ldmatrix.
  __device__ __forceinline__ uint32_t raw() const {
    const int t = opaque(tid);
    return at_step(smem + tile_major_lane(t & 31), t >> 5) + kRaw;
  }
  // A row of 128 bytes of kQueries, block 0, and of kDh: this lane's channel and 16-byte column.
  __device__ __forceinline__ uint32_t operands() const {
    const int t = opaque(tid);
    return smem + kQueries + operand_offset(16 * (t >> 5) + (t & 15), (t >> 4) & 1);
  }
  __device__ __forceinline__ uint32_t dh() const { return operands() - (kQueries - kDh); }
  // A thread's 16 bytes of the block of which no result is used, as ldmatrix would address them.
  __device__ __forceinline__ uint32_t spare() const { return operands() ^ (kSpare * 32); }
  __device__ __forceinline__ uint32_t pair_keys() const {
    const int t = opaque(tid);
    return smem + kPairKeys + pair_offset(16 * (t >> 5) + (t & 15), (t >> 4) & 1);
  }
  // 16 bytes a thread: h, and what waits.
  __device__ __forceinline__ uint32_t states() const { return smem + kStates + opaque(tid) * 16; }
  __device__ __forceinline__ uint32_t stash() const { return smem + kStash + opaque(tid) * 16; }
  __device__ __forceinline__ uint32_t ungated() const { return smem + kUngated + opaque(tid) * 16; }
  // dx_q of the earlier sub-chunk, for stmatrix.
  __device__ __forceinline__ uint32_t out() const {
    const int t = opaque(tid);
    return smem + kOut + padded_tile_major(t & 31) + (t >> 5) * 32;
  }
  // A block of D, as it is and transposed.
  __device__ __forceinline__ uint32_t gradients(int block) const {
    return smem + kGradients + block * kScoreBlock + lane_narrow_row_major(opaque(tid) & 31);
  }
  __device__ __forceinline__ uint32_t gradients_t(int block) const {
    return smem + kGradients + block * kScoreBlock + lane_narrow_column_major(opaque(tid) & 31);
  }
  __device__ __forceinline__ uint32_t diagonal(int sub) const {
    return smem + kDiagonal + sub * kSub * 4 + (opaque(tid) & 3) * 16;
  }
};

// The products of f of a thread's tokens once more: made again from what is kept anyway, they need
// no registers meanwhile.
__device__ __forceinline__ void products_again(Decay& o, const KeyGates& key,
                                               const float (&bound)[2], const float (&rest)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float f[2][4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      float open = key.open[r][m];
      asm volatile("" : "+f"(open));
      f[r][m] = forget(open, bound[r], rest[r]);
    }
    running_products(o, f, r);
  }
}

// h before the chunk's second pair, in place of the saved one. values: the mbarrier of v.
template <class TokensOf>
__device__ __forceinline__ void advance_state(const StateAddresses& at, const float (&bound)[2],
                                              const float (&rest)[2], int q,
                                              const TokensOf& tokens_of, uint32_t values,
                                              uint32_t parity, uint64_t rows) {
  uint32_t key_b[2][4];
  float total[2][2];
#pragma unroll
  for (int sub = 1; sub >= 0; --sub) {
    const Tokens tokens = tokens_of(sub);
    uint32_t raw[4];
    ldmatrix_trans(raw, at.raw() + raw_tile(kF, sub));
    KeyGates key;
    key_gates(key, raw, bound, rest, q, tokens);
    float k_after[2][4];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int m = 0; m < 4; ++m)
        k_after[r][m] = (sub == 0 ? rest[r] * total[1][r] : rest[r]) * key.close[r][m];
    scale_after(k_after, total[sub], key.f, q, tokens);
    cut_after(k_after, q, tokens);
    pack(key_b[sub], k_after);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) total[0][r] *= total[1][r];
  float h[N / 8][4];
  const uint32_t saved = at.states();
#pragma unroll
  for (int k = 0; k < kWarps; ++k) {
    const uint4 v = ld_shared4(saved + k * kStateThreads * 16);
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      h[2 * k + (e >> 1)][2 * (e & 1)] = total[0][e & 1] * low_bf16(pairs[e]);
      h[2 * k + (e >> 1)][2 * (e & 1) + 1] = total[0][e & 1] * high_bf16(pairs[e]);
    }
  }
  mbarrier_wait(values, parity);
  fence_async_proxy();
  wgmma_fence();
#pragma unroll
  for (int sub = 0; sub < 2; ++sub)
    wgmma128<true>(h, key_b[sub], wgmma_at(rows, raw_tile(kV, sub)));
  wgmma_commit();
  wgmma_wait_all(h);
  const uint32_t advanced = at.states();
#pragma unroll
  for (int k = 0; k < kWarps; ++k)
    st_shared(advanced + k * kStateThreads * 16,
              make_uint4(pack_bf16(h[2 * k][0], h[2 * k][1]), pack_bf16(h[2 * k][2], h[2 * k][3]),
                         pack_bf16(h[2 * k + 1][0], h[2 * k + 1][1]),
                         pack_bf16(h[2 * k + 1][2], h[2 * k + 1][3])));
}

// iq = dy h^T, ik = v bf16(dh)^T, cross = sum_v h dh of a pair; bf16(dh) for the helpers.
// [tile][..]: element [r][m] of sub-chunk s is [2 s + m/2][2r + m%2].
__device__ __forceinline__ void pair_products(float (&iq)[4][4], float (&ik)[4][4],
                                              float (&cross)[2], const float (&dh)[N / 8][4],
                                              const StateAddresses& at, uint64_t pair_columns) {
  float sum[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) iq[j][e] = ik[j][e] = 0.0f;
  const uint32_t states = at.states(), dh_rows = at.dh();
#pragma unroll
  for (int k0 = 0; k0 < kWarps; k0 += kGroup) {
    uint32_t h[kGroup][4], d[kGroup][4];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int k = k0 + j;
      const uint4 h4 = ld_shared4(states + k * kStateThreads * 16);
      h[j][0] = h4.x, h[j][1] = h4.y, h[j][2] = h4.z, h[j][3] = h4.w;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        d[j][e] =
            pack_bf16(dh[2 * k + (e >> 1)][2 * (e & 1)], dh[2 * k + (e >> 1)][2 * (e & 1) + 1]);
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) stmatrix(at_step(dh_rows, k0 + j, kDhHalf), d[j]);
#pragma unroll
    for (int j = 0; j < kGroup; j += 2) {
      uint32_t product[4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        product[e] = fma_bf16x2(h[j][e], d[j][e], mul_bf16x2(h[j + 1][e], d[j + 1][e]));
      mma(sum, product, kOnes, kOnes);
    }
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      wgmma32<false>(iq, h[j], wgmma_at(pair_columns, columns_at(kDy * kPart, k0 + j)));
      wgmma32<false>(ik, d[j], wgmma_at(pair_columns, columns_at(kV * kPart, k0 + j)));
    }
    wgmma_commit();
    wgmma_wait_all(iq, ik);
  }
  cross[0] = sum[0], cross[1] = sum[2];
}

// What a piece leaves: dh before it, and its part of d bound.
__device__ __forceinline__ void end_piece(const Call<__nv_bfloat16>& a, const Piece& work,
                                          const float (&dh)[N / 8][4], const float (&dbound)[2],
                                          int own, int g, int q, int tid) {
  if (work.to >= 0) hand_over<kStateThreads>(a, work.to, dh, tid, kHandOver);
  if (a.dh0 && work.first == 0)
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        *reinterpret_cast<float2*>(a.dh0 + int64_t(work.bh) * N * N + (own + g + 8 * r) * N +
                                   8 * j + 2 * q) = make_float2(dh[j][2 * r], dh[j][2 * r + 1]);
  if (a.dbound_partial)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = dbound[r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      float* const out = a.dbound_partial + work.b * a.D + work.head * N + own + g + 8 * r;
      if (q == 0) {
        out[work.part * a.B * a.D] = sum;
        if (work.whole)
          for (int part = 1; part < a.parts(); ++part) out[part * a.B * a.D] = 0.0f;
      }
    }
}

// kQueryGate: the queries' gate. kReset: there may be resets; without, the gates are one piece of
// code without branches, in which latencies overlap.
template <Act kQueryGate, bool kGated, bool kReset>
__device__ __forceinline__ void state_warp(const Call<__nv_bfloat16>& a,
                                           unsigned char* smem_bytes) {
  const uint32_t smem = opaque_address(smem_bytes);
  const Pieces pieces(a, /*reverse=*/true);
  const int tid = opaque_thread(), warp = tid >> 5, lane = tid & 31, g = lane >> 2, q = lane & 3;
  const int own = 16 * warp;
  const StateAddresses at{smem, tid};
  const uint64_t columns = contract_columns(smem), rows = contract_tokens(smem);
  uint32_t chunk_parity = 0, parity = 0;

#pragma unroll 1
  for (int k = 0; k < pieces.count; ++k) {
    const Piece work = pieces.at(a, k);
    float bound[2], rest[2], dbound[2] = {0.0f, 0.0f};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bound[r] = a.bound ? a.bound[work.head * N + own + g + 8 * r] : 0.0f;
      rest[r] = 1.0f - bound[r];
    }
    float dh[N / 8][4];
    if (work.from < 0)
      start_dh(dh, a, work, pieces.chunks, own, g, q);
    else
      take_over<kStateThreads>(dh, a, work.from, tid);
    Resets resets;
    if (kReset) resets.load(a, work.b, work.end - 1, lane);

#pragma unroll 1
    for (int chunk = work.end - 1; chunk >= work.first; --chunk) {
      const uint64_t reset = kReset ? resets.bits() : 0;
      const auto tokens_of = [&](int sub) {  // those beyond T change nothing (Copies::gates)
        return Tokens{uint32_t(reset >> (16 * sub)) & 0xffffu, kSub};
      };
      if (kReset) resets.load(a, work.b, chunk - 1, lane);
      mbarrier_wait(smem + kLoaded, chunk_parity);
      advance_state(at, bound, rest, q, tokens_of, smem + kValues, chunk_parity, rows);

#pragma unroll 1
      for (int pair = kPairs - 1; pair >= 0; --pair) {
        float iq[4][4], ik[4][4], cross[2];
        if (pair == 0) mbarrier_wait(smem + kFirst, chunk_parity);
        mbarrier_wait(smem + kFreeDh, parity ^ 1);
        pair_products(iq, ik, cross, dh, at, wgmma_at(columns, raw_tile(0, 2 * pair)));
        uint32_t xf[2][4];
        {
          const uint32_t raw = at.raw() + raw_tile(kF, 2 * pair);
          ldmatrix_trans(xf[0], raw);
          ldmatrix_trans(xf[1], raw + kSubRows);
        }
        barrier_arrive(kDhStored, kThreads);

        float total[2][2];    // decay over the earlier and the later sub-chunk
        uint32_t query_e[4];  // q before of the earlier
        float gradient_e[2][4];
        const auto keep = [&](uint32_t to, const float(&v)[4]) {
          st_shared(to, make_float4(v[0], v[1], v[2], v[3]));
        };
        const auto kept = [&](float(&v)[4], uint32_t from) {
          const uint4 u = ld_shared4(from);
          v[0] = __uint_as_float(u.x), v[1] = __uint_as_float(u.y);
          v[2] = __uint_as_float(u.z), v[3] = __uint_as_float(u.w);
        };
        const auto part = [](uint32_t stash, int i) { return stash + i * kStateThreads * 16; };

        // ---- the earlier sub-chunk: gates, tiles, and what needs nothing of the later one
        {
          const Tokens tokens = tokens_of(2 * pair);
          KeyGates key;
          Decay decay;
          float query[2][4], slope[2][4];
          OperandTiles tiles;
          {
            key_gates(key, xf[0], bound, rest, q, tokens);
            decay_products(decay, key.f, q, tokens);
            float inverse_f[2][4], after[2][4], open[2][4];
            const uint32_t stash = at.stash();
            begin_earlier(inverse_f, after, decay, tokens, q);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#pragma unroll
              for (int m = 0; m < 4; ++m) open[r][m] = rest[r] * key.open[r][m];
              keep(part(stash, r), inverse_f[r]);
              keep(part(stash, 2 + r), after[r]);
              keep(part(stash, 4 + r), key.close[r]);
            }
            keep(part(stash, 6), open[0]), keep(at.spare(), open[1]);
          }
          uint32_t xq[4];
          ldmatrix_trans(xq, at.raw() + raw_tile(kQ, 2 * pair));
          query_gates<kQueryGate == Act::silu, true>(query, slope, xq, kQueryGate, a.query_scale);
          float up[2][4], down[2][4];
          own_parts(up, down, query, key, decay, rest);
          pack_tiles(tiles, up, down, decay, q, tokens);
          const uint32_t operands = at.operands();
          stmatrix(operands ^ (kEarlier * 32), tiles.query_d);
          stmatrix((operands + kOperandTile) ^ (kEarlier * 32), tiles.key_d);
          stmatrix((operands + kOperandTile) ^ (kAcross * 32), tiles.key_b);
#pragma unroll
          for (int e = 0; e < 4; ++e) query_e[e] = tiles.query_b[e];
#pragma unroll
          for (int r = 0; r < 2; ++r) total[0][r] = decay.total[r];

          if (pair == kPairs - 1) mbarrier_wait(smem + kGradient, chunk_parity);
          uint32_t frag[4], frag_t[4];
          ldmatrix(frag, at.gradients(2 * pair));
          ldmatrix_trans(frag_t, at.gradients_t(2 * pair));
          const uint4 d4 = ld_shared4(at.diagonal(2 * pair));
          float gq[2][4] = {}, gk[2][4] = {};
          mma(gq[0], tiles.key_d, frag[0], frag[1]);
          mma(gq[1], tiles.key_d, frag[2], frag[3]);
          mma(gk[0], tiles.query_d, frag_t[0], frag_t[1]);
          mma(gk[1], tiles.query_d, frag_t[2], frag_t[3]);
          const float diag[4] = {__uint_as_float(d4.x), __uint_as_float(d4.y),
                                 __uint_as_float(d4.z), __uint_as_float(d4.w)};
          float dxq[2][4], sums[2][4], dk[2][4];
          float iq_e[2][4];
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) iq_e[i][e] = iq[i][e];
          query_gradients(dxq, sums, dk, iq_e, gq, gk, diag,
                          {key, decay, query, slope, rest, tiles}, tokens, q);
          uint32_t packed[4];
          pack(packed, dxq);
          mbarrier_wait(smem + kStored, parity);  // dx of the pair behind
          stmatrix_trans(at.out() + kQ * kOutTile, packed);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float inverse_f[4];
            kept(inverse_f, part(at.stash(), r));
#pragma unroll
            for (int m = 0; m < 4; ++m) gradient_e[r][m] = sums[r][m] * inverse_f[m] - dk[r][m];
          }
          st_shared(at.spare() + kOperandTile, make_float4(sums[0][0], sums[1][0], 0.0f, 0.0f));
          if (!kGated)  // there, no values wait for their gate
#pragma unroll
            for (int r = 0; r < 2; ++r) keep(part(at.ungated(), r), gradient_e[r]);
        }

        // ---- the later sub-chunk: gates, tiles
        const Tokens tokens = tokens_of(2 * pair + 1);
        KeyGates key;
        Decay decay;
        float query[2][4], slope[2][4];
        OperandTiles tiles;
        uint32_t query_l[4];  // q before, from the start of the pair
        {
          uint32_t xq[4];
          ldmatrix_trans(xq, at.raw() + raw_tile(kQ, 2 * pair + 1));
          key_gates(key, xf[1], bound, rest, q, tokens);
          decay_products(decay, key.f, q, tokens);
          query_gates<kQueryGate == Act::silu, true>(query, slope, xq, kQueryGate, a.query_scale);
          float up[2][4], down[2][4];
          own_parts(up, down, query, key, decay, rest);
          pack_tiles(tiles, up, down, decay, q, tokens);
          float factor[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            total[1][r] = decay.total[r];
            factor[r] = decay.outer_up[r] * total[0][r];
          }
          pack(query_l, up, factor);
          // Keys of the earlier to the end of the pair; rounded twice, but for dv alone.
          uint32_t key_e[4];
          const uint32_t operands = at.operands(), pair_keys = at.pair_keys();
          ldmatrix(key_e, (operands + kOperandTile) ^ (kAcross * 32));
#pragma unroll
          for (int e = 0; e < 4; ++e)
            key_e[e] = pack_bf16(low_bf16(key_e[e]) * total[1][e & 1],
                                 high_bf16(key_e[e]) * total[1][e & 1]);
          stmatrix(operands ^ (kLater * 32), tiles.query_d);
          stmatrix((operands + kOperandTile) ^ (kLater * 32), tiles.key_d);
          stmatrix(operands ^ (kAcross * 32), tiles.query_b);
          mbarrier_wait(smem + kFree, parity ^ 1);  // dv lay there
          stmatrix(pair_keys, key_e);
          stmatrix(pair_keys ^ 32, tiles.key_b);
        }
        barrier_arrive(kTiles, kThreads);

        // ---- the blocks of D: the later sub-chunk's own, and across
        float iq_l[2][4], ik_l[2][4], ik_e[2][4], gq[2][4] = {}, gk[2][4] = {}, cross_l[4],
                                                  cross_e[4];
        {
          uint32_t key_e[4], frag[4], frag_t[4];
          ldmatrix(frag, at.gradients(kSubs + pair));
          ldmatrix_trans(frag_t, at.gradients_t(kSubs + pair));
          ldmatrix(key_e, (at.operands() + kOperandTile) ^ (kAcross * 32));
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            cross_e[e] = total[1][e >> 1] * cross[e >> 1];
            cross_l[e] = total[0][e >> 1] * cross[e >> 1];
          }
          add_over_tokens(cross_e, tiles.query_b, iq + 2);
          add_over_tokens(cross_l, key_e, ik);
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              iq_l[i][e] = total[0][e >> 1] * iq[2 + i][e];
              ik_l[i][e] = ik[2 + i][e];
              ik_e[i][e] = total[1][e >> 1] * ik[i][e];
            }
          mma(iq_l[0], key_e, frag[0], frag[1]);
          mma(iq_l[1], key_e, frag[2], frag[3]);
          mma(ik_e[0], tiles.query_b, frag_t[0], frag_t[1]);
          mma(ik_e[1], tiles.query_b, frag_t[2], frag_t[3]);
          ldmatrix(frag, at.gradients(2 * pair + 1));
          ldmatrix_trans(frag_t, at.gradients_t(2 * pair + 1));
          mma(gq[0], tiles.key_d, frag[0], frag[1]);
          mma(gq[1], tiles.key_d, frag[2], frag[3]);
          mma(gk[0], tiles.query_d, frag_t[0], frag_t[1]);
          mma(gk[1], tiles.query_d, frag_t[2], frag_t[3]);
        }
        // ---- dh
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float all = total[0][r] * total[1][r];
#pragma unroll
          for (int j = 0; j < N / 8; ++j) dh[j][2 * r] *= all, dh[j][2 * r + 1] *= all;
        }
        wgmma_fence();
        wgmma128<true>(dh, query_e, wgmma_at(rows, raw_tile(kDy, 2 * pair)));
        wgmma128<true>(dh, query_l, wgmma_at(rows, raw_tile(kDy, 2 * pair + 1)));
        wgmma_commit();

        const StateAddresses late = at.anew();
        // ---- dq, dk, dg of the later sub-chunk
        {
          products_again(decay, key, bound, rest);
          ldmatrix(tiles.key_b, at.pair_keys() ^ 32);
          const uint4 d4 = ld_shared4(at.diagonal(2 * pair + 1));
          const float diag[4] = {__uint_as_float(d4.x), __uint_as_float(d4.y),
                                 __uint_as_float(d4.z), __uint_as_float(d4.w)};
          float dxq[2][4], dxf[2][4];
          channel_gradients(
              dxq, dxf, dbound, iq_l, ik_l, gq, gk, [&](int r) { return cross_l[2 * r]; }, diag,
              {key, decay, query, slope, rest, tiles}, tokens, q);
          uint32_t packed[4];
          pack(packed, dxq);
          const uint32_t out = at.out() + 2 * kOutTile;
          stmatrix_trans(out + kQ * kOutTile, packed);
          pack(packed, dxf);
          stmatrix_trans(out + kF * kOutTile, packed);
        }
        wgmma_wait_all(dh);
        barrier_arrive(kState, kThreads);
        // ---- what is left of the earlier one
        {
          Earlier earlier;
          uint32_t key_e[4];
          const uint32_t operands = late.operands(), stash = late.stash();
          ldmatrix(key_e, (operands + kOperandTile) ^ (kAcross * 32));
          kept(earlier.inverse_f[0], part(stash, 0)), kept(earlier.inverse_f[1], part(stash, 1));
          kept(earlier.after[0], part(stash, 2)), kept(earlier.after[1], part(stash, 3));
          kept(earlier.close[0], part(stash, 4)), kept(earlier.close[1], part(stash, 5));
          kept(earlier.open[0], part(stash, 6)), kept(earlier.open[1], operands ^ (kSpare * 32));
          float up[4];
          kept(up, (operands ^ (kSpare * 32)) + kOperandTile);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            earlier.up[r] = up[r];
            if (kGated) {
#pragma unroll
              for (int m = 0; m < 4; ++m) earlier.gradient[r][m] = gradient_e[r][m];
            } else {
              kept(earlier.gradient[r], part(late.ungated(), r));
            }
          }
          float dxf[2][4];
          end_earlier(
              dxf, dbound, ik_e, [&](int r) { return total[0][r] * cross_e[2 * r]; }, earlier,
              key_e, q);
          uint32_t packed[4];
          pack(packed, dxf);
          stmatrix_trans(late.out() + kF * kOutTile, packed);
        }
        parity ^= 1;
      }
      chunk_parity ^= 1;
    }

    end_piece(a, work, dh, dbound, own, g, q, tid);
  }
  barrier_arrive(kDhStored, kThreads);  // the last dx is written
}

}  // namespace hgrn::hgru2::backward_roles

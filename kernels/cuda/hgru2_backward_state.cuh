// The state warps of hgru2_backward_sm90.cu, whose head has the roles and what is between them.
#pragma once
#include "cuda/hgru2_backward_earlier.cuh"
#include "cuda/hgru2_backward_products.cuh"

namespace hgrn::hgru2::backward_roles {

// The products of f of a thread's tokens once more: made again from what is kept anyway, they need
// no registers meanwhile.
__device__ __forceinline__ void products_again(Decay& o, const KeyGates& key,
                                               const KeyScales& scales) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float f[2][4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      float open = key.open[r][m];
      asm volatile("" : "+f"(open));
      f[r][m] = forget(open, scales, r);
    }
    running_products(o, f, r);
  }
}

// kQueryGate, kValueGate: the queries' and the values' gate. kReset: there may be resets; without,
// the gates are one piece of code without branches, in which latencies overlap.
template <Act kQueryGate, Act kValueGate, bool kReset>
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
    float lower[2], dbound[2] = {0.0f, 0.0f};
    KeyScales::load(lower, a.bound, work.head * N + own + g);
    KeyScales scales = {};
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
      const auto tokens_of = [&](int sub) {  // those beyond T change nothing (Copies::keys)
        return Tokens{uint32_t(reset >> (16 * sub)) & 0xffffu, kSub};
      };
      if (kReset) resets.load(a, work.b, chunk - 1, lane);
      mbarrier_wait(smem + kLoaded, chunk_parity);
      if constexpr (kValueGate != Act::identity)
        gate_first_values<kValueGate>(a, smem, work, chunk, tid);
      if (chunk == work.end - 1) {  // not before: the bounds are still on their way
        asm volatile("" : "+f"(lower[0]), "+f"(lower[1]));
        scales.set(lower);
      }
      advance_state(at, scales, q, tokens_of, smem + kValues, chunk_parity, rows);

#pragma unroll 1
      for (int pair = kPairs - 1; pair >= 0; --pair) {
        float iq[4][4], ik[4][4], cross[2];
        if (pair == 0) mbarrier_wait(smem + kFirst, chunk_parity);
        pair_products(iq, ik, cross, dh, at, wgmma_at(columns, raw_tile(0, 2 * pair)));
        uint32_t xf[2][4];
        {
          const uint32_t raw = at.raw() + raw_tile(kF, 2 * pair);
          ldmatrix_trans(xf[0], raw);
          ldmatrix_trans(xf[1], raw + kSubRows);
        }
        barrier_arrive(kRead, kThreads);
        // Not before: the helpers' products of the pair behind may still read the last one.
        mbarrier_wait(smem + kFreeDh, parity ^ 1);
        store_dh(at, dh);

        float total[2][2];    // decay over the earlier and the later sub-chunk
        uint32_t query_e[4];  // q before of the earlier
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
            key_gates(key, xf[0], scales, q, tokens);
            decay_products(decay, key.f, q, tokens);
            float inverse_f[2][4], after[2][4];
            const uint32_t stash = at.stash();
            begin_earlier(inverse_f, after, decay, tokens, q);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              keep(part(stash, r), inverse_f[r]);
              keep(part(stash, 2 + r), after[r]);
              keep(part(stash, 4 + r), key.k[r]);
            }
            keep(part(stash, 6), key.open[0]), keep(at.spare(), key.open[1]);
          }
          uint32_t xq[4];
          ldmatrix_trans(xq, at.raw() + raw_tile(kQ, 2 * pair));
          query_gates<kQueryGate == Act::silu, true>(query, slope, xq, kQueryGate, a.query_scale);
          float up[2][4], down[2][4];
          own_parts(up, down, query, key, decay);
          pack_tiles(tiles, up, down, decay, q, tokens);
          const uint32_t operands = at.operands();
          mbarrier_wait(smem + kFree, parity ^ 1);  // slopes lay there, and dv in pair_keys
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
          query_gradients(dxq, sums, dk, iq_e, gq, gk, diag, {key, decay, query, slope, tiles},
                          tokens, q);
          uint32_t packed[4];
          pack(packed, dxq);
          mbarrier_wait(smem + kStored, parity);  // dx of the pair behind
          stmatrix_trans(at.out() + kQ * kOutTile, packed);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float inverse_f[4], gradient[4];
            const uint32_t stash = at.stash();
            kept(inverse_f, part(stash, r));
#pragma unroll
            for (int m = 0; m < 4; ++m) gradient[m] = sums[r][m] * inverse_f[m] - dk[r][m];
            keep(part(stash, 7 + r), gradient);
          }
          st_shared(at.spare() + kOperandTile, make_float4(sums[0][0], sums[1][0], 0.0f, 0.0f));
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
          key_gates(key, xf[1], scales, q, tokens);
          decay_products(decay, key.f, q, tokens);
          query_gates<kQueryGate == Act::silu, true>(query, slope, xq, kQueryGate, a.query_scale);
          float up[2][4], down[2][4];
          own_parts(up, down, query, key, decay);
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
          products_again(decay, key, scales);
          ldmatrix(tiles.key_b, at.pair_keys() ^ 32);
          const uint4 d4 = ld_shared4(at.diagonal(2 * pair + 1));
          const float diag[4] = {__uint_as_float(d4.x), __uint_as_float(d4.y),
                                 __uint_as_float(d4.z), __uint_as_float(d4.w)};
          float dxq[2][4], dxf[2][4];
          channel_gradients(
              dxq, dxf, dbound, iq_l, ik_l, gq, gk, [&](int r) { return cross_l[2 * r]; }, diag,
              {key, decay, query, slope, tiles}, tokens, q);
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
          kept(earlier.k[0], part(stash, 4)), kept(earlier.k[1], part(stash, 5));
          kept(earlier.open[0], part(stash, 6)), kept(earlier.open[1], operands ^ (kSpare * 32));
          float up[4];
          kept(up, (operands ^ (kSpare * 32)) + kOperandTile);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            earlier.up[r] = up[r];
            kept(earlier.gradient[r], part(stash, 7 + r));
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

    end_piece(a, work, dh, dbound, scales, own, g, q, tid);
  }
  barrier_arrive(kRead, kThreads);  // the last dx is written
}

}  // namespace hgrn::hgru2::backward_roles

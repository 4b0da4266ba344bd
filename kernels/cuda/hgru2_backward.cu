// HGRU2 backward on tensor cores, bf16 with fp32 accumulation, n = 64 or 128.
//
// With dh = the gradient of the state after a sub-chunk of 16 tokens (fp32), h = the state before
// it (bf16) and the decay products of hgru2_gates.cuh, D[t][s] = dy_t . v_s:
//
//   dv = (k after) bf16(dh) + A^T dy
//   iq = dy h^T     ik = v bf16(dh)^T     gq = D_low (k / mid)     gk = D_low^T (q mid)
//   dq = iq before + gq mid + D_tt k      dk = ik after + gk / mid + D_tt q
//   dg_t = sum_{r>=t} [(q before) iq + (q mid) gq - (k / mid) gk]_r + sum_{s<t} [(k after) ik]_s
//          + total sum_v h dh             (dg = f df, the gradient of log f)
//   dh = diag(total) dh + (q before)^T dy
//   dxf = (1-bound) sigmoid'(xf) (dg/f - dk)     dbound = sum_t sigmoid(-xf) (dg/f - dk)
//
// D_low is strictly lower: t = s has no decay, so it stays out of dg and is added in fp32. The
// parenthesised factors in dg are the very bf16 tiles the products used, so that a pair (t,s) with
// both tokens behind r cancels to fp32 rounding; a dg from separately rounded q dq - k dk is up to
// ten times less accurate, and dbound, a long sum of it, up to a thousand times.
//
// One CTA a (b,h), or a segment of one (hgru2_scan.cu), n/16 warps, one pass from the last chunk of
// 64 tokens to the first. Per chunk, h is advanced from the saved state through the first three
// sub-chunks and kept in shared memory; then the sub-chunks are done from last to first. Warp w
// owns the channels c = 16w..16w+15: their gates, dh[c][:] in fp32 registers, dq, dk, dg; for dv it
// owns the value columns 16w..16w+15, and the warps exchange bf16(dh) and the k tile through shared
// memory. Twin: kernels/cpu/hgru2.cpp   Test: tools/hgru2_check.cu
#include "cuda/cuda_check.h"
#include "cuda/hgru2_gradients.cuh"
#include "cuda/hgru2_kernels.h"

namespace hgrn::hgru2 {
namespace {

constexpr int kSubs = kChunk / kSub;
enum Part { kQ, kF, kV, kDy };

template <int N>
struct BackwardSmem {
  static constexpr int kWarps = N / 16;
  static constexpr int kTile = kSub * N * 2;
  static constexpr int kState = N * N * 2;
  static constexpr int kRaw = 0;                            // [4 sub][q, f, v, dy][16][N] bf16
  static constexpr int kStates = kRaw + kSubs * 4 * kTile;  // [3][N/16][threads] uint4: h
  static constexpr int kDh = kStates + 3 * kState;          // [N][N] bf16
  static constexpr int kKey = kDh + kState;                 // [N][16] bf16: k after
  static constexpr int kPartial = kKey + N * 32;            // [warps][A, D][2][32] float4
  static constexpr int kScores = kPartial + kWarps * 2048;  // [A, D][16][16] bf16
  static constexpr int kBytes = kScores + 1024;
};

// The tile of dh: rows c of N bf16, 16-byte columns spread by the row.
template <int N>
__device__ __forceinline__ uint32_t dh_offset(int c, int column16) {
  return uint32_t(c * N * 2 + ((column16 ^ (c & 7)) << 4));
}

// v (channels x positions, a thread's elements [r][m]) to rows of tokens: 16 channels at out.
__device__ __forceinline__ void store_channels(__nv_bfloat16* out, int stride,
                                               const float (&v)[2][4], int g, int q, int valid) {
  uint32_t packed[4];
  pack(packed, v);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = token_of(i, g);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t pair = transpose8x8(packed[r + 2 * i]);
      if (t < valid) *reinterpret_cast<uint32_t*>(out + t * stride + 8 * r + 2 * q) = pair;
    }
  }
}

template <int N, bool kSilu>
__global__ __launch_bounds__(2 * N,
                             backward_ctas(N)) void backward_kernel(const Call<__nv_bfloat16> a) {
  using Smem = BackwardSmem<N>;
  const int T = int(a.T), D = int(a.D);
  constexpr int kThreads = 2 * N, kWarps = N / 16, kColumns = N / 8;
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  const uint32_t smem = smem_address(smem_bytes);
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, q = lane & 3;
  const int chunks = (T + kChunk - 1) / kChunk, part = int(blockIdx.x) - a.split.whole;
  const bool whole = part < 0 || a.split.segments == 1;
  const int segment = whole ? 0 : part % a.split.segments;
  const int64_t bh = whole ? blockIdx.x : a.split.whole + part / a.split.segments;
  const int64_t b = bh / a.H, head = bh % a.H;
  const int own = 16 * warp;
  const int first_chunk = segment * a.split.chunks;
  const int last_chunk = whole ? chunks - 1 : min(chunks, first_chunk + a.split.chunks) - 1;

  // A thread copies one 16-byte column of one token of a sub-chunk, from each part of the inputs.
  const int load_token = tid / kColumns, load_column = tid % kColumns;
  const __nv_bfloat16* const x = a.x + b * a.T * 3 * D + head * N + load_column * 8;
  const __nv_bfloat16* const dy = a.dy + b * a.T * D + head * N + load_column * 8;
  const uint32_t load_to = smem + Smem::kRaw + token_tile_offset<N>(load_token, load_column);
  const auto load_x = [&](int chunk, int sub) {  // zeros beyond T; not committed
    const int64_t t = int64_t(chunk) * kChunk + sub * kSub + load_token;
    const bool valid = t < T;
    const __nv_bfloat16* const from = valid ? x + t * 3 * D : x;
#pragma unroll
    for (int part = kQ; part <= kV; ++part)
      cp_async16(load_to + (sub * 4 + part) * Smem::kTile, from + (valid ? part * D : 0), valid);
  };
  const auto load_dy = [&](int chunk, int sub) {
    const int64_t t = int64_t(chunk) * kChunk + sub * kSub + load_token;
    const bool valid = t < T;
    cp_async16(load_to + (sub * 4 + kDy) * Smem::kTile, valid ? dy + t * D : dy, valid);
  };
  // This thread's part of a saved state into a slot that only this thread reads.
  const uint32_t own_states = smem + Smem::kStates + tid * 16;
  const auto load_state = [&](int chunk, int slot) {
    const uint4* const src =
        static_cast<const uint4*>(a.states) + (bh * chunks + chunk) * kWarps * kThreads + tid;
#pragma unroll
    for (int k = 0; k < kWarps; ++k)
      cp_async16(own_states + slot * Smem::kState + k * kThreads * 16, src + k * kThreads, true);
  };

#pragma unroll
  for (int sub = 0; sub < kSubs; ++sub) {
    load_x(last_chunk, sub);
    if (sub > 0) load_dy(last_chunk, sub);
  }
  load_state(last_chunk, 2);
  cp_async_commit();

  const KeyScales scales(a.bound, head * N + own + g);
  // dh: rows c = own + g (+8), columns v = 8j + 2q (+1)
  float dh[kColumns][4];
  const auto state_at = [&](int j, int r) { return (own + g + 8 * r) * N + 8 * j + 2 * q; };
  const float* const from = last_chunk == chunks - 1 ? a.dhT : nullptr;
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float2 v = make_float2(0.0f, 0.0f);
      if (from) v = *reinterpret_cast<const float2*>(from + bh * N * N + state_at(j, r));
      dh[j][2 * r] = v.x;
      dh[j][2 * r + 1] = v.y;
    }
#pragma unroll 1
  for (int behind = whole ? 0 : a.split.segments - 1; behind > segment; --behind) {
    const float* const in =
        a.boundaries + ((bh - a.split.whole) * (a.split.segments - 1) + behind - 1) * (N + 1) * N;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float decay = in[N * N + own + g + 8 * r];  // hgru2_scan.cu
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float2 v = *reinterpret_cast<const float2*>(in + state_at(j, r));
        dh[j][2 * r] = fmaf(decay, dh[j][2 * r], v.x);
        dh[j][2 * r + 1] = fmaf(decay, dh[j][2 * r + 1], v.y);
      }
    }
  }
  float dbound[2] = {0.0f, 0.0f};
  const uint32_t tile_major = lane_tile_major<N>(lane), column_major = lane_column_major<N>(lane);
  const uint32_t narrow_row = lane_narrow_row_major(lane);
  const uint32_t narrow_column = lane_narrow_column_major(lane);
  const uint32_t dh_store = smem + Smem::kDh + dh_offset<N>(own + (lane & 15), lane >> 4);
  const uint32_t dh_load = smem + Smem::kDh + dh_offset<N>(lane & 15, 2 * warp + (lane >> 4));

  const auto load_reset = [&](int chunk, int half) -> uint32_t {
    const int t = chunk * kChunk + 32 * half + lane;
    return a.reset && chunk >= 0 && t < T ? a.reset[b * a.T + t] : 0;
  };
  uint32_t next_reset[2] = {load_reset(last_chunk, 0), load_reset(last_chunk, 1)};

#pragma unroll 1
  for (int chunk = last_chunk; chunk >= first_chunk; --chunk) {
    const int t0 = chunk * kChunk;
    const uint64_t reset = uint64_t(__ballot_sync(0xffffffffu, next_reset[1] != 0)) << 32 |
                           __ballot_sync(0xffffffffu, next_reset[0] != 0);
    const auto tokens_of = [&](int sub) {
      return Tokens{uint32_t(reset >> (16 * sub)) & 0xffffu, T - t0 - kSub * sub};
    };
    cp_async_wait<0>();
    __syncthreads();
    load_dy(chunk, 0);  // the one tile that the last chunk's end still needed
    cp_async_commit();
    next_reset[0] = load_reset(chunk - 1, 0);
    next_reset[1] = load_reset(chunk - 1, 1);
    if (a.input_act != Act::identity) {
      for (int item = tid; item < kSubs * kSub * kColumns; item += kThreads)
        activate16(smem + Smem::kRaw + (item / (kSub * kColumns) * 4 + kV) * Smem::kTile +
                       item % (kSub * kColumns) * 16,
                   a.input_act);
      __syncthreads();
    }

    // ---- h before the sub-chunks 1, 2, 3 into slots 0, 1, 2; the saved one waits in slot 2
    {
      uint32_t key_b[kSubs - 1][4];
      float total[kSubs - 1][2];
      // All gates first: their latencies overlap, where the products below are a chain.
#pragma unroll
      for (int sub = 0; sub < kSubs - 1; ++sub) {
        const Tokens tokens = tokens_of(sub);
        uint32_t raw[4];
        ldmatrix_trans(
            raw, (smem + Smem::kRaw + (sub * 4 + kF) * Smem::kTile + tile_major) ^ (warp * 32));
        KeyGates key;
        key_gates(key, raw, scales, q, tokens);
        scale_after(key.k, total[sub], key.f, q, tokens);
        cut_after(key.k, q, tokens);
        pack(key_b[sub], key.k);
      }
      float h[kColumns][4];
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        const uint4 v = ld_shared4(own_states + 2 * Smem::kState + k * kThreads * 16);
        h[2 * k][0] = low_bf16(v.x), h[2 * k][1] = high_bf16(v.x);
        h[2 * k][2] = low_bf16(v.y), h[2 * k][3] = high_bf16(v.y);
        h[2 * k + 1][0] = low_bf16(v.z), h[2 * k + 1][1] = high_bf16(v.z);
        h[2 * k + 1][2] = low_bf16(v.w), h[2 * k + 1][3] = high_bf16(v.w);
      }
#pragma unroll
      for (int sub = 0; sub < kSubs - 1; ++sub) {
        const uint32_t value = smem + Smem::kRaw + (sub * 4 + kV) * Smem::kTile;
#pragma unroll
        for (int k = 0; k < kWarps; ++k) {
          uint32_t v[4];
          ldmatrix_trans(v, (value + column_major) ^ (k * 32));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float(&s)[4] = h[2 * k + i];
            s[0] *= total[sub][0], s[1] *= total[sub][0];
            s[2] *= total[sub][1], s[3] *= total[sub][1];
            mma(s, key_b[sub], v[2 * i], v[2 * i + 1]);
          }
        }
        // Apart from the products: stores between them would hold back the next loads.
#pragma unroll
        for (int k = 0; k < kWarps; ++k)
          st_shared(
              own_states + sub * Smem::kState + k * kThreads * 16,
              make_uint4(pack_bf16(h[2 * k][0], h[2 * k][1]), pack_bf16(h[2 * k][2], h[2 * k][3]),
                         pack_bf16(h[2 * k + 1][0], h[2 * k + 1][1]),
                         pack_bf16(h[2 * k + 1][2], h[2 * k + 1][3])));
      }
    }

#pragma unroll 1
    for (int sub = kSubs - 1; sub >= 0; --sub) {
      const Tokens tokens = tokens_of(sub);
      const uint32_t tile = smem + Smem::kRaw + sub * 4 * Smem::kTile;
      const uint32_t value = tile + kV * Smem::kTile, dout = tile + kDy * Smem::kTile;

      // ---- gates, this warp's part of A and D
      KeyGates key;
      Decay decay;
      float query[2][4], slope[2][4];
      OperandTiles tiles;
      {
        uint32_t xq[4], xf[4], left[4], right[4];
        ldmatrix_trans(xf, (tile + kF * Smem::kTile + tile_major) ^ (warp * 32));
        ldmatrix_trans(xq, (tile + kQ * Smem::kTile + tile_major) ^ (warp * 32));
        ldmatrix(left, (dout + column_major) ^ (warp * 32));
        ldmatrix(right, (value + tile_major) ^ (warp * 32));
        float scores_d[2][4] = {};
        mma(scores_d[0], left, right[0], right[1]);
        mma(scores_d[1], left, right[2], right[3]);
        key_gates(key, xf, scales, q, tokens);
        decay_products(decay, key.f, q, tokens);
        query_gates<kSilu>(query, slope, xq, a.output_act, a.query_scale);
        float up[2][4], down[2][4];
        own_parts(up, down, query, key, decay);
        pack_tiles(tiles, up, down, decay, q, tokens);
        float scores_a[2][4];
        partial_scores(scores_a, tiles.query_d, tiles.key_d);
        const uint32_t partial = smem + Smem::kPartial + warp * 2048 + lane * 16;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          st_shared(partial + 1024 + i * 512,
                    make_float4(scores_d[i][0], scores_d[i][1], scores_d[i][2], scores_d[i][3]));
          st_shared(partial + i * 512,
                    make_float4(scores_a[i][0], scores_a[i][1], scores_a[i][2], scores_a[i][3]));
        }
      }
      // The saved state again (slot 0 is this thread's own), for the chunk's first sub-chunk.
      if (sub == 0) cp_async_wait<1>();
      __syncthreads();

      // ---- A, D: sum over the warps, masks, bf16; the k tile
#pragma unroll
      for (int item = tid; item < 256; item += kThreads) {
        const int r = item & 1, from = (item >> 1) & 31, i = (item >> 6) & 1, which = item >> 7;
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float2 part = ld_shared_float2(smem + Smem::kPartial + w * 2048 + which * 1024 +
                                               i * 512 + from * 16 + r * 8);
          sum.x += part.x;
          sum.y += part.y;
        }
        const int t = token_of(r, from >> 2), s = 4 * (from & 3) + 2 * i;
        bool keep_x = s + which <= t, keep_y = s + 1 + which <= t;
        if (tokens.reset) {
          keep_x = keep_x && tokens.connected(t, s);
          keep_y = keep_y && tokens.connected(t, s + 1);
        }
        st_shared(smem + Smem::kScores + which * 512 + narrow_offset((from >> 2) + 8 * r, i) +
                      4 * (from & 3),
                  pack_bf16(keep_x ? sum.x : 0.0f, keep_y ? sum.y : 0.0f));
      }
      stmatrix(smem + Smem::kKey + lane_narrow_store(own, lane), tiles.key_b);
      float diagonal = 0.0f;  // D_tt of token t = lane % 16, in fp32
      {
        const int t = lane & 15, tile = (t >> 1) & 1, from = 4 * row_of(t) + (t >> 2);
#pragma unroll
        for (int w = 0; w < kWarps; ++w)
          diagonal += reinterpret_cast<const float*>(smem_bytes + Smem::kPartial + w * 2048 + 1024 +
                                                     tile * 512)[from * 4 + 2 * tile + (t & 1)];
      }

      // ---- iq, ik, sum_v h dh; bf16(dh) for the other warps
      float iq[2][4] = {}, ik[2][4] = {}, cross[2] = {0.0f, 0.0f};  // [tile][..]: element [r][m]
      {                                                             // is [m/2][2r + m%2]
        const uint32_t state = own_states + (sub == 0 ? 0 : sub - 1) * Smem::kState;
        uint32_t d[kWarps][4];
#pragma unroll
        for (int k = 0; k < kWarps; ++k) {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            d[k][e] =
                pack_bf16(dh[2 * k + (e >> 1)][2 * (e & 1)], dh[2 * k + (e >> 1)][2 * (e & 1) + 1]);
          stmatrix(dh_store ^ (k * 32), d[k]);
        }
#pragma unroll
        for (int k = 0; k < kWarps; ++k) {
          const uint4 h4 = ld_shared4(state + k * kThreads * 16);
          const uint32_t h[4] = {h4.x, h4.y, h4.z, h4.w};
          uint32_t frag[4];
          ldmatrix(frag, (dout + tile_major) ^ (k * 32));
          mma(iq[0], h, frag[0], frag[1]);
          mma(iq[1], h, frag[2], frag[3]);
          ldmatrix(frag, (value + tile_major) ^ (k * 32));
          mma(ik[0], d[k], frag[0], frag[1]);
          mma(ik[1], d[k], frag[2], frag[3]);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            cross[e & 1] = fmaf(low_bf16(h[e]), dh[2 * k + (e >> 1)][2 * (e & 1)], cross[e & 1]);
            cross[e & 1] =
                fmaf(high_bf16(h[e]), dh[2 * k + (e >> 1)][2 * (e & 1) + 1], cross[e & 1]);
          }
        }
      }
      if (sub == 1) cp_async_wait<0>();  // dy of sub-chunk 0, needed from the next barrier on
      __syncthreads();

      // ---- refill: q, f, v of this sub-chunk and dy of the one before are no longer read
      if (sub == 1) {
        load_state(chunk, 0);
        cp_async_commit();
      }
      if (chunk > first_chunk) {
        load_x(chunk - 1, sub);
        if (sub + 1 < kSubs)
          load_dy(chunk - 1, sub + 1);
        else
          load_state(chunk - 1, 2);
      }
      cp_async_commit();

      // ---- dv, this warp's value columns
      __nv_bfloat16* const dx = a.dx + (b * a.T + t0 + kSub * sub) * 3 * D + head * N + own;
      {
        float dv[2][2][4] = {};
#pragma unroll
        for (int k = 0; k < kWarps; ++k) {
          uint32_t left[4], right[4];
          ldmatrix_trans(left, smem + Smem::kKey + narrow_row + k * 512);
          ldmatrix_trans(right, dh_load + k * 16 * N * 2);
          mma(dv[k & 1][0], left, right[0], right[1]);
          mma(dv[k & 1][1], left, right[2], right[3]);
        }
        uint32_t left[4], right[4];
        ldmatrix_trans(left, smem + Smem::kScores + narrow_row);
        ldmatrix_trans(right, (dout + column_major) ^ (warp * 32));
        mma(dv[0][0], left, right[0], right[1]);
        mma(dv[1][1], left, right[2], right[3]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int token = token_of(r, g);
          if (token < tokens.valid)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int at = (token * 3 + 2) * D + 8 * i + 2 * q;
              float low = dv[0][i][2 * r] + dv[1][i][2 * r];
              float high = dv[0][i][2 * r + 1] + dv[1][i][2 * r + 1];
              if (a.input_act != Act::identity) {
                const uint32_t raw = *reinterpret_cast<const uint32_t*>(a.x + (dx - a.dx) + at);
                float unused[2], slope[2];
                query_gate(unused, slope, raw, a.input_act, 1.0f);
                low *= slope[0];
                high *= slope[1];
              }
              *reinterpret_cast<uint32_t*>(dx + at) = pack_bf16(low, high);
            }
        }
      }

      // ---- the diagonal block, dq, dk, dg
      {
        float gq[2][4] = {}, gk[2][4] = {};
        uint32_t frag[4];
        ldmatrix(frag, smem + Smem::kScores + 512 + narrow_row);
        mma(gq[0], tiles.key_d, frag[0], frag[1]);
        mma(gq[1], tiles.key_d, frag[2], frag[3]);
        ldmatrix_trans(frag, smem + Smem::kScores + 512 + narrow_column);
        mma(gk[0], tiles.query_d, frag[0], frag[1]);
        mma(gk[1], tiles.query_d, frag[2], frag[3]);
        float diag[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) diag[m] = __shfl_sync(0xffffffffu, diagonal, 4 * q + m);
        float dxq[2][4], dxf[2][4];
        const auto all_columns = [&](int r) {
          cross[r] += __shfl_xor_sync(0xffffffffu, cross[r], 1);
          return cross[r] += __shfl_xor_sync(0xffffffffu, cross[r], 2);
        };
        channel_gradients(dxq, dxf, dbound, iq, ik, gq, gk, all_columns, diag,
                          {key, decay, query, slope, tiles}, tokens, q);
        store_channels(dx, 3 * D, dxq, g, q, tokens.valid);
        store_channels(dx + D, 3 * D, dxf, g, q, tokens.valid);
      }

      // ---- dh
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        uint32_t frag[4];
        ldmatrix_trans(frag, (dout + column_major) ^ (k * 32));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float(&s)[4] = dh[2 * k + i];
          s[0] *= decay.total[0], s[1] *= decay.total[0];
          s[2] *= decay.total[1], s[3] *= decay.total[1];
          mma(s, tiles.query_b, frag[2 * i], frag[2 * i + 1]);
        }
      }
    }
  }

  if (a.dh0 && first_chunk == 0)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        *reinterpret_cast<float2*>(a.dh0 + bh * N * N + state_at(j, r)) =
            make_float2(dh[j][2 * r], dh[j][2 * r + 1]);
  if (a.dbound_partial)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = dbound[r] * scales.inverse_rest[r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      float* const out = a.dbound_partial + b * D + head * N + own + g + 8 * r;
      if (q == 0) {
        out[segment * a.B * D] = sum;
        if (whole)
          for (int s = 1; s < a.split.segments; ++s) out[s * a.B * D] = 0.0f;
      }
    }
}

template <int N, bool kSilu>
void launch(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  constexpr int kBytes = BackwardSmem<N>::kBytes;
  const auto kernel = backward_kernel<N, kSilu>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<unsigned(c.split.ctas(c.B * c.H)), 2 * N, kBytes, stream>>>(c);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

int tensor_smem_bytes(int n) {
  return n == 128 ? BackwardSmem<128>::kBytes : BackwardSmem<64>::kBytes;
}

void backward_tensor(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  if (c.split.segments > 1) scan_reverse(c, stream);
  if (c.n == 128 && c.sm90) return backward_sm90(c, stream);
  const bool silu = c.output_act == Act::silu;
  if (c.n == 128) return silu ? launch<128, true>(c, stream) : launch<128, false>(c, stream);
  silu ? launch<64, true>(c, stream) : launch<64, false>(c, stream);
}

}  // namespace hgrn::hgru2

// What the state warps of hgru2_backward_sm90.cu do with h and dh, 16 channels of a warp by all 128
// value columns: where they start, h's advance, the products of a pair with both, what a piece
// leaves; and where in shared memory a state thread finds its parts.
#pragma once
#include "cuda/hgru2_backward_roles.cuh"

namespace hgrn::hgru2::backward_roles {

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

// A chunk's first values, of its first pair, through their gate: 32 tokens, 16 bytes of two of them
// a thread. The derivatives go to where dx_i will be, as Copies::gate_values does with the rest.
template <Act kValueGate>
__device__ __forceinline__ void gate_first_values(const Call<__nv_bfloat16>& a, uint32_t smem,
                                                  const Piece& work, int chunk, int tid_) {
  const int tid = opaque(tid_), token = tid >> 4, column16 = tid & 15, T = int(a.T);
  const int first = chunk * kChunk + token, step = int(a.D);
  const uint32_t at = smem + kRaw + kV * kPart + row_offset(position_of(token), column16);
  __nv_bfloat16* const slopes =
      a.dx + ((work.b * a.T + first) * 3 + 2) * step + work.head * N + column16 * 8;
  uint4 slope[2];
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    uint4 v = ld_shared4(at + s * kSubRows);
    activate_with_slope<kValueGate>(v, slope[s]);
    st_shared(at + s * kSubRows, v);
  }
  fence_async_proxy();  // wgmma reads them
  barrier_arrive(kFirstGated, kThreads);
#pragma unroll
  for (int s = 0; s < 2; ++s)
    st_global_if(first + s * kSub < T, slopes + s * kSub * 3 * step, slope[s]);
  barrier_sync(kAmongState, kStateThreads);
}

// h before the chunk's second pair, in place of the saved one. values: the mbarrier of v.
template <class TokensOf>
__device__ __forceinline__ void advance_state(const StateAddresses& at, const KeyScales& scales,
                                              int q, const TokensOf& tokens_of, uint32_t values,
                                              uint32_t parity, uint64_t rows) {
  uint32_t key_b[2][4];
  float total[2][2];
#pragma unroll
  for (int sub = 1; sub >= 0; --sub) {
    const Tokens tokens = tokens_of(sub);
    uint32_t raw[4];
    ldmatrix_trans(raw, at.raw() + raw_tile(kF, sub));
    KeyGates key;
    key_gates(key, raw, scales, q, tokens);
    if (sub == 0)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int m = 0; m < 4; ++m) key.k[r][m] *= total[1][r];
    scale_after(key.k, total[sub], key.f, q, tokens);
    cut_after(key.k, q, tokens);
    pack(key_b[sub], key.k);
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

// Register e of step k of 16 value columns of bf16(dh).
__device__ __forceinline__ uint32_t rounded_dh(const float (&dh)[N / 8][4], int k, int e) {
  return pack_bf16(dh[2 * k + (e >> 1)][2 * (e & 1)], dh[2 * k + (e >> 1)][2 * (e & 1) + 1]);
}

// iq = dy h^T, ik = v bf16(dh)^T, cross = sum_v h dh of a pair.
// [tile][..]: element [r][m] of sub-chunk s is [2 s + m/2][2r + m%2].
__device__ __forceinline__ void pair_products(float (&iq)[4][4], float (&ik)[4][4],
                                              float (&cross)[2], const float (&dh)[N / 8][4],
                                              const StateAddresses& at, uint64_t pair_columns) {
  float sum[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) iq[j][e] = ik[j][e] = 0.0f;
  const uint32_t states = at.states();
#pragma unroll
  for (int k0 = 0; k0 < kWarps; k0 += kGroup) {
    uint32_t h[kGroup][4], d[kGroup][4];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int k = k0 + j;
      const uint4 h4 = ld_shared4(states + k * kStateThreads * 16);
      h[j][0] = h4.x, h[j][1] = h4.y, h[j][2] = h4.z, h[j][3] = h4.w;
#pragma unroll
      for (int e = 0; e < 4; ++e) d[j][e] = rounded_dh(dh, k, e);
    }
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

// bf16(dh) for the helpers.
__device__ __forceinline__ void store_dh(const StateAddresses& at, const float (&dh)[N / 8][4]) {
  const uint32_t rows = at.dh();
#pragma unroll
  for (int k = 0; k < kWarps; ++k) {
    uint32_t d[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] = rounded_dh(dh, k, e);
    stmatrix(at_step(rows, k, kDhHalf), d);
  }
}

// What a piece leaves: dh before it, and its part of d bound. What lies in local memory takes
// hundreds of cycles here, so that as little as possible is taken from before the loop.
__device__ __forceinline__ void end_piece(const Call<__nv_bfloat16>& a, const Piece& work,
                                          const float (&dh)[N / 8][4], const float (&dbound)[2],
                                          const KeyScales& scales, int own, int g, int q, int tid) {
  if (work.to >= 0) hand_over<kStateThreads>(a, work.to, dh, tid, kAmongState);
  if (a.dh0 && work.first == 0)
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        *reinterpret_cast<float2*>(a.dh0 + int64_t(work.bh) * N * N + (own + g + 8 * r) * N +
                                   8 * j + 2 * q) = make_float2(dh[j][2 * r], dh[j][2 * r + 1]);
  if (!a.dbound_partial) return;
  const int t = opaque(tid), channel = 16 * (t >> 5) + ((t & 31) >> 2);
  const int part = int(a.B * a.D);
  float* const out = a.dbound_partial + work.bh * N + channel;
  // work.whole, made again
  const bool whole = a.chain.slots ? work.from < 0 && work.to < 0 : int(blockIdx.x) < a.split.whole;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = dbound[r] * scales.inverse_rest[r];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if ((t & 3) == 0) {
      out[int64_t(work.part) * part + 8 * r] = sum;
      if (whole)
#pragma unroll 1
        for (int p = 1; p < a.parts(); ++p) out[int64_t(p) * part + 8 * r] = 0.0f;
    }
  }
}

}  // namespace hgrn::hgru2::backward_roles

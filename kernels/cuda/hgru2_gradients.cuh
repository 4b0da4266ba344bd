// HGRU2's gradients of queries, keys and gates, in registers, from the products of a sub-chunk
// (docs/notation.md, backward): for the tensor-core kernels, whose gates and elements are those of
// hgru2_gates.cuh.
// Twin: kernels/cpu/hgru2.cpp   Test: tools/hgru2_check.cu
#pragma once
#include "cuda/hgru2_gates.cuh"

namespace hgrn::hgru2 {

// What the backward pass of a warp's 16 channels and 16 tokens takes from its forward part.
struct ChannelTerms {
  const KeyGates& key;
  const Decay& decay;
  const float (&query)[2][4], (&slope)[2][4];  // slope: of the query's gate
  const OperandTiles& tiles;
};

// 1/f of a thread's tokens, of products of the other three.
__device__ __forceinline__ void inverse_forgets(float (&o)[4], const Decay& decay, int r) {
  const float *const before = decay.up[r], *const after = decay.down[r];
  const float all = decay.inverse[r];
  o[0] = all * after[0];
  o[1] = all * (before[0] * after[1]);
  o[2] = all * (before[1] * after[2]);
  o[3] = all * before[2];
}
// A token's summand of the suffix in dg, and its dq: arguments as of channel_gradients().
__device__ __forceinline__ float suffix_summand(const ChannelTerms& x, const float (&iq)[2][4],
                                                const float (&gq)[2][4], const float (&gk)[2][4],
                                                int r, int m) {
  const int i = m >> 1, e = 2 * r + (m & 1);
  return element(x.tiles.query_b, r, m) * iq[i][e] +
         (element(x.tiles.query_d, r, m) * gq[i][e] - element(x.tiles.key_d, r, m) * gk[i][e]);
}
__device__ __forceinline__ float query_gradient(const ChannelTerms& x, const float (&iq)[2][4],
                                                const float (&gq)[2][4], float diag, int r, int m) {
  const int i = m >> 1, e = 2 * r + (m & 1);
  return x.decay.up[r][m] * (iq[i][e] * x.decay.outer_up[r] + gq[i][e] * x.decay.outer_mid[r]) +
         diag * x.key.k[r][m];
}

// dq, dk and dlog f of them, and from those dx_q, dx_f and dbound, (1 - bound) d bound summed over
// this thread's tokens (docs/notation.md, backward).
// iq, ik: products of dy and of v with the states; gq, gk: with the diagonal block D; cross(r):
// sum_v h dh; diag: D_tt. [r][m]: channel g + 8 r, token 4 q + m; iq, ik, gq, gk [m/2][2r + m%2].
template <class Cross>
__device__ __forceinline__ void channel_gradients(float (&dxq)[2][4], float (&dxf)[2][4],
                                                  float (&dbound)[2], float (&iq)[2][4],
                                                  float (&ik)[2][4], const float (&gq)[2][4],
                                                  const float (&gk)[2][4], const Cross& cross,
                                                  const float (&diag)[4], const ChannelTerms& x,
                                                  const Tokens& tokens, int q) {
  if (tokens.reset)
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int i = m >> 1, p = m & 1;
      if (tokens.cut_before_or_at(4 * q + m)) iq[i][p] = iq[i][2 + p] = 0.0f;
      if (tokens.cut_after(4 * q + m)) ik[i][p] = ik[i][2 + p] = 0.0f;
    }
  // Both rows at once up to the exchange between lanes, whose latency they share.
  float dg[2][4];
  {
    float up[2][4], down01[2], down012[2], first_down[2], outer[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float down[4];  // summands of the exclusive prefix, as up of the suffix
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int i = m >> 1, e = 2 * r + (m & 1);
        up[r][m] = suffix_summand(x, iq, gq, gk, r, m);
        down[m] = element(x.tiles.key_b, r, m) * ik[i][e];
      }
      up[r][2] += up[r][3], up[r][1] += up[r][2], up[r][0] += up[r][1];
      first_down[r] = down[0], down01[r] = down[0] + down[1], down012[r] = down01[r] + down[2];
      outer[r] = down012[r] + down[3];
    }
    sums_of_others(outer, up[0][0], up[1][0], q);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      outer[r] += x.decay.total[r] * cross(r);
      dg[r][0] = up[r][0] + outer[r];
      dg[r][1] = up[r][1] + (first_down[r] + outer[r]);
      dg[r][2] = up[r][2] + (down01[r] + outer[r]);
      dg[r][3] = up[r][3] + (down012[r] + outer[r]);
    }
  }
  if (tokens.reset)
#pragma unroll
    for (int m = 0; m < 4; ++m)
      if ((tokens.reset >> (4 * q + m)) & 1u) dg[0][m] = dg[1][m] = 0.0f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float* const after = x.decay.down[r];
    float inverse_f[4];
    inverse_forgets(inverse_f, x.decay, r);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int i = m >> 1, e = 2 * r + (m & 1);
      const float dq = query_gradient(x, iq, gq, diag[m], r, m);
      const float dk =
          after[m] * (ik[i][e] * x.decay.outer_down[r] + gk[i][e] * x.decay.inner_mid[r]) +
          diag[m] * x.query[r][m];
      const float d = x.key.k[r][m] * (dg[r][m] * inverse_f[m] - dk);
      dbound[r] += d;
      dxq[r][m] = dq * x.slope[r][m];
      dxf[r][m] = x.key.open[r][m] * d;
    }
  }
}

}  // namespace hgrn::hgru2

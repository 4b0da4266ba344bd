// The gradients of a pair's earlier sub-chunk in the state warps of hgru2_backward_sm90.cu: those
// that need nothing of the later one, and the rest behind it. In one piece, for a sub-chunk of
// which everything is known, they are channel_gradients() of hgru2_gradients.cuh.
#pragma once
#include "cuda/hgru2_backward_roles.cuh"
#include "cuda/hgru2_gradients.cuh"

namespace hgrn::hgru2::backward_roles {

// What a pair's earlier sub-chunk still needs when everything is done that does not depend on the
// later one. [r][m]: channel g + 8 r, token 4 q + m.
struct Earlier {
  float up[2];            // the suffix summands of dg of this thread's tokens, added up
  float gradient[2][4];   // what dg / f - dk has without the later sub-chunk and other lanes
  float inverse_f[2][4];  // 0 at a reset: no gradient goes through f there
  float after[2][4];      // decay to the end, 0 before a reset
  float k[2][4], open[2][4];
};

// Its gates' part.
__device__ __forceinline__ void begin_earlier(float (&inverse_f)[2][4], float (&after)[2][4],
                                              const Decay& decay, const Tokens& tokens, int q) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    inverse_forgets(inverse_f[r], decay, r);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      if (tokens.reset && ((tokens.reset >> (4 * q + m)) & 1u)) inverse_f[r][m] = 0.0f;
      after[r][m] = decay.down[r][m] * decay.outer_down[r];
    }
  }
  cut_after(after, q, tokens);
}

// iq: products of dy with the state before, gq, gk: with the diagonal block of D, as for
// channel_gradients, of which this is the first part: dxq; up: the suffix summands of dg; dk.
__device__ __forceinline__ void query_gradients(float (&dxq)[2][4], float (&up)[2][4],
                                                float (&dk)[2][4], float (&iq)[2][4],
                                                const float (&gq)[2][4], const float (&gk)[2][4],
                                                const float (&diag)[4], const ChannelTerms& x,
                                                const Tokens& tokens, int q) {
  if (tokens.reset)
#pragma unroll
    for (int m = 0; m < 4; ++m)
      if (tokens.cut_before_or_at(4 * q + m)) iq[m >> 1][m & 1] = iq[m >> 1][2 + (m & 1)] = 0.0f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float* const after = x.decay.down[r];
#pragma unroll
    for (int m = 3; m >= 0; --m) {
      const int i = m >> 1, e = 2 * r + (m & 1);
      up[r][m] = suffix_summand(x, iq, gq, gk, r, m);
      if (m < 3) up[r][m] += up[r][m + 1];
      dxq[r][m] = query_gradient(x, iq, gq, diag[m], r, m) * x.slope[r][m];
      dk[r][m] = after[m] * (gk[i][e] * x.decay.inner_mid[r]) + diag[m] * x.query[r][m];
    }
  }
}

// The rest. ik: products of v with dh and with the later sub-chunk's queries; key_b: k after;
// cross(r): sum_v h dh over this sub-chunk times its decay.
template <class Cross>
__device__ __forceinline__ void end_earlier(float (&dxf)[2][4], float (&dbound)[2],
                                            const float (&ik)[2][4], const Cross& cross,
                                            const Earlier& x, const uint32_t (&key_b)[4], int q) {
  float down[2][3], outer[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    down[r][0] = element(key_b, r, 0) * ik[0][2 * r];
    down[r][1] = down[r][0] + element(key_b, r, 1) * ik[0][2 * r + 1];
    down[r][2] = down[r][1] + element(key_b, r, 2) * ik[1][2 * r];
    outer[r] = down[r][2] + element(key_b, r, 3) * ik[1][2 * r + 1];
  }
  sums_of_others(outer, x.up[0], x.up[1], q);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    outer[r] += cross(r);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float dg = m == 0 ? outer[r] : outer[r] + down[r][m - 1];
      const float d =
          x.k[r][m] * (x.gradient[r][m] +
                       (dg * x.inverse_f[r][m] - x.after[r][m] * ik[m >> 1][2 * r + (m & 1)]));
      dbound[r] += d;
      dxf[r][m] = x.open[r][m] * d;
    }
  }
}

// c += sum over the 16 tokens of a value, rounded to bf16 as they are in `products`, [tile][..] as
// iq and ik: one product with ones adds up over the lanes of a channel.
__device__ __forceinline__ void add_over_tokens(float (&c)[4], const uint32_t (&tile)[4],
                                                const float (*products)[4]) {
  uint32_t summand[4];
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      summand[r + 2 * i] =
          mul_bf16x2(tile[r + 2 * i], pack_bf16(products[i][2 * r], products[i][2 * r + 1]));
  mma(c, summand, kOnes, kOnes);
}

}  // namespace hgrn::hgru2::backward_roles

// HGRU2's gates and decay products for the tensor-core kernels, in registers.
//
//   f = bound + (1-bound) sigmoid(xf)    k = (1-bound) sigmoid(-xf)    q = scale * act(xq)
//
// A bound counts as at least e^-8, which changes no result by more than rounding.
//
// A warp owns 16 channels and works on sub-chunks of 16 tokens. A thread (lane = 4g+q) holds the
// channels g and g+8 (index r = 0, 1) at the four tokens 4q..4q+3 (index m): 8 elements. No log
// of a gate and no exp beyond the sigmoids: decays enter as running products of f inside the
// sub-chunk,
//
//   before[t] = f_0 ... f_t        after[s] = f_{s+1} ... f_15        total = f_0 ... f_15
//   mid[t]    = f_8 ... f_t for t >= 8, 1/(f_{t+1} ... f_7) for t < 8,
//
// so that before and after are <= 1 and serve every product with a state, and mid[t]/mid[s], the
// decay between two tokens of the sub-chunk, splits into two factors that cannot overflow: at most
// eight steps, each with f >= e^-8.
//
// Positions. Column j = 8i+2q+p of an MMA tile holds token 4q+2i+p, so that a thread's four tokens
// are neighbours and a scan over the sub-chunk needs one exchange between four lanes. Tiles in
// shared memory keep rows in token order, and ldmatrix takes row addresses in position order; those
// of the Hopper kernels keep rows in position order, as wgmma reads them.
#pragma once
#include "cuda/mma.cuh"
#include "ops/seq_kernel.h"

namespace hgrn::hgru2 {

constexpr int kSub = 16;    // tokens of a sub-chunk
constexpr int kChunk = 64;  // tokens between two saved states
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLeastBound = 3.3546263e-4f;  // e^-8

// Token of row `row` (0..7) of tile i (0, 1).
__device__ __forceinline__ int token_of(int i, int row) {
  return 4 * (row >> 1) + 2 * i + (row & 1);
}
// Its inverse, without the tile: also the XOR key that spreads a tile's 16-byte columns over the
// banks, since the eight rows that one ldmatrix reads have eight different keys.
__device__ __forceinline__ int row_of(int token) {
  return 2 * (token >> 2) + (token & 1);
}

// A tile [16 tokens][N] of bf16 as cp.async fills it.
template <int N>
__device__ __forceinline__ uint32_t token_tile_offset(int token, int column16) {
  return uint32_t(token * N * 2 + ((column16 ^ row_of(token)) << 4));
}
// Lane addresses for ldmatrix in a token tile; 16-column step kk is at (offset ^ kk * 32).
//   tile_major:   blocks (tile 0, left), (tile 0, right), (tile 1, left), (tile 1, right)
//   column_major: blocks (tile 0, left), (tile 1, left), (tile 0, right), (tile 1, right)
template <int N>
__device__ __forceinline__ uint32_t lane_tile_major(int lane) {
  return token_tile_offset<N>(token_of(lane >> 4, lane & 7), (lane >> 3) & 1);
}
template <int N>
__device__ __forceinline__ uint32_t lane_column_major(int lane) {
  return token_tile_offset<N>(token_of((lane >> 3) & 1, lane & 7), lane >> 4);
}

// A tile of rows of 16 bf16 (32 bytes): [channels][16 positions] or [16 positions][16 positions].
__device__ __forceinline__ uint32_t narrow_offset(int row, int half) {
  return uint32_t(row * 32 + ((half ^ ((row >> 2) & 1)) << 4));
}
// Blocks (rows 0-7, left), (rows 0-7, right), (rows 8-15, left), (rows 8-15, right).
__device__ __forceinline__ uint32_t lane_narrow_row_major(int lane) {
  return narrow_offset((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}
// Blocks (rows 0-7, left), (rows 8-15, left), (rows 0-7, right), (rows 8-15, right).
__device__ __forceinline__ uint32_t lane_narrow_column_major(int lane) {
  return narrow_offset((lane & 7) + (((lane >> 3) & 1) << 3), lane >> 4);
}

// A sub-chunk's tokens: bit t of `reset` = the state is zeroed before token t; tokens from `valid`
// on lie beyond the row's end and must change nothing.
struct Tokens {
  uint32_t reset;
  int valid;
  __device__ __forceinline__ bool cut_before_or_at(int t) const {
    return (reset & ((2u << t) - 1u)) != 0;
  }
  __device__ __forceinline__ bool cut_after(int t) const { return (reset >> (t + 1)) != 0; }
  // s <= t in the same segment
  __device__ __forceinline__ bool connected(int t, int s) const {
    return s <= t && ((reset >> (s + 1)) & ((1u << (t - s)) - 1u)) == 0;
  }
};

__device__ __forceinline__ float element(const uint32_t (&raw)[4], int r, int m) {
  const uint32_t v = raw[r + 2 * (m >> 1)];
  return (m & 1) ? high_bf16(v) : low_bf16(v);
}

// What the keys of a thread's two channels are made with: the bound, rest = 1 - bound, and what
// lets one exponential, rest exp(-xf), serve both k and the sigmoid.
struct KeyScales {
  float bound[2], rest[2], log2_rest[2], inverse_rest[2];
  KeyScales() = default;
  // bounds: (D), or null: 0. channel: the thread's first. load() and set() are its two halves, for
  // those with something to do while the bounds are on their way.
  __device__ __forceinline__ KeyScales(const float* bounds, int channel) {
    float lower[2];
    load(lower, bounds, channel);
    set(lower);
  }
  __device__ __forceinline__ static void load(float (&lower)[2], const float* bounds, int channel) {
#pragma unroll
    for (int r = 0; r < 2; ++r) lower[r] = bounds ? bounds[channel + 8 * r] : 0.0f;
  }
  __device__ __forceinline__ void set(const float (&lower)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bound[r] = max_or_nan(lower[r], kLeastBound);
      rest[r] = max_or_nan(1.0f - bound[r], 0x1p-24f);  // a bound of 1 divides nothing by 0
      log2_rest[r] = log2_approx(rest[r]);
      inverse_rest[r] = rcp_approx(rest[r]);
    }
  }
};

// The key side: everything that depends on xf.
struct KeyGates {
  float open[2][4];  // sigmoid(xf)
  float k[2][4];     // rest sigmoid(-xf), exact for xf -> infinity
  float f[2][4];
};
__device__ __forceinline__ float forget(float open, const KeyScales& scales, int r) {
  return fmaf(scales.rest[r], open, scales.bound[r]);
}

// x: ldmatrix_trans, tile_major, of the xf tile at this warp's 16 channels. One reciprocal serves
// two sigmoids, 1/a = b/(ab): what limits the gates is the number of instructions, and of special
// functions most. xf counts as at least -40, where sigmoid is 4e-18, so that the product stays
// finite. A NaN stays one, and makes its neighbour one.
__device__ __forceinline__ void key_gates(KeyGates& o, const uint32_t (&x)[4],
                                          const KeyScales& scales, int q, const Tokens& tokens) {
  constexpr uint32_t kLeast = 0xc220c220u;  // -40, twice
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t pair = x[r + 2 * i];
      asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(kLeast));
      const float xf[2] = {low_bf16(pair), high_bf16(pair)};
      float e[2], a[2];  // rest exp(-xf), 1 + exp(-xf)
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        e[p] = exp2_approx(fmaf(-kLog2e, xf[p], scales.log2_rest[r]));
        a[p] = fmaf(e[p], scales.inverse_rest[r], 1.0f);
      }
      const float inverse = rcp_approx(a[0] * a[1]);
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int m = 2 * i + p;
        o.open[r][m] = inverse * a[1 - p];
        o.k[r][m] = e[p] * o.open[r][m];
        o.f[r][m] = forget(o.open[r][m], scales, r);
      }
    }
  if (tokens.valid < kSub)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int m = 0; m < 4; ++m)
        if (4 * q + m >= tokens.valid) o.k[r][m] = 0.0f, o.f[r][m] = 1.0f;
}

// The products over the four lanes of a channel: of the neighbour in a pair of lanes, and of the
// other pair.
struct Exchange {
  float neighbour, pair, others;
  __device__ __forceinline__ explicit Exchange(float own) {
    neighbour = __shfl_xor_sync(0xffffffffu, own, 1);
    pair = own * neighbour;
    others = __shfl_xor_sync(0xffffffffu, pair, 2);
  }
  __device__ __forceinline__ float product_before(int q) const {
    return (q & 1 ? neighbour : 1.0f) * (q & 2 ? others : 1.0f);
  }
  __device__ __forceinline__ float product_after(int q) const {
    return (q & 1 ? 1.0f : neighbour) * (q & 2 ? 1.0f : others);
  }
  __device__ __forceinline__ float product() const { return pair * others; }
};

// Of the four lanes of a channel, `later` of those after this one and `earlier` of those before it,
// added up, for both channels of a thread; earlier: in, sums: out. A lane sends what its receiver
// wants: the neighbour's later to an even lane, its earlier to an odd one; then lane 2 the later of
// both its pair to the lanes 0 and 1, lane 1 the earlier to 2 and 3.
__device__ __forceinline__ void sums_of_others(float (&sums)[2], float later0, float later1,
                                               int q) {
  const bool odd = q & 1;
  const float later[2] = {later0, later1};
  float near[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) near[r] = __shfl_xor_sync(0xffffffffu, odd ? later[r] : sums[r], 1);
#pragma unroll
  for (int r = 0; r < 2; ++r)
    sums[r] = near[r] + __shfl_sync(0xffffffffu, near[r] + (odd ? sums[r] : later[r]),
                                    q & 2 ? 1 : 2, /*width=*/4);
}

// The decay products, as a thread's own part (up, down) times a factor a channel and thread:
//   before = up outer_up    after = down outer_down    mid = up outer_mid    1/mid = down inner_mid
// Resets are not in them but in total: see cut_before, cut_after.
struct Decay {
  float up[2][4], down[2][4];  // f_{4q} ... f_t and f_{t+1} ... f_{4q+3}
  float outer_up[2], outer_down[2], outer_mid[2], inner_mid[2], total[2];
  float inverse[2];  // 1 / (f_{4q} ... f_{4q+3})
};

__device__ __forceinline__ void running_products(Decay& o, const float (&f)[2][4], int r) {
  o.up[r][0] = f[r][0];
  o.up[r][1] = f[r][0] * f[r][1];
  o.up[r][2] = o.up[r][1] * f[r][2];
  o.up[r][3] = o.up[r][2] * f[r][3];
  o.down[r][3] = 1.0f;
  o.down[r][2] = f[r][3];
  o.down[r][1] = f[r][2] * f[r][3];
  o.down[r][0] = f[r][1] * o.down[r][1];
}

__device__ __forceinline__ void decay_products(Decay& o, const float (&f)[2][4], int q,
                                               const Tokens& tokens) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    running_products(o, f, r);
    const Exchange lanes(o.up[r][3]);
    o.outer_up[r] = lanes.product_before(q);
    o.outer_down[r] = lanes.product_after(q);
    // Between this thread's tokens and the middle: the lane 2 or 1, for the lanes 3 and 0.
    const float outer = q == 0 || q == 3 ? lanes.neighbour : 1.0f;
    const float inverse = rcp_approx(o.up[r][3] * outer);
    o.outer_mid[r] = q >= 2 ? outer : inverse;
    o.inner_mid[r] = q >= 2 ? inverse : outer;
    o.inverse[r] = inverse * outer;
    o.total[r] = tokens.reset ? 0.0f : lanes.product();
  }
}

// after and total alone, for advancing a state: value[r][m] *= after.
__device__ __forceinline__ void scale_after(float (&value)[2][4], float (&total)[2],
                                            const float (&f)[2][4], int q, const Tokens& tokens) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float p3 = f[r][3], p2 = f[r][2] * p3, p1 = f[r][1] * p2;
    const Exchange lanes(f[r][0] * p1);
    const float outer = lanes.product_after(q);
    value[r][0] *= outer * p1;
    value[r][1] *= outer * p2;
    value[r][2] *= outer * p3;
    value[r][3] *= outer;
    total[r] = tokens.reset ? 0.0f : lanes.product();
  }
}

// Zero what a reset separates from the state before, or after, the sub-chunk.
__device__ __forceinline__ void cut_before(float (&v)[2][4], int q, const Tokens& tokens) {
  if (tokens.reset)
#pragma unroll
    for (int m = 0; m < 4; ++m)
      if (tokens.cut_before_or_at(4 * q + m)) v[0][m] = v[1][m] = 0.0f;
}
__device__ __forceinline__ void cut_after(float (&v)[2][4], int q, const Tokens& tokens) {
  if (tokens.reset)
#pragma unroll
    for (int m = 0; m < 4; ++m)
      if (tokens.cut_after(4 * q + m)) v[0][m] = v[1][m] = 0.0f;
}

// Sigmoids of queries and values are 0.5 + 0.5 tanh(x/2), a special function each. The card's tanh
// is documented to be right to 2^-11; on an H200 such a sigmoid is within 3.5e-6 for all bf16
// (`hgru2_check gates`), where rounding to bf16 takes 2e-3 near 1, and 0.3 % off at -8, where it is
// 3e-4. A silu of -infinity is NaN. (Not for f: 1 - f has to be right where f is nearly 1.) Halves
// of two bf16 are exact.
__device__ __forceinline__ uint32_t halves(uint32_t pair) {
  return mul_bf16x2(pair, 0x3f003f00u);
}

// value = scale * act(x) of two neighbours, slope = its derivative. The gate is the same for all
// threads; within it nothing branches, so that special-function latencies of a thread's elements
// overlap. kSilu: act is known to be silu; kGate: known not to be identity.
template <bool kSilu = false, bool kGate = kSilu>
__device__ __forceinline__ void query_gate(float (&value)[2], float (&slope)[2], uint32_t x,
                                           Act act, float scale) {
  const bool identity = !kGate && act == Act::identity, silu = kSilu || act == Act::silu;
  const uint32_t half = halves(x);
  const float h[2] = {low_bf16(half), high_bf16(half)}, half_scale = 0.5f * scale;
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const float t = tanh_approx(h[p]);
    const float open = fmaf(half_scale, t, half_scale), close = fmaf(-0.5f, t, 0.5f);
    if (silu) {
      value[p] = scale * fmaf(h[p], t, h[p]);
      slope[p] = fmaf(value[p], close, open);
    } else {
      value[p] = identity ? scale * (2.0f * h[p]) : open;
      slope[p] = identity ? scale : open * close;
    }
  }
}
// The same for all elements of a thread: x as for key_gates.
template <bool kSilu = false, bool kGate = kSilu>
__device__ __forceinline__ void query_gates(float (&value)[2][4], float (&slope)[2][4],
                                            const uint32_t (&x)[4], Act act, float scale) {
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float v[2], d[2];
      query_gate<kSilu, kGate>(v, d, x[r + 2 * i], act, scale);
      value[r][2 * i] = v[0], value[r][2 * i + 1] = v[1];
      slope[r][2 * i] = d[0], slope[r][2 * i + 1] = d[1];
    }
}
template <bool kSilu = false, bool kGate = kSilu>
__device__ __forceinline__ void query_gates(float (&value)[2][4], const uint32_t (&x)[4], Act act) {
  float unused[2][4];
  query_gates<kSilu, kGate>(value, unused, x, act, 1.0f);
}

// Elements [r][m] as the four registers of an A tile (rows = channels, columns = positions).
__device__ __forceinline__ void pack(uint32_t (&o)[4], const float (&v)[2][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i) o[r + 2 * i] = pack_bf16(v[r][2 * i], v[r][2 * i + 1]);
}
// The same registers, rows times a factor: o = pack(v * factor).
__device__ __forceinline__ void pack(uint32_t (&o)[4], const float (&v)[2][4],
                                     const float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      o[r + 2 * i] = pack_bf16(v[r][2 * i] * factor[r], v[r][2 * i + 1] * factor[r]);
}
// Where a warp stores such registers in a narrow tile of channels, with stmatrix.
__device__ __forceinline__ uint32_t lane_narrow_store(int channel0, int lane) {
  return narrow_offset(channel0 + (lane & 15), lane >> 4);
}

// The bf16 tiles that the products of a sub-chunk take: q before, k after, q mid, k / mid.
struct OperandTiles {
  uint32_t query_b[4], key_b[4], query_d[4], key_d[4];
};
// What pack_tiles() takes.
__device__ __forceinline__ void own_parts(float (&up)[2][4], float (&down)[2][4],
                                          const float (&query)[2][4], const KeyGates& key,
                                          const Decay& decay) {
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      up[r][m] = query[r][m] * decay.up[r][m];
      down[r][m] = key.k[r][m] * decay.down[r][m];
    }
}
// up: q times the thread's part of `before`, down: k times that of `after`; overwritten.
__device__ __forceinline__ void pack_tiles(OperandTiles& o, float (&up)[2][4], float (&down)[2][4],
                                           const Decay& decay, int q, const Tokens& tokens) {
  pack(o.query_d, up, decay.outer_mid);
  pack(o.key_d, down, decay.inner_mid);
  cut_before(up, q, tokens);
  cut_after(down, q, tokens);
  pack(o.query_b, up, decay.outer_up);
  pack(o.key_b, down, decay.outer_down);
}

// This warp's part, over its 16 channels, of A[t][s] = sum_c qd[t][c] kd[s][c], in positions.
__device__ __forceinline__ void partial_scores(float (&c)[2][4], const uint32_t (&qd)[4],
                                               const uint32_t (&kd)[4]) {
  uint32_t a[4];
  a[0] = transpose8x8(qd[0]);
  a[1] = transpose8x8(qd[2]);
  a[2] = transpose8x8(qd[1]);
  a[3] = transpose8x8(qd[3]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t b0 = transpose8x8(kd[2 * i]), b1 = transpose8x8(kd[2 * i + 1]);
    c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0.0f;
    mma(c[i], a, b0, b1);
  }
}

// act(x) of eight bf16; act is not identity.
__device__ __forceinline__ uint4 activated(uint4 v, Act act) {
  uint32_t* const p = reinterpret_cast<uint32_t*>(&v);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float value[2], unused[2];
    query_gate<false, true>(value, unused, p[i], act, 1.0f);
    p[i] = pack_bf16(value[0], value[1]);
  }
  return v;
}
// v := act(v) of eight bf16, slope = its derivative in f16. All eight side by side: where one warp
// a scheduler does this, latencies count for more than special functions.
template <Act kAct>
__device__ __forceinline__ void activate_with_slope(uint4& v, uint4& slope) {
  static_assert(kAct != Act::identity);
  uint32_t* const p = reinterpret_cast<uint32_t*>(&v);
  uint32_t* const d = reinterpret_cast<uint32_t*>(&slope);
  float h[8], t[8];  // x/2, tanh(x/2)
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t half = halves(p[i]);
    h[2 * i] = low_bf16(half), h[2 * i + 1] = high_bf16(half);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) t[i] = tanh_approx(h[i]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float a[2], b[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float x2 = h[2 * i + k], th = t[2 * i + k], open = fmaf(0.5f, th, 0.5f);
      a[k] = kAct == Act::silu ? fmaf(x2, th, x2) : open;
      b[k] = fmaf(a[k], 1.0f - open, kAct == Act::silu ? open : 0.0f);
    }
    p[i] = pack_bf16(a[0], a[1]);
    d[i] = pack_half(b[0], b[1]);
  }
}
// x := act(x) over 16-byte pieces of shared memory.
__device__ __forceinline__ void activate16(uint32_t address, Act act) {
  st_shared(address, activated(ld_shared4(address), act));
}

}  // namespace hgrn::hgru2

// HGRU2 backward on Hopper, n = 128: the mathematics of hgru2_backward.cu (read its head first),
// with the gates and the states on different warps.
//
// One CTA a (b,h), or a segment of one (hgru2_scan.cu): 16 warps, one pass from the last chunk of
// 64 tokens to the first, sub-chunks of 16 tokens. Four warps a scheduler, two of each role:
//
//   Gate warps 0..7: warp w owns the channels c = 16w..16w+15 of everything that is summed over the
//   value columns: gates -> tiles -> iq = h dy, ik = dh v -> dq, dk, dg -> dx_q, dx_f.
//   State warps 8..15: warp 8+w owns dh[c][:] of the same channels in fp32 registers, the states h
//   of the chunk, sum_v h dh; 16 value columns of dv; the first two A and D; all loads.
//
// What the gate warps do is long and needs no state until iq and ik; what the state warps do is
// short and fits in between. mbarriers, one phase a sub-chunk:
//   full    gates -> states   the tiles and totals are written (and the dx before them read back)
//   scored  states -> gates   D is there
//   freed   states -> gates   the tiles may be written again
//   read    gates -> states   h, bf16(dh), v, dy and the sum h dh are no longer read
//   ready   states -> gates   h, bf16(dh) and the sum h dh of the next sub-chunk are written
//   loaded  copies -> all     one a slot of the two rings below
// and one named barrier of the state warps: dv's product has read bf16(dh), and A is there.
//
// The states before the sub-chunks 1, 2, 3 are made from the chunk's saved one by columns, so that
// only a few of them are in registers at once, while the gate warps end the chunk before. This
// needs f and v of a whole chunk early: their ring holds 7 sub-chunks, that of q and dy holds 3. dx
// goes through the shared memory of the x it belongs to: a warp writes its own 16 channels, reads
// them back as rows of 32 bytes and stores those.
//
// sum_v h dh, a part of dg, is the diagonal of the product h dh^T of bf16 tiles that are in
// registers anyway: its rounding is lost in that of the other products.
//
// Shared memory tiles of tokens, and dh: two halves of 64 columns, rows of 128 bytes in the order
// of positions (hgru2_gates.cuh), 16-byte columns spread by the row's last three bits. That is
// the layout of wgmma's 128-byte swizzle, too.
// Twin: kernels/cpu/hgru2.cpp   Test: tools/hgru2_check.cu
#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // below sm_90 the kernel is empty, and nothing refers to its parts
#endif

#include "cuda/hgru2_range.cuh"

namespace hgrn::hgru2 {
namespace {

constexpr int N = 128, kWarps = N / 16, kSubs = kChunk / kSub;
constexpr int kRole = 32 * kWarps, kThreads = 2 * kRole;
constexpr int kGateRegisters = 136, kStateRegisters = 120;
static_assert(kGateRegisters + kStateRegisters == 2 * 128);
constexpr int kDvBarrier = 1;

constexpr int kTile = kSub * N * 2, kHalf = kTile / 2;
constexpr int kH = N * N * 2;
constexpr int kNarrow = N * 32;
constexpr int kKeyRing = 7, kQueryRing = 3;
// Byte offsets in shared memory.
constexpr int kKeyRaw = 0;                                   // [slot][f, v][16 positions][N] bf16
constexpr int kQueryRaw = kKeyRaw + kKeyRing * 2 * kTile;    // [slot][q, dy][16 positions][N] bf16
constexpr int kStates = kQueryRaw + kQueryRing * 2 * kTile;  // [3][N/16][kRole] uint4: h
constexpr int kDh = kStates + 3 * kH;                        // [2 halves][N][64] bf16
constexpr int kKey = kDh + kH;                               // [N][16] bf16: k after
constexpr int kKeyD = kKey + kNarrow;                        // [N][16] bf16: k / mid
constexpr int kQuery = kKeyD + kNarrow;                      // [N][16] bf16: q before
constexpr int kQueryD = kQuery + kNarrow;                    // [N][16] bf16: q mid
constexpr int kScores = kQueryD + kNarrow;                   // [A, D][16][16] bf16
constexpr int kTotal = kScores + 1024;                       // [N] float
constexpr int kCross = kTotal + N * 4;                       // [N] float: sum_v h dh
constexpr int kDiagonal = kCross + N * 4;                    // [16] float: D_tt
constexpr int kResets = kDiagonal + 64;                      // [chunk % 2][64 bits]
constexpr int kFull = kResets + 16;                          // mbarriers
constexpr int kScored = kFull + 8, kFreed = kFull + 16, kRead = kFull + 24, kReady = kFull + 32;
constexpr int kKeyLoaded = kFull + 40;                   // [slot]
constexpr int kQueryLoaded = kKeyLoaded + 8 * kKeyRing;  // [slot]
constexpr int kBytes = kQueryLoaded + 8 * kQueryRing;

// A 16-byte column of a row of a token tile; ldmatrix's lane addresses at 16-column step 0.
//   tile_major:   blocks (tile 0, left), (tile 0, right), (tile 1, left), (tile 1, right)
//   column_major: blocks (tile 0, left), (tile 1, left), (tile 0, right), (tile 1, right)
__device__ __forceinline__ uint32_t row_offset(int row, int column16) {
  return uint32_t((column16 >> 3) * kHalf + row * 128 + (((column16 ^ row) & 7) << 4));
}
__device__ __forceinline__ uint32_t tile_major_lane(int lane) {
  return row_offset(8 * (lane >> 4) + (lane & 7), (lane >> 3) & 1);
}
__device__ __forceinline__ uint32_t column_major_lane(int lane) {
  return row_offset(lane & 15, lane >> 4);
}
// The address of 16-column step k; `half` bytes lie between the halves.
__device__ __forceinline__ uint32_t at_step(uint32_t base, int k, int half = kHalf) {
  return (base ^ ((k & 3) * 32)) + (k >> 2) * half;
}
__device__ __forceinline__ int position_of(int token) {
  return 8 * ((token >> 1) & 1) + row_of(token);
}
__device__ __forceinline__ int token_at(int position) {
  return token_of(position >> 3, position & 7);
}

// What both roles know of their block. Unit i of it is the sub-chunk i before its end.
struct Block : Range {
  int units;
  __device__ __forceinline__ explicit Block(const Call<__nv_bfloat16>& a) : Range(a, true) {
    units = (end - first) * kSubs;
  }
  __device__ __forceinline__ int first_token(int unit) const {
    return end * kChunk - (unit + 1) * kSub;
  }
};

// The resets of a chunk, one bit a token, to shared memory: one warp, a chunk ahead of their use.
__device__ __forceinline__ void read_resets(const Call<__nv_bfloat16>& a, const Block& block,
                                            unsigned char* smem_bytes, int chunk, int lane) {
  uint32_t bits[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = chunk * kChunk + 32 * half + lane;
    const bool reset = a.reset && t < a.T && a.reset[block.b * a.T + t];
    bits[half] = __ballot_sync(0xffffffffu, reset);
  }
  uint32_t* const to = reinterpret_cast<uint32_t*>(smem_bytes + kResets + (chunk & 1) * 8);
  if (lane < 2) to[lane] = lane ? bits[1] : bits[0];
}
__device__ __forceinline__ uint32_t resets_of(const unsigned char* smem_bytes, int t0) {
  return reinterpret_cast<const uint16_t*>(smem_bytes + kResets)[t0 / kSub % (2 * kSubs)];
}

// Where unit i lies in its ring, and the parity of its turn there.
template <int kRing>
struct Turn {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kRing) slot = 0, parity ^= 1;
  }
};

// The compiler shall not know where v comes from: it would keep what else is made from it in
// registers for the whole loop.
__device__ __forceinline__ void forget_origin(float& v) {
  asm volatile("" : "+f"(v));
}
__device__ __forceinline__ uint32_t of_unknown_origin(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}

// ---- gate warps

template <Act kAct>
__device__ __forceinline__ void gate_warp(const Call<__nv_bfloat16>& a, unsigned char* smem_bytes) {
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
  float dbound[2] = {0.0f, 0.0f};
  const uint32_t tile_major = smem + tile_major_lane(lane);
  const uint32_t own_tile = at_step(tile_major, warp);
  const uint32_t narrow_store = smem + lane_narrow_store(own, lane);
  const uint32_t dh_at = smem + kDh + own * 128 + column_major_lane(lane);
  const uint32_t own_states = smem + kStates + tid * 16;
  Turn<kKeyRing> key_turn;
  Turn<kQueryRing> query_turn;

#pragma unroll 1
  for (int unit = 0; unit < block.units; ++unit) {
    const int t0 = block.first_token(unit), sub = kSubs - 1 - unit % kSubs;
    const uint32_t parity = unit & 1;
    const Tokens tokens{resets_of(smem_bytes, t0), T - t0};
    const uint32_t xf_at = kKeyRaw + key_turn.slot * 2 * kTile, v_at = xf_at + kTile;
    const uint32_t xq_at = kQueryRaw + query_turn.slot * 2 * kTile, dy_at = xq_at + kTile;
    mbarrier_wait(smem + kKeyLoaded + key_turn.slot * 8, key_turn.parity);
    mbarrier_wait(smem + kQueryLoaded + query_turn.slot * 8, query_turn.parity);

    // ---- gates, the tiles of this warp's channels
    KeyGates key;
    Decay decay;
    float query[2][4], slope[2][4];
    {
      uint32_t query_b[4], query_d[4], key_b[4], key_d[4];
      uint32_t xq[4], xf[4];
      ldmatrix_trans(xf, own_tile + xf_at);
      ldmatrix_trans(xq, own_tile + xq_at);
      key_gates(key, xf, bound, rest, q, tokens);
      decay_products(decay, key.f, q, tokens);
      float up[2][4], down[2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          query_gate<kAct == Act::silu>(query[r][m], slope[r][m], element(xq, r, m), kAct,
                                        a.query_scale);
          up[r][m] = query[r][m] * decay.up[r][m];
          down[r][m] = rest[r] * key.close[r][m] * decay.down[r][m];
        }
      pack(query_d, up, decay.outer_mid);
      pack(key_d, down, decay.inner_mid);
      cut_before(up, q, tokens);
      cut_after(down, q, tokens);
      pack(query_b, up, decay.outer_up);
      pack(key_b, down, decay.outer_down);
      mbarrier_wait(smem + kFreed, parity ^ 1);
      stmatrix(narrow_store + kQueryD, query_d);
      stmatrix(narrow_store + kKeyD, key_d);
      stmatrix(narrow_store + kQuery, query_b);
      stmatrix(narrow_store + kKey, key_b);
    }
    if (q == 0)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        reinterpret_cast<float*>(smem_bytes + kTotal)[own + g + 8 * r] = decay.total[r];
    mbarrier_arrive_warp(smem + kFull);

    // ---- iq, ik
    mbarrier_wait(smem + kReady, parity);
    float iq[2][4] = {}, ik[2][4] = {};  // [tile][..]: element [r][m] is [m/2][2r + m%2]
    float cross[2];
    {
      const uint32_t state = own_states + (sub == 0 ? 2 : sub - 1) * kH;
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        uint32_t d[4], frag[4];
        const uint4 h4 = ld_shared4(state + k * kRole * 16);
        const uint32_t h[4] = {h4.x, h4.y, h4.z, h4.w};
        ldmatrix(d, at_step(dh_at, k, kH / 2));
        ldmatrix(frag, at_step(tile_major, k) + dy_at);
        mma(iq[0], h, frag[0], frag[1]);
        mma(iq[1], h, frag[2], frag[3]);
        ldmatrix(frag, at_step(tile_major, k) + v_at);
        mma(ik[0], d, frag[0], frag[1]);
        mma(ik[1], d, frag[2], frag[3]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r)
        cross[r] = reinterpret_cast<const float*>(smem_bytes + kCross)[own + g + 8 * r];
    }
    mbarrier_arrive_warp(smem + kRead);
    mbarrier_wait(smem + kScored, parity);

    // ---- the diagonal block, dq, dk, dg
    {
      // This warp's tiles again, and further down the running products: they need no registers in
      // between.
      uint32_t query_b[4], query_d[4], key_b[4], key_d[4], frag[4];
      ldmatrix(key_d, narrow_store + kKeyD);
      ldmatrix(query_d, narrow_store + kQueryD);
      ldmatrix(query_b, narrow_store + kQuery);
      ldmatrix(key_b, narrow_store + kKey);
      float gq[2][4] = {}, gk[2][4] = {};
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
      if (tokens.reset)
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int i = m >> 1, p = m & 1;
          if (tokens.cut_before_or_at(4 * q + m)) iq[i][p] = iq[i][2 + p] = 0.0f;
          if (tokens.cut_after(4 * q + m)) ik[i][p] = ik[i][2 + p] = 0.0f;
        }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int m = 0; m < 4; ++m) forget_origin(key.f[r][m]);
        running_products(decay, key.f, r);
        float up[4], down[4];  // summands of the suffix and the exclusive prefix
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int i = m >> 1, e = 2 * r + (m & 1);
          up[m] = element(query_b, r, m) * iq[i][e] +
                  (element(query_d, r, m) * gq[i][e] - element(key_d, r, m) * gk[i][e]);
          down[m] = element(key_b, r, m) * ik[i][e];
        }
        up[2] += up[3], up[1] += up[2], up[0] += up[1];
        const float down01 = down[0] + down[1], down012 = down01 + down[2];
        const Exchange ups(up[0]), downs(down012 + down[3]);
        const float outer = ups.sum_after(q) + downs.sum_before(q) + decay.total[r] * cross[r];
        float dg[4] = {up[0] + outer, up[1] + (down[0] + outer), up[2] + (down01 + outer),
                       up[3] + (down012 + outer)};
        if (tokens.reset)
#pragma unroll
          for (int m = 0; m < 4; ++m)
            if ((tokens.reset >> (4 * q + m)) & 1u) dg[m] = 0.0f;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int i = m >> 1, e = 2 * r + (m & 1);
          const float dq =
              decay.up[r][m] * (iq[i][e] * decay.outer_up[r] + gq[i][e] * decay.outer_mid[r]) +
              diag[m] * (rest[r] * key.close[r][m]);
          const float dk =
              decay.down[r][m] * (ik[i][e] * decay.outer_down[r] + gk[i][e] * decay.inner_mid[r]) +
              diag[m] * query[r][m];
          const float d = key.close[r][m] * (dg[m] * rcp_approx(key.f[r][m]) - dk);
          dbound[r] += d;
          dxq[r][m] = dq * slope[r][m];
          dxf[r][m] = rest[r] * key.open[r][m] * d;
        }
      }
      uint32_t packed[4];
      pack(packed, dxq);
      stmatrix_trans(own_tile + xq_at, packed);
      pack(packed, dxf);
      stmatrix_trans(own_tile + xf_at, packed);
      // Rows of 32 bytes of this warp's channels, a lane 16 bytes of one token.
      __syncwarp();
      const uint32_t thread = of_unknown_origin(tid), row = thread % 32 >> 1;
      const uint32_t column16 = 2 * (thread >> 5) + (thread & 1), token = token_at(row);
      const uint4 of_q = ld_shared4(smem + row_offset(row, column16) + xq_at);
      const uint4 of_f = ld_shared4(smem + row_offset(row, column16) + xf_at);
      if (t0 + int(token) < T) {
        __nv_bfloat16* const dx = a.dx + (block.b * a.T + t0) * 3 * a.D + block.head * N +
                                  (token * 3 * uint32_t(a.D) + 8 * column16);
        *reinterpret_cast<uint4*>(dx) = of_q;
        *reinterpret_cast<uint4*>(dx + a.D) = of_f;
      }
    }
    key_turn.advance();
    query_turn.advance();
  }

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

// ---- state warps

// dh at the end of this block's tokens, from dhT or the segments behind: rows c = own + g (+8),
// columns v = 8j + 2q (+1).
__device__ __forceinline__ void start_dh(float (&dh)[N / 8][4], const Call<__nv_bfloat16>& a,
                                         const Block& block, int own, int g, int q) {
  const auto state_at = [&](int j, int r) { return (own + g + 8 * r) * N + 8 * j + 2 * q; };
  const float* const from = block.end == block.chunks ? a.dhT : nullptr;
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

// A state thread's part of the copies: one 16-byte column of one token of every sub-chunk, and its
// own fragments of the saved states. Addresses are a pointer of the CTA and the thread's offset.
struct Copies {
  const Call<__nv_bfloat16>& a;
  const Block& block;
  uint32_t smem, thread, token;
  __device__ __forceinline__ Copies(const Call<__nv_bfloat16>& call, const Block& its_block,
                                    uint32_t smem_base, uint32_t its_thread)
      : a(call), block(its_block), smem(smem_base), thread(its_thread), token(its_thread / 16) {}
  __device__ __forceinline__ uint32_t to(uint32_t tile) const {
    return smem + row_offset(position_of(token), thread % 16) + tile;
  }
  // Tokens at and beyond T are filled with zeros, and nothing is read.
  __device__ __forceinline__ void copy(uint32_t tile, const __nv_bfloat16* first, uint32_t stride,
                                       bool valid) const {
    cp_async16(to(tile),
               reinterpret_cast<const char*>(first) + (token * stride * 2 + thread % 16 * 16),
               valid);
  }
  // f and v of a unit.
  __device__ __forceinline__ void key_side(int unit, int slot) const {
    const int t0 = block.first_token(unit);
    const bool valid = t0 + int(token) < int(a.T);
    const uint32_t tile = kKeyRaw + slot * 2 * kTile, stride = 3 * uint32_t(a.D);
    const __nv_bfloat16* const x = a.x + ((block.b * a.T + t0) * 3 + 1) * a.D + block.head * N;
    copy(tile, x, stride, valid);
    copy(tile + kTile, x + a.D, stride, valid);
    if (a.input_act != Act::identity) {  // a thread's own copies need no barrier
      cp_async_commit();
      cp_async_wait<0>();
      activate16(to(tile + kTile), a.input_act);
      mbarrier_arrive_warp(smem + kKeyLoaded + slot * 8);
    } else {
      cp_async_arrive(smem + kKeyLoaded + slot * 8);
    }
  }
  // q and dy.
  __device__ __forceinline__ void query_side(int unit, int slot) const {
    const int t0 = block.first_token(unit);
    const bool valid = t0 + int(token) < int(a.T);
    const uint32_t tile = kQueryRaw + slot * 2 * kTile, D = uint32_t(a.D);
    const int64_t row = block.b * a.T + t0;
    copy(tile, a.x + row * 3 * a.D + block.head * N, 3 * D, valid);
    copy(tile + kTile, a.dy + row * a.D + block.head * N, D, valid);
    cp_async_arrive(smem + kQueryLoaded + slot * 8);
  }
  __device__ __forceinline__ void saved_state(int chunk, int slot) const {
    const uint4* const from =
        static_cast<const uint4*>(a.states) + (block.bh * block.chunks + chunk) * (kH / 16);
#pragma unroll
    for (int k = 0; k < kWarps; ++k)
      cp_async16(smem + kStates + slot * kH + (k * kRole + thread) * 16,
                 from + (k * kRole + thread), true);
  }
};

// A masked, or D: a 16x16 product over 128 channels or value columns, one warp.
template <bool kGradient>
__device__ __forceinline__ void score_block(unsigned char* smem_bytes, int lane, uint32_t v,
                                            uint32_t dy, const Tokens& tokens) {
  const uint32_t smem = smem_address(smem_bytes);
  float c[2][2][4] = {};  // two sums, for shorter chains of dependent products
#pragma unroll
  for (int k = 0; k < kWarps; ++k) {
    uint32_t left[4], right[4];
    if (kGradient) {
      ldmatrix(left, at_step(smem + column_major_lane(lane), k) + dy);
      ldmatrix(right, at_step(smem + tile_major_lane(lane), k) + v);
    } else {
      ldmatrix_trans(left, smem + kQueryD + lane_narrow_row_major(lane) + k * 512);
      ldmatrix_trans(right, smem + kKeyD + lane_narrow_column_major(lane) + k * 512);
    }
    mma(c[k & 1][0], left, right[0], right[1]);
    mma(c[k & 1][1], left, right[2], right[3]);
  }
  const int g = lane >> 2, q = lane & 3;
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
      st_shared(smem + kScores + kGradient * 512 + narrow_offset(g + 8 * r, i) + 4 * q,
                pack_bf16(keep_x ? sum[i][0] : 0.0f, keep_y ? sum[i][1] : 0.0f));
    }
    if (kGradient && q == g >> 1)
      reinterpret_cast<float*>(smem_bytes + kDiagonal)[t] = (g & 1) ? sum[r][1] : sum[r][0];
  }
}

struct StateWarp {
  const Call<__nv_bfloat16>& a;
  unsigned char* const smem_bytes;
  const uint32_t smem;
  const Block block;
  const int tid, warp, lane, g, q, own;
  const uint32_t column_major, own_states;

  __device__ __forceinline__ StateWarp(const Call<__nv_bfloat16>& call, unsigned char* bytes)
      : a(call),
        smem_bytes(bytes),
        smem(smem_address(bytes)),
        block(call),
        tid(int(threadIdx.x) - kRole),
        warp(tid >> 5),
        lane(tid & 31),
        g(lane >> 2),
        q(lane & 3),
        own(16 * warp),
        column_major(smem + column_major_lane(lane)),
        own_states(smem + kStates + tid * 16) {}

  // h before the sub-chunks 1, 2, 3 into slots 0, 1, 2, from the saved one that waits in slot 1.
  // `turn`: that of the chunk's last sub-chunk.
  __device__ __forceinline__ void chunk_states(int chunk, Turn<kKeyRing> turn) const {
    uint32_t key_b[kSubs - 1][4], value[kSubs - 1];
    float total[kSubs - 1][2], bound[2], rest[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bound[r] = a.bound ? a.bound[block.head * N + own + g + 8 * r] : 0.0f;
      rest[r] = 1.0f - bound[r];
    }
#pragma unroll
    for (int sub = kSubs - 2; sub >= 0; --sub) {
      turn.advance();
      const uint32_t xf_at = kKeyRaw + turn.slot * 2 * kTile;
      value[sub] = xf_at + kTile;
      mbarrier_wait(smem + kKeyLoaded + turn.slot * 8, turn.parity);
      const int t0 = chunk * kChunk + kSub * sub;
      const Tokens tokens{resets_of(smem_bytes, t0), int(a.T) - t0};
      uint32_t raw[4];
      ldmatrix_trans(raw, at_step(smem + tile_major_lane(lane), warp) + xf_at);
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
    constexpr int kTogether = 1;  // steps of 16 columns: more would not fit the registers
#pragma unroll 4
    for (int k0 = 0; k0 < kWarps; k0 += kTogether) {
      float h[kTogether][2][4];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const uint4 v = ld_shared4(own_states + kH + (k0 + j) * kRole * 16);
        h[j][0][0] = low_bf16(v.x), h[j][0][1] = high_bf16(v.x);
        h[j][0][2] = low_bf16(v.y), h[j][0][3] = high_bf16(v.y);
        h[j][1][0] = low_bf16(v.z), h[j][1][1] = high_bf16(v.z);
        h[j][1][2] = low_bf16(v.w), h[j][1][3] = high_bf16(v.w);
      }
#pragma unroll
      for (int sub = 0; sub < kSubs - 1; ++sub) {
        uint32_t v[kTogether][4];
#pragma unroll
        for (int j = 0; j < kTogether; ++j)
          ldmatrix_trans(v[j], at_step(column_major, k0 + j) + value[sub]);
#pragma unroll
        for (int j = 0; j < kTogether; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float(&s)[4] = h[j][i];
            s[0] *= total[sub][0], s[1] *= total[sub][0];
            s[2] *= total[sub][1], s[3] *= total[sub][1];
            mma(s, key_b[sub], v[j][2 * i], v[j][2 * i + 1]);
          }
#pragma unroll
        for (int j = 0; j < kTogether; ++j)
          st_shared(
              own_states + sub * kH + (k0 + j) * kRole * 16,
              make_uint4(pack_bf16(h[j][0][0], h[j][0][1]), pack_bf16(h[j][0][2], h[j][0][3]),
                         pack_bf16(h[j][1][0], h[j][1][1]), pack_bf16(h[j][1][2], h[j][1][3])));
      }
    }
  }

  // bf16(dh) for all, and sum_v h dh with the h in `slot`.
  __device__ __forceinline__ void publish(const float (&dh)[N / 8][4], int slot) const {
    // Blocks in the order rows 0-7 left and right, rows 8-15 left and right: a pair of registers is
    // then the B operand of the transpose.
    const uint32_t dh_at = smem + kDh + own * 128 + tile_major_lane(lane);
    float diagonal[2][4] = {};
#pragma unroll
    for (int k = 0; k < kWarps; ++k) {
      uint32_t d[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = 2 * k + (e & 1), r = e >> 1;
        d[e] = pack_bf16(dh[j][2 * r], dh[j][2 * r + 1]);
      }
      stmatrix(at_step(dh_at, k, kH / 2), d);
      const uint4 h4 = ld_shared4(own_states + slot * kH + k * kRole * 16);
      const uint32_t h[4] = {h4.x, h4.y, h4.z, h4.w};
      mma(diagonal[0], h, d[0], d[1]);
      mma(diagonal[1], h, d[2], d[3]);
    }
    if (q == g >> 1) {
      float* const cross = reinterpret_cast<float*>(smem_bytes + kCross) + own + g;
      cross[0] = (g & 1) ? diagonal[0][1] : diagonal[0][0];
      cross[8] = (g & 1) ? diagonal[1][3] : diagonal[1][2];
    }
    mbarrier_arrive_warp(smem + kReady);
  }

  // dv of this warp's 16 value columns from the tile it lies in, over v.
  __device__ __forceinline__ void store_dv(const float (&dv)[2][4], uint32_t v_at, int t0) const {
    const uint32_t packed[4] = {pack_bf16(dv[0][0], dv[0][1]), pack_bf16(dv[0][2], dv[0][3]),
                                pack_bf16(dv[1][0], dv[1][1]), pack_bf16(dv[1][2], dv[1][3])};
    stmatrix(at_step(column_major, warp) + v_at, packed);
    __syncwarp();
    const uint32_t thread = of_unknown_origin(tid), row = thread % 32 >> 1;
    const uint32_t column16 = 2 * (thread >> 5) + (thread & 1), token = token_at(row);
    uint4 v = ld_shared4(smem + row_offset(row, column16) + v_at);
    if (t0 + int(token) >= int(a.T)) return;
    const int64_t first = ((block.b * a.T + t0) * 3 + 2) * a.D + block.head * N;
    const uint32_t at = token * 3 * uint32_t(a.D) + 8 * column16;
    if (a.input_act != Act::identity) {
      const uint4 raw = *reinterpret_cast<const uint4*>(a.x + first + at);
      const uint32_t* const x = reinterpret_cast<const uint32_t*>(&raw);
      uint32_t* const d = reinterpret_cast<uint32_t*>(&v);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float unused, slope_low, slope_high;
        query_gate(unused, slope_low, low_bf16(x[e]), a.input_act, 1.0f);
        query_gate(unused, slope_high, high_bf16(x[e]), a.input_act, 1.0f);
        d[e] = pack_bf16(low_bf16(d[e]) * slope_low, high_bf16(d[e]) * slope_high);
      }
    }
    *reinterpret_cast<uint4*>(a.dx + first + at) = v;
  }

  __device__ __forceinline__ void run() const {
    const int T = int(a.T);
    {
      const Copies copies(a, block, smem, tid);
#pragma unroll 1
      for (int unit = 0; unit < kKeyRing - 1; ++unit)
        if (unit < block.units) copies.key_side(unit, unit);
#pragma unroll 1
      for (int unit = 0; unit < kQueryRing - 1; ++unit)
        if (unit < block.units) copies.query_side(unit, unit);
      copies.saved_state(block.end - 1, 1);
      cp_async_commit();
    }
    float dh[N / 8][4];
    if (block.from < 0)
      start_dh(dh, a, block, own, g, q);
    else
      take_over<kRole>(dh, a, block.from, tid);
    Turn<kKeyRing> key_turn;
    Turn<kQueryRing> query_turn;
    cp_async_wait<0>();
#pragma unroll 1
    for (int unit = 0; unit < block.units; ++unit) {
      const int t0 = block.first_token(unit), sub = kSubs - 1 - unit % kSubs;
      const int chunk = t0 / kChunk;
      const uint32_t parity = unit & 1;
      // What a unit two or three before this one has ordered: a saved state.
      if (sub == 3 || sub == 0) cp_async_wait<2>();
      if (sub == 3) chunk_states(chunk, key_turn);
      publish(dh, sub == 0 ? 2 : sub - 1);

      const uint32_t v_at = kKeyRaw + key_turn.slot * 2 * kTile + kTile;
      const uint32_t dy_at = kQueryRaw + query_turn.slot * 2 * kTile + kTile;
      mbarrier_wait(smem + kKeyLoaded + key_turn.slot * 8, key_turn.parity);
      mbarrier_wait(smem + kQueryLoaded + query_turn.slot * 8, query_turn.parity);
      mbarrier_wait(smem + kFull, parity);
      mbarrier_wait(smem + kReady, parity);  // dv reads bf16(dh) of all state warps
      if (warp < 2) {
        const Tokens tokens{resets_of(smem_bytes, t0), T - t0};
        if (warp == 0)
          score_block<false>(smem_bytes, lane, v_at, dy_at, tokens);
        else
          score_block<true>(smem_bytes, lane, v_at, dy_at, tokens);
        mbarrier_arrive_warp(smem + kScored);
      }

      // ---- dv from dh, and dh
      float dv[2][4] = {};
      const uint32_t narrow_row = smem + lane_narrow_row_major(of_unknown_origin(lane));
      {
        const uint32_t dh_columns = at_step(column_major, warp, kH / 2) + kDh;
        uint32_t query_b[4];
        ldmatrix(query_b, smem + lane_narrow_store(own, lane) + kQuery);
        float total[2];
#pragma unroll
        for (int r = 0; r < 2; ++r)
          total[r] = reinterpret_cast<const float*>(smem_bytes + kTotal)[own + g + 8 * r];
#pragma unroll
        for (int k = 0; k < kWarps; ++k) {
          uint32_t left[4], right[4];
          ldmatrix_trans(left, narrow_row + kKey + k * 512);
          ldmatrix_trans(right, dh_columns + k * 16 * 128);
          mma(dv[0], left, right[0], right[1]);
          mma(dv[1], left, right[2], right[3]);
          ldmatrix_trans(right, at_step(column_major, k) + dy_at);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float(&s)[4] = dh[2 * k + i];
            s[0] *= total[0], s[1] *= total[0], s[2] *= total[1], s[3] *= total[1];
            mma(s, query_b, right[2 * i], right[2 * i + 1]);
          }
        }
      }
      barrier_sync(kDvBarrier, kRole);
      {
        uint32_t left[4], right[4];
        ldmatrix_trans(left, narrow_row + kScores);
        ldmatrix_trans(right, at_step(column_major, warp) + dy_at);
        mma(dv[0], left, right[0], right[1]);
        mma(dv[1], left, right[2], right[3]);
      }
      mbarrier_arrive_warp(smem + kFreed);

      // For chunk_states() behind the next named barrier, and the gates behind the next ready.
      if (sub == 2 && warp == kWarps - 1 && chunk > block.first)
        read_resets(a, block, smem_bytes, chunk - 1, lane);

      // ---- loads: over the unit before, which all have left
      const auto copies = [&] { return Copies(a, block, smem, of_unknown_origin(tid)); };
      const int before_key = key_turn.slot == 0 ? kKeyRing - 1 : key_turn.slot - 1;
      const int before_query = query_turn.slot == 0 ? kQueryRing - 1 : query_turn.slot - 1;
      if (unit + kKeyRing - 1 < block.units) copies().key_side(unit + kKeyRing - 1, before_key);
      if (unit + kQueryRing - 1 < block.units)
        copies().query_side(unit + kQueryRing - 1, before_query);

      mbarrier_wait(smem + kRead, parity);
      // The saved states: this chunk's for its first sub-chunk, the next one's to start from.
      if (t0 % kChunk == 3 * kSub) copies().saved_state(chunk, 2);
      if (t0 % kChunk == 2 * kSub && chunk > block.first) copies().saved_state(chunk - 1, 1);
      cp_async_commit();
      store_dv(dv, v_at, t0);
      key_turn.advance();
      query_turn.advance();
    }

    if (block.to >= 0) hand_over<kRole>(a, block.to, dh, tid, kDvBarrier);
    if (a.dh0 && block.first == 0)
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          *reinterpret_cast<float2*>(a.dh0 + block.bh * N * N + (own + g + 8 * r) * N + 8 * j +
                                     2 * q) = make_float2(dh[j][2 * r], dh[j][2 * r + 1]);
  }
};

template <Act kAct>
__global__ __launch_bounds__(kThreads, 1) void backward_kernel(const Call<__nv_bfloat16> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  if (threadIdx.x == 0) {
    const uint32_t smem = smem_address(smem_bytes);
    mbarrier_init(smem + kFull, kWarps);
    mbarrier_init(smem + kScored, 2);
    mbarrier_init(smem + kFreed, kWarps);
    mbarrier_init(smem + kRead, kWarps);
    mbarrier_init(smem + kReady, kWarps);
    for (int i = 0; i < kKeyRing + kQueryRing; ++i)
      mbarrier_init(smem + kKeyLoaded + i * 8, kWarps);
  }
  if (threadIdx.x < 32) {
    const Block block(a);
    read_resets(a, block, smem_bytes, block.end - 1, threadIdx.x);
  }
  __syncthreads();
  if (threadIdx.x < kRole) {
    registers_grow<kGateRegisters>();
    gate_warp<kAct>(a, smem_bytes);
  } else {
    registers_shrink<kStateRegisters>();
    StateWarp(a, smem_bytes).run();
  }
#endif
}

template <Act kAct>
void launch(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  const auto kernel = backward_kernel<kAct>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<c.ctas(), kThreads, kBytes, stream>>>(c);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void backward_split_sm90(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  static_assert(kBytes <= 227 * 1024);
  clear_flags(c, stream);
  if (c.output_act == Act::silu) return launch<Act::silu>(c, stream);
  if (c.output_act == Act::sigmoid) return launch<Act::sigmoid>(c, stream);
  launch<Act::identity>(c, stream);
}

}  // namespace hgrn::hgru2

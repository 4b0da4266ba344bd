// The helper warps of hgru2_backward_sm90.cu, whose head has the roles and what is between them.
#pragma once
#include "cuda/hgru2_backward_roles.cuh"

namespace hgrn::hgru2::backward_roles {

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

}  // namespace hgrn::hgru2::backward_roles

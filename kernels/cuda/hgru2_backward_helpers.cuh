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
  // Where this thread's piece of q goes; those of f, v, dy are kPart further each.
  __device__ __forceinline__ uint32_t piece(int sub, int half) const {
    return (raw ^ (half * kSpread)) + sub * kSubRows + half * kEight;
  }
  __device__ __forceinline__ void copy(uint32_t to, const __nv_bfloat16* from, int half,
                                       int left) const {
    const bool valid = left > 8 * half;
    cp_async16(to, valid ? from : any, valid);
  }
  // q, f; a token beyond the last gets an f so large that it keeps all and adds nothing.
  __device__ __forceinline__ void gates(int sub, int left) const {
    constexpr uint32_t kOpen = 0x7f7f7f7fu;  // two bf16, the largest
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const __nv_bfloat16* const from = x + half * 8 * 3 * D;
      copy(piece(sub, half) + kQ * kPart, from, half, left);
      if (left > 8 * half)
        copy(piece(sub, half) + kF * kPart, from + D, half, left);
      else
        st_shared(piece(sub, half) + kF * kPart, make_uint4(kOpen, kOpen, kOpen, kOpen));
    }
  }
  __device__ __forceinline__ void values(int sub, int left) const {  // v, dy
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      copy(piece(sub, half) + kV * kPart, x + (half * 8 * 3 + 2) * D, half, left);
      copy(piece(sub, half) + kDy * kPart, dy + half * 8 * D, half, left);
    }
  }
  // The values this thread has copied, and waited for, through their gate.
  template <Act kValueGate>
  __device__ __forceinline__ void gate_values(int sub) const {
    const uint32_t at[2] = {piece(sub, 0) + kV * kPart, piece(sub, 1) + kV * kPart};
    const uint4 v[2] = {ld_shared4(at[0]), ld_shared4(at[1])};
    st_shared(at[0], activated(v[0], kValueGate));
    st_shared(at[1], activated(v[1], kValueGate));
  }
  __device__ __forceinline__ void saved_state(const void* states, int64_t index, int slot) const {
    const uint4* const from = static_cast<const uint4*>(states) + index * (kH / 16) + thread;
#pragma unroll
    for (int k = 0; k < kH / 16 / kHelperThreads; ++k)
      cp_async16(state + slot * kH + k * kHelperThreads * 16, from + k * kHelperThreads, true);
  }
};

// Two neighbours of A or D as they are stored, row t and columns s, s + 1; above the diagonal
// (kStrict: on it, too) and over a reset 0.
template <bool kStrict>
__device__ __forceinline__ uint32_t masked(float x, float y, int t, int s, const Tokens& tokens) {
  bool keep_x = s + kStrict <= t, keep_y = s + 1 + kStrict <= t;
  if (tokens.reset) {
    keep_x = keep_x && tokens.connected(t, s);
    keep_y = keep_y && tokens.connected(t, s + 1);
  }
  return pack_bf16(keep_x ? x : 0.0f, keep_y ? y : 0.0f);
}

// A of a sub-chunk, one warp for the eight columns 8 half ...: 16 rows of products over 128
// channels.
__device__ __forceinline__ void score_columns(uint32_t smem, int lane, int half,
                                              const Tokens& tokens) {
  const uint32_t left_tile = smem + kQueryD + lane_narrow_row_major(lane);
  const uint32_t right_tile = smem + kKeyD + narrow_offset(lane, half);  // two steps of channels
  float c[2][4] = {};  // two sums, for shorter chains of dependent products
#pragma unroll
  for (int k0 = 0; k0 < kWarps; k0 += 2) {
    uint32_t right[4];
    ldmatrix_trans(right, right_tile + k0 * 512);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t left[4];
      ldmatrix_trans(left, left_tile + (k0 + k) * 512);
      mma(c[k], left, right[2 * k], right[2 * k + 1]);
    }
  }
  const int g = lane >> 2, q = lane & 3;
#pragma unroll
  for (int r = 0; r < 2; ++r)
    st_shared(smem + kScores + narrow_offset(g + 8 * r, half) + 4 * q,
              masked<false>(c[0][2 * r] + c[1][2 * r], c[0][2 * r + 1] + c[1][2 * r + 1],
                            token_of(r, g), 4 * q + 2 * half, tokens));
}

// D of a chunk's sub-chunks, a warp each. The product is that of all tokens with all tokens, of
// which blocks off the diagonal are of no use: it is done once a chunk, and state warps do not wait
// for it in each sub-chunk.
__device__ __forceinline__ void chunk_gradients(unsigned char* smem_bytes, uint32_t smem, int warp,
                                                int lane, uint32_t buffer, uint64_t reset) {
  const uint64_t columns = contract_columns(smem);
  float all[kChunk / 8][4];
#pragma unroll
  for (int j = 0; j < kChunk / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) all[j][e] = 0.0f;
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kWarps; ++k)
    wgmma64_shared<false, false>(all, wgmma_at(columns, columns_at(kDy * kPart, k)),
                                 wgmma_at(columns, columns_at(kV * kPart, k)));
  wgmma_commit();
  wgmma_wait_all(all);
  float own[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float low = warp & 1 ? all[2 + i][e] : all[i][e];
      const float high = warp & 1 ? all[6 + i][e] : all[4 + i][e];
      own[i][e] = warp & 2 ? high : low;
    }
  const Tokens tokens{uint32_t(reset >> (16 * warp)) & 0xffffu, kSub};
  const int g = lane >> 2, q = lane & 3;
  float* const diagonal =
      reinterpret_cast<float*>(smem_bytes + kDiagonal) + buffer * kChunk + warp * kSub;
  uint32_t packed[4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int t = token_of(r, g);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      packed[r + 2 * i] = masked<true>(own[i][2 * r], own[i][2 * r + 1], t, 4 * q + 2 * i, tokens);
    if (q == g >> 1) diagonal[t] = (g & 1) ? own[r][2 * r + 1] : own[r][2 * r];
  }
  stmatrix(
      smem + kGradients + (buffer * kSubs + warp) * kScoreBlock + lane_narrow_column_major(lane),
      packed);
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

// A sub-chunk's values before their gate, for dv: in their own tile they are gated long before. A
// warp copies what it reads, the value columns 64 m + 16 warp ..., and so waits for no other.
struct Ungated {
  const __nv_bfloat16*
      from;           // of this lane's token and columns in the first sub-chunk that is read
  uint32_t to, tile;  // where they go; what the lane addresses
  int64_t D;
  int token;
  __device__ __forceinline__ Ungated(const Call<__nv_bfloat16>& a, const Block& block,
                                     uint32_t smem, int warp, int lane)
      : D(a.D), token(lane >> 1) {
    const int column = 16 * warp + 8 * (lane & 1);
    const int64_t row = block.b * a.T + block.last_chunk * kChunk + (kSubs - 1) * kSub + token;
    from = a.x + (row * 3 + 2) * D + block.head * N + column;
    to = smem + kUngated + position_of(token) * kPitch + column * 2;
    tile = smem + kUngated + padded_tile_major(lane) + warp * 32;
  }
  // The next sub-chunk's; left: tokens from its first on.
  __device__ __forceinline__ void copy(int left) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const bool valid = token < left;
      cp_async16(to + m * 128, valid ? from + 64 * m : from - token * 3 * D, valid);
    }
    from -= kSub * 3 * D;
  }
  // dv (value columns 64 m + 16 warp + g + 8 r, four tokens) times the derivative of the gate.
  template <Act kValueGate>
  __device__ __forceinline__ void scale(float (&dv)[2][2][4]) const {
    __syncwarp();  // all lanes have waited for their copies
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint32_t v[4];  // [r + 2 i]
      ldmatrix_trans(v, tile + m * 128);
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float unused[2], slope[2];
          query_gate<kValueGate == Act::silu, true>(unused, slope, v[r + 2 * i], kValueGate, 1.0f);
          dv[m][i][2 * r] *= slope[0];
          dv[m][i][2 * r + 1] *= slope[1];
        }
    }
    __syncwarp();  // before they are written again
  }
};

template <Act kValueGate, bool kReset>
__device__ __forceinline__ void helper_warp(const Call<__nv_bfloat16>& a,
                                            unsigned char* smem_bytes) {
  constexpr bool kGated = kValueGate != Act::identity;
  const uint32_t smem = smem_address(smem_bytes);
  const Block block(a);
  const int thread = threadIdx.x - kStateThreads, lane = thread & 31;
  const int warp = __reduce_max_sync(0xffffffffu, thread >> 5);  // uniform, as in Range
  const int T = int(a.T);
  Copies copies(a, block, smem, thread, block.last_chunk);
  // All copies have arrived but the newest: q and f of sub-chunk 0.
  const auto gates_loaded = [&] {
    cp_async_wait<1>();
    mbarrier_arrive_warp(smem + kLoaded);
  };
  // And those; but v and dy of sub-chunk 0, and values before their gate.
  const auto gates0_loaded = [&] {
    cp_async_wait<kGated ? 2 : 1>();
    mbarrier_arrive_warp(smem + kLoaded0);
  };
  // And those; the values from `from` down are not gated yet, those behind are.
  const auto values_loaded = [&](int from) {
    cp_async_wait<0>();
    if (kGated)
#pragma unroll 1
      for (int sub = from; sub >= 0; --sub) copies.gate_values<kValueGate>(sub);
    fence_async_proxy();  // wgmma reads what this thread has copied and gated
    mbarrier_arrive_warp(smem + kValues);
  };
  Resets resets;
  if (kReset) resets.load(a, block.b, block.last_chunk, lane);
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
  Ungated ungated(a, block, smem, warp, lane);
  if (kGated) ungated.copy(T - block.last_chunk * kChunk - (kSubs - 1) * kSub);
  cp_async_commit();
  gates_loaded();
  gates0_loaded();
  values_loaded(kSubs - 1);
  const uint32_t dv_store = smem + padded_tile_major(lane) + warp * 32 + kOut + kV * kOutTile;
  const uint64_t raw_rows = contract_tokens(smem);
  const uint64_t dh_rows = wgmma_operand(smem + kDh, kDhHalf, 1024);
  const uint64_t keys = wgmma_operand<32>(smem + kKey, 0, 256);
  const uint64_t scores = wgmma_operand<32>(smem + kScores, 0, 256);
  uint32_t buffer = 0;  // of D
  // dx of the sub-chunk behind, which waits in shared memory, goes as far behind x; warps 2 and 3
  // store it, from the token on that is 4 before that of their copies.
  const int staged_token = copies.token - 4;
  const auto staged = [&] { return a.dx + ((copies.x - a.x) + (kChunk + kSub - 4) * 3 * a.D); };
  const uint32_t staged_at = smem + kOut + position_of(staged_token) * kPitch + thread % 16 * 16;

#pragma unroll 1
  for (int chunk = block.last_chunk; chunk >= block.first_chunk; --chunk) {
    const int t0 = chunk * kChunk;
    const bool more = chunk > block.first_chunk;
    const uint64_t reset = kReset ? resets.bits() : 0;
    barrier_sync(kHelper, kHelperThreads);  // all values are here, and gated
    chunk_gradients(smem_bytes, smem, warp, lane, buffer, reset);
    mbarrier_arrive_warp(smem + kGradient);
    buffer ^= 1;
#pragma unroll 1
    for (int sub = kSubs - 1; sub >= 0; --sub) {
      const Tokens tokens{uint32_t(reset >> (16 * sub)) & 0xffffu, kSub};
      barrier_sync(kTiles, kThreads);
      if (warp < 2)
        score_columns(smem, lane, warp, tokens);
      else if (sub < kSubs - 1 || chunk < block.last_chunk)
        store_dx(staged(), a.D, staged_at, T - t0 - kSub * (sub + 1) - staged_token);
      mbarrier_arrive_warp(smem + kStored);
      // The state warps have the gates' inputs in registers.
      if (more) copies.gates(sub, kSub);
      cp_async_commit();
      if (more && sub == 0) gates_loaded();
      if (kGated) cp_async_wait<1>();  // of the last turn: the values, and those before their gate
      barrier_sync(kHelper, kHelperThreads);

      // ---- dv^T: value columns 64 m + 16 warp ... of the products with all of them
      float dv[2][2][4] = {};
      fence_async_proxy();  // wgmma reads what other threads have stored before the barrier
      wgmma_fence();
#pragma unroll
      for (int m = 0; m < 2; ++m)
        wgmma16_shared<true, true>(dv[m], wgmma_at(raw_rows, raw_tile(kDy, sub) + m * kHalf),
                                   scores);
      wgmma_commit();
      wgmma_wait_all(dv[0], dv[1]);
      barrier_sync(kDhStored, kThreads);
      fence_async_proxy();
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kWarps; ++k)
#pragma unroll
        for (int m = 0; m < 2; ++m)
          wgmma16_shared<true, true>(dv[m], wgmma_at(dh_rows, m * kDhHalf + k * kSubRows),
                                     wgmma_at(keys, k * 512));
      wgmma_commit();
      wgmma_wait_all(dv[0], dv[1]);
      const auto store_dv = [&] {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint32_t packed[4] = {
              pack_bf16(dv[m][0][0], dv[m][0][1]), pack_bf16(dv[m][0][2], dv[m][0][3]),
              pack_bf16(dv[m][1][0], dv[m][1][1]), pack_bf16(dv[m][1][2], dv[m][1][3])};
          stmatrix_trans(dv_store + m * 128, packed);
        }
      };
      if (!kGated) store_dv();
      barrier_sync(kState, kThreads);
      mbarrier_arrive_warp(smem + kFree);

      // ---- refill what the state warps have read
      if (sub == kFirstSlot + 1) {
        copies.saved_state(a.states, block.bh * block.chunks + chunk, kFirstSlot);
        cp_async_commit();
      }
      if (more) {
        copies.values(sub, kSub);
        if (sub == kSubs - 1) copies.saved_state(a.states, block.bh * block.chunks + chunk - 1, 2);
      }
      cp_async_commit();
      // Gates, when no one waits: the derivative in dv; the values refilled in the last turn, which
      // only the thread that has copied them touches before kValues.
      if (kGated) {
        // Always so; the compiler does not know, and does none of this before kFree.
        if (a.input_act != Act::identity) ungated.scale<kValueGate>(dv);
        if (sub > 0 || more) ungated.copy(T - t0 - kSub * (sub - 1));
        cp_async_commit();
        store_dv();
        if (sub < kSubs - 1 && more) copies.gate_values<kValueGate>(sub + 1);
      }
      if (sub == kFirstSlot) {
        cp_async_wait<3>();  // copies since: v and dy, q and f, v and dy
        mbarrier_arrive_warp(smem + kFirst);
      }
      copies.back(1);
    }
    if (!more) continue;
    if (kReset) resets.load(a, block.b, chunk - 1, lane);  // on the way while those copies are
    gates0_loaded();
    values_loaded(0);
  }
  barrier_sync(kTiles, kThreads);
  if (warp >= 2) store_dx(staged(), a.D, staged_at, T - block.first_chunk * kChunk - staged_token);
}

}  // namespace hgrn::hgru2::backward_roles

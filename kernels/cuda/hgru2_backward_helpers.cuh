// The helper warps of hgru2_backward_sm90.cu, whose head has the roles and what is between them.
#pragma once
#include "cuda/hgru2_backward_roles.cuh"

namespace hgrn::hgru2::backward_roles {

// A chunk of a CTA's work, and the one that comes after it, in the same piece or the next.
struct Place {
  int bh, b, head, chunk, first;  // first: chunk of the piece
  int piece;
  __device__ __forceinline__ Place(const Call<__nv_bfloat16>& a, const Pieces& pieces, int k) {
    const Piece p = pieces.at(a, k);
    bh = p.bh, b = p.b, head = p.head, chunk = p.end - 1, first = p.first;
    piece = k;
  }
  // Of the pair's first token in x and dy.
  __device__ __forceinline__ int64_t row(const Call<__nv_bfloat16>& a, int pair) const {
    return b * a.T + chunk * kChunk + pair * kPair;
  }
  // Tokens of the head from the pair's first on.
  __device__ __forceinline__ int left(int T, int pair) const {
    return T - chunk * kChunk - pair * kPair;
  }
  __device__ __forceinline__ int64_t saved(const Pieces& pieces) const {
    return int64_t(bh) * pieces.chunks + chunk;
  }
};

// A helper thread's part of the copies between device and shared memory: one 16-byte column of the
// tokens token + 8 i of a pair of sub-chunks. x and dy point at the pair that is copied next:
// multiplying addresses out took as many instructions as the products of these warps. `left`: its
// tokens from this thread's first on; zeros, for which nothing is read, beyond them.
struct Copies {
  static constexpr int kEight = 4 * 128;  // from the row of token t to that of t + 8; the columns
  static constexpr int kSpread = 4 << 4;  // of the second are spread by a row with bit 2 set
  static constexpr int kTokens = kPair / 8;
  const __nv_bfloat16 *x, *dy, *const any;
  uint32_t raw, state;
  int D, token, thread;
  __device__ __forceinline__ Copies(const Call<__nv_bfloat16>& a, uint32_t smem, int thread_)
      : any(a.x), D(int(a.D)), token(thread_ / 16), thread(thread_) {
    raw = smem + kRaw + row_offset(position_of(token), thread % 16);
    state = smem + kStates;
  }
  // To a chunk's last pair.
  __device__ __forceinline__ void go_to(const Call<__nv_bfloat16>& a, const Place& place) {
    const int64_t row = place.row(a, kPairs - 1) + token;
    const int channel = place.head * N + thread % 16 * 8;
    x = a.x + row * 3 * D + channel;
    dy = a.dy + row * D + channel;
  }
  // To the pair `pairs` before.
  __device__ __forceinline__ void back(int pairs) {
    const int step = opaque(D);
    x -= pairs * kPair * 3 * step;
    dy -= pairs * kPair * step;
  }
  // Where this thread's piece i of q goes; those of f, v, dy are kPart further each.
  __device__ __forceinline__ uint32_t place_of(int pair, int i) const {
    return (uint32_t(opaque(int(raw))) ^ ((i & 1) * kSpread)) + (2 * pair + (i >> 1)) * kSubRows +
           (i & 1) * kEight;
  }
  __device__ __forceinline__ void copy(uint32_t to, const __nv_bfloat16* from, int i,
                                       int left) const {
    const bool valid = left > 8 * i;
    cp_async16(to, valid ? from : any, valid);
  }
  // f, v; a token beyond the last gets an f so large that it keeps all and adds nothing.
  __device__ __forceinline__ void keys(int pair, int left) const {
    constexpr uint32_t kOpen = 0x7f7f7f7fu;  // two bf16, the largest
    const int step = opaque(D);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const __nv_bfloat16* const from = x + (i * 8 * 3 + 1) * step;
      if (left > 8 * i)
        copy(place_of(pair, i) + kF * kPart, from, i, left);
      else
        st_shared(place_of(pair, i) + kF * kPart, make_uint4(kOpen, kOpen, kOpen, kOpen));
      copy(place_of(pair, i) + kV * kPart, from + step, i, left);
    }
  }
  __device__ __forceinline__ void queries(int pair, int left) const {
    const int step = opaque(D);
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      copy(place_of(pair, i) + kQ * kPart, x + i * 8 * 3 * step, i, left);
  }
  __device__ __forceinline__ void gradients(int pair, int left) const {  // dy
    const int step = opaque(D);
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      copy(place_of(pair, i) + kDy * kPart, dy + i * 8 * step, i, left);
  }
  // The values this thread has copied, and waited for, through their gate, whose derivatives go to
  // where dx_i of these tokens will be (Slopes). ahead: pairs from the one that is copied next.
  template <Act kValueGate>
  __device__ __forceinline__ void gate_values(const Call<__nv_bfloat16>& a, int pair, int ahead,
                                              int left) const {
    const int step = opaque(D);
    const int64_t there = reinterpret_cast<const char*>(x) - reinterpret_cast<const char*>(a.x);
    char* const slopes = reinterpret_cast<char*>(a.dx) + there + (ahead * kPair * 3 + 2) * 2 * step;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const uint32_t at = place_of(pair, i) + kV * kPart;
      uint4 v = ld_shared4(at), slope;
      activate_with_slope<kValueGate>(v, slope);
      st_shared(at, v);
      st_global_if(left > 8 * i, slopes + i * 8 * 3 * 2 * step, slope);
    }
  }
  // h, in one piece, by one thread; `loaded` counts its bytes. State warps have written there.
  __device__ __forceinline__ void saved_state(const void* states, int64_t index,
                                              uint32_t loaded) const {
    if (thread != 0) return;
    fence_async_proxy();
    mbarrier_expect_more(loaded, kH);
    bulk_load(state, static_cast<const char*>(states) + index * kH, kH, loaded);
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

// A product of 64 rows and columns over 128; left, right: its operands at step k of 16.
template <bool kRows, bool kColumns, class Left, class Right>
__device__ __forceinline__ void all_with_all(float (&all)[kChunk / 8][4], const Left& left,
                                             const Right& right) {
#pragma unroll
  for (int j = 0; j < kChunk / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) all[j][e] = 0.0f;
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kWarps; ++k) wgmma64_shared<kRows, kColumns>(all, left(k), right(k));
  wgmma_commit();
  wgmma_wait_all(all);
}

// The 16 columns 16 block ... of a product's rows of this warp.
__device__ __forceinline__ void own_block(float (&own)[2][4], const float (&all)[kChunk / 8][4],
                                          int block) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float low = block & 1 ? all[2 + i][e] : all[i][e];
      const float high = block & 1 ? all[6 + i][e] : all[4 + i][e];
      own[i][e] = block & 2 ? high : low;
    }
}

// A of a pair, a block a warp: of the earlier and of the later sub-chunk, and across, where the
// tiles are cut already. As for D the product is that of all blocks with all.
__device__ __forceinline__ void pair_scores(uint32_t smem, int warp, int lane_, uint32_t reset) {
  const uint64_t queries = wgmma_operand(smem + kQueries, 0, 1024);
  const uint64_t keys = wgmma_operand(smem + kKeys, 0, 1024);
  float all[kChunk / 8][4];
  all_with_all<true, true>(
      all, [&](int k) { return wgmma_at(queries, k * 2048); },
      [&](int k) { return wgmma_at(keys, k * 2048); });
  if (warp == kSpare) return;
  float own[2][4];
  own_block(own, all, warp);
  const Tokens tokens{(warp == kLater ? reset >> 16 : reset) & 0xffffu, kSub};
  const int lane = opaque(lane_), g = lane >> 2, q = lane & 3;
  uint32_t packed[4];
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      packed[r + 2 * i] = warp == kAcross ? pack_bf16(own[i][2 * r], own[i][2 * r + 1])
                                          : masked<false>(own[i][2 * r], own[i][2 * r + 1],
                                                          token_of(r, g), 4 * q + 2 * i, tokens);
  const int row = (warp == kEarlier ? 0 : kSub) + (lane & 15), column16 = lane >> 4;
  stmatrix(smem + kScores + pair_offset(row, (warp == kLater ? 2 : 0) + column16), packed);
}

// D of a chunk's sub-chunks, a warp each, and across those of a pair. The product is that of all
// tokens with all tokens, of which the other blocks are of no use: it is done once a chunk, and
// state warps do not wait for it in each pair.
__device__ __forceinline__ void chunk_gradients(unsigned char* smem_bytes, uint32_t smem, int warp,
                                                int lane_, uint64_t reset) {
  const uint64_t columns = contract_columns(smem);
  float all[kChunk / 8][4];
  all_with_all<false, false>(
      all, [&](int k) { return wgmma_at(columns, columns_at(kDy * kPart, k)); },
      [&](int k) { return wgmma_at(columns, columns_at(kV * kPart, k)); });
  float own[2][4];
  own_block(own, all, warp);
  const Tokens tokens{uint32_t(reset >> (16 * warp)) & 0xffffu, kSub};
  const int lane = opaque(lane_), g = lane >> 2, q = lane & 3;
  float* const diagonal = reinterpret_cast<float*>(smem_bytes + kDiagonal) + warp * kSub;
  const uint32_t to = smem + kGradients + lane_narrow_column_major(lane);
  uint32_t packed[4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int t = token_of(r, g);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      packed[r + 2 * i] = masked<true>(own[i][2 * r], own[i][2 * r + 1], t, 4 * q + 2 * i, tokens);
    if (q == g >> 1) diagonal[t] = (g & 1) ? own[r][2 * r + 1] : own[r][2 * r];
  }
  stmatrix(to + warp * kScoreBlock, packed);
  if (warp & 1) {  // with the sub-chunk before; the tiles of queries and keys are cut at resets
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        packed[r + 2 * i] = warp & 2 ? pack_bf16(all[4 + i][2 * r], all[4 + i][2 * r + 1])
                                     : pack_bf16(all[i][2 * r], all[i][2 * r + 1]);
    stmatrix(to + (kSubs + (warp >> 1)) * kScoreBlock, packed);
  }
}

// A thread's part of dx, 16 bytes each of eight rows of a pair, from shared memory: of dx_q and
// dx_f of the pair behind the one that is worked on, then of dv of that one. dx points at the pair
// behind, and at that one after go_to() or back().
struct Stores {
  __nv_bfloat16* dx = nullptr;
  int left = 0;  // tokens of the head from this thread's first one on
  uint32_t gates, values;
  int D, token, thread;
  __device__ __forceinline__ Stores(const Call<__nv_bfloat16>& a, uint32_t smem, int thread_)
      : D(int(a.D)), token(thread_ / 16), thread(thread_) {
    gates = smem + kOut + position_of(token) * kPitch + thread % 16 * 16;
    values = smem + kPairKeys + dv_offset(position_of(token), thread % 16);
  }
  // To a chunk's last pair.
  __device__ __forceinline__ void go_to(const Call<__nv_bfloat16>& a, const Place& place) {
    dx = a.dx + (place.row(a, kPairs - 1) + token) * 3 * D + place.head * N + thread % 16 * 8;
    left = place.left(int(a.T), kPairs - 1) - token;
  }
  // To the pair before.
  __device__ __forceinline__ void back() {
    dx -= kPair * 3 * opaque(D);
    left += kPair;
  }
  __device__ __forceinline__ void store_gates() const {
    const int step = opaque(D);
#pragma unroll
    for (int i = 0; i < Copies::kTokens; ++i) {  // the token 8 behind lies 4 rows further
      if (left <= 8 * i) break;
#pragma unroll
      for (int part = kQ; part <= kF; ++part)
        st_global(dx + (i * 8 * 3 + part) * step,
                  ld_shared4(gates + (part + (i & ~1)) * kOutTile + 4 * (i & 1) * kPitch));
    }
  }
  __device__ __forceinline__ void store_values() const {
    const int step = opaque(D);
#pragma unroll
    for (int i = 0; i < Copies::kTokens; ++i) {
      if (left <= 8 * i) break;
      st_global(dx + (i * 8 * 3 + kV) * step,
                ld_shared4((values ^ ((i & 1) * 64)) + ((i >> 1) * 16 + (i & 1) * 4) * 256));
    }
  }
};

// The derivatives of the values' gate of a pair, for dv. gate_values() and gate_first_values() have
// left them in device memory, since they are made with the values, up to a chunk ahead, and shared
// memory has no room until the product of A is done: then they come to the blocks of its queries
// that only it has read: eight rows for eight value columns, one for each of eight positions, in it
// 16 bytes for each of the pair's four such eights. They are copied by rows, as all is, and read by
// columns; for both to hit different banks, the eight rows are in another order for each of eight
// columns.
struct Slopes {
  static constexpr int kColumns64 = 8 * 8 * 128;              // to a column 64 further
  static constexpr int kEight = (4 * 128) ^ (4 << 4);         // ^: from token t to t + 8
  static constexpr int kLaterSub = 32 * (kLater - kEarlier);  // ^: to the later sub-chunk
  uint32_t smem;
  int warp, lane;
  __device__ __forceinline__ uint32_t place(int column16, int position) const {
    return smem + kQueries +
           operand_offset(8 * column16 + ((position ^ column16) & 7), position >> 3);
  }
  // From where this thread will store dv.
  __device__ __forceinline__ void copy(const Stores& dv) const {
    const int thread = opaque(dv.thread), step = opaque(dv.D);
    const uint32_t to = place(thread % 16, position_of(thread / 16));
#pragma unroll
    for (int i = 0; i < Copies::kTokens; ++i) {
      const bool valid = dv.left > 8 * i;
      cp_async16(to ^ ((i & 1) * kEight) ^ ((i >> 1) * kLaterSub),
                 valid ? dv.dx + (i * 8 * 3 + kV) * step : dv.dx, valid);
    }
  }
  // dv (value columns 64 m + 16 warp + g + 8 r, four tokens of each sub-chunk) times the
  // derivatives, rounded.
  __device__ __forceinline__ void scale(uint32_t (&rounded)[2][2][4],
                                        const float (&dv)[2][4][4]) const {
    const int l = opaque(lane);
    const uint32_t tile = place(2 * warp + ((l >> 3) & 1), 8 * (l >> 4) + (l & 7));
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t slope[4];
        ldmatrix_trans(slope, (tile ^ (s * kLaterSub)) + m * kColumns64);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          rounded[m][s][e] =
              pack_bf16(dv[m][2 * s + (e >> 1)][2 * (e & 1)] * low_half(slope[e]),
                        dv[m][2 * s + (e >> 1)][2 * (e & 1) + 1] * high_half(slope[e]));
      }
  }
};

template <Act kValueGate, bool kReset>
__device__ __forceinline__ void helper_warp(const Call<__nv_bfloat16>& a,
                                            unsigned char* smem_bytes) {
  constexpr bool kGated = kValueGate != Act::identity;
  const uint32_t smem = smem_address(smem_bytes);
  const Pieces pieces(a, /*reverse=*/true);
  const int thread = threadIdx.x - kStateThreads, lane = thread & 31;
  const int warp = uniform(thread >> 5);
  const int T = int(a.T);
  Place here(a, pieces, 0);  // the chunk that is worked on
  Copies copies(a, smem, thread);
  copies.go_to(a, here);
  // What this thread has copied so far counts as soon as it is there, which may be before this warp
  // would get round to waiting for it; what it has stored, now. The bytes of h count by themselves.
  const auto arrive = [&](uint32_t barrier) {
    cp_async_arrive(smem + barrier);
    mbarrier_arrive_warp(smem + barrier);
  };
  Resets resets;
  if (kReset) resets.load(a, here.b, here.chunk, lane);
  // The later tokens of a pair do not reach the earlier ones.
  if (thread < 2 * kSub)
    st_shared(smem + kScores + pair_offset(thread >> 1, 2 + (thread & 1)), make_uint4(0, 0, 0, 0));
  const auto left_of = [&](int pair) { return here.left(T, pair) - copies.token; };
  copies.saved_state(a.states, here.saved(pieces), smem + kLoaded);
#pragma unroll 1
  for (int pair = kPairs - 1; pair >= 0; --pair, copies.back(1)) copies.keys(pair, left_of(pair));
  arrive(kLoaded);
  cp_async_commit();
  copies.back(-1);
#pragma unroll 1
  for (int pair = 0; pair < kPairs; ++pair, copies.back(-1)) {
    copies.queries(pair, left_of(pair));
    copies.gradients(pair, left_of(pair));
  }
  copies.back(kPairs + 1);  // from behind the chunk to the last pair of the one before
  cp_async_commit();
  const Slopes slopes{smem, warp, lane};
  if constexpr (kGated) {
    cp_async_wait<1>();
#pragma unroll 1
    for (int pair = kPairs - 1; pair > 0; --pair)
      copies.gate_values<kValueGate>(a, pair, pair + 1, left_of(pair));
    fence_async_proxy();
  }
  arrive(kValues);
  // Of dv, a row a position: where a warp stores its value columns, what a thread reads.
  const uint32_t dv_store =
      smem + kPairKeys + dv_offset(8 * (lane >> 4) + (lane & 7), 2 * warp + ((lane >> 3) & 1));
  const uint64_t raw_rows = contract_tokens(smem);
  const uint64_t dh_rows = wgmma_operand(smem + kDh, kDhHalf, 1024);
  const uint64_t keys = wgmma_operand<64>(smem + kPairKeys, 0, 512);
  const uint64_t scores = wgmma_operand<64>(smem + kScores, 0, 512);
  Stores stores(a, smem, thread);

#pragma unroll 1
  for (bool starts = true, more = true; more;) {  // starts: a piece
    // What is copied from here on.
    Place next = here;
    if (here.chunk > here.first) {
      --next.chunk;
    } else if (here.piece + 1 < pieces.count) {
      next = Place(a, pieces, here.piece + 1);
      copies.go_to(a, next);
    } else {
      more = false;
    }
    const bool all = next.left(T, 0) >= kChunk;  // tokens of the next chunk
    const auto next_left = [&](int pair) { return next.left(T, pair) - copies.token; };
    const auto next_queries = [&](int pair) {
      if (more) all ? copies.queries(pair, kPair) : copies.queries(pair, next_left(pair));
      cp_async_commit();
    };
    const uint64_t reset = kReset ? resets.bits() : 0;
    cp_async_wait<0>();
    fence_async_proxy();
    // v and dy are here, and gated.
    if (kGated)
      barrier_sync(kFirstGated, kThreads);
    else
      barrier_sync(kHelper, kHelperThreads);
    chunk_gradients(smem_bytes, smem, warp, lane, reset);
    mbarrier_arrive_warp(smem + kGradient);
#pragma unroll 1
    for (int pair = kPairs - 1; pair >= 0; --pair) {
      barrier_sync(kRead, kThreads);
      // dx of the pair behind is written, too; h, f and v are read.
      stores.store_gates();
      mbarrier_arrive_warp(smem + kStored);
      if (starts && pair == kPairs - 1)
        stores.go_to(a, here);
      else
        stores.back();
      if (pair > 0 || more)
        copies.saved_state(a.states, (pair > 0 ? here : next).saved(pieces),
                           smem + (pair > 0 ? kFirst : kLoaded));
      if (pair > 0) mbarrier_arrive_warp(smem + kFirst);  // q was waited for before D
      if (more) all ? copies.keys(pair, kPair) : copies.keys(pair, next_left(pair));
      if (pair == 0 && more) arrive(kLoaded);
      cp_async_commit();
      // The next chunk's values of the pair behind, refilled in the last turn and waited for with
      // its slopes, while the state warps make the tiles: until kValues only the thread that has
      // copied them touches them.
      if constexpr (kGated)
        if (more && pair < kPairs - 1) {
          copies.gate_values<kValueGate>(a, pair + 1, 1, all ? kPair : next_left(pair + 1));
          fence_async_proxy();
        }
      if (pair == 0 && more) arrive(kValues);
      barrier_sync(kTiles, kThreads);
      if (!kGated) next_queries(pair);
      fence_async_proxy();  // wgmma reads what other threads have stored before the barrier
      pair_scores(smem, warp, lane, uint32_t(reset >> (32 * pair)));
      barrier_sync(kHelper, kHelperThreads);
      if (kGated) {  // on their way while dv is made; q behind them, so that they are waited for
                     // alone
        slopes.copy(stores);
        cp_async_commit();
        next_queries(pair);
      }

      // ---- dv^T: value columns 64 m + 16 warp ... of the products with all of them
      float dv[2][4][4];
      fence_async_proxy();
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kWarps; ++k)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint64_t dh = wgmma_at(dh_rows, m * kDhHalf + k * kSubRows);
          if (k == 0)
            wgmma32_shared_first<true, true>(dv[m], dh, wgmma_at(keys, k * 1024));
          else
            wgmma32_shared<true, true>(dv[m], dh, wgmma_at(keys, k * 1024));
        }
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int m = 0; m < 2; ++m)
          wgmma32_shared<true, true>(dv[m],
                                     wgmma_at(raw_rows, raw_tile(kDy, 2 * pair + s) + m * kHalf),
                                     wgmma_at(scores, s * kSub * 64));
      wgmma_commit();
      wgmma_wait_all(dv[0], dv[1]);
      mbarrier_arrive_warp(smem + kFreeDh);
      // All but q: slopes, which other warps read, and the values that the next turn gates.
      if (kGated) cp_async_wait<1>();
      barrier_sync(kState, kThreads);  // no helper's products read any longer, either
      if (more) all ? copies.gradients(pair, kPair) : copies.gradients(pair, next_left(pair));
      cp_async_commit();
      uint32_t rounded[2][2][4];
      if (kGated) slopes.scale(rounded, dv);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          if (!kGated)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              rounded[m][s][e] = pack_bf16(dv[m][2 * s + (e >> 1)][2 * (e & 1)],
                                           dv[m][2 * s + (e >> 1)][2 * (e & 1) + 1]);
          stmatrix_trans(dv_store + m * 128 + s * kSub * 256, rounded[m][s]);
        }
      barrier_sync(kHelper, kHelperThreads);
      stores.store_values();
      mbarrier_arrive_warp(smem + kFree);
      copies.back(1);
    }
    if (!more) break;
    starts = next.piece != here.piece;
    here = next;
    if (kReset) resets.load(a, here.b, here.chunk, lane);  // on the way while those copies are
  }
  barrier_sync(kRead, kThreads);
  stores.store_gates();
}

}  // namespace hgrn::hgru2::backward_roles

// HGRU2 forward on Hopper, n = 128: the mathematics of hgru2_forward.cu (read its head first), with
// warps of two roles beside each other on an SM instead of all warps in step.
//
// One CTA a (b,h), a segment of one (hgru2_scan.cu) or a run of several (hgru2_range.cuh), 16
// warps, sequential over steps of two sub-chunks of 16 tokens; from one head to the next the gate
// warps go as from step to step.
//
//   Gate warps 0..7: warp w computes the gates of the channels c = 16w..16w+15 and writes the tiles
//   q before, k after, q mid, k / mid; they load x two steps ahead and store y.
//   State warps 8..15: warp 8+w owns the value columns v = 16w..16w+15 of S^T in fp32 registers: y,
//   S, as wgmmas that read the tiles of the gate warps. Two of them, in turn others, also compute
//   A, one for each sub-chunk: the same two every time kept the others waiting. No other warp reads
//   those columns of the values, so where these pass through a gate (kValueGate), it is in this
//   warp's registers.
//
// Nothing that the gate warps do depends on the state, so they run up to two steps ahead: tiles, A
// and y have two stages. mbarriers a stage: full (tiles and factors are written, v has arrived),
// scored (A is there), empty (the stage may be written again, its y is complete). The tiles have
// rows of 32 bytes, a channel's 16 positions, which are the 32-byte swizzle of wgmma's operands as
// hgru2_gates.cuh lays them out; x and y have rows 16 bytes longer than the data.
//
// S is multiplied with the decay of both sub-chunks at once, in the second: in between the state is
// diag(shrunk) S, shrunk being the total of the first. The first one's keys are divided by it and
// the second one's queries multiplied with it, which costs a gate thread two factors. That shrunk
// is kept above 2^-60 changes no result by more than rounding; at a reset in the first sub-chunk,
// where it is 0, S is multiplied there, too.
// Twin: kernels/cpu/hgru2.cpp   Test: tools/hgru2_check.cu
#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // below sm_90 the kernel is empty, and nothing refers to its parts
#endif

#include "cuda/hgru2_range.cuh"
#include "cuda/wgmma.cuh"

namespace hgrn::hgru2 {
namespace {

constexpr int N = 128, kWarps = N / 16, kRole = 32 * kWarps, kThreads = 2 * kRole;
constexpr int kStep = 32, kSteps = kChunk / kStep;  // tokens of a step, steps of a chunk
constexpr int kBuffers = 4, kStages = 2;
constexpr float kLeastShrunk = 8.67e-19f;  // 2^-60: far from where a key / shrunk overflows
constexpr int kGateBarrier = 1, kStateBarrier = 2;
// The state warps hold a product's fragments as well as the state: what they gain, gates give up.
constexpr int kGateRegisters = 96, kStateRegisters = 160;

constexpr int kTile = kSub * kPitch;
constexpr int kNarrow = N * 32;
enum Tile { kQuery, kKey, kQueryD, kKeyD, kTiles };
// Byte offsets in shared memory.
constexpr int kRaw = 0;                                 // [buffer][2 sub][q, f, v][16][N] bf16
constexpr int kRawBuffer = 2 * 3 * kTile;               //
constexpr int kTileAt = kRaw + kBuffers * kRawBuffer;   // [stage][2 sub][kTiles][N][16] bf16
constexpr int kTileStage = 2 * kTiles * kNarrow;        //
constexpr int kY = kTileAt + kStages * kTileStage;      // [stage][2 sub][16][N] bf16
constexpr int kYStage = 2 * kTile;                      //
constexpr int kFactor = kY + kStages * kYStage;         // [stage][2 sub][N] float
constexpr int kScores = kFactor + kStages * 2 * N * 4;  // [stage][2 sub][16][16] bf16: A
constexpr int kFull = kScores + kStages * 2 * 512;      // mbarriers [stage]
constexpr int kScored = kFull + kStages * 8, kEmpty = kScored + kStages * 8;
constexpr int kBytes = kEmpty + kStages * 8;

// A piece in steps.
struct Steps : Piece {
  int first_step, steps;
  __device__ __forceinline__ Steps(const Call<__nv_bfloat16>& a, const Pieces& pieces, int k)
      : Piece(pieces.at(a, k)) {
    first_step = first * kSteps;
    steps = min((int(a.T) + kStep - 1) / kStep, end * kSteps);
  }
};

// Whether S is multiplied in that sub-chunk of a step: the same for all warps.
__device__ __forceinline__ bool multiplies(int sub, const Tokens& tokens) {
  return sub == 1 || tokens.reset != 0;
}

// The resets of a step, read one step ahead.
struct Resets {
  uint32_t next;
  __device__ __forceinline__ void load(const Call<__nv_bfloat16>& a, int64_t b, int step,
                                       int lane) {
    const int t = step * kStep + lane;
    next = a.reset && t < a.T ? a.reset[b * a.T + t] : 0;
  }
  __device__ __forceinline__ uint32_t bits() const { return __ballot_sync(0xffffffffu, next != 0); }
};

// A gate thread's part of the copies between device and shared memory: one 16-byte column of one
// token of each of a step's two sub-chunks. Addresses are counted up from step to step: multiplying
// them out took a fifth of the gate warps' time.
struct Copies {
  // The next step to load, or to store.
  struct Place {
    int piece = 0, token, left;  // this thread's first token of the step; steps left of the piece
  };
  const Call<__nv_bfloat16>& a;
  const Pieces& pieces;
  Place loads, stores;
  const __nv_bfloat16* from;  // x of the next step to load
  __nv_bfloat16* to;          // y of the next step to store
  uint32_t at;                // of the token and column in a tile
  int thread, T, D;
  __device__ __forceinline__ Copies(const Call<__nv_bfloat16>& a_, const Pieces& pieces_,
                                    uint32_t smem, int thread_)
      : a(a_), pieces(pieces_), thread(thread_), T(int(a.T)), D(int(a.D)) {
    at = smem + position_of(thread / 16) * kPitch + thread % 16 * 16;
    enter(loads, [&](int64_t row, int channel) { from = a.x + row * 3 * D + channel; });
    enter(stores, [&](int64_t row, int channel) { to = a.y + row * D + channel; });
  }
  // To the first step of its piece; aim(row, channel) of it.
  template <class Aim>
  __device__ __forceinline__ void enter(Place& place, const Aim& aim) {
    const Steps p(a, pieces, place.piece);
    place.left = p.steps - p.first_step;
    place.token = p.first_step * kStep + thread / 16;
    aim(p.b * a.T + place.token, p.head * N + thread % 16 * 8);
  }
  // The next step's x, if there is one, into a buffer. Beyond T, where nothing is read, zeros, and
  // an f so large that the state keeps all and takes nothing.
  __device__ __forceinline__ void load(uint32_t buffer) {
    if (loads.left == 0) return;
    constexpr uint32_t kOpen = 0x7f7f7f7fu;  // two bf16, the largest
#pragma unroll
    for (int sub = 0; sub < 2; ++sub) {
      const __nv_bfloat16* part = from + sub * kSub * 3 * int64_t(D);
      const uint32_t to = at + buffer + sub * 3 * kTile;
      const bool valid = loads.token + sub * kSub < T;
#pragma unroll
      for (int i = 0; i < 3; ++i, part += D)
        if (i != 1 || valid) cp_async16(to + i * kTile, part, valid);
      if (!valid) st_shared(to + kTile, make_uint4(kOpen, kOpen, kOpen, kOpen));
    }
    loads.token += kStep;
    from += kStep * 3 * int64_t(D);
    if (--loads.left == 0 && ++loads.piece < pieces.count)
      enter(loads, [&](int64_t row, int channel) { from = a.x + row * 3 * D + channel; });
  }
  // y of a step, from shared memory to registers and from there on.
  __device__ __forceinline__ void read(uint4 (&y)[2], int stage) const {
#pragma unroll
    for (int sub = 0; sub < 2; ++sub) y[sub] = ld_shared4(at + kY + stage * kYStage + sub * kTile);
  }
  __device__ __forceinline__ void store(const uint4 (&y)[2]) {
#pragma unroll
    for (int sub = 0; sub < 2; ++sub)
      if (stores.token + sub * kSub < T)
        *reinterpret_cast<uint4*>(to + sub * kSub * int64_t(D)) = y[sub];
    stores.token += kStep;
    to += kStep * int64_t(D);
    if (--stores.left == 0 && ++stores.piece < pieces.count)
      enter(stores, [&](int64_t row, int channel) { to = a.y + row * D + channel; });
  }
};

// kReset: there may be resets; without, the gates are one piece of code without branches.
template <Act kQueryGate, bool kReset>
__device__ __forceinline__ void gate_warp(const Call<__nv_bfloat16>& a, unsigned char* smem_bytes) {
  const uint32_t smem = smem_address(smem_bytes);
  const Pieces pieces(a, /*reverse=*/false);
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, q = lane & 3;
  const int own = 16 * warp;
  Copies copies(a, pieces, smem, tid);
  const auto load = [&](int turn) {
    copies.load(kRaw + (turn % kBuffers) * kRawBuffer);
    cp_async_commit();
  };
  load(0);
  load(1);
  const uint32_t tile_major = smem + padded_tile_major(lane) + warp * 32;
  const uint32_t narrow_store = smem + lane_narrow_store(own, lane);

  int turn = 0;  // steps done, of all pieces
#pragma unroll 1
  for (int k = 0; k < pieces.count; ++k) {
    const Steps piece(a, pieces, k);
    const KeyScales scales(a.bound, piece.head * N + own + g);
    Resets resets;
    if (kReset) resets.load(a, piece.b, piece.first_step, lane);

#pragma unroll 1
    for (int step = piece.first_step; step < piece.steps; ++step, ++turn) {
      const int stage = turn % kStages;
      const uint32_t raw = kRaw + (turn % kBuffers) * kRawBuffer;
      const uint32_t reset = kReset ? resets.bits() : 0;
      if (kReset) resets.load(a, piece.b, step + 1, lane);
      cp_async_wait<1>();
      barrier_sync(kGateBarrier, kRole);  // x has arrived
      uint32_t xq[2][4], xf[2][4];
#pragma unroll
      for (int sub = 0; sub < 2; ++sub) {
        ldmatrix_trans(xf[sub], tile_major + raw + (sub * 3 + 1) * kTile);
        ldmatrix_trans(xq[sub], tile_major + raw + sub * 3 * kTile);
      }
      mbarrier_wait(smem + kEmpty + stage * 8, (turn / kStages & 1) ^ 1);
      uint4 y[2];  // of two steps ago; stored once the first gates have given it time to arrive
      if (turn >= kStages) copies.read(y, stage);
      load(turn + 2);  // over x of two steps ago, which the state warps have read

      float shrunk[2] = {1.0f, 1.0f};
#pragma unroll
      for (int sub = 0; sub < 2; ++sub) {
        const Tokens tokens{(reset >> (16 * sub)) & 0xffffu, kSub};
        OperandTiles tiles;
        KeyGates key;
        key_gates(key, xf[sub], scales, q, tokens);
        Decay decay;
        decay_products(decay, key.f, q, tokens);
        float query[2][4], k[2][4];
        query_gates<kQueryGate == Act::silu, true>(query, xq[sub], kQueryGate);
        const bool multiply = multiplies(sub, tokens);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          decay.outer_up[r] *= a.query_scale, decay.outer_mid[r] *= a.query_scale;
          decay.total[r] *= shrunk[r];
          decay.outer_up[r] *= shrunk[r];
          if (multiply) continue;
          shrunk[r] = fmaxf(decay.total[r], kLeastShrunk);
          decay.outer_down[r] *= rcp_approx(shrunk[r]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            query[r][m] *= decay.up[r][m];
            k[r][m] = decay.down[r][m] * key.k[r][m];
          }
        pack_tiles(tiles, query, k, decay, q, tokens);
        const uint32_t to = narrow_store + kTileAt + stage * kTileStage + sub * kTiles * kNarrow;
        stmatrix(to + kQueryD * kNarrow, tiles.query_d);
        stmatrix(to + kKeyD * kNarrow, tiles.key_d);
        stmatrix(to + kQuery * kNarrow, tiles.query_b);
        stmatrix(to + kKey * kNarrow, tiles.key_b);
        if (multiply && q == 0)
#pragma unroll
          for (int r = 0; r < 2; ++r)
            reinterpret_cast<float*>(
                smem_bytes + kFactor)[(stage * 2 + sub) * N + own + g + 8 * r] = decay.total[r];
        if (sub == 0 && turn >= kStages) copies.store(y);
      }
      fence_async_proxy();  // wgmma reads the tiles
      mbarrier_arrive_warp(smem + kFull + stage * 8);
    }
  }
  // The last steps' y.
#pragma unroll 1
  for (int last = max(0, turn - kStages); last < turn; ++last) {
    const int stage = last % kStages;
    mbarrier_wait(smem + kEmpty + stage * 8, last / kStages & 1);
    uint4 y[2];
    copies.read(y, stage);
    copies.store(y);
  }
}

// S^T at the start of this piece's tokens, from h0 or the segments before: rows v = own + g (+8),
// columns c = 8j + 2q (+1).
template <class At>
__device__ __forceinline__ void start_state(float (&S)[N / 8][4], const Call<__nv_bfloat16>& a,
                                            const Piece& piece, int q, const At& state_at) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      S[j][e] = piece.first == 0 && a.h0 ? a.h0[int64_t(piece.bh) * N * N + state_at(j, e)] : 0.0f;
#pragma unroll 1
  for (int before = 0; before < piece.segment; ++before) {  // hgru2_scan.cu
    const float* const in =
        a.boundaries +
        (int64_t(piece.bh - a.split.whole) * (a.split.segments - 1) + before) * (N + 1) * N;
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        S[j][e] = fmaf(in[N * N + 8 * j + 2 * q + (e & 1)], S[j][e], in[state_at(j, e)]);
  }
}

// A of one sub-chunk, masked, by one warp: `tiles` and `out` are its shared memory.
__device__ __forceinline__ void score_block(uint32_t tiles, uint32_t out, int lane,
                                            const Tokens& tokens) {
  float c[2][2][4] = {};  // two sums, for shorter chains of dependent products
#pragma unroll
  for (int k = 0; k < kWarps; ++k) {
    uint32_t left[4], right[4];
    ldmatrix_trans(left, tiles + kQueryD * kNarrow + lane_narrow_row_major(lane) + k * 512);
    ldmatrix_trans(right, tiles + kKeyD * kNarrow + lane_narrow_column_major(lane) + k * 512);
    mma(c[k & 1][0], left, right[0], right[1]);
    mma(c[k & 1][1], left, right[2], right[3]);
  }
  const int g = lane >> 2, q = lane & 3;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = token_of(r, g), s = 4 * q + 2 * i;
      bool keep_x = s <= t, keep_y = s < t;
      if (tokens.reset) keep_x = tokens.connected(t, s), keep_y = tokens.connected(t, s + 1);
      const float x = c[0][i][2 * r] + c[1][i][2 * r];
      const float y = c[0][i][2 * r + 1] + c[1][i][2 * r + 1];
      st_shared(out + narrow_offset(g + 8 * r, i) + 4 * q,
                pack_bf16(keep_x ? x : 0.0f, keep_y ? y : 0.0f));
    }
}

template <Act kValueGate, bool kReset>
__device__ __forceinline__ void state_warp(const Call<__nv_bfloat16>& a,
                                           unsigned char* smem_bytes) {
  const uint32_t smem = smem_address(smem_bytes);
  const Pieces pieces(a, /*reverse=*/false);
  const int warp = (threadIdx.x >> 5) - kWarps, lane = threadIdx.x & 31;
  const int g = lane >> 2, q = lane & 3, own = 16 * warp;
  const auto state_at = [&](int j, int e) {
    return (8 * j + 2 * q + (e & 1)) * N + own + g + 8 * (e >> 1);
  };
  const uint32_t tile_major = smem + padded_tile_major(lane) + warp * 32;
  const uint64_t narrow = wgmma_operand<32>(smem + kTileAt, 0, 256);  // the first tile

  int turn = 0;  // steps done, of all pieces
#pragma unroll 1
  for (int k = 0; k < pieces.count; ++k) {
    const Steps piece(a, pieces, k);
    float S[N / 8][4];
    if (piece.from < 0)
      start_state(S, a, piece, q, state_at);
    else
      take_over<kRole>(S, a, piece.from, int(threadIdx.x) - kRole);
    Resets resets;
    if (kReset) resets.load(a, piece.b, piece.first_step, lane);

#pragma unroll 1
    for (int step = piece.first_step; step < piece.steps; ++step, ++turn) {
      const int stage = turn % kStages;
      const uint32_t parity = turn / kStages & 1;
      const uint32_t value = kRaw + (turn % kBuffers) * kRawBuffer + 2 * kTile;
      const uint32_t tiles = kTileAt + stage * kTileStage, scores = kScores + stage * 1024;
      const uint32_t reset = kReset ? resets.bits() : 0;
      if (kReset) resets.load(a, piece.b, step + 1, lane);
      if (a.states && step % kSteps == 0) {
        uint4* const out =
            static_cast<uint4*>(a.states) +
            ((int64_t(piece.bh) * pieces.chunks + step / kSteps) * kWarps + warp) * kRole + lane;
#pragma unroll
        for (int w = 0; w < kWarps; ++w)
          out[w * 32] = make_uint4(transpose8x8(pack_bf16(S[2 * w][0], S[2 * w][1])),
                                   transpose8x8(pack_bf16(S[2 * w + 1][0], S[2 * w + 1][1])),
                                   transpose8x8(pack_bf16(S[2 * w][2], S[2 * w][3])),
                                   transpose8x8(pack_bf16(S[2 * w + 1][2], S[2 * w + 1][3])));
      }
      mbarrier_wait(smem + kFull + stage * 8, parity);
      if (warp / 2 == turn % (kWarps / 2)) {
        const int sub = warp % 2;
        score_block(smem + tiles + sub * kTiles * kNarrow, smem + scores + sub * 512, lane,
                    Tokens{(reset >> (16 * sub)) & 0xffffu, 0});
        mbarrier_arrive_warp(smem + kScored + stage * 8);
      }

      uint32_t v[2][4];  // of both sub-chunks: value columns by tokens
#pragma unroll
      for (int sub = 0; sub < 2; ++sub) {
        ldmatrix_trans(v[sub], tile_major + value + sub * 3 * kTile);
        if (kValueGate != Act::identity) {
          const uint4 gated =
              activated(make_uint4(v[sub][0], v[sub][1], v[sub][2], v[sub][3]), kValueGate);
          v[sub][0] = gated.x, v[sub][1] = gated.y, v[sub][2] = gated.z, v[sub][3] = gated.w;
        }
      }

      float y[2][2][4];  // [sub][8 tokens][..]: value columns by tokens
#pragma unroll
      for (int sub = 0; sub < 2; ++sub) {
        const uint64_t tile = wgmma_at(narrow, (stage * 2 + sub) * kTiles * kNarrow);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) y[sub][i][e] = 0.0f;
        uint32_t state[kWarps][4];
#pragma unroll
        for (int k = 0; k < kWarps; ++k)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float* const pair = &S[2 * k + e / 2][e % 2 * 2];
            state[k][e] = pack_bf16(pair[0], pair[1]);
          }
        const int at = stage * 2 + sub;
        if (multiplies(sub, Tokens{(reset >> (16 * sub)) & 0xffffu, 0}))
#pragma unroll
          for (int j = 0; j < N / 8; ++j) {
            const float2 factor = ld_shared_float2(smem + kFactor + (at * N + 8 * j + 2 * q) * 4);
            S[j][0] *= factor.x, S[j][1] *= factor.y;
            S[j][2] *= factor.x, S[j][3] *= factor.y;
          }
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kWarps; ++k)
          wgmma16<true>(y[sub], state[k], wgmma_at(tile, kQuery * kNarrow + k * 512));
        wgmma128<false>(S, v[sub], wgmma_at(tile, kKey * kNarrow));
        wgmma_commit();
        wgmma_wait_all(y[sub], S);
      }
      mbarrier_wait(smem + kScored + stage * 8, parity);
#pragma unroll
      for (int sub = 0; sub < 2; ++sub) {
        uint32_t right[4];
        ldmatrix(right, smem + lane_narrow_row_major(lane) + scores + sub * 512);
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma(y[sub][i], v[sub], right[2 * i], right[2 * i + 1]);
#pragma unroll
          for (int r = 0; r < 2; ++r)
            packed[r + 2 * i] = pack_bf16(y[sub][i][2 * r], y[sub][i][2 * r + 1]);
        }
        stmatrix_trans(tile_major + kY + stage * kYStage + sub * kTile, packed);
      }
      mbarrier_arrive_warp(smem + kEmpty + stage * 8);
    }
    if (piece.to >= 0) hand_over<kRole>(a, piece.to, S, int(threadIdx.x) - kRole, kStateBarrier);
    if (a.hT && piece.steps * kStep >= a.T)
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) a.hT[int64_t(piece.bh) * N * N + state_at(j, e)] = S[j][e];
  }
}

template <Act kQueryGate, Act kValueGate, bool kReset>
__global__ __launch_bounds__(kThreads, 1) void forward_kernel(const Call<__nv_bfloat16> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  if (threadIdx.x == 0) {
    const uint32_t smem = smem_address(smem_bytes);
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(smem + kFull + i * 8, kWarps);
      mbarrier_init(smem + kScored + i * 8, 2);
      mbarrier_init(smem + kEmpty + i * 8, kWarps);
    }
  }
  __syncthreads();
  if (threadIdx.x < kRole) {
    registers_shrink<kGateRegisters>();
    gate_warp<kQueryGate, kReset>(a, smem_bytes);
  } else {
    registers_grow<kStateRegisters>();
    state_warp<kValueGate, kReset>(a, smem_bytes);
  }
  lower_flag(a);
#endif
}

template <Act kQueryGate, Act kValueGate, bool kReset>
void launch(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  const auto kernel = forward_kernel<kQueryGate, kValueGate, kReset>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<c.ctas(), kThreads, kBytes, stream>>>(c);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void forward_sm90(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  static_assert(kBytes <= 227 * 1024);
  dispatch_gates(c, [&](auto query, auto values, auto reset) {
    launch<query(), values(), reset()>(c, stream);
  });
}

}  // namespace hgrn::hgru2

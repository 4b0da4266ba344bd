// HGRU2 forward on tensor cores (paper Eq. 1-2), bf16 with fp32 accumulation, n = 64 or 128.
//
//   h_t = diag(f_t) h_{t-1} + k_t (x) v_t      y_t = q_t^T h_t      gates: hgru2_gates.cuh
//
// x (B,T,3D) = [q|f|i], y (B,T,D), h (B,H,n,n): rows are key channels c, columns value channels v.
// One CTA a (b,h), or a segment of one (hgru2_scan.cu), n/16 warps, sequential over sub-chunks of
// 16 tokens. With S = h before the
// sub-chunk and the decay products of hgru2_gates.cuh,
//
//   y = (q before) bf16(S) + A v       A[t][s] = sum_c (q mid)[t][c] (k / mid)[s][c], s <= t
//   S = diag(total) S + (k after)^T v
//
// Warp w computes the gates of the channels c = 16w..16w+15, whose contraction meets in shared
// memory, and owns the value columns v = 16w..16w+15 of S^T, which stay in its registers in fp32.
// No gate and no score goes to device memory: a token moves 6n bytes in, 2n out and, where a
// backward follows, 2n*n/64 for the state before every 64th token.
// Twin: kernels/cpu/hgru2.cpp   Test: tools/hgru2_check.cu
#include "cuda/cuda_check.h"
#include "cuda/hgru2_gates.cuh"
#include "cuda/hgru2_kernels.h"

namespace hgrn::hgru2 {
namespace {

constexpr int kStep = 32;  // tokens between barriers

template <int N>
struct ForwardSmem {
  static constexpr int kWarps = N / 16;
  static constexpr int kTile = kSub * N * 2;
  static constexpr int kRaw = 0;                        // [2 buffers][2 sub][q, f, v][16][N] bf16
  static constexpr int kRawBuffer = 2 * 3 * kTile;      //
  static constexpr int kQuery = kRaw + 2 * kRawBuffer;  // [2 sub][N][16] bf16: q before
  static constexpr int kKey = kQuery + 2 * N * 32;      // [2 sub][N][16] bf16: k after
  static constexpr int kPartial = kKey + 2 * N * 32;    // [2 sub][warps][2][32] float4
  static constexpr int kScores = kPartial + 2 * kWarps * 1024;  // [2 sub][16][16] bf16: A
  static constexpr int kTotal = kScores + 2 * 512;              // [2 sub][N] float
  static constexpr int kBytes = kTotal + 2 * N * 4;
};

template <int N, bool kSilu>
__global__ __launch_bounds__(2 * N,
                             forward_ctas(N)) void forward_kernel(const Call<__nv_bfloat16> a) {
  using Smem = ForwardSmem<N>;
  const int T = int(a.T), D = int(a.D);
  constexpr int kThreads = 2 * N, kWarps = N / 16, kColumns = N / 8;
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  const uint32_t smem = smem_address(smem_bytes);
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, q = lane & 3;
  const int chunks = (T + kChunk - 1) / kChunk, part = int(blockIdx.x) - a.split.whole;
  const bool whole = part < 0 || a.split.segments == 1;
  const int segment = whole ? 0 : part % a.split.segments;
  const int64_t bh = whole ? blockIdx.x : a.split.whole + part / a.split.segments;
  const int64_t b = bh / a.H, h = bh % a.H;
  const int own = 16 * warp;
  constexpr int kSteps = kChunk / kStep;  // steps of a chunk
  const int first_step = segment * a.split.chunks * kSteps;
  const int all_steps = (T + kStep - 1) / kStep;
  const int steps = whole ? all_steps : min(all_steps, first_step + a.split.chunks * kSteps);

  // x of 32 tokens, zeros beyond T: a thread copies one column of one token of each sub-chunk.
  const int load_token = tid / kColumns, load_column = tid % kColumns;
  const __nv_bfloat16* const x = a.x + b * a.T * 3 * D + h * N + load_column * 8;
  const uint32_t load_to = smem + Smem::kRaw + token_tile_offset<N>(load_token, load_column);
  const auto load = [&](int step) {
    const uint32_t buffer = load_to + (step & 1) * Smem::kRawBuffer;
    const int64_t t = int64_t(step) * kStep + load_token;
    const __nv_bfloat16* from = x + t * 3 * D;
#pragma unroll
    for (int sub = 0; sub < 2; ++sub) {
      const bool valid = t + sub * kSub < T;
#pragma unroll
      for (int part = 0; part < 3; ++part)
        cp_async16(buffer + (sub * 3 + part) * Smem::kTile,
                   valid ? from + (sub * kSub * 3 + part) * int64_t(D) : x, valid);
    }
    cp_async_commit();
  };
  load(first_step);

  const KeyScales scales(a.bound, h * N + own + g);
  // S^T: rows v = own + g (+8), columns c = 8j + 2q (+1)
  float S[kColumns][4];
  const auto state_at = [&](int j, int e) {
    return (8 * j + 2 * q + (e & 1)) * N + own + g + 8 * (e >> 1);
  };
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      S[j][e] = segment == 0 && a.h0 ? a.h0[bh * N * N + state_at(j, e)] : 0.0f;
#pragma unroll 1
  for (int before = 0; before < segment; ++before) {  // hgru2_scan.cu
    const float* const in =
        a.boundaries + ((bh - a.split.whole) * (a.split.segments - 1) + before) * (N + 1) * N;
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        S[j][e] = fmaf(in[N * N + 8 * j + 2 * q + (e & 1)], S[j][e], in[state_at(j, e)]);
  }
  const uint32_t tile_major = lane_tile_major<N>(lane), column_major = lane_column_major<N>(lane);
  const uint32_t narrow_row = lane_narrow_row_major(lane);
  const uint32_t narrow_column = lane_narrow_column_major(lane);
  const uint32_t narrow_store = lane_narrow_store(own, lane);
  uint32_t next_reset = 0;
  if (a.reset && first_step * kStep + lane < T)
    next_reset = a.reset[b * a.T + first_step * kStep + lane];

#pragma unroll 1
  for (int step = first_step; step < steps; ++step) {
    const uint32_t raw = smem + Smem::kRaw + (step & 1) * Smem::kRawBuffer;
    const int t0 = step * kStep;
    const uint32_t reset = __ballot_sync(0xffffffffu, next_reset != 0);
    cp_async_wait<0>();
    __syncthreads();  // x has arrived, and the last step's tiles are no longer read
    if (step + 1 < steps) load(step + 1);
    next_reset = 0;
    if (a.reset && t0 + kStep + lane < T) next_reset = a.reset[b * a.T + t0 + kStep + lane];

    if (a.states && step % kSteps == 0) {
      uint4* const out = static_cast<uint4*>(a.states) +
                         ((bh * chunks + t0 / kChunk) * kWarps + warp) * kThreads + lane;
#pragma unroll
      for (int w = 0; w < kWarps; ++w)
        out[w * 32] = make_uint4(transpose8x8(pack_bf16(S[2 * w][0], S[2 * w][1])),
                                 transpose8x8(pack_bf16(S[2 * w + 1][0], S[2 * w + 1][1])),
                                 transpose8x8(pack_bf16(S[2 * w][2], S[2 * w][3])),
                                 transpose8x8(pack_bf16(S[2 * w + 1][2], S[2 * w + 1][3])));
    }
    if (a.input_act != Act::identity)
      for (int item = tid; item < kStep * kColumns; item += kThreads)
        activate16(
            raw + ((item / (16 * kColumns)) * 3 + 2) * Smem::kTile + (item % (16 * kColumns)) * 16,
            a.input_act);

        // ---- gates of this warp's 16 channels
#pragma unroll
    for (int sub = 0; sub < 2; ++sub) {
      const Tokens tokens{(reset >> (16 * sub)) & 0xffffu, T - t0 - 16 * sub};
      const uint32_t tile = raw + sub * 3 * Smem::kTile;
      uint32_t xq[4], xf[4];
      OperandTiles tiles;
      ldmatrix_trans(xq, (tile + tile_major) ^ (warp * 32));
      ldmatrix_trans(xf, (tile + Smem::kTile + tile_major) ^ (warp * 32));
      KeyGates key;
      key_gates(key, xf, scales, q, tokens);
      Decay decay;
      decay_products(decay, key.f, q, tokens);
      float query[2][4], k[2][4];
      query_gates<kSilu>(query, xq, a.output_act);
#pragma unroll
      for (int r = 0; r < 2; ++r)
        decay.outer_up[r] *= a.query_scale, decay.outer_mid[r] *= a.query_scale;
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          query[r][m] *= decay.up[r][m];
          k[r][m] = decay.down[r][m] * key.k[r][m];
        }
      pack_tiles(tiles, query, k, decay, q, tokens);
      float scores[2][4];
      partial_scores(scores, tiles.query_d, tiles.key_d);
      stmatrix(smem + Smem::kQuery + sub * N * 32 + narrow_store, tiles.query_b);
      stmatrix(smem + Smem::kKey + sub * N * 32 + narrow_store, tiles.key_b);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        st_shared(smem + Smem::kPartial + ((sub * kWarps + warp) * 2 + i) * 512 + lane * 16,
                  make_float4(scores[i][0], scores[i][1], scores[i][2], scores[i][3]));
      if (q == 0)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          reinterpret_cast<float*>(smem_bytes + Smem::kTotal)[sub * N + own + g + 8 * r] =
              decay.total[r];
    }
    __syncthreads();

    // ---- A: sum over the warps, causal mask, bf16
#pragma unroll
    for (int item = tid; item < 256; item += kThreads) {
      const int r = item & 1, from = (item >> 1) & 31, i = (item >> 6) & 1, sub = item >> 7;
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 part = ld_shared_float2(
            smem + Smem::kPartial + ((sub * kWarps + w) * 2 + i) * 512 + from * 16 + r * 8);
        sum.x += part.x;
        sum.y += part.y;
      }
      const int t = token_of(r, from >> 2), s = 4 * (from & 3) + 2 * i;
      bool keep_x = s <= t, keep_y = s < t;
      if (reset) {
        const Tokens tokens{(reset >> (16 * sub)) & 0xffffu, 0};
        keep_x = tokens.connected(t, s), keep_y = tokens.connected(t, s + 1);
      }
      st_shared(
          smem + Smem::kScores + sub * 512 + narrow_offset((from >> 2) + 8 * r, i) + 4 * (from & 3),
          pack_bf16(keep_x ? sum.x : 0.0f, keep_y ? sum.y : 0.0f));
    }
    __syncthreads();

    // ---- y and S, this warp's 16 value columns
#pragma unroll
    for (int sub = 0; sub < 2; ++sub) {
      const uint32_t query = smem + Smem::kQuery + sub * N * 32 + narrow_row;
      const uint32_t key = smem + Smem::kKey + sub * N * 32 + narrow_row;
      const uint32_t value = raw + (sub * 3 + 2) * Smem::kTile;
      float out[2][2][4] = {};  // two sums, for shorter chains of dependent products
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        uint32_t frag[4];
        ldmatrix_trans(frag, query + k * 512);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          mma(out[k & 1][i], frag, pack_bf16(S[2 * k][2 * i], S[2 * k][2 * i + 1]),
              pack_bf16(S[2 * k + 1][2 * i], S[2 * k + 1][2 * i + 1]));
      }
      uint32_t scores[4], v[4];
      ldmatrix(scores, smem + Smem::kScores + sub * 512 + narrow_column);
      ldmatrix_trans(v, (value + column_major) ^ (warp * 32));
      mma(out[0][0], scores, v[0], v[1]);
      mma(out[1][1], scores, v[2], v[3]);
      __nv_bfloat16* const y = a.y + ((b * a.T + t0 + 16 * sub) * D + h * N + own + 2 * q);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int token = token_of(r, g);
        if (t0 + 16 * sub + token < T)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            *reinterpret_cast<uint32_t*>(y + int64_t(token) * D + 8 * i) = pack_bf16(
                out[0][i][2 * r] + out[1][i][2 * r], out[0][i][2 * r + 1] + out[1][i][2 * r + 1]);
      }
      ldmatrix_trans(v, (value + tile_major) ^ (warp * 32));
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        uint32_t frag[4];
        ldmatrix(frag, key + k * 512);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float(&s)[4] = S[2 * k + i];
          const float2 total =
              ld_shared_float2(smem + Smem::kTotal + (sub * N + 16 * k + 8 * i + 2 * q) * 4);
          s[0] *= total.x;
          s[1] *= total.y;
          s[2] *= total.x;
          s[3] *= total.y;
          mma(s, v, frag[2 * i], frag[2 * i + 1]);
        }
      }
    }
  }
  if (a.hT && steps * kStep >= T)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) a.hT[bh * N * N + state_at(j, e)] = S[j][e];
}

template <int N, bool kSilu>
void launch(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  constexpr int kBytes = ForwardSmem<N>::kBytes;
  const auto kernel = forward_kernel<N, kSilu>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<unsigned(c.split.ctas(c.B * c.H)), 2 * N, kBytes, stream>>>(c);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void forward_tensor(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  if (c.split.segments > 1) scan_forward(c, stream);
  if (c.n == 128 && c.sm90) return forward_sm90(c, stream);
  const bool silu = c.output_act == Act::silu;
  if (c.n == 128) return silu ? launch<128, true>(c, stream) : launch<128, false>(c, stream);
  silu ? launch<64, true>(c, stream) : launch<64, false>(c, stream);
}

}  // namespace hgrn::hgru2

// What each segment adds to the state, for splitting few long sequences over many SMs.
//
// The tensor-core kernels walk one head from end to end on one CTA. Heads beyond a whole number of
// waves (on a Hopper, with n = 128: where they are no more than the SMs) are split into segments of
// whole chunks that run side by side (Split, hgru2_kernels.h); each needs the state, or in backward
// its gradient, where it starts. This kernel runs the recurrence of the state alone over every
// segment that another one follows, each from zero (the first one from h0, in reverse the last one
// from dhT):
//
//   forward:  h = diag(total) h + (k after)^T v
//   reverse:  dh = diag(total) dh + (q before)^T dy
//
// and writes the state it ends with and the product of its decays. The main kernels then start a
// segment from a few of these: state = diag(decay_j) state + state_j, over the segments j before it
// (reverse: behind it). A sum of few terms in a fixed order.
//
// One CTA a segment, n/16 warps; warp w owns the rows c = 16w..16w+15, as in hgru2_backward.cu.
// boundaries (split heads, segments-1, n+1, n) fp32: n rows of state, then the decays; entry j is
// segment j (reverse: j+1).
// Twin: none (the CPU kernel needs no split)   Test: tools/hgru2_check.cu
#include "cuda/cuda_check.h"
#include "cuda/hgru2_gates.cuh"
#include "cuda/hgru2_kernels.h"

namespace hgrn::hgru2 {
namespace {

constexpr int kSubs = kChunk / kSub;

template <int N, bool kReverse>
struct ScanSmem {
  static constexpr int kParts = kReverse ? 3 : 2;  // f, v | f, dy, q
  static constexpr int kTile = kSub * N * 2;
  static constexpr int kBuffer = kSubs * kParts * kTile;  // [sub][part][16][N] bf16
  static constexpr int kBytes = 2 * kBuffer;
};

template <int N, bool kReverse>
__global__ __launch_bounds__(2 * N, 1) void scan_kernel(const Call<__nv_bfloat16> a) {
  using Smem = ScanSmem<N, kReverse>;
  constexpr int kThreads = 2 * N, kWarps = N / 16, kColumns = N / 8;
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  const uint32_t smem = smem_address(smem_bytes);
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, q = lane & 3;
  const int edges = a.split.segments - 1, entry = int(blockIdx.x) % edges;
  const int64_t bh = a.split.whole + blockIdx.x / edges, b = bh / a.H, head = bh % a.H;
  const int own = 16 * warp, T = int(a.T), D = int(a.D);
  const int chunks = (T + kChunk - 1) / kChunk, segment = kReverse ? entry + 1 : entry;
  const int first_chunk = segment * a.split.chunks;
  const int end_chunk = min(chunks, first_chunk + a.split.chunks), count = end_chunk - first_chunk;
  const auto chunk_at = [&](int i) { return kReverse ? end_chunk - 1 - i : first_chunk + i; };

  const int load_token = tid / kColumns, load_column = tid % kColumns;
  const __nv_bfloat16* const x = a.x + b * a.T * 3 * D + head * N + load_column * 8;
  const __nv_bfloat16* const dy = kReverse ? a.dy + b * a.T * D + head * N + load_column * 8 : x;
  const uint32_t load_to = smem + token_tile_offset<N>(load_token, load_column);
  const auto load = [&](int i) {
#pragma unroll
    for (int sub = 0; sub < kSubs; ++sub) {
      const int64_t t = int64_t(chunk_at(i)) * kChunk + sub * kSub + load_token;
      const bool valid = t < T;
      const __nv_bfloat16* const from = valid ? x + t * 3 * D : x;
      const uint32_t to = load_to + (i & 1) * Smem::kBuffer + sub * Smem::kParts * Smem::kTile;
      cp_async16(to, from + (valid ? D : 0), valid);
      if (kReverse) {
        cp_async16(to + Smem::kTile, valid ? dy + t * D : dy, valid);
        cp_async16(to + 2 * Smem::kTile, from, valid);
      } else {
        cp_async16(to + Smem::kTile, from + (valid ? 2 * D : 0), valid);
      }
    }
    cp_async_commit();
  };
  load(0);

  const KeyScales scales(a.bound, head * N + own + g);
  float state[kColumns][4];  // rows c = own + g (+8), columns v = 8j + 2q (+1)
  const float* first = nullptr;
  if (kReverse ? segment == edges : segment == 0) first = kReverse ? a.dhT : a.h0;
  float decay_product[2] = {1.0f, 1.0f};
  const auto state_at = [&](int j, int r) { return (own + g + 8 * r) * N + 8 * j + 2 * q; };
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float2 v = make_float2(0.0f, 0.0f);
      if (first) v = *reinterpret_cast<const float2*>(first + bh * N * N + state_at(j, r));
      state[j][2 * r] = v.x;
      state[j][2 * r + 1] = v.y;
    }
  const uint32_t tile_major = lane_tile_major<N>(lane), column_major = lane_column_major<N>(lane);

#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int chunk = chunk_at(i), t0 = chunk * kChunk;
    const uint32_t raw = smem + (i & 1) * Smem::kBuffer;
    uint64_t reset = 0;
    if (a.reset)
      for (int half = 1; half >= 0; --half) {
        const int t = t0 + 32 * half + lane;
        reset = reset << 32 |
                __ballot_sync(0xffffffffu, t < T && a.reset[b * a.T + (t < T ? t : 0)] != 0);
      }
    cp_async_wait<0>();
    __syncthreads();
    if (i + 1 < count) load(i + 1);
    if (!kReverse && a.input_act != Act::identity) {
      for (int item = tid; item < kSubs * kSub * kColumns; item += kThreads)
        activate16(raw + (item / (kSub * kColumns) * Smem::kParts + 1) * Smem::kTile +
                       item % (kSub * kColumns) * 16,
                   a.input_act);
      __syncthreads();
    }
#pragma unroll 2
    for (int step = 0; step < kSubs; ++step) {
      const int sub = kReverse ? kSubs - 1 - step : step;
      const Tokens tokens{uint32_t(reset >> (16 * sub)) & 0xffffu, T - t0 - kSub * sub};
      const uint32_t tile = raw + sub * Smem::kParts * Smem::kTile;
      uint32_t x_f[4], factor[4];
      ldmatrix_trans(x_f, (tile + tile_major) ^ (warp * 32));
      KeyGates key;
      key_gates(key, x_f, scales, q, tokens);
      float total[2];
      if (kReverse) {
        float value[2][4];
        uint32_t x_q[4];
        ldmatrix_trans(x_q, (tile + 2 * Smem::kTile + tile_major) ^ (warp * 32));
        Decay decay;
        decay_products(decay, key.f, q, tokens);
        query_gates(value, x_q, a.output_act);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int m = 0; m < 4; ++m) value[r][m] *= decay.up[r][m];
          decay.outer_up[r] *= a.query_scale;
          total[r] = decay.total[r];
        }
        cut_before(value, q, tokens);
        pack(factor, value, decay.outer_up);
      } else {
        scale_after(key.k, total, key.f, q, tokens);
        cut_after(key.k, q, tokens);
        pack(factor, key.k);
      }
      decay_product[0] *= total[0];
      decay_product[1] *= total[1];
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        uint32_t frag[4];
        ldmatrix_trans(frag, (tile + Smem::kTile + column_major) ^ (k * 32));
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float(&s)[4] = state[2 * k + e];
          s[0] *= total[0], s[1] *= total[0], s[2] *= total[1], s[3] *= total[1];
          mma(s, factor, frag[2 * e], frag[2 * e + 1]);
        }
      }
    }
  }
  float* const out = a.boundaries + int64_t(blockIdx.x) * (N + 1) * N;
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      *reinterpret_cast<float2*>(out + state_at(j, r)) =
          make_float2(state[j][2 * r], state[j][2 * r + 1]);
  if (q == 0)
#pragma unroll
    for (int r = 0; r < 2; ++r) out[N * N + own + g + 8 * r] = decay_product[r];
}

template <int N, bool kReverse>
void launch(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  constexpr int kBytes = ScanSmem<N, kReverse>::kBytes;
  const auto kernel = scan_kernel<N, kReverse>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<unsigned(c.split.boundaries(c.B * c.H)), 2 * N, kBytes, stream>>>(c);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

Split plan_split(int64_t heads, int64_t T, int64_t slots) {
  const int64_t chunks = (T + kChunk - 1) / kChunk, whole = heads / slots * slots;
  const int64_t rest = heads - whole;
  int64_t segments = 1;
  if (rest > 0) segments = std::min({slots / rest, chunks, int64_t(kMaxSegments)});
  if (segments < 2) return {int(heads), 1, int(chunks)};
  const int64_t per_segment = (chunks + segments - 1) / segments;
  return {int(whole), int((chunks + per_segment - 1) / per_segment), int(per_segment)};
}

void scan_forward(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  c.n == 128 ? launch<128, false>(c, stream) : launch<64, false>(c, stream);
}
void scan_reverse(const Call<__nv_bfloat16>& c, cudaStream_t stream) {
  c.n == 128 ? launch<128, true>(c, stream) : launch<64, true>(c, stream);
}

}  // namespace hgrn::hgru2

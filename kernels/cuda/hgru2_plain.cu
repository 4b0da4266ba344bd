// HGRU2 as plain recurrences in fp32, for any n from 1 to 256 and for fp32 or bf16 activations:
// the precision fp32, the head sizes without a tensor-core kernel, and decoding.
//
//   f = bound + (1-bound) sigmoid(xf)    k = (1-bound) sigmoid(-xf)    q = scale act_o(xq)
//   v = act_i(xi)        h_t = diag(f_t) h_{t-1} + k_t (x) v_t         y_t = q_t^T h_t
//   dh_t = diag(f_{t+1}) dh_{t+1} + q_t (x) dy_t      dv_t = k_t^T dh_t
//   dq_t = h_t dy_t    dk_t = dh_t v_t    df_t = sum_v h_{t-1} dh_t
//
// x (B,T,3D) = [q|f|i], y (B,T,D), h (B,H,n,n) with rows c (key channels) and columns v. A reset
// before token t is f_t = 0 with df_t = 0.
// value_kernel keeps 32 columns v of the state a CTA, one a lane, and contracts over c: forward,
// and in reverse, with q and k swapped, dv and dh0. key_kernel keeps one row c a warp and contracts
// over v: dq, dk, df, with h recomputed from the states that forward saved every 64 tokens.
// Twin: kernels/cpu/hgru2.cpp   Test: tools/hgru2_check.cu
#include "cuda/cuda_check.h"
#include "cuda/hgru2_kernels.h"

namespace hgrn::hgru2 {
namespace {

constexpr int kTile = 16;   // tokens between barriers
constexpr int kChunk = 64;  // tokens between saved states
constexpr int kBlocks = kChunk / kTile;

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ void store(float* p, float v) {
  *p = v;
}
__device__ __forceinline__ void store(__nv_bfloat16* p, float v) {
  *p = __float2bfloat16_rn(v);
}

__device__ __forceinline__ float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}
__device__ __forceinline__ float activation(float x, Act act) {
  if (act == Act::identity) return x;
  return act == Act::silu ? x * sigmoid(x) : sigmoid(x);
}
__device__ __forceinline__ float activation_slope(float x, Act act) {
  if (act == Act::identity) return 1.0f;
  const float s = sigmoid(x);
  return act == Act::silu ? s + x * s * sigmoid(-x) : s * sigmoid(-x);
}

// Warps of a value_kernel CTA; each keeps kRows rows of the state.
__host__ __device__ constexpr int warps_for(int n) {
  return n < 8 ? n : 8;
}

template <int kRows>
struct ValueSmem {
  float query[kTile][8 * kRows], key[kTile][8 * kRows], f[kTile][8 * kRows];
  float value[kTile][32];
  float partial[kTile][8][32];
};

// kReverse: the state is dh, query/key/value are k/q/dy, out is the gradient of xi.
template <class E, int kRows, bool kReverse>
__global__ void value_kernel(const Call<E> a) {
  extern __shared__ __align__(16) unsigned char smem_bytes[];
  ValueSmem<kRows>& smem = *reinterpret_cast<ValueSmem<kRows>*>(smem_bytes);
  const int n = a.n, tid = threadIdx.x, threads = blockDim.x, warp = tid >> 5, lane = tid & 31;
  const int warps = threads >> 5, column = blockIdx.y * 32 + lane, row0 = warp * kRows;
  const int64_t bh = blockIdx.x, b = bh / a.H, head = bh % a.H;
  const E* const x = a.x + b * a.T * 3 * a.D + head * n;
  const int64_t chunks = (a.T + kChunk - 1) / kChunk;
  float* const states = static_cast<float*>(a.states);
  const auto state_at = [&](int64_t block, int i) { return (block * n + row0 + i) * n + column; };
  const auto inside = [&](int i) { return row0 + i < n && column < n; };

  const float* const first = kReverse ? a.dhT : a.h0;
  float h[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) h[i] = first && inside(i) ? first[state_at(bh, i)] : 0.0f;

  const int64_t tiles = (a.T + kTile - 1) / kTile;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t t0 = (kReverse ? tiles - 1 - tile : tile) * kTile;
    const int count = int(min(int64_t(kTile), a.T - t0));
    for (int item = tid; item < count * warps * kRows; item += threads) {
      const int c = item % (warps * kRows), token = item / (warps * kRows);
      float q = 0.0f, k = 0.0f, f = 0.0f;
      if (c < n) {
        const E* const row = x + (t0 + token) * 3 * a.D + c;
        const float bound = a.bound ? a.bound[head * n + c] : 0.0f, xf = to_float(row[a.D]);
        q = a.query_scale * activation(to_float(row[0]), a.output_act);
        k = (1.0f - bound) * sigmoid(-xf);
        f = a.reset && a.reset[b * a.T + t0 + token] ? 0.0f : bound + (1.0f - bound) * sigmoid(xf);
      }
      smem.query[token][c] = kReverse ? k : q;
      smem.key[token][c] = kReverse ? q : k;
      smem.f[token][c] = f;
    }
    for (int item = tid; item < count * 32; item += threads) {
      const int v = blockIdx.y * 32 + item % 32, token = item / 32;
      float value = 0.0f;
      if (v < n)
        value = kReverse ? to_float(a.dy[(b * a.T + t0 + token) * a.D + head * n + v])
                         : activation(to_float(x[((t0 + token) * 3 + 2) * a.D + v]), a.input_act);
      smem.value[token][item % 32] = value;
    }
    if (!kReverse && states && t0 % kChunk == 0)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        if (inside(i)) states[state_at(bh * chunks + t0 / kChunk, i)] = h[i];
    __syncthreads();
    for (int step = 0; step < count; ++step) {
      const int token = kReverse ? count - 1 - step : step;
      const float value = smem.value[token][lane];
      float out = 0.0f;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float f = smem.f[token][row0 + i], k = smem.key[token][row0 + i];
        h[i] = kReverse ? fmaf(k, value, h[i]) : fmaf(f, h[i], k * value);
        out = fmaf(smem.query[token][row0 + i], h[i], out);
        if (kReverse) h[i] *= f;
      }
      smem.partial[token][warp][lane] = out;
    }
    __syncthreads();
    for (int item = tid; item < count * 32; item += threads) {
      const int v = blockIdx.y * 32 + item % 32, token = item / 32;
      if (v >= n) continue;
      float sum = 0.0f;
      for (int w = 0; w < warps; ++w) sum += smem.partial[token][w][item % 32];
      if (kReverse) {
        const int64_t at = ((t0 + token) * 3 + 2) * a.D + v;
        sum *= activation_slope(to_float(x[at]), a.input_act);
        store(a.dx + b * a.T * 3 * a.D + head * n + at, sum);
      } else {
        store(a.y + (b * a.T + t0 + token) * a.D + head * n + v, sum);
      }
    }
  }
  float* const last = kReverse ? a.dh0 : a.hT;
  if (last)
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (inside(i)) last[state_at(bh, i)] = h[i];
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// Shared memory: v and dy of a chunk, and the states of one tile a warp; rows of 32*kColumns.
template <int kColumns>
constexpr int key_smem_bytes(int warps) {
  return (2 * kChunk + warps * kTile) * 32 * kColumns * int(sizeof(float));
}

template <class E, int kColumns>
__global__ void key_kernel(const Call<E> a) {
  extern __shared__ __align__(16) unsigned char smem_bytes[];
  constexpr int kWidth = 32 * kColumns;
  const int n = a.n, tid = threadIdx.x, threads = blockDim.x, warp = tid >> 5, lane = tid & 31;
  float* const value = reinterpret_cast<float*>(smem_bytes);           // [kChunk][kWidth]
  float* const dout = value + kChunk * kWidth;                         // [kChunk][kWidth]
  float* const past = dout + kChunk * kWidth + warp * kTile * kWidth;  // [kTile][kWidth] h_t
  const int64_t bh = blockIdx.x, b = bh / a.H, head = bh % a.H;
  const int c = int(blockIdx.y) * (threads >> 5) + warp;
  const bool active = c < n;
  const int64_t chunks = (a.T + kChunk - 1) / kChunk;
  const E* const x = a.x + b * a.T * 3 * a.D + head * n;
  E* const dx = a.dx + b * a.T * 3 * a.D + head * n;
  const float bound = active && a.bound ? a.bound[head * n + c] : 0.0f, rest = 1.0f - bound;
  const float* const states = static_cast<const float*>(a.states);

  float dh[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int v = lane + 32 * j;
    dh[j] = a.dhT && active && v < n ? a.dhT[(bh * n + c) * n + v] : 0.0f;
  }
  float dbound = 0.0f;

  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t t0 = chunk * kChunk;
    const int count = int(min(int64_t(kChunk), a.T - t0));
    __syncthreads();
    for (int item = tid; item < kChunk * kWidth; item += threads) {
      const int v = item % kWidth, token = item / kWidth;
      const bool valid = token < count && v < n;
      value[item] =
          valid ? activation(to_float(x[((t0 + token) * 3 + 2) * a.D + v]), a.input_act) : 0.0f;
      dout[item] = valid ? to_float(a.dy[(b * a.T + t0 + token) * a.D + head * n + v]) : 0.0f;
    }
    __syncthreads();
    if (!active) continue;

    // A lane keeps the gates of the tokens lane and lane + 32; beyond the end f = 1, k = q = 0.
    float q[2], k[2], f[2], dq[2], dk[2], df[2];
    bool cut[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = lane + 32 * half;
      q[half] = k[half] = dq[half] = dk[half] = df[half] = 0.0f;
      f[half] = 1.0f;
      cut[half] = false;
      if (token < count) {
        const E* const row = x + (t0 + token) * 3 * a.D + c;
        const float xf = to_float(row[a.D]);
        q[half] = a.query_scale * activation(to_float(row[0]), a.output_act);
        k[half] = rest * sigmoid(-xf);
        cut[half] = a.reset && a.reset[b * a.T + t0 + token];
        f[half] = cut[half] ? 0.0f : bound + rest * sigmoid(xf);
      }
    }
    float h[kColumns], start[kBlocks][kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int v = lane + 32 * j;
      h[j] = v < n ? states[((bh * chunks + chunk) * n + c) * n + v] : 0.0f;
    }
    const auto advance = [&](int token, int half) {
      const float fs = __shfl_sync(0xffffffffu, f[half], token & 31);
      const float ks = __shfl_sync(0xffffffffu, k[half], token & 31);
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        h[j] = fmaf(fs, h[j], ks * value[token * kWidth + lane + 32 * j]);
    };
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) start[block][j] = h[j];
      if (block + 1 < kBlocks)
        for (int i = 0; i < kTile; ++i) advance(block * kTile + i, block / 2);
    }
#pragma unroll
    for (int block = kBlocks - 1; block >= 0; --block) {
      constexpr int kHalf = 32 / kTile;
      const int half = block / kHalf;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) h[j] = start[block][j];
      for (int i = 0; i < kTile; ++i) {
        advance(block * kTile + i, half);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) past[i * kWidth + lane + 32 * j] = h[j];
      }
      for (int i = kTile - 1; i >= 0; --i) {
        const int token = block * kTile + i;
        const float fs = __shfl_sync(0xffffffffu, f[half], token & 31);
        const float qs = __shfl_sync(0xffffffffu, q[half], token & 31);
        float sum_q = 0.0f, sum_k = 0.0f, sum_f = 0.0f;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int v = lane + 32 * j;
          const float dy = dout[token * kWidth + v];
          const float before = i == 0 ? start[block][j] : past[(i - 1) * kWidth + v];
          dh[j] = fmaf(qs, dy, dh[j]);
          sum_q = fmaf(past[i * kWidth + v], dy, sum_q);
          sum_k = fmaf(dh[j], value[token * kWidth + v], sum_k);
          sum_f = fmaf(before, dh[j], sum_f);
          dh[j] *= fs;
        }
        sum_q = warp_sum(sum_q);
        sum_k = warp_sum(sum_k);
        sum_f = warp_sum(sum_f);
        if (lane == (token & 31)) dq[half] = sum_q, dk[half] = sum_k, df[half] = sum_f;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = lane + 32 * half;
      if (token >= count) continue;
      const int64_t at = (t0 + token) * 3 * a.D + c;
      const float xf = to_float(x[at + a.D]);
      const float d = sigmoid(-xf) * ((cut[half] ? 0.0f : df[half]) - dk[half]);
      dbound += d;
      store(dx + at, a.query_scale * dq[half] * activation_slope(to_float(x[at]), a.output_act));
      store(dx + at + a.D, rest * sigmoid(xf) * d);
    }
  }
  dbound = warp_sum(dbound);
  if (active && a.dbound_partial && lane == 0) a.dbound_partial[b * a.D + head * n + c] = dbound;
}

template <class E, int kRows, bool kReverse>
void launch_value(const Call<E>& c, cudaStream_t stream) {
  constexpr int kBytes = int(sizeof(ValueSmem<kRows>));
  const auto kernel = value_kernel<E, kRows, kReverse>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<dim3(unsigned(c.B * c.H), unsigned((c.n + 31) / 32)), 32 * warps_for(c.n), kBytes,
           stream>>>(c);
  CUDA_CHECK(cudaGetLastError());
}

template <class E, bool kReverse>
void value_pass(const Call<E>& c, cudaStream_t stream) {
  const int rows = (c.n + 7) / 8;  // rows a warp; with fewer than 8 warps, one
  if (rows <= 1) return launch_value<E, 1, kReverse>(c, stream);
  if (rows <= 2) return launch_value<E, 2, kReverse>(c, stream);
  if (rows <= 4) return launch_value<E, 4, kReverse>(c, stream);
  if (rows <= 8) return launch_value<E, 8, kReverse>(c, stream);
  if (rows <= 16) return launch_value<E, 16, kReverse>(c, stream);
  launch_value<E, 32, kReverse>(c, stream);
}

template <class E, int kColumns>
void launch_key(const Call<E>& c, cudaStream_t stream) {
  int device = 0, limit = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  int warps = std::min(c.n, 8);
  while (warps > 1 && key_smem_bytes<kColumns>(warps) > limit) warps /= 2;
  const int bytes = key_smem_bytes<kColumns>(warps);
  check(bytes <= limit,
        "hgru2 backward with n={} needs {} bytes of shared memory a block, this GPU has {}; set a "
        "smaller model.expand_ratio",
        c.n, bytes, limit);
  const auto kernel = key_kernel<E, kColumns>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<dim3(unsigned(c.B * c.H), unsigned((c.n + warps - 1) / warps)), 32 * warps, bytes,
           stream>>>(c);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

template <class E>
void forward_plain(const Call<E>& c, cudaStream_t stream) {
  value_pass<E, false>(c, stream);
}

template <class E>
void backward_plain(const Call<E>& c, cudaStream_t stream) {
  value_pass<E, true>(c, stream);
  if (c.n <= 32) return launch_key<E, 1>(c, stream);
  if (c.n <= 64) return launch_key<E, 2>(c, stream);
  if (c.n <= 128) return launch_key<E, 4>(c, stream);
  launch_key<E, 8>(c, stream);
}

template void forward_plain(const Call<float>&, cudaStream_t);
template void forward_plain(const Call<__nv_bfloat16>&, cudaStream_t);
template void backward_plain(const Call<float>&, cudaStream_t);
template void backward_plain(const Call<__nv_bfloat16>&, cudaStream_t);

}  // namespace hgrn::hgru2

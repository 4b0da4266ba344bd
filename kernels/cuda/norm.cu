// RMSNorm and LayerNorm over the columns, plain and fused with the residual stream.
//   sum = x + dropout(branch)                                            (residual form)
//   mu = mean(sum) (0 for RMSNorm), r = 1/sqrt(mean((sum - mu)^2) + eps), h = (sum - mu) r
//   y = w h + b;  stats (N,2) = mu, r
//   dx = r (w dy - h mean(w dy h) - mean(w dy)), the last term for LayerNorm only
//   dw += sum over rows of dy h;  db += sum over rows of dy
//   residual form: dsum += dx, dbranch = dropout'(dsum)
//   on demand backward makes y again from what it reads anyway, with forward's bits
// x, sum, y (N,D) f32 or bf16; w, b (D) f32. The statistics are those of sum as it is stored.
//
// Memory-bound, so each row is read once: 1 to 16 warps keep it in registers, 8 columns a 16-byte
// access. Backward copies a lane's part of the next row to shared memory (cp.async) while it works
// on this one. dw and db stay in registers over all rows of a CTA, which writes them as one partial
// row; a second kernel adds the partial rows in order: no atomics.
// Rows that are not a multiple of 8 columns, or longer than 8192 (fp32 backward: 4096), take the
// plain kernels.
// Twin: kernels/cpu/norm.cpp   Test: tests/ops/test_norm.cpp
#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace hgrn {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kRowWarps = 8;  // a CTA's warps, where a row does not need more

template <class T>
struct ForwardArgs {
  T* sum;  // null in the plain form
  T* y;
  float* stats;
  const T* x;
  const T* branch;
  const float* w;
  const float* b;  // may be null
  int64_t N;
  int D;
  int group_warps;
  bool layer;
  float eps;
  DropMask drop;
};

template <class T>
struct BackwardArgs {
  T* dx;       // dsum in the residual form: read and written
  T* dbranch;  // may be null
  float* partial_dw;
  float* partial_db;  // null: no db wanted
  const T* dy;
  const T* x;
  const float* w;
  const float* stats;
  int64_t N;
  int D;
  int group_warps;
  DropMask drop;
};
template <class T>
struct AgainArgs : BackwardArgs<T> {
  T* y;            // null: forward's output is not wanted again; may be dy
  const float* b;  // of y; may be null
};

// The warps that share a row, and several rows a CTA. Sums alternate between two halves of
// `shared`, so that one barrier a sum is enough: a half is written again only after the next sum's
// barrier, which no warp passes before all have read it. The barrier is the row's own, so that the
// rows of a CTA do not wait for each other; an mbarrier, since compute-sanitizer's racecheck loses
// count of __syncthreads() where parts of a CTA use bar.sync.
struct RowGroup {
  struct Shared {
    float2 sums[2 * kMaxWarps];
    uint64_t barriers[kRowWarps / 2];  // one a row of several warps
  };
  int index, warp, lane, warps;  // row in the CTA, warp in the row, warps a row
  float2* sums;
  uint32_t barrier;
  int sum_number = 0;

  // By all threads of the CTA.
  __device__ RowGroup(int group_warps, Shared& s) : warps(group_warps), sums(s.sums) {
    const int w = threadIdx.x / 32;
    index = w / warps, warp = w % warps, lane = threadIdx.x % 32;
    barrier = smem_address(s.barriers + index);
    if (warps == 1) return;
    if (warp == 0 && lane == 0)
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(32 * warps) : "memory");
    __syncthreads();
  }
  __device__ __forceinline__ float2 sum(float2 v) {
    v.x = warp_sum(v.x), v.y = warp_sum(v.y);
    if (warps == 1) return v;
    float2* slots = sums + (sum_number & 1) * kMaxWarps + index * warps;
    if (lane == 0) slots[warp] = v;
    sync();
    float2 total = slots[0];
    for (int i = 1; i < warps; ++i) total.x += slots[i].x, total.y += slots[i].y;
    return total;
  }
  __device__ __forceinline__ float sum(float v) {
    return warps == 1 ? warp_sum(v) : sum(make_float2(v, 0.0f)).x;
  }
  // Of one row, or of two at the price of one.
  __device__ __forceinline__ void sum_rows(float (&v)[1]) { v[0] = sum(v[0]); }
  __device__ __forceinline__ void sum_rows(float (&v)[2]) {
    const float2 both = sum(make_float2(v[0], v[1]));
    v[0] = both.x, v[1] = both.y;
  }

 private:
  __device__ __forceinline__ void sync() {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .b64 state;\n"
        "mbarrier.arrive.shared.b64 state, [%0];\n"
        "}" ::"r"(barrier)
        : "memory");
    do {
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}"
          : "=r"(done)
          : "r"(barrier), "r"(sum_number & 1)
          : "memory");
    } while (!done);
    ++sum_number;
  }
};

// CTAs a multiprocessor that registers must leave room for.
template <class T>
constexpr int forward_ctas(int packs, int rows, bool residual) {
  if (sizeof(T) == 4) return 1;
  return packs * rows > 4 || (packs == 4 && residual) ? 3 : 4;
}

// A group of warps takes kRows rows at once: short rows alone leave too few loads on their way.
template <class T, int kPacks, int kRows, bool kResidual>
__global__ __launch_bounds__(
    256,
    forward_ctas<T>(kPacks, kRows, kResidual)) void norm_forward_kernel(const ForwardArgs<T> a) {
  const DropMask drop = a.drop.now();
  __shared__ RowGroup::Shared shared;
  RowGroup group(a.group_warps, shared);
  const int groups = blockDim.x / 32 / a.group_warps;
  const int64_t row0 = (int64_t(blockIdx.x) * groups + group.index) * kRows;
  const int first = (group.warp * 32 + group.lane) * kWide, stride = a.group_warps * 32 * kWide;
  const int64_t start = row0 * a.D + first;
  // No early return: the warps of a row share barriers.
  const auto has = [&](int j, int k) { return row0 + j < a.N && first + k * stride < a.D; };

  float v[kRows][kPacks][kWide];
  float sums[kRows] = {};  // LayerNorm: of the values; RMSNorm: of their squares
  {
    Pack<T, kWide> x[kRows][kPacks], branch[kRows][kPacks];
#pragma unroll
    for (int j = 0; j < kRows; ++j)
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (!has(j, k)) continue;
        x[j][k].load(a.x + start + j * a.D + k * stride);
        if (kResidual) branch[j][k].load(a.branch + start + j * a.D + k * stride);
      }
#pragma unroll
    for (int j = 0; j < kRows; ++j)
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int col = first + k * stride;
        if (!has(j, k)) continue;
        x[j][k].unpack(v[j][k]);
        if (kResidual) {
          float add[kWide];
          branch[j][k].unpack(add);
          drop.apply(add, row0 + j, col);
#pragma unroll
          for (int i = 0; i < kWide; ++i) v[j][k][i] += add[i];
          x[j][k].pack(v[j][k]);
          x[j][k].store(a.sum + start + j * a.D + k * stride);
          x[j][k].unpack(v[j][k]);
        }
#pragma unroll
        for (int i = 0; i < kWide; ++i)
          sums[j] = fmaf(v[j][k][i], a.layer ? 1.0f : v[j][k][i], sums[j]);
      }
  }
  float mean[kRows] = {};
  if (a.layer) {  // the squares of centred values: E[x^2] - mean^2 would cancel
    group.sum_rows(sums);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      mean[j] = sums[j] / float(a.D);
      sums[j] = 0;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (!has(j, k)) continue;
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
          v[j][k][i] -= mean[j];
          sums[j] += v[j][k][i] * v[j][k][i];
        }
      }
    }
  }
  group.sum_rows(sums);
  float r[kRows];
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    r[j] = 1.0f / sqrtf(sums[j] / float(a.D) + a.eps);
    if (row0 + j < a.N && group.warp == 0 && group.lane == 0)
      reinterpret_cast<float2*>(a.stats)[row0 + j] = make_float2(mean[j], r[j]);
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int col = first + k * stride;
    if (!has(0, k)) continue;
    float w[kWide], b[kWide] = {};
    load<kWide>(w, a.w + col);
    if (a.b) load<kWide>(b, a.b + col);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (!has(j, k)) continue;
#pragma unroll
      for (int i = 0; i < kWide; ++i) v[j][k][i] = fmaf(v[j][k][i] * r[j], w[i], b[i]);
      store<kWide>(a.y + start + j * a.D + k * stride, v[j][k]);
    }
  }
}

// Adds the register sums of a CTA's rows in row order and writes them as row blockIdx.x. `shared`
// holds D floats for each of the groups; all threads may still read it at the call.
template <int kPacks>
__device__ void write_partial_row(float* partial, const float (&sums)[kPacks][kWide], float* shared,
                                  const RowGroup& group, int groups, int first, int stride, int D) {
  constexpr int kColumns = 4;  // a thread
  float* const out = partial + int64_t(blockIdx.x) * D;
  float* const mine = groups == 1 ? out : shared + group.index * D;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    if (first + k * stride < D) store<kWide>(mine + first + k * stride, sums[k]);
  if (groups == 1) return;
  __syncthreads();
  for (int col = threadIdx.x * kColumns; col < D; col += blockDim.x * kColumns) {
    float total[kColumns];
    load<kColumns>(total, shared + col);
    for (int g = 1; g < groups; ++g) {
      float v[kColumns];
      load<kColumns>(v, shared + g * D + col);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) total[i] += v[i];
    }
    store<kColumns>(out + col, total);
  }
}

// What backward writes: dx; or dsum += dx; or that and dbranch. Three kernels, since dropout's
// random numbers would cost the second one the registers for its rows.
enum class Form { plain, residual, branch };

// What a lane reads of a row in the backward pass. The next row comes by way of a slot in shared
// memory that the lane fills and reads itself: no barrier, and no registers for a row on its way.
template <class T, int kPacks, bool kResidual>
struct BackwardRow {
  static constexpr int kTensors = kResidual ? 3 : 2, kParts = sizeof(Pack<T, kWide>) / 16;
  static constexpr int kPackBytes = 16 * kTensors * kPacks * kParts;
  static constexpr int kSlotBytes = kPackBytes + int(sizeof(float2));  // a thread
  Pack<T, kWide> x[kPacks], dy[kPacks], dsum[kResidual ? kPacks : 1];
  float2 stats;

  // Starts the copies of a row. A slot is [tensor][pack][16-byte part][thread], then the
  // statistics.
  __device__ __forceinline__ static void fetch(char* slot, const BackwardArgs<T>& a, int64_t row,
                                               int first, int stride) {
    if (row < a.N) {
      cp_async8(smem_address(slot) + kPackBytes * blockDim.x + 8 * threadIdx.x, a.stats + 2 * row);
      const T* const from[] = {a.x, a.dy, a.dx};
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int64_t col = first + k * stride, at = row * a.D + col;
        if (col >= a.D) continue;
#pragma unroll
        for (int t = 0; t < kTensors; ++t)
#pragma unroll
          for (int part = 0; part < kParts; ++part)
            cp_async16(smem_address(place(slot, t, k, part)),
                       reinterpret_cast<const uint4*>(from[t] + at) + part, true);
      }
    }
    cp_async_commit();
  }
  __device__ __forceinline__ void take(char* slot) {
    cp_async_wait<0>();
    stats = reinterpret_cast<const float2*>(slot + kPackBytes * blockDim.x)[threadIdx.x];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      load(x[k], slot, 0, k);
      load(dy[k], slot, 1, k);
      if constexpr (kResidual) load(dsum[k], slot, 2, k);
    }
  }

 private:
  __device__ __forceinline__ static uint4* place(char* slot, int tensor, int pack, int part) {
    const int i = (tensor * kPacks + pack) * kParts + part;
    return reinterpret_cast<uint4*>(slot) + i * blockDim.x + threadIdx.x;
  }
  __device__ __forceinline__ static void load(Pack<T, kWide>& to, char* slot, int tensor, int k) {
    if constexpr (kParts == 1)
      to.raw = *place(slot, tensor, k, 0);
    else
      to.a = *reinterpret_cast<const float4*>(place(slot, tensor, k, 0)),
      to.b = *reinterpret_cast<const float4*>(place(slot, tensor, k, 1));
  }
};

// kAgain: y is wanted. A kernel of its own, since y costs registers, which are warps in flight.
template <class T, int kPacks, bool kLayer, Form kForm, bool kAgain>
__global__ __launch_bounds__(32 * kMaxWarps, 1) void norm_backward_kernel(
    const std::conditional_t<kAgain, AgainArgs<T>, BackwardArgs<T>> a) {
  constexpr bool kResidual = kForm != Form::plain;
  const DropMask drop = a.drop.now();
  __shared__ RowGroup::Shared shared;
  extern __shared__ float4 row_shared[];  // the slot; then D floats a group of warps
  RowGroup group(a.group_warps, shared);
  const int groups = blockDim.x / 32 / a.group_warps;
  const int first = (group.warp * 32 + group.lane) * kWide, stride = a.group_warps * 32 * kWide;
  const float inverse_D = 1.0f / float(a.D);
  const int64_t step = int64_t(gridDim.x) * groups;

  constexpr bool kHoldW = kForm != Form::branch;  // where registers are left
  float held_w[kHoldW ? kPacks : 1][kWide];
  if constexpr (kHoldW) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (first + k * stride < a.D) load<kWide>(held_w[k], a.w + first + k * stride);
  }
  const auto load_w = [&](float(&w)[kWide], int k) {
    if constexpr (kHoldW) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) w[i] = held_w[k][i];
    } else {
      load<kWide>(w, a.w + first + k * stride);
    }
  };

  float dw[kPacks][kWide] = {};
  float db[kLayer ? kPacks : 1][kWide] = {};
  using Row = BackwardRow<T, kPacks, kResidual>;
  char* const slot = reinterpret_cast<char*>(row_shared);
  int64_t row = int64_t(blockIdx.x) * groups + group.index;
  Row::fetch(slot, a, row, first, stride);
#pragma unroll 1
  for (; row < a.N; row += step) {
    Row now;
    now.take(slot);
    Row::fetch(slot, a, row + step, first, stride);
    const float2 stats = now.stats;
    float2 dots = {0, 0};  // sums of w dy h and of w dy
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int col = first + k * stride;
      if (col >= a.D) continue;
      float h[kWide], g[kWide], w[kWide];
      now.x[k].unpack(h), now.dy[k].unpack(g);
      load_w(w, k);
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        h[i] = (kLayer ? h[i] - stats.x : h[i]) * stats.y;
        dw[k][i] += g[i] * h[i];
        if constexpr (kLayer) db[k][i] += g[i];
        dots.x += w[i] * g[i] * h[i];
        if (kLayer) dots.y += w[i] * g[i];
      }
      if constexpr (kAgain) {  // here, where registers are free; dy's row has been read
        float b[kWide] = {};
        if constexpr (kLayer)
          if (a.b) load<kWide>(b, a.b + col);
#pragma unroll
        for (int i = 0; i < kWide; ++i) h[i] = fmaf(h[i], w[i], b[i]);
        store<kWide>(a.y + row * a.D + col, h);
      }
    }
    if constexpr (kLayer)
      dots = group.sum(dots);
    else
      dots.x = group.sum(dots.x);
    const float along = dots.x * inverse_D, mean = dots.y * inverse_D;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int col = first + k * stride;
      const int64_t at = row * a.D + col;
      if (col >= a.D) continue;
      float h[kWide], g[kWide], w[kWide];
      now.x[k].unpack(h), now.dy[k].unpack(g);
      load_w(w, k);
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        h[i] = (kLayer ? h[i] - stats.x : h[i]) * stats.y;
        g[i] = stats.y * (w[i] * g[i] - h[i] * along - (kLayer ? mean : 0.0f));
      }
      if constexpr (kResidual) {
        float before[kWide];
        now.dsum[k].unpack(before);
#pragma unroll
        for (int i = 0; i < kWide; ++i) g[i] = rounded<T>(g[i] + before[i]);
      }
      store<kWide>(a.dx + at, g);
      if constexpr (kForm == Form::branch) {
        drop.apply(g, row, col);
        store<kWide>(a.dbranch + at, g);
      }
    }
  }
  let_next_start();
  float* merged = reinterpret_cast<float*>(row_shared);
  write_partial_row<kPacks>(a.partial_dw, dw, merged, group, groups, first, stride, a.D);
  if constexpr (kLayer)
    if (a.partial_db)
      write_partial_row<kPacks>(a.partial_db, db, merged, group, groups, first, stride, a.D);
}

// ---- any number of columns: one CTA a row, which it reads three times (from cache)
constexpr int kPlainThreads = 256;

template <class T>
__global__ __launch_bounds__(kPlainThreads) void norm_forward_plain_kernel(const ForwardArgs<T> a) {
  const DropMask drop = a.drop.now();
  __shared__ float shared[kPlainThreads / 32];
  const int64_t row = blockIdx.x, at = row * a.D;
  const T* x = a.sum ? a.sum + at : a.x + at;
  float total = 0;
  for (int col = threadIdx.x; col < a.D; col += kPlainThreads) {
    float v[1], add[1];
    load<1>(v, a.x + at + col);
    if (a.sum) {
      load<1>(add, a.branch + at + col);
      drop.apply(add, row, col);
      v[0] = rounded<T>(v[0] + add[0]);
      store<1>(a.sum + at + col, v);
    }
    total += v[0];
  }
  const float mean = a.layer ? block_sum<kPlainThreads>(total, shared) / float(a.D) : 0.0f;
  float squares = 0;
  for (int col = threadIdx.x; col < a.D; col += kPlainThreads) {
    float v[1];
    load<1>(v, x + col);
    squares += (v[0] - mean) * (v[0] - mean);
  }
  squares = block_sum<kPlainThreads>(squares, shared);
  const float r = 1.0f / sqrtf(squares / float(a.D) + a.eps);
  if (threadIdx.x == 0) a.stats[2 * row] = mean, a.stats[2 * row + 1] = r;
  for (int col = threadIdx.x; col < a.D; col += kPlainThreads) {
    float v[1];
    load<1>(v, x + col);
    v[0] = fmaf((v[0] - mean) * r, a.w[col], a.b ? a.b[col] : 0.0f);
    store<1>(a.y + at + col, v);
  }
}

// The partial rows start at zero and are added to in place: a thread owns its columns.
template <class T, bool kResidual>
__global__ __launch_bounds__(kPlainThreads) void norm_backward_plain_kernel(const AgainArgs<T> a,
                                                                            bool layer) {
  const DropMask drop = a.drop.now();
  __shared__ float shared[kPlainThreads / 32];
  float* dw = a.partial_dw + int64_t(blockIdx.x) * a.D;
  float* db = a.partial_db ? a.partial_db + int64_t(blockIdx.x) * a.D : nullptr;
  for (int col = threadIdx.x; col < a.D; col += kPlainThreads) {
    dw[col] = 0;
    if (db) db[col] = 0;
  }
  for (int64_t row = blockIdx.x; row < a.N; row += gridDim.x) {
    const int64_t at = row * a.D;
    const float mu = a.stats[2 * row], r = a.stats[2 * row + 1];
    float along = 0, mean = 0;
    for (int col = threadIdx.x; col < a.D; col += kPlainThreads) {
      float x[1], g[1];
      load<1>(x, a.x + at + col), load<1>(g, a.dy + at + col);
      const float h = (x[0] - mu) * r;
      dw[col] += g[0] * h;
      if (db) db[col] += g[0];
      along += a.w[col] * g[0] * h;
      mean += a.w[col] * g[0];
    }
    along = block_sum<kPlainThreads>(along, shared) / float(a.D);
    mean = layer ? block_sum<kPlainThreads>(mean, shared) / float(a.D) : 0.0f;
    for (int col = threadIdx.x; col < a.D; col += kPlainThreads) {
      float x[1], g[1];
      load<1>(x, a.x + at + col), load<1>(g, a.dy + at + col);
      const float h = (x[0] - mu) * r;
      g[0] = r * (a.w[col] * g[0] - h * along - mean);
      if (a.y) {
        x[0] = fmaf(h, a.w[col], a.b ? a.b[col] : 0.0f);
        store<1>(a.y + at + col, x);
      }
      if (kResidual) {
        float before[1];
        load<1>(before, a.dx + at + col);
        g[0] = rounded<T>(g[0] + before[0]);
      }
      store<1>(a.dx + at + col, g);
      if (kResidual && a.dbranch) {
        drop.apply(g, row, col);
        store<1>(a.dbranch + at + col, g);
      }
    }
  }
}

// ---- launches
// How a row is laid over warps: `packs` a lane on `warps` warps, with the fewest idle lanes.
struct RowLayout {
  int warps, packs;
};

RowLayout row_layout(int D, int max_packs, int max_warps) {
  RowLayout best{0, 0};
  for (int packs = max_packs; packs >= 1; --packs) {
    const int per_warp = 32 * kWide * packs, warps = (D + per_warp - 1) / per_warp;
    if (warps > max_warps) continue;
    if (best.warps == 0 || warps * packs < best.warps * best.packs) best = {warps, packs};
  }
  return best;
}

// f(std::integral_constant<int, packs>), packs in 1 .. kMax
template <int kMax, class F>
void dispatch_packs(int packs, F&& f) {
  if constexpr (kMax > 1)
    if (packs < kMax) return dispatch_packs<kMax - 1>(packs, f);
  f(std::integral_constant<int, kMax>{});
}

bool wide_rows(int64_t D, int64_t max_cols, std::initializer_list<const void*> pointers) {
  if (D > max_cols) return false;
  bool wide = false;
  dispatch_width(D, pointers, [&](auto width) { wide = width() == kWide; });
  return wide;
}

template <class T>
void launch_forward(ForwardArgs<T> a, cudaStream_t stream) {
  constexpr int kMaxPacks = 4;
  const int64_t max_cols = kRowWarps * 32 * kWide * kMaxPacks;
  if (!wide_rows(a.D, max_cols, {a.sum, a.y, a.x, a.branch, a.w, a.b, a.stats})) {
    norm_forward_plain_kernel<T><<<unsigned(a.N), kPlainThreads, 0, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
    return;
  }
  const RowLayout layout = row_layout(a.D, kMaxPacks, kRowWarps);
  a.group_warps = layout.warps;
  const int groups = kRowWarps / layout.warps;
  const unsigned threads = unsigned(groups * layout.warps * 32);
  dispatch_packs<kMaxPacks>(layout.packs, [&](auto packs) {
    constexpr int kRows = std::is_same_v<T, bf16> && packs() <= 3 ? 2 : 1;
    const auto blocks = [&](int rows) {
      return unsigned((a.N + rows * groups - 1) / (rows * groups));
    };
    if (a.sum)  // reads and writes twice as much a row
      norm_forward_kernel<T, packs(), 1, true><<<blocks(1), threads, 0, stream>>>(a);
    else
      norm_forward_kernel<T, packs(), kRows, false><<<blocks(kRows), threads, 0, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
  });
}

struct Grid {
  int blocks, threads;
  size_t shared;
};

template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

// As many CTAs as fit. slot_bytes: of a thread.
template <class Kernel>
Grid backward_grid(Kernel kernel, const cudaDeviceProp& device, int64_t N, int D, int group_warps,
                   int slot_bytes) {
  constexpr size_t kMostShared = 52 << 10;  // of 16 warps in bf16; every device has it
  Grid g;
  const int groups = std::max(1, kRowWarps / group_warps);
  g.threads = 32 * group_warps * groups;
  const size_t merge = groups > 1 ? size_t(groups) * size_t(D) * sizeof(float) : 0;
  g.shared = std::max(size_t(slot_bytes) * size_t(g.threads), merge);
  check(g.shared <= kMostShared, "norm_backward: {} bytes of shared memory at D = {}", g.shared, D);
  allow_shared(kernel, g.shared);
  int resident = 0;
  CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, g.threads, g.shared));
  const int64_t needed = (N + groups - 1) / groups;
  g.blocks = int(std::clamp<int64_t>(needed, 1, int64_t(device.multiProcessorCount) * resident));
  return g;
}

}  // namespace

void CudaOps::norm_forward_any(Tensor sum, Tensor y, Tensor stats, Tensor x, Tensor branch,
                               Tensor w, Tensor b, Norm kind, float eps, const Dropout& drop) {
  const int64_t N = x.rows(), D = x.cols();
  check(y.numel() == N * D && stats.numel() == 2 * N && w.numel() == D && (!b || b.numel() == D) &&
            sum.numel() == branch.numel() && (!sum || sum.numel() == N * D),
        "norm_forward: x {}, y {}, stats {}, w {}, b {}, sum {}, branch {}", x.shape.str(),
        y.shape.str(), stats.shape.str(), w.shape.str(), b.shape.str(), sum.shape.str(),
        branch.shape.str());
  if (N == 0 || D == 0) return;
  dispatch(act_dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    ForwardArgs<T> a{sum ? sum.ptr<T>() : nullptr,
                     y.ptr<T>(),
                     stats.ptr<float>(),
                     x.ptr<T>(),
                     branch ? branch.ptr<T>() : nullptr,
                     w.ptr<float>(),
                     b ? b.ptr<float>() : nullptr,
                     N,
                     int(D),
                     1,
                     kind == Norm::layer,
                     eps,
                     DropMask(drop)};
    launch_forward(a, stream_);
  });
}

void CudaOps::norm_backward_any(Tensor dx, Tensor dbranch, Grad dw, Grad db, Tensor dy, Tensor x,
                                Tensor w, Tensor stats, Norm kind, const Dropout& drop,
                                const NormAgain& again, bool residual) {
  const int64_t N = x.rows(), D = x.cols();
  check(dx.numel() == N * D && dy.numel() == N * D && stats.numel() == 2 * N && w.numel() == D &&
            dw.to.numel() == D && (!db || db.to.numel() == D) &&
            (!dbranch || dbranch.numel() == N * D) && (!again.y || again.y.numel() == N * D) &&
            (!again.b || again.b.numel() == D),
        "norm_backward: x {}, dx {}, dy {}, stats {}, w {}, dw {}, db {}, dbranch {}, y {}, b {}",
        x.shape.str(), dx.shape.str(), dy.shape.str(), stats.shape.str(), w.shape.str(),
        dw.to.shape.str(), db.to.shape.str(), dbranch.shape.str(), again.y.shape.str(),
        again.b.shape.str());
  check(!residual || dbranch || drop.p == 0,
        "residual_norm_backward: dbranch is needed with dropout {}", drop.p);
  if (N == 0 || D == 0) {
    if (dw.fresh) zero(dw.to);
    if (db.fresh) zero(db.to);
    return;
  }
  const bool layer = kind == Norm::layer;
  const int sms = prop_.multiProcessorCount;
  dispatch(act_dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    AgainArgs<T> a{
        {dx.ptr<T>(), dbranch ? dbranch.ptr<T>() : nullptr, nullptr, nullptr, dy.ptr<T>(),
         x.ptr<T>(), w.ptr<float>(), stats.ptr<float>(), N, int(D), 1, DropMask(drop)},
        again.y ? again.y.ptr<T>() : nullptr,
        again.b ? again.b.ptr<float>() : nullptr};
    const auto launch = [&](auto kernel, const Grid& grid, auto... extra) {
      auto* partial =
          reinterpret_cast<float*>(scratch(size_t(grid.blocks) * 2 * size_t(D) * sizeof(float)));
      a.partial_dw = partial;
      if (db) a.partial_db = partial + int64_t(grid.blocks) * D;
      kernel<<<grid.blocks, grid.threads, grid.shared, stream_>>>(a, extra...);
      CUDA_CHECK(cudaGetLastError());
      add_partial_rows(dw, a.partial_dw, grid.blocks, D);
      if (db) add_partial_rows(db, a.partial_db, grid.blocks, D);
    };
    // Two packs: with more a lane has too few rows on their way (docs/benchmarks_history.md).
    // Sums and packs must fit 128 registers; an fp32 pack takes twice those of a bf16 one,
    // LayerNorm twice the sums, dropout its random numbers.
    constexpr int kMostPacks = 2, kHalf = std::is_same_v<T, float> ? 1 : 2;
    const int max_packs = layer || dbranch ? kHalf : kMostPacks;
    const bool wide = wide_rows(D, kMaxWarps * 32 * kWide * kHalf,
                                {a.dx, a.dbranch, a.dy, a.x, a.w, a.stats, a.y, a.b});
    if (!wide ||
        ((db || a.b) && !layer)) {  // no model has an RMSNorm with a bias: not worth a kernel
      const Grid grid{int(std::min<int64_t>(N, sms * 4)), kPlainThreads, 0};
      if (residual)
        launch(norm_backward_plain_kernel<T, true>, grid, layer);
      else
        launch(norm_backward_plain_kernel<T, false>, grid, layer);
      return;
    }
    const RowLayout layout = row_layout(a.D, max_packs, kMaxWarps);
    a.group_warps = layout.warps;
    const auto go = [&](auto layered, auto packs) {
      const auto run = [&](auto form) {
        const auto kernel = norm_backward_kernel<T, packs(), layered(), form(), false>;
        using Row = BackwardRow<T, packs(), form() != Form::plain>;
        // One grid with y and without: it decides how dw's sums are split.
        const Grid grid = backward_grid(kernel, prop_, N, a.D, a.group_warps, Row::kSlotBytes);
        if (!a.y) return launch(kernel, grid);
        const auto again = norm_backward_kernel<T, packs(), layered(), form(), true>;
        allow_shared(again, grid.shared);
        launch(again, grid);
      };
      if (!residual) return run(std::integral_constant<Form, Form::plain>{});
      if constexpr (packs() <= kHalf)
        if (dbranch) return run(std::integral_constant<Form, Form::branch>{});
      run(std::integral_constant<Form, Form::residual>{});
    };
    if (layer)
      return dispatch_packs<kHalf>(layout.packs, [&](auto packs) { go(std::true_type{}, packs); });
    dispatch_packs<kMostPacks>(layout.packs, [&](auto packs) { go(std::false_type{}, packs); });
  });
}

void CudaOps::norm_forward(Tensor y, Tensor stats, Tensor x, Tensor w, Tensor b, Norm kind,
                           float eps) {
  norm_forward_any(Tensor(), y, stats, x, Tensor(), w, b, kind, eps, Dropout());
}

void CudaOps::norm_backward(Tensor dx, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w,
                            Tensor stats, Norm kind, NormAgain again) {
  norm_backward_any(dx, Tensor(), dw, db, dy, x, w, stats, kind, Dropout(), again, false);
}

void CudaOps::residual_norm_forward(Tensor sum, Tensor y, Tensor stats, Tensor x, Tensor branch,
                                    Tensor w, Tensor b, Norm kind, float eps, Dropout drop) {
  check(sum && branch, "residual_norm_forward: sum and branch are needed");
  norm_forward_any(sum, y, stats, x, branch, w, b, kind, eps, drop);
}

void CudaOps::residual_norm_backward(Tensor dsum, Tensor dbranch, Grad dw, Grad db, Tensor dy,
                                     Tensor sum, Tensor w, Tensor stats, Norm kind, Dropout drop,
                                     NormAgain again) {
  norm_backward_any(dsum, dbranch, dw, db, dy, sum, w, stats, kind, drop, again, true);
}

}  // namespace hgrn

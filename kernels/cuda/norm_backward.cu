// RMSNorm and LayerNorm over the columns, plain and fused with the residual stream: backward.
//   dx = r (w dy - h mean(w dy h) - mean(w dy)), the last term for LayerNorm only
//   dw += sum over rows of dy h;  db += sum over rows of dy
//   residual form: dsum += dx, dbranch = dropout'(dsum)
//   on demand y = w h + b is made again, with forward's bits (norm_forward.cu has h, mu and r)
// x, y, dx, dy (N,D) f32 or bf16; w, b, dw, db (D) f32; stats (N,2) = mu, r.
//
// A lane's part of the next row, or of the next two where it is small, is copied to shared memory
// (cp.async) while it works on this one.
// dw and db stay in registers over all rows of a CTA, which writes them as one partial row; a
// second kernel adds the partial rows in order: no atomics. Rows of more than 8192 columns (fp32:
// 4096) take the plain kernel. Twin: kernels/cpu/norm.cpp   Test: tests/ops/test_norm.cpp,
// tests/ops/test_again.cpp
#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/launch.cuh"
#include "cuda/norm_rows.cuh"

namespace hgrn {
namespace {

using namespace norm;

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

// What a lane reads of a row in the backward pass. The next rows come by way of slots in shared
// memory that the lane fills and reads itself: no barrier, and no registers for a row on its way.
template <class T, int kPacks, bool kResidual, bool kAgain>
struct BackwardRow {
  static constexpr int kTensors = kResidual ? 3 : 2, kParts = sizeof(Pack<T, kWide>) / 16;
  static constexpr int kPackBytes = 16 * kTensors * kPacks * kParts;
  static constexpr int kSlotBytes = kPackBytes + int(sizeof(float2));  // a thread
  // Rows on their way. Registers leave room for 24 warps an SM or fewer: with 32 bytes a lane at a
  // time the memory would wait, unless rows are written back to it as well.
  static constexpr int kAhead = kPackBytes <= 32 && !kAgain ? 2 : 1;
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
    cp_async_wait<kAhead - 1>();
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
  extern __shared__ float4 row_shared[];  // the slots; then D floats a group of warps
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
  using Row = BackwardRow<T, kPacks, kResidual, kAgain>;
  constexpr int kAhead = Row::kAhead;
  const int slot_bytes = Row::kSlotBytes * int(blockDim.x);
  char* slot = reinterpret_cast<char*>(row_shared);
  int64_t row = int64_t(blockIdx.x) * groups + group.index;
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    Row::fetch(slot + i * slot_bytes, a, row + i * step, first, stride);
  int to_other = slot_bytes;
#pragma unroll 1
  for (; row < a.N; row += step) {
    // Drawn while the row is on its way, where registers are left.
    constexpr bool kDrawAhead = kForm == Form::branch && !kAgain;
    Philox bits[kDrawAhead ? kPacks : 1];
    if constexpr (kDrawAhead) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (drop.p != 0) bits[k] = drop.bits(row, first + k * stride);
    }
    Row now;
    now.take(slot);
    Row::fetch(slot, a, row + kAhead * step, first, stride);
    if constexpr (kAhead == 2) slot += to_other, to_other = -to_other;
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
    // dx = r w dy - (x - mu) along - mean, with r in both sums.
    const float along = stats.y * stats.y * (dots.x * inverse_D);
    const float mean = stats.y * (dots.y * inverse_D);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int col = first + k * stride;
      const int64_t at = row * a.D + col;
      if (col >= a.D) continue;
      float x[kWide], g[kWide], w[kWide], before[kWide] = {};
      now.x[k].unpack(x), now.dy[k].unpack(g);
      load_w(w, k);
      if constexpr (kResidual) now.dsum[k].unpack(before);
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        const float from_mean = kLayer ? x[i] - stats.x : x[i];
        const float rest = fmaf(-along, from_mean, kLayer ? before[i] - mean : before[i]);
        g[i] = fmaf(stats.y, w[i] * g[i], rest);
      }
      Pack<T, kWide> dx;
      dx.pack(g);
      dx.store(a.dx + at);
      if constexpr (kForm == Form::branch) {
        dx.unpack(g);  // rounded, as a reader of dsum sees it; by pairs, which costs much less
        if constexpr (!kDrawAhead)
          drop.apply(g, row, col);
        else if (drop.p != 0)
          drop.apply(g, bits[k].v);
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
struct Grid {
  int blocks, threads;
  size_t shared;
};

template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

// As many CTAs as fit. slots_bytes: of a thread.
template <class Kernel>
Grid backward_grid(Kernel kernel, const cudaDeviceProp& device, int64_t N, int D, int group_warps,
                   int slots_bytes) {
  constexpr size_t kMostShared = 52 << 10;  // of 16 warps in bf16; every device has it
  Grid g;
  const int groups = std::max(1, kRowWarps / group_warps);
  g.threads = 32 * group_warps * groups;
  const size_t merge = groups > 1 ? size_t(groups) * size_t(D) * sizeof(float) : 0;
  g.shared = std::max(size_t(slots_bytes) * size_t(g.threads), merge);
  check(g.shared <= kMostShared, "norm_backward: {} bytes of shared memory at D = {}", g.shared, D);
  allow_shared(kernel, g.shared);
  int resident = 0;
  CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, g.threads, g.shared));
  const int64_t needed = (N + groups - 1) / groups;
  g.blocks = int(std::clamp<int64_t>(needed, 1, int64_t(device.multiProcessorCount) * resident));
  return g;
}

}  // namespace

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
      add_rows(dw, a.partial_dw, grid.blocks, D);
      if (db) add_rows(db, a.partial_db, grid.blocks, D);
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
        using Row = BackwardRow<T, packs(), form() != Form::plain, false>;
        // One grid with y and without: it decides how dw's sums are split.
        const Grid grid =
            backward_grid(kernel, prop_, N, a.D, a.group_warps, Row::kAhead * Row::kSlotBytes);
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

void CudaOps::norm_backward(Tensor dx, Grad dw, Grad db, Tensor dy, Tensor x, Tensor w,
                            Tensor stats, Norm kind, NormAgain again) {
  norm_backward_any(dx, Tensor(), dw, db, dy, x, w, stats, kind, Dropout(), again, false);
}

void CudaOps::residual_norm_backward(Tensor dsum, Tensor dbranch, Grad dw, Grad db, Tensor dy,
                                     Tensor sum, Tensor w, Tensor stats, Norm kind, Dropout drop,
                                     NormAgain again) {
  norm_backward_any(dsum, dbranch, dw, db, dy, sum, w, stats, kind, drop, again, true);
}

}  // namespace hgrn

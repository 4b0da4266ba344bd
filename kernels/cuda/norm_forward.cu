// RMSNorm and LayerNorm over the columns, plain and fused with the residual stream: forward.
//   sum = x + dropout(branch)                                            (residual form)
//   mu = mean(sum) (0 for RMSNorm), r = 1/sqrt(mean((sum - mu)^2) + eps), h = (sum - mu) r
//   y = w h + b;  stats (N,2) = mu, r
// x, sum, y (N,D) f32 or bf16; w, b (D) f32. The statistics are those of sum as it is stored.
// Rows of more than 8192 columns take the plain kernel.
// Twin: kernels/cpu/norm.cpp   Test: tests/ops/test_norm.cpp
#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/norm_rows.cuh"

namespace hgrn {
namespace {

using namespace norm;

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

void CudaOps::norm_forward(Tensor y, Tensor stats, Tensor x, Tensor w, Tensor b, Norm kind,
                           float eps) {
  norm_forward_any(Tensor(), y, stats, x, Tensor(), w, b, kind, eps, Dropout());
}

void CudaOps::residual_norm_forward(Tensor sum, Tensor y, Tensor stats, Tensor x, Tensor branch,
                                    Tensor w, Tensor b, Norm kind, float eps, Dropout drop) {
  check(sum && branch, "residual_norm_forward: sum and branch are needed");
  norm_forward_any(sum, y, stats, x, branch, w, b, kind, eps, drop);
}

}  // namespace hgrn

// Embedding.  x[r] = dropout(s w[token[r]]);  dw[t] += s sum over rows r with token t of
// dropout'(dx[r]) x, dx (N,D) and w (V,D) f32 or bf16, tokens (N) i32, dw (V,D) f32.
//
// Backward without atomics, equal bits in every run: row numbers are sorted by token (a stable
// sort, so rows of a token stay in order) and cut into pieces of kPiece. A piece adds the runs that
// lie within it to dw and leaves the sums of runs cut by its ends in `heads` and `tails`; the piece
// where a cut run starts then adds it up, piece by piece.
// Twin: kernels/cpu/embedding.cpp   Test: tests/ops/test_embedding.cpp
#include <algorithm>
#include <bit>
#include <cub/device/device_radix_sort.cuh>
#include <utility>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/vec.cuh"

namespace hgrn {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 32;  // sorted rows

template <class T, int kVec>
__global__ __launch_bounds__(kThreads) void embedding_forward_kernel(T* x, const int* tokens,
                                                                     const T* w, int64_t N,
                                                                     int64_t D, float scale,
                                                                     DropMask mask) {
  const DropMask drop = mask.now();
  constexpr int kAhead = 4;
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= N) return;
  const T* from = w + int64_t(tokens[row]) * D;
  T* to = x + row * D;
  constexpr int stride = 32 * kVec;
  for (int64_t at = threadIdx.x % 32 * kVec; at < D; at += stride * kAhead) {
    Pack<T, kVec> packs[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (at + k * stride < D) packs[k].load(from + at + k * stride);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t col = at + k * stride;
      if (col >= D) continue;
      float v[kVec];
      packs[k].unpack(v);
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[i] *= scale;
      drop.apply(v, row, col);
      store<kVec>(to + col, v);
    }
  }
}

__global__ __launch_bounds__(kThreads) void iota_kernel(int* out, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) out[i] = int(i);
}

template <int kVec>
__device__ __forceinline__ void add_to(float* p, const float (&v)[kVec], float scale) {
  float sum[kVec];
  load<kVec>(sum, p);
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[i] += scale * v[i];
  store<kVec>(p, sum);
}

// token, row (N): sorted. Piece blockIdx.x; columns from blockIdx.y.
template <class T, int kVec>
__global__ __launch_bounds__(kThreads) void embedding_pieces_kernel(
    float* dw, float* heads, float* tails, const T* dx, const int* token, const int* row, int64_t N,
    int64_t D, float scale, DropMask mask) {
  const DropMask drop = mask.now();
  constexpr int kAhead = 4;
  const int64_t col = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
  if (col >= D) return;
  const int64_t begin = int64_t(blockIdx.x) * kPiece, end = min(begin + kPiece, N);
  const bool from_before = begin > 0 && token[begin - 1] == token[begin];
  const bool goes_on = end < N && token[end] == token[end - 1];

  float sum[kVec] = {};
  int64_t run = begin;  // where the current run starts
  for (int64_t at = begin; at < end; at += kAhead) {
    Pack<T, kVec> packs[kAhead];
    int rows[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (at + k >= end) continue;
      rows[k] = row[at + k];
      packs[k].load(dx + int64_t(rows[k]) * D + col);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = at + k;
      if (i >= end) continue;
      float v[kVec];
      packs[k].unpack(v);
      drop.apply(v, rows[k], col);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] += v[j];
      if (i + 1 < end && token[i + 1] == token[i]) continue;
      if (run == begin && from_before)
        store<kVec>(heads + int64_t(blockIdx.x) * D + col, sum);
      else if (i + 1 == end && goes_on)
        store<kVec>(tails + int64_t(blockIdx.x) * D + col, sum);
      else
        add_to<kVec>(dw + int64_t(token[i]) * D + col, sum, scale);
      run = i + 1;
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] = 0;
    }
  }
}

template <int kVec>
__global__ __launch_bounds__(kThreads) void embedding_cut_runs_kernel(float* dw, const float* heads,
                                                                      const float* tails,
                                                                      const int* token, int64_t N,
                                                                      int64_t D, float scale) {
  const int64_t col = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
  const int64_t piece = blockIdx.x, begin = piece * kPiece, end = begin + kPiece;
  if (col >= D || end >= N) return;
  const int t = token[end - 1];
  if (token[end] != t) return;                                          // not cut
  if (token[begin] == t && begin > 0 && token[begin - 1] == t) return;  // starts further left
  int64_t low = end, high = N;  // first sorted row past the run
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    token[middle] == t ? low = middle + 1 : high = middle;
  }
  const int64_t last_piece = (low - 1) / kPiece;
  float sum[kVec];
  load<kVec>(sum, tails + piece * D + col);
#pragma unroll 4
  for (int64_t q = piece + 1; q <= last_piece; ++q) {
    float v[kVec];
    load<kVec>(v, heads + q * D + col);
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum[j] += v[j];
  }
  add_to<kVec>(dw + int64_t(t) * D + col, sum, scale);
}

size_t aligned(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

}  // namespace

void CudaOps::embedding_forward(Tensor x, Tensor tokens, Tensor w, float scale, Dropout drop) {
  const int64_t N = x.rows(), D = x.cols();
  check(tokens.numel() == N && w.cols() == D, "embedding_forward: x {}, tokens {}, w {}",
        x.shape.str(), tokens.shape.str(), w.shape.str());
  if (N == 0 || D == 0) return;
  dispatch(act_dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_width(D, {x.data, w.data}, [&](auto width) {
      constexpr int kRows = kThreads / 32;
      embedding_forward_kernel<T, width()>
          <<<unsigned((N + kRows - 1) / kRows), kThreads, 0, stream_>>>(
              x.ptr<T>(), tokens.ptr<int32_t>(), w.ptr<T>(), N, D, scale, DropMask(drop));
      CUDA_CHECK(cudaGetLastError());
    });
  });
}

void CudaOps::embedding_backward(Grad dw, Tensor dx, Tensor tokens, float scale, Dropout drop) {
  const int64_t N = dx.rows(), D = dx.cols();
  check(tokens.numel() == N && dw.to.cols() == D && N < (int64_t(1) << 31),
        "embedding_backward: dw {}, dx {}, tokens {}", dw.to.shape.str(), dx.shape.str(),
        tokens.shape.str());
  if (dw.fresh) zero(dw.to);  // most tokens do not occur
  if (N == 0 || D == 0) return;
  const int token_bits = std::max(1, int(std::bit_width(uint64_t(dw.to.rows() - 1))));
  const int64_t pieces = (N + kPiece - 1) / kPiece;
  const auto* unsorted = reinterpret_cast<const uint32_t*>(tokens.ptr<int32_t>());
  const auto sort = [&](void* temp, size_t& bytes, uint32_t* token, const int* from, int* row) {
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(temp, bytes, unsorted, token, from, row, int(N), 0,
                                               token_bits, stream_));
  };
  size_t sort_bytes = 0;
  sort(nullptr, sort_bytes, nullptr, nullptr, nullptr);

  const size_t index_bytes = aligned(size_t(N) * 4), sums_bytes = aligned(size_t(pieces * D) * 4);
  char* at = scratch(3 * index_bytes + 2 * sums_bytes + sort_bytes);
  const auto take = [&at](size_t bytes) { return std::exchange(at, at + bytes); };
  int* iota = reinterpret_cast<int*>(take(index_bytes));
  int* row = reinterpret_cast<int*>(take(index_bytes));
  int* token = reinterpret_cast<int*>(take(index_bytes));
  float* heads = reinterpret_cast<float*>(take(sums_bytes));
  float* tails = reinterpret_cast<float*>(take(sums_bytes));

  iota_kernel<<<unsigned((N + kThreads - 1) / kThreads), kThreads, 0, stream_>>>(iota, N);
  CUDA_CHECK(cudaGetLastError());
  sort(at, sort_bytes, reinterpret_cast<uint32_t*>(token), iota, row);
  dispatch(act_dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_width(D, {dw.to.data, dx.data}, [&](auto width) {
      constexpr int kVec = width();
      const int64_t vectors = D / kVec;
      const int threads = int(std::min<int64_t>(128, (vectors + 31) / 32 * 32));
      const dim3 blocks(unsigned(pieces), unsigned((vectors + threads - 1) / threads));
      embedding_pieces_kernel<T, kVec><<<blocks, threads, 0, stream_>>>(
          dw.to.ptr<float>(), heads, tails, dx.ptr<T>(), token, row, N, D, scale, DropMask(drop));
      CUDA_CHECK(cudaGetLastError());
      embedding_cut_runs_kernel<kVec>
          <<<blocks, threads, 0, stream_>>>(dw.to.ptr<float>(), heads, tails, token, N, D, scale);
      CUDA_CHECK(cudaGetLastError());
    });
  });
}

}  // namespace hgrn

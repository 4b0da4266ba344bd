// Embedding.  x[r] = dropout(s w[token[r]]);  dw[t] += s sum over rows r with token t of
// dropout'(dx[r]) x, dx (N,D) and w (V,D) f32 or bf16, tokens (N) i32, dw (V,D) f32.
//
// Backward gives equal bits in every run: row numbers are sorted by token (a stable sort, so rows
// of a token stay in order) and cut into pieces of kPiece. A piece adds the runs that lie within it
// to dw and leaves the sums of runs cut by its ends in `heads` and `tails`; the piece where a cut
// run starts then adds it up, piece by piece. Three launches, the latter two early (launch.cuh). A
// fresh dw is written once: the sort, which knows them, writes zeros for tokens that do not occur.
// Twin: kernels/cpu/embedding.cpp   Test: tests/ops/test_embedding.cpp
#include <algorithm>
#include <utility>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace hgrn {
namespace {

constexpr int kThreads = 256;
constexpr int kColumnThreads = 128;
constexpr int kPiece = 32;  // sorted rows; a lane each
constexpr int kSortThreads = 1024, kSortWarps = kSortThreads / 32;
constexpr int kSortBatch = 256;  // rows that a warp reads at once
constexpr int kMaxRange = 512;   // tokens a CTA of the sort; 64 KiB of counts

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

// A counting sort. CTA c owns the tokens c range .. (c+1) range - 1 and reads all N tokens, twice:
// it counts its own, and those of lower CTAs, after which its first place comes; then it places its
// rows. No CTA waits for another. A warp counts and places a share of the rows, in order, and the
// second time reads only those groups of 32 that it found a token of its own in.
// row, token (N): the row numbers by token, and their tokens. Where dw is given, its rows of tokens
// that do not occur become zero.
template <int kVec>
__global__ __launch_bounds__(kSortThreads) void embedding_sort_kernel(int* row, int* token,
                                                                      float* dw, const int* tokens,
                                                                      int64_t N, int V, int range,
                                                                      int64_t D) {
  constexpr int kAhead = kSortBatch / 32, kNone = 0x7fffffff;
  extern __shared__ int counts[];  // [kSortWarps][range]; then where the warp's next row goes
  // [kSortWarps][batches]: a bit for each group of a batch
  uint8_t* const found = reinterpret_cast<uint8_t*>(counts + kSortWarps * range);
  __shared__ int sums[kSortWarps];
  __shared__ unsigned absent[kMaxRange / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = int(blockIdx.x) * range;
  int* const own = counts + warp * range;
  for (int i = threadIdx.x; i < kSortWarps * range; i += kSortThreads) counts[i] = 0;
  __syncthreads();

  const int64_t share = (N + kSortThreads - 1) / kSortThreads * 32;
  const int64_t begin = warp * share, end = min(begin + share, N);
  uint8_t* const own_found = found + warp * ((share + kSortBatch - 1) / kSortBatch);
  const auto load_tokens = [&](int(&t)[kAhead], int64_t at, unsigned groups) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      t[k] = (groups >> k & 1) && at + 32 * k < end ? tokens[at + 32 * k] : kNone;
  };
  int lower = 0;
  for (int64_t base = begin, batch = 0; base < end; base += kSortBatch, ++batch) {
    int t[kAhead];
    load_tokens(t, base + lane, ~0u);
    unsigned groups = 0;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      lower += t[k] < first;
      if (unsigned(t[k] - first) >= unsigned(range)) continue;
      atomicAdd(own + t[k] - first, 1);
      groups |= 1u << k;
    }
    groups = __reduce_or_sync(kFullMask, groups);
    if (lane == 0) own_found[batch] = uint8_t(groups);
  }
  lower = block_sum<kSortThreads>(lower, sums);

  // Thread i: token first + i. Its rows of all warps, then the sum over the tokens before it.
  int total = 0;
  if (int(threadIdx.x) < range)
    for (int w = 0; w < kSortWarps; ++w) total += counts[w * range + threadIdx.x];
  int up_to = total;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int left = __shfl_up_sync(kFullMask, up_to, offset);
    if (lane >= offset) up_to += left;
  }
  if (lane == 31) sums[warp] = up_to;
  const unsigned none = __ballot_sync(kFullMask, total == 0);
  if (lane == 0 && warp < range / 32) absent[warp] = none;
  __syncthreads();
  int place = lower + up_to - total;
  for (int w = 0; w < warp; ++w) place += sums[w];
  if (int(threadIdx.x) < range)
    for (int w = 0; w < kSortWarps; ++w) {
      const int count = counts[w * range + threadIdx.x];
      counts[w * range + threadIdx.x] = place;
      place += count;
    }
  __syncthreads();

  for (int64_t base = begin, batch = 0; base < end; base += kSortBatch, ++batch) {
    const unsigned groups = own_found[batch];
    int t[kAhead];
    load_tokens(t, base + lane, groups);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (!(groups >> k & 1)) continue;
      const bool in = unsigned(t[k] - first) < unsigned(range);
      const unsigned lanes = __ballot_sync(kFullMask, in);
      if (in) {
        const unsigned equal = __match_any_sync(lanes, t[k]);
        const int earlier = __popc(equal & ((1u << lane) - 1));
        const int to = own[t[k] - first] + earlier;
        __syncwarp(lanes);
        if (earlier == 0) own[t[k] - first] = to + __popc(equal);
        row[to] = int(base + 32 * k + lane);
        token[to] = t[k];
      }
      __syncwarp();
    }
  }
  let_next_start();
  if (dw == nullptr) return;
  const float zeros[kVec] = {};
  for (int i = warp; i < range && first + i < V; i += kSortWarps)
    if (absent[i / 32] >> (i % 32) & 1)
      for (int64_t col = lane * kVec; col < D; col += 32 * kVec)
        store<kVec>(dw + int64_t(first + i) * D + col, zeros);
}

// What a row of dw holds before a run's sum comes in.
template <int kVec>
struct TableRow {
  Pack<float, kVec> before;
  __device__ __forceinline__ void load(const float* p, bool fresh) {
    const float zeros[kVec] = {};
    fresh ? before.pack(zeros) : before.load(p);
  }
  __device__ __forceinline__ void store_with(float* p, float scale, const float (&sum)[kVec]) {
    float v[kVec];
    before.unpack(v);
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = fmaf(scale, sum[i], v[i]);
    store<kVec>(p, v);
  }
};

// token, row (N): sorted. Piece blockIdx.x; columns from blockIdx.y. Rows of dx, and those of dw
// where a run ends, are loaded kAhead at a time.
template <class T, int kVec>
__global__ __launch_bounds__(kColumnThreads) void embedding_pieces_kernel(
    float* dw, float* heads, float* tails, const T* dx, const int* token, const int* row, int64_t N,
    int64_t D, float scale, bool fresh, DropMask mask) {
  static_assert(kPiece == 32);
  constexpr int kAhead = 4;
  wait_for_previous();
  const DropMask drop = mask.now();
  const int64_t col = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
  const int64_t begin = int64_t(blockIdx.x) * kPiece;
  const int count = int(min(N - begin, int64_t(kPiece))), lane = threadIdx.x % 32;

  // The masks have a bit a row. `ends`: a run ends with the row, or the piece does; of these `head`
  // ends a run that came from before and `tail` is in a run that goes on.
  int own_token = 0, own_row = 0;
  if (lane < count) own_token = token[begin + lane], own_row = row[begin + lane];
  const int next = begin + lane + 1 < N && lane < count ? token[begin + lane + 1] : -1;
  const int before = begin > 0 ? token[begin - 1] : -1;
  const unsigned changes = __ballot_sync(kFullMask, lane < count && next != own_token);
  const unsigned last = 1u << (count - 1), ends = changes | last;
  const bool from_before = before == __shfl_sync(kFullMask, own_token, 0);
  const unsigned head = from_before ? ends & (0u - ends) : 0;
  const unsigned tail = last & ~changes & ~head;

  float sum[kVec] = {};
#pragma unroll 1
  for (int at = 0; at < count; at += kAhead) {
    Pack<T, kVec> packs[kAhead];
    TableRow<kVec> table[kAhead];
    int rows[kAhead], tokens[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      rows[k] = __shfl_sync(kFullMask, own_row, at + k);
      tokens[k] = __shfl_sync(kFullMask, own_token, at + k);
      if (at + k >= count || col >= D) continue;
      packs[k].load(dx + int64_t(rows[k]) * D + col);
      if ((ends & ~head & ~tail) >> (at + k) & 1)
        table[k].load(dw + int64_t(tokens[k]) * D + col, fresh);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (at + k >= count || col >= D) continue;
      float v[kVec];
      packs[k].unpack(v);
      drop.apply(v, rows[k], col);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] += v[j];
      const unsigned bit = 1u << (at + k);
      if (!(ends & bit)) continue;
      if (head & bit)
        store<kVec>(heads + int64_t(blockIdx.x) * D + col, sum);
      else if (tail & bit)
        store<kVec>(tails + int64_t(blockIdx.x) * D + col, sum);
      else
        table[k].store_with(dw + int64_t(tokens[k]) * D + col, scale, sum);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] = 0;
    }
  }
}

template <int kVec>
__global__ __launch_bounds__(kColumnThreads) void embedding_cut_runs_kernel(
    float* dw, const float* heads, const float* tails, const int* token, int64_t N, int64_t D,
    float scale, bool fresh) {
  constexpr int kAhead = 8;
  wait_for_previous();
  const int64_t col = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
  const int64_t piece = blockIdx.x, begin = piece * kPiece, end = begin + kPiece;
  if (end >= N) return;
  const int t = token[end - 1];
  const bool cut = token[end] == t;
  const bool starts_before = token[begin] == t && begin > 0 && token[begin - 1] == t;
  if (!cut || starts_before) return;

  TableRow<kVec> table;
  float sum[kVec] = {};
  if (col < D) {
    table.load(dw + int64_t(t) * D + col, fresh);
    load<kVec>(sum, tails + piece * D + col);
  }
  for (int64_t q = piece + 1;; q += 32) {
    const int64_t at = (q + threadIdx.x % 32) * kPiece;
    const int found = __popc(__ballot_sync(kFullMask, at < N && token[at] == t));  // of 32 pieces
    for (int i = 0; i < found && col < D; i += kAhead) {
      Pack<float, kVec> packs[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (i + k < found) packs[k].load(heads + (q + i + k) * D + col);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (i + k >= found) continue;
        float v[kVec];
        packs[k].unpack(v);
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum[j] += v[j];
      }
    }
    if (found < 32) break;
  }
  if (col < D) table.store_with(dw + int64_t(t) * D + col, scale, sum);
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
  if (N == 0 || D == 0) {
    if (dw.fresh) zero(dw.to);
    return;
  }
  const int64_t V = dw.to.rows(), pieces = (N + kPiece - 1) / kPiece;
  const size_t index_bytes = aligned(size_t(N) * 4), sums_bytes = aligned(size_t(pieces * D) * 4);
  char* at = scratch(2 * index_bytes + 2 * sums_bytes);
  const auto take = [&at](size_t bytes) { return std::exchange(at, at + bytes); };
  int* row = reinterpret_cast<int*>(take(index_bytes));
  int* token = reinterpret_cast<int*>(take(index_bytes));
  float* heads = reinterpret_cast<float*>(take(sums_bytes));
  float* tails = reinterpret_cast<float*>(take(sums_bytes));

  // The more CTAs, the more often all tokens are read.
  const int range = int(std::min<int64_t>(kMaxRange, ((V + 63) / 64 + 31) / 32 * 32));
  const size_t batches =
      size_t((N + kSortThreads - 1) / kSortThreads * 32 + kSortBatch - 1) / kSortBatch;
  const size_t sort_bytes = kSortWarps * (size_t(range) * sizeof(int) + batches);
  const bool early = hopper_code(prop_.major);  // on any stream: nothing is read before the wait
  dispatch(act_dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_width(D, {dw.to.data, dx.data}, [&](auto width) {
      constexpr int kVec = width() == kWide ? 4 : 1;  // 16 bytes of dw: most of what moves
      const auto sort = embedding_sort_kernel<kVec>;
      CUDA_CHECK(
          cudaFuncSetAttribute(sort, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sort_bytes)));
      sort<<<unsigned((V + range - 1) / range), kSortThreads, sort_bytes, stream_>>>(
          row, token, dw.fresh ? dw.to.ptr<float>() : nullptr, tokens.ptr<int32_t>(), N, int(V),
          range, D);
      CUDA_CHECK(cudaGetLastError());
      const int64_t vectors = D / kVec, parts = (vectors + kColumnThreads - 1) / kColumnThreads;
      const dim3 threads(unsigned(((vectors + parts - 1) / parts + 31) / 32 * 32));
      const dim3 blocks{unsigned(pieces), unsigned(parts)};
      const auto add_pieces = embedding_pieces_kernel<T, kVec>;
      launch(add_pieces, blocks, threads, 0, stream_, early, dw.to.ptr<float>(), heads, tails,
             dx.ptr<T>(), token, row, N, D, scale, dw.fresh, DropMask(drop));
      const auto add_cut_runs = embedding_cut_runs_kernel<kVec>;
      launch(add_cut_runs, blocks, threads, 0, stream_, early, dw.to.ptr<float>(), heads, tails,
             token, N, D, scale, dw.fresh);
    });
  });
}

}  // namespace hgrn

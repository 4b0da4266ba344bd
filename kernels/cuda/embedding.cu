// Embedding.  x[r] = dropout(s w[token[r]]);  dw[t] += s sum over rows r with token t of
// dropout'(dx[r]) x, dx (N,D) and w (V,D) f32 or bf16, tokens (N) i32, dw (V,D) f32.
//
// Backward gives equal bits in every run: row numbers are sorted by token (a stable sort, so rows
// of a token stay in order) and cut into pieces of kPiece. The rows of a token are a run; the piece
// that it starts in sums it, in order, also beyond its end. Only a run that fills the next piece is
// summed in parts, each piece its own; the last to arrive adds them up in the order of the pieces.
// A fresh dw is written once: further CTAs write zeros for tokens that do not occur.
//
// The sort needs nothing but tokens, so that forward can do it ahead: its own CTAs start while
// those of the sort still run (launch.cuh).
// Twin: kernels/cpu/embedding.cpp   Test: tests/ops/test_embedding.cpp
#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "ops/scratch.h"

namespace hgrn {
namespace {

constexpr int kThreads = 256, kForwardBlocks = 4;       // of forward
constexpr int kColumnThreads = 128, kColumnBlocks = 7;  // the latter: what 72 registers allow
constexpr int kPiece = kEmbeddingPiece;                 // sorted rows; a lane each
constexpr int kSortThreads = 1024, kSortWarps = kSortThreads / 32;
constexpr int kSortBatch = 256;                         // rows that a warp reads at once
constexpr int64_t kMaxRange = kSortThreads;             // tokens a CTA of the sort, a thread each
constexpr int64_t kMostRows = 0x7fffffff - 2 * kPiece;  // numbered in 32 bits

// Where the parts of `order` lie (gpu_embedding_order in ops/scratch.h).
struct Order {
  int *row, *token;  // (N) the row numbers by token, and their tokens
  int* start;        // (V+1) the first of a token's rows; start[V] = N
  int* arrived;      // (pieces, embedding_column_parts(D)) of a run in parts; 0 between calls

  Order(int* data, int64_t N, int64_t V)
      : row(data), token(data + N), start(token + N), arrived(start + V + 1) {}
};

// Rows of a warp, how many of them it has on their way, and of each how many packs a lane. With
// dropout they share what the mask's key costs.
template <bool kDrop>
struct ForwardLayout {
  static constexpr int kRows = kDrop ? 4 : 1, kAtOnce = kDrop ? 2 : 1, kPacks = kDrop ? 2 : 4;
};

template <class T, int kVec, bool kDrop>
__global__ __launch_bounds__(kThreads, kForwardBlocks) void embedding_forward_kernel(
    T* x, const int* tokens, const T* w, int64_t N, int64_t D, float scale, DropMask mask) {
  // The sort, where it comes before, must be done when this kernel is: its last CTA waits.
  if (blockIdx.x == gridDim.x - 1) wait_for_previous();
  using Layout = ForwardLayout<kDrop>;
  constexpr int kAtOnce = Layout::kAtOnce, kPacks = Layout::kPacks, stride = 32 * kVec;
  const int64_t first =
      (int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32) * int64_t(Layout::kRows);
  if (first >= N) return;
  const int lane = threadIdx.x % 32;
  const int lane_token = lane < Layout::kRows && first + lane < N ? tokens[first + lane] : -1;
  const DropMask drop = mask.now();
#pragma unroll 1
  for (int from = 0; from < Layout::kRows; from += kAtOnce) {
    int token[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) token[r] = __shfl_sync(kFullMask, lane_token, from + r);
#pragma unroll 1
    for (int64_t at = lane * kVec; at < D; at += stride * kPacks) {
      Pack<T, kVec> packs[kAtOnce][kPacks];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r)
#pragma unroll
        for (int k = 0; k < kPacks; ++k)
          if (at + k * stride < D && token[r] >= 0)
            packs[r][k].load(w + int64_t(token[r]) * D + at + k * stride);
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r)
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
          const int64_t row = first + from + r, col = at + k * stride;
          if (col >= D || token[r] < 0) continue;
          float v[kVec];
          packs[r][k].unpack(v);
#pragma unroll
          for (int i = 0; i < kVec; ++i) v[i] *= scale;
          if constexpr (kDrop) drop.apply(v, row, col);
          store<kVec>(x + row * D + col, v);
        }
    }
  }
}

// A counting sort. CTA c owns the tokens c range .. (c+1) range - 1 and reads all N tokens, twice:
// it counts its own, and those of lower CTAs, after which its first place comes; then it places its
// rows. No CTA waits for another. A warp counts and places a share of the rows, in order, and the
// second time reads only those groups of 32 that it found a token of its own in.
__global__ __launch_bounds__(kSortThreads) void embedding_sort_kernel(Order order,
                                                                      const int* tokens, int64_t N,
                                                                      int V, int range,
                                                                      int64_t counters) {
  let_next_start();
  constexpr int kAhead = kSortBatch / 32, kNone = 0x7fffffff;
  extern __shared__ int counts[];  // [kSortWarps][range]; then where the warp's next row goes
  // [kSortWarps][batches]: a bit for each group of a batch
  uint8_t* const found = reinterpret_cast<uint8_t*>(counts + kSortWarps * range);
  __shared__ int sums[kSortWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = int(blockIdx.x) * range;
  int* const own = counts + warp * range;
  for (int i = threadIdx.x; i < kSortWarps * range; i += kSortThreads) counts[i] = 0;
  for (int64_t i = int64_t(blockIdx.x) * kSortThreads + threadIdx.x; i < counters;
       i += int64_t(gridDim.x) * kSortThreads)
    order.arrived[i] = 0;
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
  __syncthreads();
  int place = lower + up_to - total;
  for (int w = 0; w < warp; ++w) place += sums[w];
  if (int(threadIdx.x) < range && first + int(threadIdx.x) < V)
    order.start[first + threadIdx.x] = place;
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) order.start[V] = int(N);
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
        order.row[to] = int(base + 32 * k + lane);
        order.token[to] = t[k];
      }
      __syncwarp();
    }
  }
}

// What a row of dw holds before a run's sum comes in: nothing where it is fresh.
template <int kVec, bool kFresh>
struct TableRow {
  Pack<float, kVec> before;
  __device__ __forceinline__ void load(const float* p) {
    if constexpr (!kFresh) before.load(p);
  }
  __device__ __forceinline__ void store_with(float* p, float scale, const float (&sum)[kVec]) {
    float v[kVec] = {};
    if constexpr (!kFresh) before.unpack(v);
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = fmaf(scale, sum[i], v[i]);
    store<kVec>(p, v);
  }
};

// Of kPiece rows of the table those that no token has.
template <int kVec>
__device__ void write_zeros(float* dw, const int* start, int first, int V, int D, int col) {
  const int t = first + int(threadIdx.x % 32);
  unsigned absent = __ballot_sync(kFullMask, t < V && start[t] == start[t + 1]);
  if (col >= D) return;
  const float zeros[kVec] = {};
  for (; absent != 0; absent &= absent - 1)
    store<kVec>(dw + int64_t(first + __ffs(int(absent)) - 1) * D + col, zeros);
}

// The random bits of two rows at a lane's columns, by all lanes of a warp. Four columns are half of
// what a Philox call serves: the even lane draws the first row's, the odd one the second's, and
// each hands on the other's half.
template <int kVec>
class PairBits {
 public:
  __device__ __forceinline__ PairBits(const DropMask& drop, int row0, int row1, int col)
      : drop_(drop), row_{row0, row1}, col_(col) {
    static_assert(kVec == 1 || kVec == 4);
    if constexpr (kVec == 4) {
      if (drop.p == 0) return;
      const bool odd = threadIdx.x % 2 != 0;
      const Philox own = drop.bits(odd ? row1 : row0, col);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t mine = odd ? own.v[i + 2] : own.v[i];
        const uint32_t other = __shfl_xor_sync(kFullMask, odd ? own.v[i] : own.v[i + 2], 1);
        words_[0][i] = odd ? other : mine, words_[1][i] = odd ? mine : other;
      }
    }
  }
  __device__ __forceinline__ void apply(float (&v)[kVec], int i) const {
    if constexpr (kVec == 1)
      drop_.apply(v, row_[i], col_);
    else if (drop_.p != 0)
      drop_.apply(v, words_[i]);
  }

 private:
  const DropMask& drop_;
  const int row_[2], col_;
  uint32_t words_[2][2];
};

// By every warp that has left its part of the run of token t in `partial`.
template <int kVec, bool kFresh>
__device__ void finish_run(float* dw, const float* partial, const Order& order, int t, int D,
                           int column_part, int col, float scale) {
  constexpr int kAhead = 8;
  const int first = order.start[t] / kPiece, last = (order.start[t + 1] - 1) / kPiece;
  int* const arrived = order.arrived + int64_t(first) * embedding_column_parts(D) + column_part;
  __threadfence();  // the part is there before the arrival shows
  __syncwarp();
  int before = 0;
  if (threadIdx.x % 32 == 0) before = atomicAdd(arrived, 1);
  before = __shfl_sync(kFullMask, before, 0);
  if (before < last - first) return;
  if (threadIdx.x % 32 == 0) *arrived = 0;
  __threadfence();
  if (col >= D) return;
  TableRow<kVec, kFresh> table;
  table.load(dw + int64_t(t) * D + col);
  float sum[kVec];
  load<kVec>(sum, partial + (2 * int64_t(first) + 1) * D + col);
#pragma unroll 1
  for (int q = first + 1; q <= last; q += kAhead) {
    Pack<float, kVec> packs[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (q + k <= last) packs[k].load(partial + 2 * int64_t(q + k) * D + col);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (q + k > last) continue;
      float v[kVec];
      packs[k].unpack(v);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] += v[j];
    }
  }
  table.store_with(dw + int64_t(t) * D + col, scale, sum);
}

// A warp: piece blockIdx.x of the sorted rows, or, behind these, kPiece rows of the table for
// zeros; and 32 kVec columns. Rows of dx, and those of dw where a run ends, are loaded kAhead at a
// time. partial (pieces, 2, D): the sum of a run that came from the piece before and of one that
// goes on in the next, where these are summed in parts.
template <class T, int kVec, bool kFresh>
__global__ __launch_bounds__(kColumnThreads,
                             kColumnBlocks) void embedding_sums_kernel(float* dw, float* partial,
                                                                       Order order, const T* dx,
                                                                       int N, int V, int D,
                                                                       float scale, DropMask mask) {
  static_assert(kPiece == 32);
  constexpr int kAhead = kFresh && sizeof(T) == 2 ? 8 : 4;
  wait_for_previous();
  const int lane = threadIdx.x % 32;
  const int column_part = int(blockIdx.y * blockDim.x + threadIdx.x) / 32;
  const int col = (column_part * 32 + lane) * kVec;
  if (col - lane * kVec >= D) return;
  const int piece = int(blockIdx.x), pieces = (N - 1) / kPiece + 1;
  if constexpr (kFresh)
    if (piece >= pieces)
      return write_zeros<kVec>(dw, order.start, (piece - pieces) * kPiece, V, D, col);
  const DropMask drop = mask.now();

  // The sorted rows of this piece and of the next; token -1 behind the last one.
  const int begin = piece * kPiece, count = min(N - begin, kPiece);
  int token[2] = {-1, -1}, row[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = begin + i * kPiece + lane;
    if (at < N) token[i] = order.token[at], row[i] = order.row[at];
  }
  const int before = piece > 0 ? order.token[begin - 1] : -1;
  const int before_last_piece = piece > 1 ? order.token[begin - kPiece - 1] : -1;

  // A run is long, and summed in parts, if it fills the piece after the one it starts in. `start`
  // to `end` are the rows to sum; the masks have a bit a row: `ends`, a run ends with it, or its
  // part does; `head` and `tail`, a part does.
  const int first = __shfl_sync(kFullMask, token[0], 0);
  const int last = __shfl_sync(kFullMask, token[0], count - 1);
  const int after = __shfl_sync(kFullMask, token[1], 0);
  const int after_all = __shfl_sync(kFullMask, token[1], 31);
  const int right = __shfl_down_sync(kFullMask, token[0], 1);
  const unsigned changes =
      __ballot_sync(kFullMask, lane < count && token[0] != (lane < 31 ? right : after));
  const bool goes_on = last == after, filled = count == kPiece && first == last;
  const bool from_before = first == before;
  const bool long_head = from_before && (filled || first == before_last_piece);
  const bool starts_here = goes_on && !(filled && from_before);
  const bool long_tail = starts_here && last == after_all;
  const unsigned same = __ballot_sync(kFullMask, token[1] == last);
  const int beyond = starts_here && !long_tail ? __popc(same) : 0;
  const int start = from_before && !long_head ? __ffs(int(changes)) : 0, end = count + beyond;
  const uint64_t ends = changes | (goes_on ? uint64_t(1) << (kPiece - 1 + beyond) : 0);
  const uint64_t head = long_head ? ends & (0 - ends) : 0;
  const uint64_t tail = long_tail ? uint64_t(1) << (kPiece - 1) : 0;

  float sum[kVec] = {};
#pragma unroll 1
  for (int at = start; at < end; at += kAhead) {
    const unsigned ends_here = unsigned(ends >> at), parts_here = unsigned((head | tail) >> at);
    Pack<T, kVec> packs[kAhead];
    TableRow<kVec, kFresh> table[kAhead];
    int rows[kAhead], tokens[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const bool own = at + k < kPiece;
      rows[k] = __shfl_sync(kFullMask, own ? row[0] : row[1], at + k);
      tokens[k] = __shfl_sync(kFullMask, own ? token[0] : token[1], at + k);
      if (at + k >= end || col >= D) continue;
      packs[k].load(dx + int64_t(rows[k]) * D + col);
      if ((ends_here & ~parts_here) >> k & 1) table[k].load(dw + int64_t(tokens[k]) * D + col);
    }
#pragma unroll
    for (int pair = 0; pair < kAhead; pair += 2) {
      const PairBits<kVec> bits(drop, rows[pair], rows[pair + 1], col);
#pragma unroll
      for (int k = pair; k < pair + 2; ++k) {
        if (at + k >= end || col >= D) continue;
        float v[kVec];
        packs[k].unpack(v);
        bits.apply(v, k - pair);
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum[j] += v[j];
        if (!(ends_here >> k & 1)) continue;
        if (parts_here >> k & 1)
          store<kVec>(partial + (2 * int64_t(piece) + (tail >> (at + k) & 1)) * D + col, sum);
        else
          table[k].store_with(dw + int64_t(tokens[k]) * D + col, scale, sum);
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum[j] = 0;
      }
    }
  }
#pragma unroll 1
  for (int i = 0; i < 2; ++i)
    if (i == 0 ? long_head : long_tail)
      finish_run<kVec, kFresh>(dw, partial, order, i == 0 ? first : last, D, column_part, col,
                               scale);
}

// shared_bytes: that a CTA may have.
void sort_tokens(const Order& order, const int* tokens, int64_t N, int64_t V, int64_t D,
                 size_t shared_bytes, cudaStream_t stream) {
  const int64_t batches =
      ((N + kSortThreads - 1) / kSortThreads * 32 + kSortBatch - 1) / kSortBatch;
  // The more CTAs, the more often all tokens are read; the fewer, the longer is each at its counts,
  // which is more than the tokens take where there are few of those.
  constexpr size_t kStatic = kSortWarps * sizeof(int);
  const int64_t room =
      (int64_t((shared_bytes - kStatic) / kSortWarps) - batches) / int64_t(sizeof(int));
  const int64_t by_rows =
      std::max<int64_t>(512, N / 64);  // 800 gain at 65,536 rows, lose at 20,480
  const int range = int(std::min({kMaxRange, room, by_rows, (V + 63) / 64 + 31}) / 32 * 32);
  check(
      V > 0 && range > 0,
      "embedding: {} rows are more than a CTA's {} bytes of shared memory can sort (vocabulary of "
      "{}); take a smaller train.micro_batch",
      N, shared_bytes, V);
  const size_t bytes = kSortWarps * (size_t(range) * sizeof(int) + size_t(batches));
  CUDA_CHECK(cudaFuncSetAttribute(embedding_sort_kernel,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  embedding_sort_kernel<<<unsigned((V + range - 1) / range), kSortThreads, bytes, stream>>>(
      order, tokens, N, int(V), range, (N + kPiece - 1) / kPiece * embedding_column_parts(D));
  CUDA_CHECK(cudaGetLastError());
}

size_t aligned(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

}  // namespace

int64_t CudaOps::embedding_order_size(int64_t N, int64_t V, int64_t D) const {
  return gpu_embedding_order(N, V, D);
}

void CudaOps::embedding_forward(Tensor x, Tensor tokens, Tensor w, float scale, Dropout drop,
                                Tensor order) {
  const int64_t N = x.rows(), D = x.cols(), V = w.rows();
  check(tokens.numel() == N && w.cols() == D && N <= kMostRows &&
            (!order || order.numel() == gpu_embedding_order(N, V, D)),
        "embedding_forward: x {}, tokens {}, w {}, order {}", x.shape.str(), tokens.shape.str(),
        w.shape.str(), order.shape.str());
  if (N == 0 || D == 0) return;
  if (order)
    sort_tokens({order.ptr<int32_t>(), N, V}, tokens.ptr<int32_t>(), N, V, D,
                prop_.sharedMemPerBlockOptin, stream_);
  // With the sort before, which starts when all before it is done: nothing else is waited for.
  const bool early = order && hopper_code(prop_.major);
  dispatch(act_dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_width(D, {x.data, w.data}, [&](auto width) {
      const auto run = [&](auto drops) {
        constexpr int kRows = kThreads / 32 * ForwardLayout<drops()>::kRows;
        launch(embedding_forward_kernel<T, width(), drops()>,
               dim3(unsigned((N + kRows - 1) / kRows)), dim3(kThreads), 0, stream_, early,
               x.ptr<T>(), tokens.ptr<int32_t>(), w.ptr<T>(), N, D, scale, DropMask(drop));
      };
      drop.p > 0 ? run(std::true_type{}) : run(std::false_type{});
    });
  });
}

void CudaOps::embedding_backward(Grad dw, Tensor dx, Tensor tokens, float scale, Dropout drop,
                                 Tensor order) {
  const int64_t N = dx.rows(), D = dx.cols(), V = dw.to.rows();
  const int64_t order_size = gpu_embedding_order(N, V, D);
  check(tokens.numel() == N && dw.to.cols() == D && N <= kMostRows &&
            (!order || order.numel() == order_size),
        "embedding_backward: dw {}, dx {}, tokens {}, order {}", dw.to.shape.str(), dx.shape.str(),
        tokens.shape.str(), order.shape.str());
  if (N == 0 || D == 0) {
    if (dw.fresh) zero(dw.to);
    return;
  }
  const int64_t pieces = (N + kPiece - 1) / kPiece;
  const size_t order_bytes = order ? 0 : aligned(size_t(order_size) * sizeof(int));
  char* const at = scratch(order_bytes + size_t(2 * pieces * D) * sizeof(float));
  const Order sorted(order ? order.ptr<int32_t>() : reinterpret_cast<int*>(at), N, V);
  float* const partial = reinterpret_cast<float*>(at + order_bytes);
  if (!order)
    sort_tokens(sorted, tokens.ptr<int32_t>(), N, V, D, prop_.sharedMemPerBlockOptin, stream_);
  // After the sort, on any stream: nothing is read before the wait.
  const bool early = !order && hopper_code(prop_.major);
  dispatch(act_dtype_, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_width(D, {dw.to.data, dx.data}, [&](auto width) {
      constexpr int kVec = width() == kWide ? 4 : 1;  // 16 bytes of dw: most of what moves
      const int64_t vectors = D / kVec, parts = (vectors + kColumnThreads - 1) / kColumnThreads;
      const dim3 threads(unsigned(((vectors + parts - 1) / parts + 31) / 32 * 32));
      const auto run = [&](auto kernel, int64_t blocks) {
        launch(kernel, dim3(unsigned(blocks), unsigned(parts)), threads, 0, stream_, early,
               dw.to.ptr<float>(), partial, sorted, dx.ptr<T>(), int(N), int(V), int(D), scale,
               DropMask(drop));
      };
      if (dw.fresh)
        run(embedding_sums_kernel<T, kVec, true>, pieces + (V + kPiece - 1) / kPiece);
      else
        run(embedding_sums_kernel<T, kVec, false>, pieces);
    });
  });
}

}  // namespace hgrn

// Sampling by core/sampling.h: one CTA a row, one thread a contiguous piece of the vocabulary.
// Logits stay in memory: a row of 50,257 is 100 KB, which the L2 and L1 caches hold over the
// passes. The cuts of top-k and top-p are found a 4-bit digit of the key at a time: each thread
// has its own 16 bins in shared memory, so that nothing is atomic. All sums are of whole numbers.
// Twin: kernels/cpu/sample.cpp   Test: tests/ops/test_sample.cpp
#include "cuda/cuda_check.h"
#include "cuda/cuda_ops.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace hgrn {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBins = 16;
constexpr int kBinBytes = kBins * kThreads * int(sizeof(uint64_t));  // 64 KiB, dynamic

struct SampleArgs {
  int32_t* tokens;
  int32_t* history;  // may be null
  uint8_t* seen;     // may be null
  int32_t* step;
  const void* logits;
  int64_t B, ld, history_rows;
  int vocab;
  Sampling s;
};

// Kept are the tokens above `key` and the first `ties` of those at it.
struct Cut {
  uint32_t key = 0;
  uint64_t ties = UINT64_MAX;
};

__device__ __forceinline__ uint64_t warp_max(uint64_t v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const uint64_t o = __shfl_xor_sync(kFullMask, v, offset);
    v = o > v ? o : v;
  }
  return v;
}

// One thread's view of a row.
template <class T>
struct Row {
  const T* logits;
  const uint8_t* seen;
  int begin, end;
  float penalty;

  // f(id, key) in the order of ids.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    for (int at = begin; at < end; at += kWide) {
      float v[kWide];
      load<kWide>(v, logits + at);
      uint2 marks{0, 0};
      if (seen) marks = *reinterpret_cast<const uint2*>(seen + at);
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        const uint32_t mark = ((i < 4 ? marks.x : marks.y) >> (8 * (i % 4))) & 255u;
        if (mark) v[i] = sampling::penalised(v[i], penalty);
        if (at + i < end) f(at + i, sampling::key_of(v[i]));
      }
    }
  }
};

struct Shared {
  uint64_t sums[kWarps];
  uint64_t totals[kBins];
  uint64_t result;
  int token;
};

// Sum over the CTA, the same in all threads.
__device__ __forceinline__ uint64_t cta_sum(uint64_t v, Shared& sh) {
  return block_sum<kThreads>(v, sh.sums);
}

// Sum over the threads before this one.
__device__ __forceinline__ uint64_t cta_sum_before(uint64_t v, Shared& sh) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t inclusive = v;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t o = __shfl_up_sync(kFullMask, inclusive, offset);
    if (lane >= offset) inclusive += o;
  }
  if (lane == 31) sh.sums[warp] = inclusive;
  __syncthreads();
  uint64_t before = inclusive - v;
  for (int i = 0; i < warp; ++i) before += sh.sums[i];
  __syncthreads();
  return before;
}

// The first tokens in the order of keys whose amounts reach `need`. amount(key) > 0.
template <class T, class Amount>
__device__ Cut cut_at(const Row<T>& row, uint64_t need, uint64_t* bins, Shared& sh,
                      const Amount& amount) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t prefix = 0;
  uint64_t above = 0;
  for (int shift = 28; shift >= 0; shift -= 4) {
#pragma unroll
    for (int d = 0; d < kBins; ++d) bins[d * kThreads + threadIdx.x] = 0;
    row.each([&](int, uint32_t key) {
      if (shift == 28 || (key >> shift) >> 4 == prefix)
        bins[((key >> shift) & 15u) * kThreads + threadIdx.x] += amount(key);
    });
    __syncthreads();
    for (int d = warp; d < kBins; d += kWarps) {
      uint64_t sum = 0;
      for (int i = lane; i < kThreads; i += 32) sum += bins[d * kThreads + i];
      sum = warp_sum(sum);
      if (lane == 0) sh.totals[d] = sum;
    }
    __syncthreads();
    int digit = kBins - 1;
    while (digit > 0 && above + sh.totals[digit] < need) above += sh.totals[digit--];
    prefix = prefix << 4 | uint32_t(digit);
    __syncthreads();
  }
  const uint64_t each = amount(prefix) ? amount(prefix) : 1;
  return {prefix, (need - above + each - 1) / each};
}

// The weight of what a thread keeps; `ties_before` tokens at the cut lie in threads before it.
template <class T, class Weight>
__device__ uint64_t kept_mass(const Row<T>& row, const Cut& cut, Shared& sh, const Weight& weight,
                              uint64_t* ties_before) {
  uint64_t mass = 0, ties = 0;
  row.each([&](int, uint32_t key) {
    if (key > cut.key) mass += weight(key);
    ties += key == cut.key;
  });
  const uint64_t before = cta_sum_before(ties, sh);
  const uint64_t room = cut.ties > before ? cut.ties - before : 0;
  *ties_before = before;
  return mass + (ties < room ? ties : room) * weight(cut.key);
}

template <class T>
__global__ __launch_bounds__(kThreads) void sample_kernel(const SampleArgs a) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  uint64_t* const bins = reinterpret_cast<uint64_t*>(dynamic);
  __shared__ Shared sh;
  const int64_t b = blockIdx.x;
  const int piece = (a.vocab + kThreads * kWide - 1) / (kThreads * kWide) * kWide;
  Row<T> row;
  row.logits = static_cast<const T*>(a.logits) + b * a.ld;
  row.seen = a.seen ? a.seen + b * a.ld : nullptr;
  row.begin = min(int(threadIdx.x) * piece, a.vocab);
  row.end = min(row.begin + piece, a.vocab);
  row.penalty = a.s.repetition_penalty;

  // The largest key, of those the smallest id.
  uint64_t best = 0;
  row.each([&](int id, uint32_t key) {
    const uint64_t here = uint64_t(key) << 32 | (0xffffffffu - uint32_t(id));
    best = here > best ? here : best;
  });
  best = warp_max(best);
  if (threadIdx.x % 32 == 0) sh.sums[threadIdx.x / 32] = best;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) best = sh.sums[i] > best ? sh.sums[i] : best;
  const int likeliest = int(0xffffffffu - uint32_t(best));
  if (threadIdx.x == 0) sh.token = likeliest;
  __syncthreads();

  const int count = a.step[b];
  if (!a.s.greedy()) {
    const float top = sampling::of_key(uint32_t(best >> 32)), inverse = 1.0f / a.s.temperature;
    const auto weight = [&](uint32_t key) {
      return sampling::weight_of(sampling::of_key(key), top, inverse);
    };
    Cut cut;
    if (a.s.top_k > 0 && a.s.top_k < a.vocab)
      cut = cut_at(row, uint64_t(a.s.top_k), bins, sh, [](uint32_t) { return uint64_t(1); });
    uint64_t ties_before = 0;
    uint64_t mine = kept_mass(row, cut, sh, weight, &ties_before);
    uint64_t total = cta_sum(mine, sh);
    if (a.s.top_p < 1) {
      cut = cut_at(row, sampling::nucleus_mass(total, a.s.top_p), bins, sh, weight);
      mine = kept_mass(row, cut, sh, weight, &ties_before);
      total = cta_sum(mine, sh);
    }
    const uint64_t at = sampling::draw(total, a.s.seed, a.s.row0 + b, count);
    const uint64_t before = cta_sum_before(mine, sh);
    if (at >= before && at - before < mine) {  // in one thread alone
      uint64_t left = at - before, ties = ties_before;
      int token = -1;
      row.each([&](int id, uint32_t key) {
        if (token >= 0) return;
        if (!(key > cut.key || (key == cut.key && ties++ < cut.ties))) return;
        const uint64_t w = weight(key);
        if (left < w)
          token = id;
        else
          left -= w;
      });
      sh.token = token >= 0 ? token : likeliest;
    }
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  const int token = sh.token;
  a.tokens[b] = token;
  if (a.history) a.history[int64_t(count) % a.history_rows * a.B + b] = token;
  if (a.seen) a.seen[b * a.ld + token] = 1;
  a.step[b] = count + 1;
}

}  // namespace

void CudaOps::sample(Tensor tokens, Tensor history, Tensor seen, Tensor step, Tensor logits,
                     int64_t vocab, const Sampling& s) {
  const int64_t B = logits.rows(), ld = logits.cols();
  check(tokens.numel() == B && step.numel() == B && vocab > 0 && vocab <= ld && ld < (1 << 30) &&
            (!history || history.cols() == B) && (!seen || seen.numel() == logits.numel()),
        "sample: tokens {}, history {}, seen {}, step {}, logits {}, vocab {}", tokens.shape.str(),
        history.shape.str(), seen.shape.str(), step.shape.str(), logits.shape.str(), vocab);
  check(ld % kWide == 0 && reinterpret_cast<uintptr_t>(logits.data) % 16 == 0 &&
            reinterpret_cast<uintptr_t>(seen.data) % 8 == 0,
        "sample: rows of {} logits are not aligned to 16 bytes", ld);
  if (B == 0) return;
  SampleArgs a{};
  a.tokens = tokens.ptr<int32_t>();
  a.history = history ? history.ptr<int32_t>() : nullptr;
  a.history_rows = history ? history.rows() : 1;
  a.seen = seen ? seen.ptr<uint8_t>() : nullptr;
  a.step = step.ptr<int32_t>();
  a.logits = logits.data;
  a.B = B, a.ld = ld, a.vocab = int(vocab), a.s = s;
  dispatch(logits.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = sample_kernel<T>;
    CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBinBytes));
    kernel<<<unsigned(B), kThreads, kBinBytes, stream_>>>(a);
    CUDA_CHECK(cudaGetLastError());
  });
}

}  // namespace hgrn

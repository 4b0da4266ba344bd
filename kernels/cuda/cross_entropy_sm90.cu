// Cross-entropy with its gradient, in place, on Hopper: the mathematics of cross_entropy.cu for
// bf16 rows, as one stream through shared memory.
//
// One CTA an SM takes every gridDim-th row. A row comes and goes in chunks of 8 KiB through a ring
// of 28 slots, two rows of 50,304 columns: the copy engine loads the next row while the softmax
// runs over this one, and stores a chunk of the gradient as soon as it is computed.
//
//   16 warps   pass 1: the running softmax over the row's chunks, as they arrive
//              pass 2: the gradient into the chunk's own slot
//   1 thread   stores a chunk when pass 2 is through with it, then loads what comes 28 chunks later
//
// A thread reads and writes the same 16 bytes of each chunk in both passes: between them it waits
// for the row's sum alone. mbarriers a slot: full (the chunk is there), done (its gradient is).
// Twin: kernels/cpu/cross_entropy.cpp   Test: tests/ops/test_cross_entropy.cpp
#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // below sm_90 the kernel is empty, and nothing refers to its parts
#endif

#include <algorithm>

#include "cuda/bulk_copy.cuh"
#include "cuda/cross_entropy.cuh"
#include "cuda/cuda_check.h"
#include "cuda/mma.cuh"
#include "cuda/sm90.cuh"

namespace hgrn {
namespace {

constexpr int kWarps = 16, kWorkers = 32 * kWarps, kThreads = kWorkers + 32;
constexpr int kSlots = 28, kChunkBytes = 16 * kWorkers;
constexpr int kStoresBehind = 4;  // a slot is loaded again this many stores after its own
constexpr int kWorkerBarrier = 1;
// Byte offsets in shared memory.
constexpr int kFull = kSlots * kChunkBytes;        // mbarriers [slot]
constexpr int kDone = kFull + 8 * kSlots;          // mbarriers [slot]
constexpr int kSums = kDone + 8 * kSlots;          // [2 rows in turn][warp] OnlineSoftmax
constexpr int kAtTarget = kSums + 2 * 8 * kWarps;  // [2 rows in turn] float
constexpr int kBytes = kAtTarget + 2 * 4;

struct Args {
  float* nll;
  bf16* logits;
  const int* targets;
  int64_t Vp, V;
  int rows, chunks;  // chunks a row
  float scale;
};

// Position of a chunk in the ring, kept as it moves on.
struct Turn {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

// The chunks of this CTA's rows, one after the other.
struct Chunks {
  char* row;
  int64_t row_step;  // bytes
  uint32_t row_bytes;
  uint32_t at = 0;  // in the row
  __device__ __forceinline__ explicit Chunks(const Args& a)
      : row(reinterpret_cast<char*>(a.logits + int64_t(blockIdx.x) * a.Vp)),
        row_step(int64_t(gridDim.x) * a.Vp * int64_t(sizeof(bf16))),
        row_bytes(uint32_t(a.Vp * int64_t(sizeof(bf16)))) {}
  __device__ __forceinline__ char* address() const { return row + at; }
  __device__ __forceinline__ uint32_t bytes() const {
    return min(uint32_t(kChunkBytes), row_bytes - at);
  }
  __device__ __forceinline__ void next() {
    at += kChunkBytes;
    if (at >= row_bytes) at = 0, row += row_step;
  }
};

__device__ __forceinline__ void copy_thread(const Args& a, uint32_t smem) {
  const int my_rows = (a.rows - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
  const int total = my_rows * a.chunks;
  Chunks load(a), store(a);
  Turn to, from;
  int loaded = 0;
  const auto load_next = [&] {
    bulk_load(smem + to.slot * kChunkBytes, load.address(), load.bytes(),
              smem + kFull + 8 * to.slot);
    load.next(), to.next(), ++loaded;
  };
  while (loaded < min(total, kSlots)) load_next();
  for (int stored = 0; stored < total; ++stored) {
    mbarrier_wait(smem + kDone + 8 * from.slot, from.parity);
    bulk_store(store.address(), smem + from.slot * kChunkBytes, store.bytes());
    store.next(), from.next();
    wait_bulk_stores_read<kStoresBehind>();
    if (stored >= kStoresBehind && loaded < total) load_next();
  }
  wait_bulk_stores();
}

// The row's softmax out of its threads'. `sums` is written by this row alone.
__device__ __forceinline__ OnlineSoftmax row_softmax(OnlineSoftmax run, OnlineSoftmax* sums) {
  const auto merge = [](OnlineSoftmax own) {  // over the warp
    OnlineSoftmax all;
    all.m = own.m;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      all.m = fmaxf(all.m, __shfl_xor_sync(kFullMask, all.m, offset));
    all.s = warp_sum(own.s * exp2f((own.m - all.m) * kLog2e));
    return all;
  };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  run = merge(run);
  if (lane == 0) sums[warp] = run;
  barrier_sync(kWorkerBarrier, kWorkers);
  return merge(lane < kWarps ? sums[lane] : OnlineSoftmax{});
}

__device__ __forceinline__ void worker(const Args& a, unsigned char* smem_bytes) {
  const uint32_t smem = smem_address(smem_bytes);
  const int tid = threadIdx.x;
  auto* const sums = reinterpret_cast<OnlineSoftmax*>(smem_bytes + kSums);
  auto* const at_targets = reinterpret_cast<float*>(smem_bytes + kAtTarget);
  const auto own = [&](int slot) { return smem + slot * kChunkBytes + tid * 16; };
  Turn first;
  int turn = 0;
#pragma unroll 1
  for (int row = int(blockIdx.x); row < a.rows; row += int(gridDim.x), turn ^= 1) {
    const int target = a.targets[row];
    OnlineSoftmax run;
    Turn now = first;
#pragma unroll 2
    for (int chunk = 0; chunk < a.chunks; ++chunk, now.next()) {
      const int col = (chunk * kWorkers + tid) * 8;
      mbarrier_wait(smem + kFull + 8 * now.slot, now.parity);
      if (col >= a.Vp) continue;
      const uint4 raw = ld_shared4(own(now.slot));
      float v[8];
      Pack<bf16, 8>{raw}.unpack(v);
      if (target >= col && target < col + 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (col + i == target) at_targets[turn] = v[i];
      }
      follow(run, v, col, a.V);
    }
    const OnlineSoftmax total = row_softmax(run, sums + turn * kWarps);
    if (tid == 0) a.nll[row] = target < 0 ? 0.0f : logf(total.s) + (total.m - at_targets[turn]);

    const float share = a.scale / total.s;
    now = first;
#pragma unroll 2
    for (int chunk = 0; chunk < a.chunks; ++chunk, now.next()) {
      const int col = (chunk * kWorkers + tid) * 8;
      if (col < a.Vp) {
        const uint4 raw = ld_shared4(own(now.slot));
        Pack<bf16, 8> pack{raw};
        float v[8];
        pack.unpack(v);
        to_gradient(v, col, a.V, target, total.m, share, a.scale);
        pack.pack(v);
        st_shared(own(now.slot), target < 0 ? make_uint4(0, 0, 0, 0) : pack.raw);
      }
      fence_for_bulk_copy();
      mbarrier_arrive_warp(smem + kDone + 8 * now.slot);
    }
    first = now;
  }
}

__global__ __launch_bounds__(kThreads, 1) void cross_entropy_stream_kernel(const Args a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  const uint32_t smem = smem_address(smem_bytes);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      load_barrier_init(smem + kFull + 8 * slot);
      mbarrier_init(smem + kDone + 8 * slot, kWarps);
    }
    fence_for_bulk_copy();
  }
  __syncthreads();
  if (threadIdx.x < kWorkers)
    worker(a, smem_bytes);
  else if (threadIdx.x == kWorkers)
    copy_thread(a, smem);
#endif
}

}  // namespace

bool cross_entropy_sm90(float* nll, bf16* logits, const int* targets, int64_t rows, int64_t Vp,
                        int64_t V, float scale, int multiprocessors, size_t shared_bytes,
                        cudaStream_t stream) {
  const int64_t chunks = (Vp * int64_t(sizeof(bf16)) + kChunkBytes - 1) / kChunkBytes;
  // A row must be there whole before its first chunk leaves.
  if (Vp % 8 != 0 || reinterpret_cast<uintptr_t>(logits) % 16 != 0 ||
      chunks + kStoresBehind > kSlots || rows > INT32_MAX / chunks || shared_bytes < kBytes)
    return false;
  const Args a{nll, logits, targets, Vp, V, int(rows), int(chunks), scale};
  CUDA_CHECK(cudaFuncSetAttribute(cross_entropy_stream_kernel,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  cross_entropy_stream_kernel<<<unsigned(std::min<int64_t>(rows, multiprocessors)), kThreads,
                                kBytes, stream>>>(a);
  CUDA_CHECK(cudaGetLastError());
  return true;
}

}  // namespace hgrn

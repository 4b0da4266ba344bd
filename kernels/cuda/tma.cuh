// Tiles from global to shared memory by the copy engine (TMA, sm_90), and the mbarriers they
// complete on. Addresses are 32-bit shared ones (smem_address()). All functions are for one thread.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "cuda/cuda_check.h"

// 1: a wait of a second writes where it stands to WaitReport and stops the kernel.
#ifndef HGRN_BOUNDED_WAITS
#define HGRN_BOUNDED_WAITS 0
#endif

namespace hgrn {

constexpr bool kBoundedWaits = HGRN_BOUNDED_WAITS;

// Pinned host memory, readable after the kernel has stopped. Absent (null) in ordinary builds.
struct WaitReport {
  int stuck, block, thread, barrier, parity, tile, step;
};

// ---- mbarriers that count arrivals and bytes
__device__ __forceinline__ void mbarrier_init_arrivals(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and lets the phase wait for `bytes` more of copies as well.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// The same without arriving.
__device__ __forceinline__ void mbarrier_expect_more(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Whether the phase of this parity has ended; waits a while for it.
__device__ __forceinline__ bool mbarrier_try(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
// As mbarrier_wait() of sm90.cuh. `tile` and `step` are for the report.
__device__ __forceinline__ void mbarrier_await(uint32_t barrier, uint32_t parity,
                                               WaitReport* report, int tile, int step) {
  if constexpr (!kBoundedWaits) {
    while (!mbarrier_try(barrier, parity)) {
    }
  } else {
    const long long start = clock64();
    while (!mbarrier_try(barrier, parity)) {
      if (clock64() - start < 2'000'000'000LL) continue;
      if (report && atomicCAS(&report->stuck, 0, 1) == 0) {
        report->block = blockIdx.x, report->thread = threadIdx.x;
        report->barrier = barrier, report->parity = parity;
        report->tile = tile, report->step = step;
        __threadfence_system();
      }
      __nanosleep(1000000);  // so that the report gets out
      __trap();
    }
  }
}

// ---- copies. A box of the tensor goes to `dst`; its bytes count on `barrier`. What lies outside
// the tensor arrives as zeros and counts as well.
__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t dst, const CUtensorMap& map, uint32_t barrier,
                                         int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];" ::"r"(dst),
      "l"(&map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t dst, const CUtensorMap& map, uint32_t barrier,
                                         int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4, %5}], [%2];" ::"r"(dst),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
// `bytes` in a row; addresses and bytes are multiples of 16.
__device__ __forceinline__ void bulk_load(uint32_t dst, const void* src, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(dst),
      "l"(src), "r"(bytes), "r"(barrier)
      : "memory");
}

// ---- host: a map of a bf16 tensor whose boxes lie in shared memory in rows of 128 bytes, the
// 16-byte chunks of row r permuted by XOR with r % 8. sizes and box: innermost dimension first;
// strides in bytes, of all dimensions but the innermost. Sizes and addresses are multiples of 16.
inline CUtensorMap tma_map(const void* base, std::initializer_list<cuuint64_t> sizes,
                           std::initializer_list<cuuint64_t> strides,
                           std::initializer_list<cuuint32_t> box) {
  static const auto encode = [] {  // from the driver, so that nothing links to it
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000,
                                                cudaEnableDefault, &found));
#else
    CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found));
#endif
    check(f && found == cudaDriverEntryPointSuccess, Exit::failed,
          "the driver has no cuTensorMapEncodeTiled; CUDA 12.0 or newer is needed");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(f);
  }();
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult r = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, cuuint32_t(sizes.size()),
                            const_cast<void*>(base), sizes.begin(), strides.begin(), box.begin(),
                            steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(r == CUDA_SUCCESS, Exit::failed, "cuTensorMapEncodeTiled: error {} for {} x {} at {}",
        int(r), *sizes.begin(), *(sizes.begin() + 1), base);
  return map;
}

}  // namespace hgrn

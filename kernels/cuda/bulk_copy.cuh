// Copies of contiguous pieces between device and shared memory by the copy engine of sm_90
// (cp.async.bulk), without a thread's registers. Addresses and sizes are multiples of 16 bytes.
//
// A load completes on an mbarrier that was told how many bytes to expect. A store belongs to a
// group of the issuing thread, which alone can wait for it. Shared memory that ordinary
// instructions wrote or read is handed to the copy engine by fence_for_bulk_copy() in each of those
// threads, before the barrier that tells the issuing thread.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace hgrn {

// A barrier for loads: one arrival a phase, and its bytes.
__device__ __forceinline__ void load_barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void fence_for_bulk_copy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// A group of its own.
__device__ __forceinline__ void bulk_store(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until all but the kNewer newest stores have read their shared memory.
template <int kNewer>
__device__ __forceinline__ void wait_bulk_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kNewer) : "memory");
}
// Until all stores are done.
__device__ __forceinline__ void wait_bulk_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace hgrn

// What warps with different roles need to work beside each other: barriers that one side enters
// without waiting, and a split of the register file. Instructions of sm_90; setmaxnreg of sm_90a.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace hgrn {

// Named barriers 1..15 (0 is __syncthreads). `threads` counts both sides: those that sync and those
// that arrive. What a thread read and wrote before it arrived is done when the barrier completes.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// An mbarrier: 8 bytes of shared memory. A phase ends when `warps` warps have arrived; unlike at a
// named barrier, those who wait do not wait for each other. Every lane arrives for itself: one lane
// for its warp behind a __syncwarp() is no faster, and compute-sanitizer's racecheck takes what the
// other lanes did for races.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int warps) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(32 * warps)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_warp(uint32_t barrier) {
  __syncwarp();
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
  __syncwarp();
}
// The same, by each thread when the cp.asyncs it has issued so far have arrived; it does not wait.
// One more arrival of each thread of the warp, with which the mbarrier must have been made.
__device__ __forceinline__ void cp_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Waits for the end of the phase of this parity (the first phase has parity 0). Before the first
// phase has ended, parity 1 counts as ended.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra wait;\n"
      "done:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A flag in device memory that one CTA sets for another: what was written before store_release(),
// by threads that a barrier and __threadfence() order before it, is seen after wait_until_set().
__device__ __forceinline__ void store_release(uint32_t* flag, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(v) : "memory");
}
__device__ __forceinline__ void wait_until_set(const uint32_t* flag) {
  uint32_t v;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
  } while (v == 0);
}

// Registers a thread of this warpgroup may use from here on, where the card can change it. All four
// warps of a warpgroup execute it; the block's sum must fit the register file.
template <int kRegisters>
__device__ __forceinline__ void registers_grow() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void registers_shrink() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// What this thread wrote to shared memory with ordinary stores is seen by the copy engine and by
// wgmma after the next barrier. Behind a barrier: what others wrote before it is seen by the wgmmas
// that this thread takes part in, and comes before the copies that it starts, from here on.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace hgrn

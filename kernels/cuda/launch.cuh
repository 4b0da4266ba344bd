// Early launch (programmatic dependent launch, sm_90): a kernel's CTAs may start while those of the
// kernel before still run. Those of a decoding step, inside a recorded graph, load weights, which
// nothing in the graph writes, and then wait in wait_for_previous(). The later launches of one
// operation wait before all else: they only come sooner. The embedding's forward kernel runs beside
// the sort before it, of which it needs nothing; its last CTA waits, so that the two end in order.
// None comes early behind a product of cuBLASLt: a multiprocessor may be free while another CTA of
// that one's cluster still runs, and what such a kernel does at its end is not ours to know.
#pragma once
#include <cuda_runtime.h>

#include <utility>

#include "cuda/cuda_check.h"
#include "cuda/hopper.h"

namespace hgrn {

// After it, all writes of the kernel before are visible. The next kernel may start only now, so
// that what it reads before its own wait was finished two kernels ago, unless the kernel before let
// it start sooner (let_next_start()); then the wait alone orders them.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Lets a kernel that was launched with `early` take the places that this one's CTAs leave; what it
// does before its wait_for_previous() must need nothing of this one.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Before its wait a kernel may load weights in a recorded graph alone: elsewhere the kernel before
// may write them.
inline bool may_start_early(cudaStream_t stream, int compute_major) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return hopper_code(compute_major) && cudaStreamIsCapturing(stream, &status) == cudaSuccess &&
         status == cudaStreamCaptureStatusActive;
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 blocks, dim3 threads, size_t shared_bytes,
            cudaStream_t stream, bool early, A&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = early ? 1 : 0;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...));
}

}  // namespace hgrn

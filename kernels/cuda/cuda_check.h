// CUDA and cuBLAS errors become hgrn::Error: file, line, statement, the library's own text.
// After every launch: CUDA_CHECK(cudaGetLastError());
#pragma once
#include <cublasLt.h>
#include <cuda_runtime.h>

#include "core/check.h"

namespace hgrn {

inline void cuda_check(cudaError_t e, const char* file, int line, const char* what) {
  if (e == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();  // a non-sticky error must not be blamed on the next launch
  fail(Exit::failed, "{}:{}: {}: {} ({})", file, line, what, cudaGetErrorString(e),
       cudaGetErrorName(e));
}

inline void cublas_check(cublasStatus_t s, const char* file, int line, const char* what) {
  if (s == CUBLAS_STATUS_SUCCESS) [[likely]]
    return;
  fail(Exit::failed, "{}:{}: {}: {}", file, line, what, cublasLtGetStatusString(s));
}

}  // namespace hgrn

#define CUDA_CHECK(expr) ::hgrn::cuda_check((expr), __FILE__, __LINE__, #expr)
#define CUBLAS_CHECK(expr) ::hgrn::cublas_check((expr), __FILE__, __LINE__, #expr)

// The BLAS of the build, chosen by HGRN_BLAS. Its own functions and headers stay in blas.cpp.
#pragma once
#include <cstdint>
#include <string>

namespace hgrn::cpu {

constexpr int64_t kMaxBlas = INT32_MAX;  // of rows, columns and strides

// C (M,N) = op(A) op(B) + beta C, row-major, on the calling thread where it is one of several.
template <class T>  // float, double
struct BlasProduct {
  int64_t M, N, K;
  const T* A;  // (M,K), or (K,M) transposed
  int64_t lda;
  bool transpose_a;
  const T* B;  // (K,N), or (N,K) transposed
  int64_t ldb;
  bool transpose_b;
  T beta;
  T* C;
  int64_t ldc;
};
void multiply(const BlasProduct<float>& p);
void multiply(const BlasProduct<double>& p);

// Library, version and, of OpenBLAS, the kernels it took: "OpenBLAS 0.3.21 SkylakeX"; and what to
// do where those are for an older processor.
std::string blas_name();
// "", or that advice: an OpenBLAS takes kernels for SSE on an x86 newer than itself.
std::string kernel_advice(const std::string& core, bool has_avx2, bool has_avx512);

// Once before the first product: gemm.cpp shares the work of `threads` threads out.
void set_blas_threads(int threads);

}  // namespace hgrn::cpu

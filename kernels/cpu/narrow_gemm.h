// Matrix products of narrow linear layers, fp32, on one thread; gemm.cpp shares them out and picks
// the build of narrow_gemm.cpp for the processor. Plain pointers only (isa.h).
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace hgrn::cpu {

// C (M,N) = op(A) op(B) + beta C; beta is 0 or 1.
struct NarrowProduct {
  int64_t M, N, K;
  const float* A;  // (M,K), or (K,M) transposed
  int64_t lda;
  bool transpose_a;
  const float* B;  // (K,N), or (N,K) transposed
  int64_t ldb;
  bool transpose_b;
  float* C;
  int64_t ldc;
  bool add;  // beta
};

struct NarrowGemm {
  int64_t (*floats)(const NarrowProduct& p);  // workspace of a call, aligned to 64 bytes
  void (*multiply)(const NarrowProduct& p, float* work);
  bool fast;  // with 32 vector registers of 16 floats; with 16 of 8 a BLAS is as good
};

namespace isa_default {
NarrowGemm narrow_gemm();
}
namespace isa_v4 {
NarrowGemm narrow_gemm();
}

}  // namespace hgrn::cpu

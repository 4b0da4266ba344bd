// Matrix products of narrow linear layers, fp32, on one thread; gemm.cpp shares them out.
// narrow_choice.cpp picks the build for the processor. Plain pointers only (isa.h).
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace hgrn::cpu {

// C (M,N) = op(A) op(B) + plus
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
  const float* plus;  // rows ldc apart; C itself, another matrix, or null: 0
  // Called when rows [m, end) of C are done, at most kNarrowBand of them, while they are in cache;
  // may be null. With reuse, C is (kNarrowBand, N) only and holds the rows of one call.
  void (*after)(const void* context, int64_t m, int64_t end) = nullptr;
  const void* context = nullptr;
  bool reuse = false;
  // What `after` reads and writes beside C: rows (M, ahead_row) of two matrices, which are asked
  // for while the products run. May be null.
  const float* ahead[2] = {};
  int64_t ahead_row = 0;
};
constexpr int64_t kNarrowBand = 128;

struct NarrowGemm {
  int64_t (*floats)(const NarrowProduct& p);  // workspace of a call, aligned to 64 bytes
  void (*multiply)(const NarrowProduct& p, float* work);
  bool fast;             // with 32 vector registers of 16 floats; with 16 of 8 a BLAS is as good
  const char* how = "";  // for people, where it is no plain fp32: what multiplies
};

namespace isa_default {
NarrowGemm narrow_gemm();
}
namespace isa_v4 {
NarrowGemm narrow_gemm();
}
namespace isa_amx {  // amx_gemm.cpp
NarrowGemm narrow_gemm();
}
// Of amx_gemm.cpp; null where the build, the processor or the system has no AMX.
const NarrowGemm* amx_narrow_gemm();
// The fastest that there is; HGRN_AMX=0 in the environment leaves AMX out.
const NarrowGemm& best_narrow_gemm();

}  // namespace hgrn::cpu

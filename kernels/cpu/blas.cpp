// OpenBLAS or MKL: what cblas leaves to each library.   Test: tests/ops/test_linear.cpp
#include "cpu/blas.h"

#ifdef HGRN_BLAS_MKL
#include <mkl_cblas.h>
#include <mkl_service.h>
#else
#include <cblas.h>
#endif

#include <cstdlib>
#include <sstream>
#include <type_traits>

#include "core/check.h"

namespace hgrn::cpu {
namespace {

#ifdef HGRN_BLAS_MKL
using Size = MKL_INT;
#else
using Size = blasint;
#endif
static_assert(sizeof(Size) == 4, "kMaxBlas");

template <class T>
void product(const BlasProduct<T>& p) {
  const auto ta = p.transpose_a ? CblasTrans : CblasNoTrans,
             tb = p.transpose_b ? CblasTrans : CblasNoTrans;
  const auto gemm = [] {
    if constexpr (std::is_same_v<T, float>)
      return cblas_sgemm;
    else
      return cblas_dgemm;
  }();
  gemm(CblasRowMajor, ta, tb, Size(p.M), Size(p.N), Size(p.K), 1, p.A, Size(p.lda), p.B,
       Size(p.ldb), p.beta, p.C, Size(p.ldc));
}

}  // namespace

std::string kernel_advice(const std::string& core, bool has_avx2, bool has_avx512) {
  if (!has_avx2) return "";
  for (const char* old : {"Katmai", "Coppermine", "Northwood", "Prescott", "Banias", "Core2",
                          "Penryn", "Dunnington", "Nehalem", "Opteron", "Barcelona"})
    if (core.rfind(old, 0) == 0)
      return std::string(
                 " (does not know this processor, large products are several times slower: "
                 "set OPENBLAS_CORETYPE=") +
             (has_avx512 ? "SkylakeX)" : "Haswell)");
  return "";
}

void multiply(const BlasProduct<float>& p) {
  product(p);
}
void multiply(const BlasProduct<double>& p) {
  product(p);
}

#ifdef HGRN_BLAS_MKL

std::string blas_name() {  // "MKL 2026.2": what Intel calls it is major and update
  MKLVersion v;
  mkl_get_version(&v);
  return "MKL " + std::to_string(v.MajorVersion) + "." + std::to_string(v.UpdateVersion);
}

void set_blas_threads(int) {  // linked without threads of its own
  // Left alone, MKL lets the bits of a product depend on where its operands lie.
  static const bool fixed =
      std::getenv("MKL_CBWR") || mkl_cbwr_set(MKL_CBWR_AUTO) == MKL_CBWR_SUCCESS;
  check(fixed, "MKL does not promise equal bits; set MKL_CBWR=AUTO in the environment");
}

#else

std::string blas_name() {  // "OpenBLAS 0.3.21 SkylakeX"
  std::istringstream config(openblas_get_config());
  std::string name, version;
  config >> name >> version;
  const std::string core = openblas_get_corename();
  std::string advice;
#if defined(__x86_64__)
  advice = kernel_advice(core, __builtin_cpu_supports("avx2"), __builtin_cpu_supports("avx512f"));
#endif
  return name + " " + version + " " + core + advice;
}

void set_blas_threads(int threads) {
  // The OpenMP build runs single inside a parallel region. The build with a thread pool of its own
  // must be told.
  openblas_set_num_threads(openblas_get_parallel() == OPENBLAS_THREAD ? 1 : threads);
}

#endif

}  // namespace hgrn::cpu

#include "glu_gemm_time.h"

#include <cstdio>
#include <functional>

#include "cuda/glu_gemm.h"
#include "glu_gemm_reference.cuh"

namespace hgrn::glu_cases {
namespace {

double median_us(const std::function<void()>& f, int repeats = 30) {
  cudaEvent_t from, to;
  CUDA_CHECK(cudaEventCreate(&from));
  CUDA_CHECK(cudaEventCreate(&to));
  std::vector<float> ms;
  for (int i = 0; i < repeats + 3; ++i) {
    CUDA_CHECK(cudaEventRecord(from));
    f();
    CUDA_CHECK(cudaEventRecord(to));
    CUDA_CHECK(cudaEventSynchronize(to));
    float t;
    CUDA_CHECK(cudaEventElapsedTime(&t, from, to));
    if (i >= 3) ms.push_back(t);
  }
  cudaEventDestroy(from), cudaEventDestroy(to);
  std::nth_element(ms.begin(), ms.begin() + ms.size() / 2, ms.end());
  return 1e3 * ms[ms.size() / 2];
}

// Every buffer but the weights is larger than L2.
void time_case(cublasHandle_t handle, const Case& c, const glu_gemm::Options& options) {
  Data in(c);
  Memory memory;
  bf16* const gu = filled(memory, c.N * 2 * c.F, 2, 7);
  bf16* const dgu = memory.take<bf16>(c.N * 2 * c.F);
  bf16* const h = memory.take<bf16>(c.N * c.F);
  const double tile = double(c.N) * c.F;
  struct Row {
    const char* name;
    double flops, bytes;  // bytes of the elementwise operands that the fused form cannot avoid
    double gemm, glu, fused;
  } rows[3] = {{"forward", 4 * tile * c.D, 6 * tile, 0, 0, 0},
               {"backward", 2 * tile * c.D, 8 * tile, 0, 0, 0},
               {"and h", 2 * tile * c.D, 10 * tile, 0, 0, 0}};
  rows[0].gemm =
      median_us([&] { product(handle, gu, CUDA_R_16BF, in.x, in.w, c.N, 2 * c.F, c.D, false); });
  rows[0].glu = median_us([&] { glu<false>(h, nullptr, gu, c); });
  rows[1].gemm =
      median_us([&] { product(handle, h, CUDA_R_16BF, in.dy, in.down, c.N, c.F, c.D, true); });
  rows[1].glu = median_us([&] { glu<true>(dgu, h, gu, c); });
  rows[0].fused = median_us([&] {
    glu_gemm::forward(h, gu, in.x, in.w, in.bias, c.N, c.F, c.D, c.act, options, nullptr);
  });
  rows[2].gemm = rows[1].gemm, rows[2].glu = rows[1].glu;
  for (Row* r : {&rows[1], &rows[2]})
    r->fused = median_us([&] {
      glu_gemm::backward(dgu, r == &rows[2] ? h : nullptr, nullptr, in.dy, gu, in.down, c.N, c.F,
                         c.D, c.act, options, nullptr);
    });
  for (const Row& r : rows) {
    const double apart = r.gemm + r.glu;
    std::printf(
        "%-6s %-8s | %6.1f + %6.1f = %7.1f us (product %3.0f TFLOP/s) | %7.1f us %4.0f TFLOP/s "
        "%5.2f TB/s | %+7.1f us\n",
        c.name, r.name, r.gemm, r.glu, apart, r.flops / r.gemm / 1e6, r.fused,
        r.flops / r.fused / 1e6, (r.bytes + 2.0 * c.N * c.D) / r.fused / 1e6, r.fused - apart);
  }
  std::fflush(stdout);
}

}  // namespace

void time_models(cublasHandle_t handle, const glu_gemm::Options& options) {
  std::printf("model  pass     | cuBLAS + elementwise | fused | difference\n");
  for (const Case& c : kModels) time_case(handle, c, options);
}

}  // namespace hgrn::glu_cases

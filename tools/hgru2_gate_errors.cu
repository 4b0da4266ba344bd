#include "hgru2_gate_errors.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "cuda/cuda_check.h"
#include "cuda/hgru2_gates.cuh"
#include "hgru2_buffer.h"

namespace hgrn::hgru2_cases {
namespace {

constexpr int kPatterns = 1 << 16, kThreads = 256;

// out[i]: the gate of the bf16 with bits i and its derivative. A bf16 has neighbours of other sizes
// in its pair.
__global__ void gate_kernel(float2* out, Act act) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x, other = i ^ 0x8001u;
  float value[2], slope[2];
  hgru2::query_gate<false, true>(value, slope, i | other << 16, act, 1.0f);
  out[i] = make_float2(value[0], slope[0]);
}

struct Worst {
  double error = 0, share = 0;  // share: of the bar
  float x = 0;
  void meet(double got, double want, double bar, float at) {
    const double off = std::fabs(got - want);
    if (!(off <= error)) error = off, x = at;  // NaN counts
    share = std::isnan(off) ? HUGE_VAL : std::max(share, off / bar);
  }
};

}  // namespace

int gate_errors() {
  constexpr float kLargest = 80;
  constexpr double kBar = 0x1p-12;
  int missed = 0;
  for (const Act act : {Act::sigmoid, Act::silu}) {
    const Buffer out(DType::f32, {kPatterns, 2});
    gate_kernel<<<kPatterns / kThreads, kThreads>>>(static_cast<float2*>(out.t.data), act);
    CUDA_CHECK(cudaGetLastError());
    const std::vector<double> got = out.get();
    Worst value, slope;
    for (int i = 0; i < kPatterns; ++i) {
      const float x = bf16_to_float(uint16_t(i));
      if (!(std::fabs(x) <= kLargest)) continue;
      const double s = 1 / (1 + std::exp(-double(x))), rest = 1 / (1 + std::exp(double(x)));
      const bool silu = act == Act::silu;
      const double bar = silu ? kBar * (1 + std::fabs(double(x))) : kBar;
      value.meet(got[2 * i], silu ? x * s : s, bar, x);
      slope.meet(got[2 * i + 1], silu ? s + x * s * rest : s * rest, bar, x);
    }
    const char* const name = act == Act::silu ? "silu" : "sigmoid";
    for (const auto& [what, w] : {std::pair{"", value}, std::pair{"'", slope}}) {
      missed += w.share > 1;
      std::printf(
          "%s%s of every bf16 up to %.0f: off by %.3g at most, at %g, %.3f of the bar  %s\n", name,
          what, kLargest, w.error, w.x, w.share, w.share > 1 ? "FAILED" : "ok");
    }
    for (const float x : {-4.0f, -8.0f, -12.0f, -20.0f}) {
      const double s = 1 / (1 + std::exp(-double(x))), want = act == Act::silu ? x * s : s;
      const double made = got[2 * size_t(float_to_bf16(x))];
      std::printf("  %s(%g) = %.6g, off by %.2g of it\n", name, x, made,
                  std::fabs(made / want - 1));
    }
  }
  return missed;
}

}  // namespace hgrn::hgru2_cases

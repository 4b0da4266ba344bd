// Shapes where measurements (`hgrn-bench gemm --sustain 300`, `--every`; docs/benchmarks.md) found
// another algorithm at least 1.5 % faster than the heuristic's first, without a pause: a step runs
// at the card's limit of power, where what counts is a product's energy, not how fast it is alone;
// and where whole steps, with and without it, say the same (at 150M five more made them slower).
// Test: tests/ops/test_linear.cpp
#include "cuda/gemm_choices.h"

#include <cstdlib>

namespace hgrn {
namespace {

// m, n, k as in GemmCall, zero for any size; the rows of the batch (n, or k of a weight gradient)
// are at least kManyRows, since fewer may want smaller tiles.
constexpr int64_t kManyRows = 4096;
struct Line {
  int major;  // compute capability
  int64_t m, n, k;
  bool transpose_a, transpose_b;
  DType out;
  GemmChoice choice;
};
constexpr Line forward_choice(int64_t out, int64_t in, cublasLtMatmulTile_t tile,
                              cublasLtClusterShape_t cluster, int swizzle = kAnySwizzle) {
  return {9, out, 0, in, true, false, DType::bf16, {tile, cluster, swizzle}};
}
constexpr Line input_gradient_choice(int64_t out, int64_t in, cublasLtMatmulTile_t tile,
                                     cublasLtClusterShape_t cluster, int swizzle = kAnySwizzle) {
  return {9, in, 0, out, false, false, DType::bf16, {tile, cluster, swizzle}};
}
constexpr Line weight_gradient_choice(int64_t out, int64_t in, cublasLtMatmulTile_t tile,
                                      cublasLtClusterShape_t cluster, int swizzle = kAnySwizzle) {
  return {9, in, out, 0, false, true, DType::f32, {tile, cluster, swizzle}};
}
constexpr auto k64x256 = CUBLASLT_MATMUL_TILE_64x256, k144x128 = CUBLASLT_MATMUL_TILE_144x128,
               k176x256 = CUBLASLT_MATMUL_TILE_176x256, k344x128 = CUBLASLT_MATMUL_TILE_344x128,
               k256x96 = CUBLASLT_MATMUL_TILE_256x96, k128x128 = CUBLASLT_MATMUL_TILE_128x128,
               k128x160 = CUBLASLT_MATMUL_TILE_128x160, k176x128 = CUBLASLT_MATMUL_TILE_176x128,
               k128x256 = CUBLASLT_MATMUL_TILE_128x256, k256x128 = CUBLASLT_MATMUL_TILE_256x128;
constexpr auto k2x1 = CUBLASLT_CLUSTER_SHAPE_2x1x1, k1x2 = CUBLASLT_CLUSTER_SHAPE_1x2x1,
               k2x4 = CUBLASLT_CLUSTER_SHAPE_2x4x1, k4x2 = CUBLASLT_CLUSTER_SHAPE_4x2x1;
constexpr Line kLines[] = {
    // 44M: D = 512, F = 1365 stored as 1408
    forward_choice(1536, 512, k128x160, k2x1),
    forward_choice(512, 512, k128x160, k2x1),
    forward_choice(512, 1408, k128x160, k2x1),
    forward_choice(50304, 512, k176x128, k2x1),
    forward_choice(50304, 512, k176x128, k1x2),
    input_gradient_choice(512, 512, k128x160, k2x1),
    weight_gradient_choice(512, 1408, k64x256, k2x1),
    // 150M: D = 768, F = 2048
    forward_choice(2304, 768, k144x128, k1x2),
    forward_choice(2304, 768, k128x160, k1x2),
    forward_choice(768, 768, k128x160, k1x2),
    forward_choice(4096, 768, k128x160, k2x1),
    forward_choice(768, 2048, k128x128, k2x1),
    forward_choice(50304, 768, k176x128, k1x2),
    input_gradient_choice(2304, 768, k128x160, k1x2),
    input_gradient_choice(768, 768, k128x160, k1x2),
    input_gradient_choice(4096, 768, k128x160, k1x2),
    weight_gradient_choice(50304, 768, k128x256, k2x1),
    // 385M: D = 1024, F = 2816
    forward_choice(3072, 1024, k128x160, k2x1, 0),
    forward_choice(3072, 1024, k176x128, k1x2),
    forward_choice(1024, 1024, k128x128, k2x1),
    forward_choice(5632, 1024, k176x128, k1x2),
    forward_choice(1024, 2816, k256x128, k2x4),
    forward_choice(50304, 1024, k176x128, k1x2),
    input_gradient_choice(3072, 1024, k128x160, k2x1, 0),
    input_gradient_choice(3072, 1024, k256x128, k2x4),
    input_gradient_choice(1024, 1024, k128x128, k2x1),
    input_gradient_choice(5632, 1024, k128x160, k2x1),
    weight_gradient_choice(3072, 1024, k256x96, k1x2),
    weight_gradient_choice(5632, 1024, k344x128, k1x2, 1),
    weight_gradient_choice(5632, 1024, k128x128, k1x2),
    // 1B: D = 2048, F = 5632
    forward_choice(6144, 2048, k128x160, k2x1),
    forward_choice(2048, 2048, k128x160, k2x1),
    forward_choice(11264, 2048, k128x160, k2x1),
    forward_choice(2048, 5632, k256x128, k1x2),
    forward_choice(50304, 2048, k176x128, k1x2),
    input_gradient_choice(6144, 2048, k256x128, k1x2, 0),
    input_gradient_choice(6144, 2048, k128x256, k2x1),
    input_gradient_choice(2048, 2048, k256x128, k1x2),
    input_gradient_choice(11264, 2048, k256x128, k1x2),
    weight_gradient_choice(6144, 2048, k256x128, k1x2),
    weight_gradient_choice(11264, 2048, k344x128, k1x2, 0),
    weight_gradient_choice(11264, 2048, k256x128, k2x4),
    weight_gradient_choice(2048, 5632, k176x256, k1x2, 1),
    // 2.9B: D = 2560, F = 6912
    forward_choice(7680, 2560, k128x256, k2x1),
    forward_choice(50304, 2560, k176x128, k1x2),
    weight_gradient_choice(7680, 2560, k128x160, k4x2),
};

bool fits(const Line& line, int major, const GemmCall& g) {
  const auto same = [](int64_t want, int64_t size) { return want == 0 || want == size; };
  return line.major == major && same(line.m, g.m) && same(line.n, g.n) && same(line.k, g.k) &&
         (g.transpose_b ? g.k : g.n) >= kManyRows && line.transpose_a == g.transpose_a &&
         line.transpose_b == g.transpose_b && g.in == DType::bf16 && line.out == g.out;
}

}  // namespace

std::vector<GemmChoice> gemm_choices(int compute_major, const GemmCall& call) {
  static const bool on = [] {
    const char* set = std::getenv("HGRN_GEMM_CHOICES");
    return !set || *set != '0';
  }();
  std::vector<GemmChoice> out;
  for (const Line& line : kLines)
    if (on && fits(line, compute_major, call)) out.push_back(line.choice);
  return out;
}

}  // namespace hgrn

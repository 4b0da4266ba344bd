// Developer tool: holds the products with the GLU in them (kernels/cuda/glu_gemm_sm90.cu) to a
// reference and times them beside cuBLAS and an elementwise pass. Needs a Hopper.
//
//   cmake --build --preset release --target glu_gemm_check
//   build/glu_gemm_check [small] [accuracy] [time]     default: all three
//
// small: shapes at the edges of tiles, against sums in double. accuracy: the shapes of the models,
// against cuBLAS with its result in fp32. For each: every element, and the sums of the gradient's
// columns; the rows behind the last are left alone; twice the same bits; where elements are wrong,
// which. time: medians of 30 launches.
// With -DHGRN_BOUNDED_WAITS=1 a wait that does not end is reported after a second or so.
// Exits 1 if anything is wrong.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/cuda_check.h"
#include "cuda/glu_gemm.h"
#include "cuda/tma.cuh"
#include "glu_gemm_reference.cuh"
#include "glu_gemm_time.h"

using namespace hgrn;
using namespace hgrn::glu_cases;

namespace {

constexpr Case kSmall[] = {
    {"one tile", 128, 128, 192, Act::identity, false},
    {"one tile", 128, 256, 256, Act::silu, false},
    {"two CTAs", 256, 256, 256, Act::silu, true},
    {"ragged rows", 300, 256, 256, Act::silu, false},
    {"one row more", 129, 128, 192, Act::sigmoid, true},
    {"ragged depth", 300, 256, 200, Act::silu, true},
    {"ragged width", 300, 136, 264, Act::silu, true},
    {"few rows", 9, 520, 192, Act::silu, false},
    {"several tiles a CTA", 5000, 1416, 328, Act::silu, true},
    {"several bands", 6100, 264, 192, Act::identity, true},
    {"fewer steps than stages", 9000, 1416, 72, Act::silu, true},
};
// ---- references
// out (rows, columns) = a (rows, depth) b, in double: b (columns, depth), or (depth, columns).
__global__ void product_kernel(float* out, const bf16* a, const bf16* b, int64_t rows,
                               int64_t columns, int64_t depth, bool b_rows_are_depth) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= rows * columns) return;
  const int64_t r = i / columns, c = i % columns;
  double sum = 0;
  for (int64_t k = 0; k < depth; ++k)
    sum += double(__bfloat162float(a[r * depth + k])) *
           double(__bfloat162float(b[b_rows_are_depth ? k * columns + c : c * depth + k]));
  out[i] = float(sum);
}

__global__ void round_kernel(bf16* to, const float* from, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x)
    to[i] = __float2bfloat16_rn(from[i]);
}

// ---- comparison
struct Wrong {
  int64_t row, column;
  float got, want;
};
struct Findings {
  unsigned long long wrong, inexact;
  unsigned by_row[16], by_column[64];  // row % 128 in eights, column % 512 in eights
  Wrong first[8];
};

// got within relative |want| + absolute of want; want is fp32 (+ bias of the column) or bf16.
__global__ void compare_kernel(Findings* f, const bf16* got, const float* want32,
                               const bf16* want16, const bf16* bias, int64_t rows, int64_t columns,
                               float relative, float absolute) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < rows * columns;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t r = i / columns, c = i % columns;
    float want = want32 ? want32[i] : __bfloat162float(want16[i]);
    if (bias) want += __bfloat162float(bias[c]);
    const float value = __bfloat162float(got[i]);
    if (value != __bfloat162float(__float2bfloat16_rn(want))) atomicAdd(&f->inexact, 1ull);
    if (fabsf(value - want) <= relative * fabsf(want) + absolute) continue;  // false for NaN
    const unsigned long long n = atomicAdd(&f->wrong, 1ull);
    atomicAdd(&f->by_row[r % 128 / 8], 1u);
    atomicAdd(&f->by_column[c % 512 / 8], 1u);
    if (n < 8) f->first[n] = {r, c, value, want};
  }
}
__global__ void differ_kernel(unsigned long long* count, const uint16_t* a, const uint16_t* b,
                              int64_t n) {  // b null: where a is not 0xffff
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x)
    if (a[i] != (b ? b[i] : 0xffff)) atomicAdd(count, 1ull);
}

struct ColumnSum {
  double got, want, bar;
};
// The sums of the columns of `sums` (sum_rows, columns) beside those of dgu (rows, columns).
// The former are of dg and du before they are rounded, the latter of what was stored: each element
// is off by up to 2^-8 of itself, half of a bf16's last place. Of few rows, 2^-8 of all magnitudes
// is the bar. Of many it would not notice that a row of `sums` is missing, nor need it be so far:
// elements are rounded up as often as down, and a sum of independent errors of at most a passes
// 7 sqrt(sum a^2) once in 2e10 columns (Hoeffding). A row of `sums` has fewer than 64 elements
// added in fp32, each time within 2^-24 of their magnitudes.
__global__ void column_sums_kernel(ColumnSum* out, const float* sums, int64_t sum_rows,
                                   const bf16* dgu, int64_t rows, int64_t columns) {
  const int64_t c = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (c >= columns) return;
  double got = 0, want = 0, magnitudes = 0, squares = 0;
  for (int64_t r = 0; r < sum_rows; ++r) got += double(sums[r * columns + c]);
  for (int64_t r = 0; r < rows; ++r) {
    const double v = double(__bfloat162float(dgu[r * columns + c]));
    want += v, magnitudes += fabs(v), squares += v * v;
  }
  const double rounding = 0x1p-8 * fmin(magnitudes, 7 * sqrt(squares));
  out[c] = {got, want, rounding + 0x1p-18 * magnitudes + 1e-30};
}

struct Checker {
  Findings* device = nullptr;
  unsigned long long* count = nullptr;
  int failures = 0;
  Checker() {
    CUDA_CHECK(cudaMalloc(&device, sizeof(Findings)));
    CUDA_CHECK(cudaMalloc(&count, sizeof *count));
  }

  void compare(const Case& c, const char* what, const bf16* got, const float* want32,
               const bf16* want16, const bf16* bias, int64_t columns, float relative,
               float absolute) {
    CUDA_CHECK(cudaMemset(device, 0, sizeof(Findings)));
    compare_kernel<<<2048, 256>>>(device, got, want32, want16, bias, c.N, columns, relative,
                                  absolute);
    Findings f;
    CUDA_CHECK(cudaMemcpy(&f, device, sizeof f, cudaMemcpyDeviceToHost));
    std::printf("  %-6s %10llu of %10lld wrong, %8llu not the nearest bf16  %s\n", what, f.wrong,
                (long long)(c.N * columns), f.inexact, f.wrong ? "WRONG" : "ok");
    if (!f.wrong) return;
    ++failures;
    for (int i = 0; i < int(std::min<unsigned long long>(8, f.wrong)); ++i)
      std::printf("    row %lld column %lld: %g, not %g\n", (long long)f.first[i].row,
                  (long long)f.first[i].column, double(f.first[i].got), double(f.first[i].want));
    std::printf("    row %% 128 in eights:   ");
    for (unsigned n : f.by_row) std::printf(" %u", n);
    std::printf("\n    column %% 512 in eights:");
    for (unsigned n : f.by_column) std::printf(" %u", n);
    std::printf("\n");
  }
  void column_sums(const Case& c, const char* what, const float* sums, const bf16* dgu) {
    const int64_t columns = 2 * c.F;
    Memory memory;
    ColumnSum* const on_card = memory.take<ColumnSum>(columns);
    column_sums_kernel<<<unsigned((columns + 63) / 64), 64>>>(
        on_card, sums, glu_gemm::column_sum_rows(c.N), dgu, c.N, columns);
    CUDA_CHECK(cudaGetLastError());
    std::vector<ColumnSum> all(static_cast<size_t>(columns));
    CUDA_CHECK(cudaMemcpy(all.data(), on_card, all.size() * sizeof all[0], cudaMemcpyDeviceToHost));
    std::vector<size_t> wrong;
    double most = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      const double off = std::fabs(all[i].got - all[i].want);
      most = std::max(most, off / all[i].bar);
      if (!(off <= all[i].bar)) wrong.push_back(i);  // NaN, too
    }
    std::printf("  %-6s %10zu of %10zu wrong, at most %.3f of the bar  %s\n", what, wrong.size(),
                all.size(), most, wrong.empty() ? "ok" : "WRONG");
    if (wrong.empty()) return;
    ++failures;
    for (size_t i = 0; i < std::min<size_t>(8, wrong.size()); ++i) {
      const ColumnSum& column = all[wrong[i]];
      std::printf("    column %zu: %g, not %g within %g\n", wrong[i], column.got, column.want,
                  column.bar);
    }
  }
  void differ(const char* what, const void* a, const void* b, int64_t n) {
    CUDA_CHECK(cudaMemset(count, 0, sizeof *count));
    differ_kernel<<<1024, 256>>>(count, static_cast<const uint16_t*>(a),
                                 static_cast<const uint16_t*>(b), n);
    unsigned long long host;
    CUDA_CHECK(cudaMemcpy(&host, count, sizeof host, cudaMemcpyDeviceToHost));
    if (!host) return;
    ++failures;
    std::printf("  %s: %llu elements  WRONG\n", what, host);
  }
};

// ---- cases
constexpr int64_t kBehind = 64;  // rows behind the last, which must be left alone

glu_gemm::Options g_options;

// Backward with the sums of the gradient's columns, in both of its kernels: what it makes of them,
// and that dgu and h are those of backward without them, which are given.
void check_sums(Checker& checker, const Case& c, const Data& in, const bf16* gu, const bf16* h,
                const bf16* dgu) {
  const int64_t columns = 2 * c.F, sum_rows = glu_gemm::column_sum_rows(c.N);
  const int64_t rows = c.N + kBehind;
  Memory memory;
  bf16* const dgu_out = memory.take<bf16>(rows * columns);
  bf16* const h_out = memory.take<bf16>(rows * c.F);
  float* sums[2];
  for (float*& s : sums) s = memory.take<float>((sum_rows + kBehind) * columns);
  for (const bool again : {false, true}) {
    for (float* s : sums) {
      CUDA_CHECK(cudaMemset(s, 0xff, size_t((sum_rows + kBehind) * columns) * sizeof *s));
      CUDA_CHECK(cudaMemset(dgu_out, 0xff, size_t(rows * columns) * sizeof *dgu_out));
      CUDA_CHECK(cudaMemset(h_out, 0xff, size_t(rows * c.F) * sizeof *h_out));
      glu_gemm::backward(dgu_out, again ? h_out : nullptr, s, in.dy, gu, in.down, c.N, c.F, c.D,
                         c.act, g_options, nullptr);
      CUDA_CHECK(cudaDeviceSynchronize());
      checker.differ("dgu with sums", dgu_out, dgu, c.N * columns);
      checker.differ("dgu with sums, behind the last row", dgu_out + c.N * columns, nullptr,
                     kBehind * columns);
      if (again) checker.differ("h with sums", h_out, h, c.N * c.F);
      if (again)
        checker.differ("h with sums, behind the last row", h_out + c.N * c.F, nullptr,
                       kBehind * c.F);
      checker.differ("sums behind the last row", s + sum_rows * columns, nullptr,
                     2 * kBehind * columns);
    }
    checker.column_sums(c, again ? "sums,h" : "sums", sums[0], dgu);
    checker.differ("sums, two runs", sums[0], sums[1], 2 * sum_rows * columns);
  }
}

void check_case(Checker& checker, cublasHandle_t handle, const Case& c, bool by_cublas) {
  std::printf("%s: N=%lld F=%lld D=%lld act=%d%s\n", c.name, (long long)c.N, (long long)c.F,
              (long long)c.D, int(c.act), c.bias ? " bias" : "");
  std::fflush(stdout);
  const int64_t rows = c.N + kBehind, F = c.F;
  Data in(c);
  Memory memory;
  float* const want = memory.take<float>(c.N * 2 * F);
  const auto reference = [&](const bf16* a, const bf16* b, int64_t columns, bool depth_rows) {
    if (by_cublas) return product(handle, want, CUDA_R_32F, a, b, c.N, columns, c.D, depth_rows);
    product_kernel<<<unsigned((c.N * columns + 255) / 256), 256>>>(want, a, b, c.N, columns, c.D,
                                                                   depth_rows);
    CUDA_CHECK(cudaGetLastError());
  };
  bf16 *gu[2], *h[2], *dgu[2];
  for (int i = 0; i < 2; ++i) {
    gu[i] = memory.take<bf16>(rows * 2 * F), dgu[i] = memory.take<bf16>(rows * 2 * F);
    h[i] = memory.take<bf16>(rows * F);
    CUDA_CHECK(cudaMemset(gu[i], 0xff, size_t(rows * 2 * F * 2)));
    CUDA_CHECK(cudaMemset(dgu[i], 0xff, size_t(rows * 2 * F * 2)));
    CUDA_CHECK(cudaMemset(h[i], 0xff, size_t(rows * F * 2)));
  }
  bf16* const elementwise = memory.take<bf16>(c.N * 2 * F);

  for (int i = 0; i < 2; ++i)
    glu_gemm::forward(h[i], gu[i], in.x, in.w, in.bias, c.N, F, c.D, c.act, g_options, nullptr);
  CUDA_CHECK(cudaDeviceSynchronize());
  reference(in.x, in.w, 2 * F, false);
  checker.compare(c, "g, u", gu[0], want, nullptr, in.bias, 2 * F, 0.0040f, 1e-4f);
  glu<false>(elementwise, nullptr, gu[0], c);
  checker.compare(c, "h", h[0], nullptr, elementwise, nullptr, F, 0.0079f, 1e-30f);
  checker.differ("gu, two runs", gu[0], gu[1], c.N * 2 * F);
  checker.differ("h, two runs", h[0], h[1], c.N * F);
  checker.differ("gu behind the last row", gu[0] + c.N * 2 * F, nullptr, kBehind * 2 * F);
  checker.differ("h behind the last row", h[0] + c.N * F, nullptr, kBehind * F);

  // The gradient at the reference's g and u, so that it is tested alone.
  bf16* const gu_in = gu[1];
  fill_kernel<<<1024, 256>>>(gu_in, c.N * 2 * F, 2.0f, 6);
  reference(in.dy, in.down, F, true);
  bf16* const dh = h[1];
  round_kernel<<<1024, 256>>>(dh, want, c.N * F);
  glu<true>(elementwise, dh, gu_in, c);
  const auto backward = [&](bf16* dgu_out, bf16* h_out, const bf16* at) {
    glu_gemm::backward(dgu_out, h_out, nullptr, in.dy, at, in.down, c.N, F, c.D, c.act, g_options,
                       nullptr);
  };
  for (bf16* out : dgu) backward(out, nullptr, gu_in);
  CUDA_CHECK(cudaDeviceSynchronize());
  // dh of the two may round to different neighbours.
  checker.compare(c, "dg, du", dgu[0], nullptr, elementwise, nullptr, 2 * F, 0.0160f, 1e-4f);
  checker.differ("dgu, two runs", dgu[0], dgu[1], c.N * 2 * F);
  checker.differ("dgu behind the last row", dgu[0] + c.N * 2 * F, nullptr, kBehind * 2 * F);

  // h again, at forward's own g and u: its bits, and the same gradient.
  CUDA_CHECK(cudaMemset(h[1], 0xff, size_t(rows * F * 2)));
  backward(dgu[0], nullptr, gu[0]);
  backward(dgu[1], h[1], gu[0]);
  CUDA_CHECK(cudaDeviceSynchronize());
  checker.differ("h again", h[0], h[1], c.N * F);
  checker.differ("h again, behind the last row", h[1] + c.N * F, nullptr, kBehind * F);
  checker.differ("dgu with h again", dgu[0], dgu[1], c.N * 2 * F);
  check_sums(checker, c, in, gu[0], h[0], dgu[0]);
}

}  // namespace

int main(int argc, char** argv) {
  bool small = argc < 2, accuracy = argc < 2, time = argc < 2;
  for (int i = 1; i < argc; ++i) {
    small |= !std::strcmp(argv[i], "small");
    accuracy |= !std::strcmp(argv[i], "accuracy");
    time |= !std::strcmp(argv[i], "time");
  }
  WaitReport* report = nullptr;
  try {
    cudaDeviceProp card;
    CUDA_CHECK(cudaGetDeviceProperties(&card, 0));
    check(card.major == 9, "these kernels are for compute capability 9.0; this is {}.{}",
          card.major, card.minor);
    std::printf("%s, %d SMs%s\n", card.name, card.multiProcessorCount,
                kBoundedWaits ? ", bounded waits" : "");
    g_options.sms = card.multiProcessorCount;
    if (kBoundedWaits) {
      CUDA_CHECK(cudaHostAlloc(&report, sizeof *report, cudaHostAllocMapped));
      *report = {};
      g_options.report = report;
    }
    cublasHandle_t handle;
    cublas(cublasCreate(&handle));
    Checker checker;
    if (small)
      for (const Case& c : kSmall) check_case(checker, handle, c, false);
    if (accuracy)
      for (const Case& c : kModels) check_case(checker, handle, c, true);
    if (time) time_models(handle, g_options);
    cublasDestroy(handle);
    std::printf(checker.failures ? "%d checks FAILED\n" : "all is well\n", checker.failures);
    return checker.failures ? 1 : 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    if (report && report->stuck)
      std::fprintf(stderr,
                   "stuck: block %d thread %d, barrier at %#x of parity %d, tile %d, step %d "
                   "(-1: before leaving a tile, -2: the GLU)\n",
                   report->block, report->thread, report->barrier, report->parity, report->tile,
                   report->step);
    return 1;
  }
}

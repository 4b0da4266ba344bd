// out (cols) += the column sums of partial (rows, cols), fp32: the last stage of sums over rows
// that the CTAs of another kernel share (norm gains, biases, HGRU2's lower bounds). A fixed order:
// equal calls give equal bits. Twin: none (the CPU's sums are in one piece)   Tests:
// tests/ops/test_norm.cpp, test_linear.cpp, tools/hgru2_check.cu
#include "cuda/partial_rows.h"

#include "cuda/launch.cuh"

namespace hgrn {
namespace {

// A CTA takes 8 columns, one 32-byte sector of a row: 128 groups of 8 threads take the rows in
// turn, then their sums are added in order. Narrow, so that a few hundred columns fill the card.
constexpr int kPartialCols = 8, kPartialRows = 128;

__global__ __launch_bounds__(kPartialCols* kPartialRows) void add_partial_rows_kernel(
    float* out, const float* partial, int64_t rows, int64_t cols, bool fresh) {
  wait_for_previous();
  __shared__ float sums[kPartialRows][kPartialCols];
  const int lane = threadIdx.x % kPartialCols, group = threadIdx.x / kPartialCols;
  const int64_t col = int64_t(blockIdx.x) * kPartialCols + lane;
  // Rows of a batch are on their way together, also in a short last one: the usual number of rows,
  // a few for each CTA of the kernel before, makes one batch.
  constexpr int kAhead = 8;
  float total = 0;
  const int64_t step = kPartialRows * cols;
  const float* from = partial + group * cols + col;
#pragma unroll 1
  for (int64_t row = group; row < rows && col < cols; row += kAhead * kPartialRows) {
    float v[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k, from += step)
      v[k] = row + k * kPartialRows < rows ? *from : 0.0f;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) total += v[k];
  }
  sums[group][lane] = total;
  __syncthreads();
  for (int half = kPartialRows / 2; half > 0; half /= 2) {
    if (group < half) sums[group][lane] += sums[group + half][lane];
    __syncthreads();
  }
  if (group == 0 && col < cols) out[col] = (fresh ? 0.0f : out[col]) + sums[0][lane];
}

}  // namespace

void add_partial_rows(float* out, const float* partial, int64_t rows, int64_t cols, bool fresh,
                      bool early, cudaStream_t stream) {
  if (cols == 0) return;
  const unsigned blocks = unsigned((cols + kPartialCols - 1) / kPartialCols);
  launch(add_partial_rows_kernel, dim3(blocks), dim3(kPartialCols * kPartialRows), 0, stream, early,
         out, partial, rows, cols, fresh);
}

}  // namespace hgrn

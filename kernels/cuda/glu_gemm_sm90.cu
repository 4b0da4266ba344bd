// The two products of the GLU on Hopper with the GLU in them, bf16 with fp32 sums.
//   forward   gu (N,2F) = [g|u] = x (N,D) w (2F,D)^T + b, h (N,F) = a(g) u
//   backward  dh (N,F) = dy (N,D) w (D,F), dg = dh u a'(g), du = dh a(g); dh itself is not written,
//             but on demand h, for a caller that did not keep it, and what a bias of gu takes: sums
//             of dg and du over the rows that a warp has in a tile
// g, u and dh are rounded to bf16 before the GLU, so that its results are those of glu.cu.
//
// A persistent CTA an SM computes tiles of 128 rows and 256 columns: forward 128 of the gate and
// the same 128 of up, backward 256 of dh. Twelve warps of three roles:
//
//   copy    one thread of warp 0: tiles of 64 deep of both operands into a ring of three stages, by
//           TMA
//   GLU     warps 1..3: take a finished tile from shared memory, do the elementwise part, and read
//           and write global memory in whole lines. All of it lies beside the next tile's products.
//   product two warpgroups of 64 rows each: accumulators in registers, all 256 columns. At the end
//           of a tile they leave it, rounded, in shared memory, and go on with the next.
//
// Twelve warps leave each thread 168 registers: 128 of an accumulator and 40 to work with. Sixteen
// would leave 128, for which wgmma does not compile, even where setmaxnreg moves registers later.
//
// mbarriers: full, empty (a stage), out_full, out_empty (a product warpgroup's half of the tile),
// bias_empty (the bias of a tile; two tiles' lie there in turn).
// Tiles go to CTAs in a fixed order: sums do not depend on time. Clusters of two CTAs that share
// the weights' tile by multicast were slower: each then waits for the other's products as well.
//
// Shared memory, all in rows of 128 bytes with the swizzle of wgmma.cuh:
//   stage: left [128 rows][64 k]; right, forward [128 gate, 128 up][64 k], backward
//          [4 blocks of 64 columns][64 k][64 columns]
//   out:   [2 groups][4 blocks of 64 columns][64 rows][64 columns]
// Twin: the composition in src/ops/ops.cpp   Test: tests/ops/test_glu_linear.cpp,
// tools/glu_gemm_check.cu
#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // below sm_90 the kernel is empty, and nothing refers to its parts
#endif

#include "cuda/glu_gemm.h"

#include <algorithm>

#include "cuda/cuda_check.h"
#include "cuda/glu_gemm_glu.cuh"
#include "cuda/hopper.h"

namespace hgrn::glu_gemm {
namespace {

using namespace roles;

// ---- copy
template <bool kBackward, bool kHasBias>
__device__ __forceinline__ void copy_thread(const CUtensorMap& left, const CUtensorMap& right,
                                            const Call& call, uint32_t smem) {
  tma_prefetch_map(left);
  tma_prefetch_map(right);
  Tiles<kBackward> tiles(call);
  Ring ring;
  for (int turn = 0; tiles.valid(); tiles.next(), ++turn) {
    const Tile tile = tiles.tile();
    for (int k = 0; k < call.steps; ++k, ring.next()) {
      mbarrier_await(smem + kEmpty + ring.stage * 8, ring.parity ^ 1, call.report, tiles.index, k);
      const uint32_t full = smem + kFull + ring.stage * 8;
      const uint32_t to = smem + ring.stage * kStageBytes;
      if (kHasBias && k == 0)  // over the bias of two tiles ago
        mbarrier_await(smem + kBiasEmpty + (turn & 1) * 8, (turn >> 1 & 1) ^ 1, call.report,
                       tiles.index, k);
      const int bias_columns = kHasBias && k == 0 ? min(kColumns / 2, call.F - tile.column) : 0;
      mbarrier_expect(full, kStageBytes + 4 * bias_columns);
      tma_load(to, left, full, k * kDepth, int(tile.row));
      if constexpr (kBackward) {
#pragma unroll
        for (int i = 0; i < kColumns / 64; ++i)
          tma_load(to + kLeftBytes + i * kBlock, right, full, tile.column + i * 64, k * kDepth);
      } else {
#pragma unroll
        for (int part = 0; part < 2; ++part)  // gate, up
          tma_load(to + kLeftBytes + part * 2 * kBlock, right, full, k * kDepth, tile.column, part);
      }
      if constexpr (kHasBias)
        if (k == 0) {
          const uint32_t bias_to = smem + kBias + (turn & 1) * kColumns * 2;
          const bf16* const bias = call.bias + tile.column;
          bulk_load(bias_to, bias, 2 * bias_columns, full);
          bulk_load(bias_to + kColumns, bias + call.F, 2 * bias_columns, full);
        }
    }
  }
}

// ---- product
// Rounds the accumulator of a group to bf16 and leaves it in shared memory.
template <bool kHasBias>
__device__ __forceinline__ void leave_tile(float (&acc)[128], uint32_t out, uint32_t bias) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const uint32_t row = out + (16 * warp + (lane & 15)) * 128;
#pragma unroll
  for (int i = 0; i < kColumns / 16; ++i) {  // 16 columns: two chunks of 16 bytes a row
    if constexpr (kHasBias)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t b;
        asm volatile("ld.shared.b32 %0, [%1];"
                     : "=r"(b)
                     : "r"(bias + (2 * i + j) * 16 + (lane & 3) * 4)
                     : "memory");
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          acc[8 * i + 4 * j + 2 * r] += low_bf16(b);
          acc[8 * i + 4 * j + 2 * r + 1] += high_bf16(b);
        }
      }
    uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) packed[j] = pack_bf16(acc[8 * i + 2 * j], acc[8 * i + 2 * j + 1]);
    const int chunk = (2 * (i % 4) + (lane >> 4)) ^ (lane & 7);
    stmatrix(row + i / 4 * kBlock + chunk * 16, packed);
  }
}

template <bool kBackward, bool kHasBias>
__device__ __forceinline__ void product_group(const Call& call, uint32_t smem, int group) {
  const auto release = [&](int stage) {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(smem + kEmpty + stage * 8);
  };
  Tiles<kBackward> tiles(call);
  Ring ring;
  uint32_t out_parity = 1;
  for (int turn = 0; tiles.valid(); tiles.next(), ++turn) {
    float acc[128];
    int before = 0;
    for (int k = 0; k < call.steps; ++k) {
      mbarrier_await(smem + kFull + ring.stage * 8, ring.parity, call.report, tiles.index, k);
      const uint32_t at = smem + ring.stage * kStageBytes;
      const uint64_t a = wgmma_rows_of_k(at + group * kBlock);
      const uint64_t b = kBackward ? wgmma_rows_of_outer(at + kLeftBytes, kBlock)
                                   : wgmma_rows_of_k(at + kLeftBytes);
      constexpr uint64_t kStepB = kBackward ? kColumnStep : kRowStep;
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kDepth / 16; ++i)
        wgmma_m64n256<kBackward>(acc, a + i * kRowStep, b + i * kStepB, k > 0 || i > 0);
      wgmma_commit();
      if (k > 0) {
        wgmma_wait<1>();
        release(before);
      }
      before = ring.stage;
      ring.next();
    }
    wgmma_wait<0>();
    wgmma_settle(acc);
    release(before);
    mbarrier_await(smem + kOutEmpty + group * 8, out_parity, call.report, tiles.index, -1);
    out_parity ^= 1;
    leave_tile<kHasBias>(acc, smem + kOut + group * kOutGroup,
                         smem + kBias + (turn & 1) * kColumns * 2);
    if constexpr (kHasBias) mbarrier_arrive_warp(smem + kBiasEmpty + (turn & 1) * 8);
    mbarrier_arrive_warp(smem + kOutFull + group * 8);
  }
}

// ---- all of them
// kOption: forward, there is a bias; backward, h is wanted again. kSums: backward, sums are wanted.
template <bool kBackward, Act kAct, bool kOption, bool kSums>
__global__ __launch_bounds__(kThreads,
                             1) void glu_gemm_kernel(const __grid_constant__ CUtensorMap left,
                                                     const __grid_constant__ CUtensorMap right,
                                                     const Call call) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr bool kHasBias = !kBackward && kOption;
  extern __shared__ unsigned char bytes[];
  const uint32_t smem = (smem_address(bytes) + 1023) & ~1023u;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init_arrivals(smem + kFull + i * 8, 1);
      mbarrier_init_arrivals(smem + kEmpty + i * 8, kGroups * kGroupThreads / 32);  // a warp each
    }
    for (int i = 0; i < kGroups; ++i) {
      mbarrier_init(smem + kOutFull + i * 8, kGroupThreads / 32);
      mbarrier_init(smem + kOutEmpty + i * 8, kGluWarps);
    }
    for (int i = 0; i < 2; ++i)
      mbarrier_init(smem + kBiasEmpty + i * 8, kGroups * kGroupThreads / 32);
    mbarrier_init_fence();
  }
  __syncthreads();

  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  if (warp > kGluWarps) {
    product_group<kBackward, kHasBias>(call, smem, warp / 4 - 1);
  } else if (warp > 0) {
    if constexpr (kBackward)
      glu_backward_warp<kAct, kOption, kSums>(call, smem, warp - 1);
    else
      glu_forward_warp<kAct>(call, smem, warp - 1);
  } else if (threadIdx.x == 0) {
    copy_thread<kBackward, kHasBias>(left, right, call, smem);
  }
#endif
}

template <bool kBackward, Act kAct, bool kOption, bool kSums>
void launch_kernel(Call call, const CUtensorMap& left, const CUtensorMap& right,
                   const Options& options, cudaStream_t stream) {
  const auto kernel = glu_gemm_kernel<kBackward, kAct, kOption, kSums>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  CUDA_CHECK(allowed);
  constexpr int kWide = Tiles<kBackward>::kWide;
  call.row_blocks = int((call.N + kRows - 1) / kRows);
  call.column_tiles = (call.F + kWide - 1) / kWide;
  call.report = options.report;
  const int64_t tiles = int64_t(call.row_blocks) * call.column_tiles;
  const int ctas = int(std::min<int64_t>(std::max(1, options.sms), tiles));
  kernel<<<ctas, kThreads, kBytes, stream>>>(left, right, call);
  CUDA_CHECK(cudaGetLastError());
}

template <bool kBackward>
void dispatch_kernel(const Call& call, const CUtensorMap& left, const CUtensorMap& right, Act act,
                     const Options& options, cudaStream_t stream) {
  const auto with_option = [&](auto a, auto option) {
    if constexpr (kBackward)
      if (call.sums)
        return launch_kernel<true, a(), option(), true>(call, left, right, options, stream);
    launch_kernel<kBackward, a(), option(), false>(call, left, right, options, stream);
  };
  const auto with_act = [&](auto a) {
    if (kBackward ? call.h != nullptr : call.bias != nullptr)
      return with_option(a, std::true_type{});
    with_option(a, std::false_type{});
  };
  switch (act) {
    case Act::identity: return with_act(std::integral_constant<Act, Act::identity>{});
    case Act::silu: return with_act(std::integral_constant<Act, Act::silu>{});
    case Act::sigmoid: return with_act(std::integral_constant<Act, Act::sigmoid>{});
  }
  fail(Exit::failed, "glu: unknown activation {}", int(act));
}

// A matrix (rows, columns) in tiles of box_rows rows and 64 columns.
CUtensorMap matrix_map(const bf16* m, int64_t rows, int64_t columns, int box_rows) {
  return tma_map(m, {cuuint64_t(columns), cuuint64_t(rows)}, {cuuint64_t(columns) * 2},
                 {64, cuuint32_t(box_rows)});
}

}  // namespace

bool fits(int compute_major, int64_t N, int64_t F, int64_t D) {
  // A tile of fewer steps than stages would let a bias be overwritten.
  return hopper_code(compute_major) && F % 8 == 0 && D % 8 == 0 && D >= kStages * kDepth &&
         N < (int64_t(1) << 31) - 4096 && F < (int64_t(1) << 24);
}

void forward(bf16* h, bf16* gu, const bf16* x, const bf16* w, const bf16* bias, int64_t N,
             int64_t F, int64_t D, Act act, const Options& options, cudaStream_t stream) {
  const CUtensorMap left = matrix_map(x, N, D, kRows);
  // Gate and up as a third dimension: a tile at the end of the gate does not reach into up.
  const CUtensorMap right = tma_map(w, {cuuint64_t(D), cuuint64_t(F), 2},
                                    {cuuint64_t(D) * 2, cuuint64_t(F) * D * 2}, {64, 128, 1});
  Call call{};
  call.h = h, call.gu_out = gu, call.bias = bias;
  call.N = N, call.F = int(F), call.steps = int((D + kDepth - 1) / kDepth);
  dispatch_kernel<false>(call, left, right, act, options, stream);
}

int64_t column_sum_rows(int64_t N) {
  return (N + kRows - 1) / kRows * kGluWarps;
}

void backward(bf16* dgu, bf16* h, float* sums, const bf16* dy, const bf16* gu, const bf16* w,
              int64_t N, int64_t F, int64_t D, Act act, const Options& options,
              cudaStream_t stream) {
  const CUtensorMap left = matrix_map(dy, N, D, kRows);
  const CUtensorMap right = matrix_map(w, D, F, 64);
  Call call{};
  call.dgu = dgu, call.h = h, call.gu_in = gu, call.sums = sums;
  call.N = N, call.F = int(F), call.steps = int((D + kDepth - 1) / kDepth);
  dispatch_kernel<true>(call, left, right, act, options, stream);
}

}  // namespace hgrn::glu_gemm

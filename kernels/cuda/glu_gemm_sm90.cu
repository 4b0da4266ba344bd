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
#include "cuda/hopper.h"
#include "cuda/mma.cuh"
#include "cuda/sm90.cuh"
#include "cuda/tma.cuh"
#include "cuda/wgmma.cuh"

namespace hgrn::glu_gemm {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kRows = 128, kColumns = 256, kDepth = 64;
constexpr int kStages = 3, kGroups = 2, kGroupRows = kRows / kGroups;
constexpr int kGroupThreads = 128, kThreads = (1 + kGroups) * kGroupThreads;
constexpr int kGluWarps = 3;
constexpr int kPrefetchDepth = 1536;  // glu_backward_warp()
// Rows of tiles that are taken together, column by column: what they read of the left operand stays
// in L2 while the weights pass once.
constexpr int kBandRows = 2048;

constexpr int kBlock = 64 * 128;  // bytes of 64 rows of 64 elements
constexpr int kLeftBytes = kRows / 64 * kBlock, kRightBytes = kColumns / 64 * kBlock;
constexpr int kStageBytes = kLeftBytes + kRightBytes;
constexpr int kOutGroup = kColumns / 64 * kBlock;
// Byte offsets in shared memory.
constexpr int kOut = kStages * kStageBytes;
constexpr int kBias = kOut + kGroups * kOutGroup;  // [2 tiles][kColumns] bf16
constexpr int kFull = kBias + 2 * kColumns * 2;    // mbarriers
constexpr int kEmpty = kFull + kStages * 8;
constexpr int kOutFull = kEmpty + kStages * 8;
constexpr int kOutEmpty = kOutFull + kGroups * 8;
constexpr int kBiasEmpty = kOutEmpty + kGroups * 8;
constexpr int kEnd = kBiasEmpty + 2 * 8;
constexpr int kBytes = kEnd + 1024;  // to start at a multiple of 1024
static_assert(kStageBytes % 1024 == 0 && kBytes <= 227 * 1024);

struct Call {
  bf16 *h, *gu_out, *dgu;    // forward: h, gu_out; backward: dgu, and h or null
  float* sums;               // backward: (row_blocks, kGluWarps, 2F), or null
  const bf16 *gu_in, *bias;  // backward: gu_in; forward: bias, null = absent
  int64_t N;
  int F, steps;  // steps: of kDepth
  int row_blocks, column_tiles;
  WaitReport* report;
};

// The tiles of a CTA, in order.
struct Tile {
  int64_t row;  // first
  int column;   // first, of F
};
template <bool kBackward>
struct Tiles {
  static constexpr int kWide = kBackward ? kColumns : kColumns / 2;  // columns of F in a tile
  static constexpr int kBand = kBandRows / kRows;
  const Call& call;
  int index, total;

  __device__ __forceinline__ explicit Tiles(const Call& c)
      : call(c), index(int(blockIdx.x)), total(c.row_blocks * c.column_tiles) {}
  __device__ __forceinline__ bool valid() const { return index < total; }
  __device__ __forceinline__ void next() { index += int(gridDim.x); }
  __device__ __forceinline__ Tile at(int i) const {
    const int band = i / (kBand * call.column_tiles), inside = i - band * kBand * call.column_tiles;
    const int height = min(kBand, call.row_blocks - band * kBand);
    const int column = inside / height;
    const int row = band * kBand + inside - column * height;
    return {int64_t(row) * kRows, column * kWide};
  }
  __device__ __forceinline__ Tile tile() const { return at(index); }
};

// A place in the ring of stages.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

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

// ---- GLU
__device__ __forceinline__ float sigmoid(float x) {
  return rcp_approx(1.0f + exp2_approx(x * -1.44269504088896341f));
}

// Two neighbouring elements of h.
template <Act kAct>
__device__ __forceinline__ uint32_t glu(uint32_t g, uint32_t u) {
  const auto value = [](float gate, float up) {
    if constexpr (kAct == Act::identity) return up * gate;
    const float s = sigmoid(gate);
    return up * (kAct == Act::silu ? gate * s : s);
  };
  return pack_bf16(value(low_bf16(g), low_bf16(u)), value(high_bf16(g), high_bf16(u)));
}

// g and u of two neighbouring elements become dg and du, before they are rounded: {{dg, du}, ...};
// h is what glu() makes of them.
template <Act kAct>
__device__ __forceinline__ float4 glu_gradient(uint32_t& g, uint32_t& u, uint32_t dh, uint32_t& h) {
  const auto gradient = [](float gate, float up, float d) -> float3 {
    if constexpr (kAct == Act::identity) return {d * up, d * gate, up * gate};
    const float s = sigmoid(gate);
    if constexpr (kAct == Act::silu)
      return {d * up * (s * (1 + gate * (1 - s))), d * (gate * s), up * (gate * s)};
    return {d * up * (s * (1 - s)), d * s, up * s};
  };
  const float3 low = gradient(low_bf16(g), low_bf16(u), low_bf16(dh));
  const float3 high = gradient(high_bf16(g), high_bf16(u), high_bf16(dh));
  g = pack_bf16(low.x, high.x);
  u = pack_bf16(low.y, high.y);
  h = pack_bf16(low.z, high.z);
  return {low.x, high.x, low.y, high.y};
}

// h of a tile. A warp takes two rows at a time, a lane 8 columns of one.
template <Act kAct>
__device__ __forceinline__ void glu_forward_warp(const Call& call, uint32_t smem, int warp) {
  const int lane = threadIdx.x % 32, chunk = lane % 16;
  const uint32_t from = smem + kOut + chunk / 8 * kBlock;
  const int64_t F = call.F;
  Tiles<false> tiles(call);
  uint32_t parity = 0;
  for (; tiles.valid(); tiles.next(), parity ^= 1) {
    const Tile tile = tiles.tile();
    const int64_t column = tile.column + chunk * 8;
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      const int64_t first = tile.row + group * kGroupRows;
      const int rows = column < F ? int(min(int64_t(kGroupRows), call.N - first)) : 0;
      bf16* const g_to = call.gu_out + first * 2 * F + column;
      bf16* const h_to = call.h + first * F + column;
      mbarrier_await(smem + kOutFull + group * 8, parity, call.report, tiles.index, -2);
#pragma unroll 4
      for (int r = 2 * warp + lane / 16; r < kGroupRows; r += 2 * kGluWarps) {
        const uint32_t at = from + group * kOutGroup + r * 128 + ((chunk ^ r) & 7) * 16;
        const uint4 g = ld_shared4(at), u = ld_shared4(at + 2 * kBlock);
        if (r >= rows) continue;
        *reinterpret_cast<uint4*>(g_to + r * 2 * F) = g;
        *reinterpret_cast<uint4*>(g_to + r * 2 * F + F) = u;
        *reinterpret_cast<uint4*>(h_to + r * F) = make_uint4(
            glu<kAct>(g.x, u.x), glu<kAct>(g.y, u.y), glu<kAct>(g.z, u.z), glu<kAct>(g.w, u.w));
      }
      mbarrier_arrive_warp(smem + kOutEmpty + group * 8);
    }
  }
}

// Brings g and u of half a tile, 64 rows of 256 columns, to L2.
__device__ __forceinline__ void prefetch_half(const Call& call, int64_t row, int column,
                                              int thread) {
  for (int i = thread; i < kGroupRows * 8; i += kGluWarps * 32) {  // 4 lines of g, 4 of u
    const int64_t r = row + i / 8, F = call.F;
    const int c = column + i % 4 * 64;
    if (r < call.N && c < F)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(call.gu_in + r * 2 * F + i / 4 % 2 * F + c));
  }
}

// dg and du of a tile. A warp takes kBatch rows at a time, a lane 8 columns of each. g and u of the
// next batch are loaded as those of this one are used up. The copies of the operands keep the way
// from L2 to the SM busy, so that a load takes thousands of clocks: 33 KB of loads are on their way
// at any time, in 88 registers a thread. Fewer are slower: 6 rows by a fifth and more where D is at
// most 1024. There a prefetch to L2 half a tile ahead helps, too; where the products of a tile take
// longer, the loads have time, and more requests only disturb (tools/glu_gemm_check.cu).
template <Act kAct, bool kAgain, bool kSums>
__device__ __forceinline__ void glu_backward_warp(const Call& call, uint32_t smem, int warp) {
  constexpr int kBatch = 11;
  constexpr int kTurns = (kGroupRows + kBatch * kGluWarps - 1) / (kBatch * kGluWarps);  // a half
  const int lane = threadIdx.x % 32;
  const int64_t F = call.F, pitch = 2 * F;
  // This lane's part of a batch: element of gu and dgu, of h, and rows from there on that exist.
  struct Part {
    int64_t at, h_at;
    int rows;
  };
  const auto part_of = [&](int64_t tile_row, int tile_column, int group, int first) -> Part {
    const int64_t row = tile_row + group * kGroupRows + first;
    const int column = tile_column + lane * 8, most = min(kBatch, kGroupRows - first);
    return {row * pitch + column, row * F + column,
            column < F ? int(min(int64_t(most), call.N - row)) : 0};
  };
  uint4 g[kBatch] = {}, u[kBatch] = {};
  const auto load = [&](int i, const bf16* from, int rows) {
    if (i >= rows) return;
    g[i] = __ldcs(reinterpret_cast<const uint4*>(from));
    u[i] = __ldcs(reinterpret_cast<const uint4*>(from + F));
  };
  Tiles<true> tiles(call);
  Tile tile = tiles.tile();
  Part here = part_of(tiles.valid() ? tile.row : call.N, tile.column, 0, warp * kBatch);
#pragma unroll
  for (int i = 0; i < kBatch; ++i) load(i, call.gu_in + here.at + i * pitch, here.rows);
  uint32_t parity = 0;
  for (; tiles.valid(); tiles.next(), parity ^= 1) {
    const bool more = tiles.index + int(gridDim.x) < tiles.total;
    const Tile after = more ? tiles.at(tiles.index + int(gridDim.x)) : Tile{call.N, 0};
    float sums[2][8] = {};  // of dg and du, of this warp's rows of the tile
#pragma unroll 1
    for (int turn = 0; turn < kGroups * kTurns; ++turn) {
      const int group = turn / kTurns, first = (turn % kTurns * kGluWarps + warp) * kBatch;
      if (turn % kTurns == 0) {
        if (call.steps * kDepth < kPrefetchDepth)
          prefetch_half(call, group == 0 ? tile.row + kGroupRows : after.row,
                        group == 0 ? tile.column : after.column, warp * 32 + lane);
        mbarrier_await(smem + kOutFull + group * 8, parity, call.report, tiles.index, -2);
      }
      const int next_turn = turn + 1 < kGroups * kTurns ? turn + 1 : 0;
      const Part next =
          part_of(next_turn ? tile.row : after.row, next_turn ? tile.column : after.column,
                  next_turn / kTurns, (next_turn % kTurns * kGluWarps + warp) * kBatch);
      const bf16* from = call.gu_in + next.at;
      bf16 *to = call.dgu + here.at, *h_to = call.h + here.h_at;
      const uint32_t out = smem + kOut + group * kOutGroup + lane / 8 * kBlock + first * 128;
      const auto gradient_at = [&](int i) {
        return ld_shared4(out + i * 128 + ((lane ^ (first + i)) & 7) * 16);
      };
      uint4 next_dh = gradient_at(0);
#pragma unroll
      for (int i = 0; i < kBatch; ++i, from += pitch, to += pitch, h_to += F) {
        // Rows that do not exist are computed as well: no branch keeps the rows apart.
        const uint4 dh = next_dh;
        if (i + 1 < kBatch) next_dh = gradient_at(i + 1);
        uint4 h;
        const float4 pairs[4] = {glu_gradient<kAct>(g[i].x, u[i].x, dh.x, h.x),
                                 glu_gradient<kAct>(g[i].y, u[i].y, dh.y, h.y),
                                 glu_gradient<kAct>(g[i].z, u[i].z, dh.z, h.z),
                                 glu_gradient<kAct>(g[i].w, u[i].w, dh.w, h.w)};
        if (i < here.rows) {
          if constexpr (kSums)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              sums[0][2 * j] += pairs[j].x, sums[0][2 * j + 1] += pairs[j].y;
              sums[1][2 * j] += pairs[j].z, sums[1][2 * j + 1] += pairs[j].w;
            }
          *reinterpret_cast<uint4*>(to) = g[i];
          *reinterpret_cast<uint4*>(to + F) = u[i];
          if constexpr (kAgain) *reinterpret_cast<uint4*>(h_to) = h;
        }
        load(i, from, next.rows);
        __syncwarp();  // the compiler would gather the loads of all rows at the end
      }
      here = next;
      if (turn % kTurns == kTurns - 1) mbarrier_arrive_warp(smem + kOutEmpty + group * 8);
    }
    if constexpr (kSums)
      if (const int column = tile.column + lane * 8; column < F) {
        float* const to = call.sums + (tile.row / kRows * kGluWarps + warp) * pitch + column;
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
          for (int j = 0; j < 8; j += 4)
            *reinterpret_cast<float4*>(to + part * F + j) =
                make_float4(sums[part][j], sums[part][j + 1], sums[part][j + 2], sums[part][j + 3]);
      }
    tile = after;
  }
}

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

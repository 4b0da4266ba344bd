// The GLU warps of glu_gemm_sm90.cu, whose head has the roles and what is between them: a finished
// tile from shared memory, the elementwise part, whole lines to and from device memory.
#pragma once
#include "cuda/glu_gemm_roles.cuh"
#include "ops/seq_kernel.h"

namespace hgrn::glu_gemm::roles {

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

}  // namespace hgrn::glu_gemm::roles

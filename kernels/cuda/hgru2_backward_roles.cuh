// What both roles of hgru2_backward_sm90.cu know: sizes, what lies where in shared memory and how
// it is addressed, the barriers between them, their block and its resets.
#pragma once
#include "cuda/hgru2_range.cuh"
#include "cuda/wgmma.cuh"

namespace hgrn::hgru2::backward_roles {

constexpr int N = 128, kWarps = N / 16, kSubs = kChunk / kSub;
constexpr int kStateThreads = 32 * kWarps, kHelpers = 4, kHelperThreads = 32 * kHelpers;
constexpr int kThreads = kStateThreads + kHelperThreads;
constexpr int kStateRegisters = 208, kHelperRegisters = 88;
// What the block starts with, 168 a thread, is all that there is to share out.
static_assert(kStateThreads * kStateRegisters + kHelperThreads * kHelperRegisters <=
              168 * kThreads);
constexpr uint32_t kOnes = 0x3f803f80u;  // two bf16
constexpr int kGroup = 2;    // steps of 16 value columns whose operands are in registers at once
static_assert(kGroup == 2);  // two are added up before their product with ones
enum Part { kQ, kF, kV, kDy };
enum Barrier { kTiles = 1, kState = 2, kHelper = 3, kHandOver = 4 };

constexpr int kPitch = N * 2 + 16;
constexpr int kTile = kSub * N * 2, kHalf = kTile / 2;  // of x and dy
constexpr int kOutTile = kSub * kPitch;
constexpr int kH = N * N * 2;
constexpr int kNarrow = N * 32;
// Byte offsets in shared memory.
constexpr int kRaw = 0;                            // [4 sub][q, f, v, dy][16 positions][N] bf16
constexpr int kStates = kRaw + kSubs * 4 * kTile;  // [3][N/16][state threads] uint4: h
constexpr int kDh = kStates + 3 * kH;              // [N][N] bf16
constexpr int kKey = kDh + N * kPitch;             // [N][16] bf16: k after
constexpr int kKeyD = kKey + kNarrow;              // [N][16] bf16: k / mid
constexpr int kQueryD = kKeyD + kNarrow;           // [N][16] bf16: q mid
constexpr int kOut = kQueryD + kNarrow;            // [q, f, v][16 positions][N] bf16: dx
constexpr int kScores = kOut + 3 * kOutTile;       // [A, D][16][16] bf16
constexpr int kDiagonal = kScores + 1024;          // [16] float: D_tt
constexpr int kBarriers = kDiagonal + 64;          // loaded, loaded 0, values, first, scores, free
constexpr int kBytes = kBarriers + 6 * 8;
constexpr int kLoaded = kBarriers, kLoaded0 = kBarriers + 8, kValues = kBarriers + 16,
              kFirst = kBarriers + 24, kScored = kBarriers + 32, kFree = kBarriers + 40;

// Row of a token in a tile, and lane addresses for ldmatrix; 16-column step kk is at + 32 kk.
//   tile_major:   blocks (tile 0, left), (tile 0, right), (tile 1, left), (tile 1, right)
//   column_major: blocks (tile 0, left), (tile 1, left), (tile 0, right), (tile 1, right)
// The same in a tile of x or dy: two halves of 64 columns, rows of 128 bytes, 16-byte columns
// spread by the row's last three bits. at_step: 16-column step k.
__device__ __forceinline__ uint32_t row_offset(int row, int column16) {
  return uint32_t((column16 >> 3) * kHalf + row * 128 + (((column16 ^ row) & 7) << 4));
}
__device__ __forceinline__ uint32_t tile_major_lane(int lane) {
  return row_offset(8 * (lane >> 4) + (lane & 7), (lane >> 3) & 1);
}
__device__ __forceinline__ uint32_t column_major_lane(int lane) {
  return row_offset(lane & 15, lane >> 4);
}
__device__ __forceinline__ uint32_t at_step(uint32_t base, int k, int half = kHalf) {
  return (base ^ ((k & 3) * 32)) + (k >> 2) * half;
}
// Such tiles as the B operand of a wgmma: the columns contracted, a token a column of the result;
// or the tokens contracted, a column a column. Of the first tile; columns_at: bytes from there to
// 16 columns of another.
__device__ __forceinline__ uint64_t contract_columns(uint32_t smem) {
  return wgmma_operand(smem + kRaw, 16, 1024);
}
__device__ __forceinline__ uint64_t contract_tokens(uint32_t smem) {
  return wgmma_operand(smem + kRaw, kHalf, 1024);
}
__device__ __forceinline__ constexpr uint32_t columns_at(uint32_t tile, int k) {
  return tile + (k >> 2) * kHalf + (k & 3) * 32;
}
__device__ __forceinline__ int position_of(int token) {
  return 8 * ((token >> 1) & 1) + row_of(token);
}
__device__ __forceinline__ uint32_t padded_tile_major(int lane) {
  return (8 * (lane >> 4) + (lane & 7)) * kPitch + ((lane >> 3) & 1) * 16;
}
__device__ __forceinline__ uint32_t padded_column_major(int lane) {
  return (lane & 15) * kPitch + (lane >> 4) * 16;
}

// What both roles know of their block.
struct Block : Range {
  int first_chunk, last_chunk;
  __device__ __forceinline__ explicit Block(const Call<__nv_bfloat16>& a) : Range(a, true) {
    first_chunk = first, last_chunk = end - 1;
  }
};

// The resets of a chunk, read ahead.
struct Resets {
  uint32_t next[2];
  __device__ __forceinline__ void load(const Call<__nv_bfloat16>& a, int64_t b, int chunk,
                                       int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = chunk * kChunk + 32 * half + lane;
      next[half] = a.reset && chunk >= 0 && t < a.T ? a.reset[b * a.T + t] : 0;
    }
  }
  __device__ __forceinline__ uint64_t bits() const {
    return uint64_t(__ballot_sync(0xffffffffu, next[1] != 0)) << 32 |
           __ballot_sync(0xffffffffu, next[0] != 0);
  }
};

}  // namespace hgrn::hgru2::backward_roles

// What both roles of hgru2_backward_sm90.cu know: sizes, what lies where in shared memory and how
// it is addressed, the barriers between them, their block and its resets.
#pragma once
#include "cuda/hgru2_range.cuh"
#include "cuda/wgmma.cuh"

namespace hgrn::hgru2::backward_roles {

constexpr int N = 128, kWarps = N / 16, kSubs = kChunk / kSub;
constexpr int kStateThreads = 32 * kWarps, kHelpers = 4, kHelperThreads = 32 * kHelpers;
constexpr int kThreads = kStateThreads + kHelperThreads;
// What the block starts with, 168 a thread, is all that there is to share out.
constexpr int helper_registers(bool gated) {
  return gated ? 88 : 72;
}
constexpr int state_registers(bool gated) {
  return (168 * kThreads - helper_registers(gated) * kHelperThreads) / kStateThreads / 8 * 8;
}
constexpr uint32_t kOnes = 0x3f803f80u;  // two bf16
constexpr int kFirstSlot = 1;  // of h, where the saved one waits for the chunk's first sub-chunk
constexpr int kGroup = 2;      // steps of 16 value columns whose operands are in registers at once
static_assert(kGroup == 2);    // two are added up before their product with ones
enum Part { kQ, kF, kV, kDy };
enum Barrier { kTiles = 1, kState = 2, kHelper = 3, kHandOver = 4, kDhStored = 5 };

constexpr int kPitch = N * 2 + 16;
constexpr int kOutTile = kSub * kPitch;
constexpr int kH = N * N * 2;
constexpr int kNarrow = N * 32;
// Tiles with rows of 64 columns, 128 bytes: x and dy of a chunk, and dh, in two halves each.
constexpr int kPart = kChunk * N * 2, kHalf = kPart / 2, kSubRows = kSub * 128;
constexpr int kDhHalf = kH / 2;
constexpr int kScoreBlock = kSub * 32;
// Byte offsets in shared memory.
constexpr int kRaw = 0;                    // [q, f, v, dy][2 halves][4 sub][16 positions][64] bf16
constexpr int kStates = kRaw + 4 * kPart;  // [3][N/16][state threads] uint4: h
constexpr int kDh = kStates + 3 * kH;      // [2 halves][N][64] bf16
constexpr int kKey = kDh + kH;             // [N][16] bf16: k after
constexpr int kKeyD = kKey + kNarrow;      // [N][16] bf16: k / mid
constexpr int kQueryD = kKeyD + kNarrow;   // [N][16] bf16: q mid
constexpr int kOut = kQueryD + kNarrow;    // [q, f, v][16 positions][N] bf16: dx
constexpr int kScores = kOut + 3 * kOutTile;       // [16][16] bf16: A
constexpr int kGradients = kScores + kScoreBlock;  // [2 chunks][4 sub][16][16] bf16: D
constexpr int kDiagonal = kGradients + 2 * kSubs * kScoreBlock;  // [2 chunks][64] float: D_tt
constexpr int kUngated = kDiagonal + 2 * kChunk * 4;  // [16 positions][N] bf16: v before its gate
constexpr int kBarriers = kUngated + kOutTile;
constexpr int kMbarriers = 7;
constexpr int kBytes = kBarriers + kMbarriers * 8;
constexpr int kLoaded = kBarriers, kLoaded0 = kBarriers + 8, kValues = kBarriers + 16,
              kFirst = kBarriers + 24, kGradient = kBarriers + 32, kFree = kBarriers + 40,
              kStored = kBarriers + 48;

// Row of a token in a tile, and lane addresses for ldmatrix; 16-column step kk is at + 32 kk.
//   tile_major:   blocks (tile 0, left), (tile 0, right), (tile 1, left), (tile 1, right)
// The same in a tile of x, dy or dh: two halves of 64 columns, rows of 128 bytes, 16-byte columns
// spread by the row's last three bits. at_step: 16-column step k.
__device__ __forceinline__ uint32_t row_offset(int row, int column16, int half = kHalf) {
  return uint32_t((column16 >> 3) * half + row * 128 + (((column16 ^ row) & 7) << 4));
}
// Of a sub-chunk's rows of x or dy.
__device__ __forceinline__ constexpr int raw_tile(int part, int sub) {
  return part * kPart + sub * kSubRows;
}
__device__ __forceinline__ uint32_t tile_major_lane(int lane) {
  return row_offset(8 * (lane >> 4) + (lane & 7), (lane >> 3) & 1);
}
__device__ __forceinline__ uint32_t at_step(uint32_t base, int k, int half = kHalf) {
  return (base ^ ((k & 3) * 32)) + (k >> 2) * half;
}
// Such tiles as operands of a wgmma: the columns contracted, a token a row or column of the result;
// or the tokens contracted, a column a row or column. Of the first tile; columns_at: bytes from
// there to 16 columns of another.
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

// threadIdx.x as a value that the compiler cannot make again. It would read it anew before each of
// the addresses that depend on it, and wait some 30 cycles each time.
__device__ __forceinline__ int opaque_thread() {
  return __shfl_sync(0xffffffffu, int(threadIdx.x), int(threadIdx.x) & 31);
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

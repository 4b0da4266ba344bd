// What both roles of hgru2_backward_sm90.cu know: sizes, what lies where in shared memory and how
// it is addressed, the barriers between them, their block and its resets.
#pragma once
#include "cuda/hgru2_range.cuh"
#include "cuda/tma.cuh"
#include "cuda/wgmma.cuh"

namespace hgrn::hgru2::backward_roles {

constexpr int N = 128, kWarps = N / 16, kSubs = kChunk / kSub;
constexpr int kStateThreads = 32 * kWarps, kHelpers = 4, kHelperThreads = 32 * kHelpers;
constexpr int kThreads = kStateThreads + kHelperThreads;
// What the block starts with, 168 a thread, is all that there is to share out.
constexpr int kHelperRegisters = 72;
constexpr int kStateRegisters =
    (168 * kThreads - kHelperRegisters * kHelperThreads) / kStateThreads;
constexpr int kPairs = kSubs / 2, kPair = 2 * kSub;  // a step: an earlier and a later sub-chunk
constexpr uint32_t kOnes = 0x3f803f80u;              // two bf16
constexpr int kGroup = 8;  // steps of 16 value columns whose operands are in registers at once
static_assert(kGroup % 2 == 0);  // two are added up before their product with ones
enum Part { kQ, kF, kV, kDy };
// kHelper and kAmongState: all of one role.
enum Barrier { kTiles = 1, kState = 2, kHelper = 3, kAmongState = 4, kRead = 5, kFirstGated = 6 };

constexpr int kOutTile = kSub * kPitch;
constexpr int kH = N * N * 2;
// Tiles with rows of 64 columns, 128 bytes: x and dy of a chunk, and dh, in two halves each.
constexpr int kPart = kChunk * N * 2, kHalf = kPart / 2, kSubRows = kSub * 128;
constexpr int kDhHalf = kH / 2;
constexpr int kScoreBlock = kSub * 32;
// The blocks of 16 positions of a channel in a tile of operands of A: of the earlier and of the
// later sub-chunk's own block of A, of the one off the diagonal, and one of which no result is
// used: it keeps numbers of the state threads. Once A is made, the first two of the queries' tile
// hold what dv is multiplied with (Slopes).
constexpr int kOperandTile = N * 128;
enum Block16 { kEarlier, kLater, kAcross, kSpare };
constexpr int kStashed = 9;  // pieces of 16 bytes that a state thread keeps in kStash
// Byte offsets in shared memory.
constexpr int kRaw = 0;                    // [q, f, v, dy][2 halves][4 sub][16 positions][64] bf16
constexpr int kStates = kRaw + 4 * kPart;  // [N/16][state threads] uint4: h
constexpr int kDh = kStates + kH;          // [2 halves][N][64] bf16
constexpr int kQueries = kDh + kH;         // [N][4 blocks][16] bf16: q mid, q mid, q before
constexpr int kKeys = kQueries + kOperandTile;  // [N][4 blocks][16] bf16: k / mid, k / mid, k after
// [N][32 positions] bf16: k after, to the end of the pair; then [32 positions][N]: dv.
constexpr int kPairKeys = kKeys + kOperandTile;
constexpr int kScores = kPairKeys + N * 64;       // [32][32] bf16: A, 0 above the diagonal
constexpr int kGradients = kScores + kPair * 64;  // [4 sub, 2 across][16][16] bf16: D
constexpr int kDiagonal = kGradients + (kSubs + kPairs) * kScoreBlock;  // [64] float: D_tt
constexpr int kOut = kDiagonal + kChunk * 4;  // [2 sub][q, f][16 positions][N] bf16: dx
constexpr int kStash = kOut + 4 * kOutTile;   // [kStashed][state threads] uint4
constexpr int kBarriers = kStash + kStashed * kStateThreads * 16;
constexpr int kMbarriers = 7;
constexpr int kBytes = kBarriers + 64;
// The first two count each helper thread twice: when it arrives and when its copies do. `first` is
// for the one pair behind that with which a chunk starts.
static_assert(kPairs == 2);
constexpr int kCopiedMbarriers = 2;
constexpr int kLoaded = kBarriers, kValues = kBarriers + 8, kFirst = kBarriers + 16,
              kGradient = kBarriers + 24, kFreeDh = kBarriers + 32, kFree = kBarriers + 40,
              kStored = kBarriers + 48;
static_assert(kMbarriers * 8 <= 64);

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

// A tile of operands of A: a row of 128 bytes a channel. The pair's keys, and A: a row of 64 bytes
// a channel or token. Block b of 16 positions is at ^ 32 b.
__device__ __forceinline__ uint32_t operand_offset(int channel, int column16) {
  return uint32_t(channel * 128 + ((column16 ^ (channel & 7)) << 4));
}
__device__ __forceinline__ uint32_t pair_offset(int row, int column16) {
  return uint32_t(row * 64 + ((column16 ^ ((row >> 1) & 3)) << 4));
}
// dv: a row of 256 bytes a position.
__device__ __forceinline__ uint32_t dv_offset(int position, int column16) {
  return uint32_t(position * 256 + ((column16 ^ (position & 7)) << 4));
}

// A number of which the compiler keeps nothing that is made of it in registers over a loop.
__device__ __forceinline__ int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}
// threadIdx.x as a value that the compiler cannot make again. It would read it anew before each of
// the addresses that depend on it, and wait some 30 cycles each time.
__device__ __forceinline__ int opaque_thread() {
  return __shfl_sync(0xffffffffu, int(threadIdx.x), int(threadIdx.x) & 31);
}

// The same for the address of shared memory, in a uniform register.
__device__ __forceinline__ uint32_t opaque_address(const unsigned char* smem_bytes) {
  return __reduce_max_sync(0xffffffffu, smem_address(smem_bytes));
}

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

// What all roles of glu_gemm_sm90.cu know: sizes, what lies where in shared memory, the arguments,
// which tiles a CTA computes.
#pragma once
#include "cuda/mma.cuh"
#include "cuda/sm90.cuh"
#include "cuda/tma.cuh"
#include "cuda/wgmma.cuh"

namespace hgrn::glu_gemm::roles {

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

}  // namespace hgrn::glu_gemm::roles

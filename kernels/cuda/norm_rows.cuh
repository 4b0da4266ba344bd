// How the kernels of norm_forward.cu and norm_backward.cu lay rows over warps, and sum over them.
// Memory-bound, so each row is read once: 1 to 16 warps keep it in registers, 8 columns a 16-byte
// access. Rows that are not a multiple of 8 columns, or too long for that, take the plain kernels.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace hgrn::norm {

constexpr int kMaxWarps = 16;
constexpr int kRowWarps = 8;        // a CTA's warps, where a row does not need more
constexpr int kPlainThreads = 256;  // of the plain kernels: one CTA a row, which it reads three
                                    // times (from cache)

// The warps that share a row, and several rows a CTA. Sums alternate between two halves of
// `shared`, so that one barrier a sum is enough: a half is written again only after the next sum's
// barrier, which no warp passes before all have read it. The barrier is the row's own, so that the
// rows of a CTA do not wait for each other; an mbarrier, since compute-sanitizer's racecheck loses
// count of __syncthreads() where parts of a CTA use bar.sync.
struct RowGroup {
  struct Shared {
    float2 sums[2 * kMaxWarps];
    uint64_t barriers[kRowWarps / 2];  // one a row of several warps
  };
  int index, warp, lane, warps;  // row in the CTA, warp in the row, warps a row
  float2* sums;
  uint32_t barrier;
  int sum_number = 0;

  // By all threads of the CTA.
  __device__ RowGroup(int group_warps, Shared& s) : warps(group_warps), sums(s.sums) {
    const int w = threadIdx.x / 32;
    index = w / warps, warp = w % warps, lane = threadIdx.x % 32;
    barrier = smem_address(s.barriers + index);
    if (warps == 1) return;
    if (warp == 0 && lane == 0)
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(32 * warps) : "memory");
    __syncthreads();
  }
  __device__ __forceinline__ float2 sum(float2 v) {
    v.x = warp_sum(v.x), v.y = warp_sum(v.y);
    if (warps == 1) return v;
    float2* slots = sums + (sum_number & 1) * kMaxWarps + index * warps;
    if (lane == 0) slots[warp] = v;
    sync();
    float2 total = slots[0];
    for (int i = 1; i < warps; ++i) total.x += slots[i].x, total.y += slots[i].y;
    return total;
  }
  __device__ __forceinline__ float sum(float v) {
    v = warp_sum(v);
    if (warps == 1) return v;
    float2* slots = sums + (sum_number & 1) * kMaxWarps + index * warps;
    if (lane == 0) slots[warp].x = v;
    sync();
    float total = slots[0].x;
    for (int i = 1; i < warps; ++i) total += slots[i].x;
    return total;
  }
  // Of one row, or of two at the price of one.
  __device__ __forceinline__ void sum_rows(float (&v)[1]) { v[0] = sum(v[0]); }
  __device__ __forceinline__ void sum_rows(float (&v)[2]) {
    const float2 both = sum(make_float2(v[0], v[1]));
    v[0] = both.x, v[1] = both.y;
  }

 private:
  __device__ __forceinline__ void sync() {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .b64 state;\n"
        "mbarrier.arrive.shared.b64 state, [%0];\n"
        "}" ::"r"(barrier)
        : "memory");
    do {
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}"
          : "=r"(done)
          : "r"(barrier), "r"(sum_number & 1)
          : "memory");
    } while (!done);
    ++sum_number;
  }
};

// How a row is laid over warps: `packs` a lane on `warps` warps, with the fewest idle lanes.
struct RowLayout {
  int warps, packs;
};

inline RowLayout row_layout(int D, int max_packs, int max_warps) {
  RowLayout best{0, 0};
  for (int packs = max_packs; packs >= 1; --packs) {
    const int per_warp = 32 * kWide * packs, warps = (D + per_warp - 1) / per_warp;
    if (warps > max_warps) continue;
    if (best.warps == 0 || warps * packs < best.warps * best.packs) best = {warps, packs};
  }
  return best;
}

// f(std::integral_constant<int, packs>), packs in 1 .. kMax
template <int kMax, class F>
void dispatch_packs(int packs, F&& f) {
  if constexpr (kMax > 1)
    if (packs < kMax) return dispatch_packs<kMax - 1>(packs, f);
  f(std::integral_constant<int, kMax>{});
}

inline bool wide_rows(int64_t D, int64_t max_cols, std::initializer_list<const void*> pointers) {
  if (D > max_cols) return false;
  bool wide = false;
  dispatch_width(D, pointers, [&](auto width) { wide = width() == kWide; });
  return wide;
}

}  // namespace hgrn::norm

// Vectors of floats as wide as the processor's registers, and small dense products on tiles in
// cache. Tiles are row-major, aligned to vectors, their widths multiples of kLanes.
// g++ splits vectors wider than a register through memory, so the width follows the target.
// Test: tests/ops/test_hgru2.cpp, through the chunked kernel
#pragma once
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/vec_math.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed inline only

namespace hgrn::cpu {
inline namespace HGRN_ISA {

#ifdef __AVX512F__
constexpr int kVecBytes = 64;
#else
constexpr int kVecBytes = 32;
#endif
constexpr int kLanes = kVecBytes / 4;
typedef float Vec __attribute__((vector_size(kVecBytes)));
typedef int32_t IntVec __attribute__((vector_size(kVecBytes)));
typedef float AnyVec __attribute__((vector_size(kVecBytes), aligned(4)));  // anywhere in memory

template <>
struct IntOf<Vec> {
  using type = IntVec;
};

#ifdef __AVX512F__
// A division of 16 floats takes as long as some eight multiplications: here an approximation within
// 2^-14, and a step of Newton's. Of infinity 0: max() gives its second operand where the first is
// NaN, as infinity times 0 is. For x >= 1; within 1 ulp below 2^126; NaN stays. (Masks, since g++
// 12 warns of the others.)
template <>
struct Reciprocal<Vec> {
  static Vec of(Vec x) {
    constexpr __mmask16 all = 0xffff;
    const Vec y = _mm512_maskz_rcp14_ps(all, x), error = 1.0f - x * y;
    return y + y * Vec(_mm512_maskz_max_ps(all, error, Vec{} - 1.0f));
  }
};
#endif

inline Vec& at(float* p) {
  return *reinterpret_cast<Vec*>(p);
}
inline const Vec& at(const float* p) {
  return *reinterpret_cast<const Vec*>(p);
}

// The first `count` of a vector's floats, wherever they lie; the others are 0. The rare case is a
// function of its own: beside it, g++ would pass every vector through memory.
[[gnu::noinline, gnu::cold]] inline Vec load_part(const float* p, int64_t count) {
  Vec x{};
  for (int64_t l = 0; l < count; ++l) x[l] = p[l];
  return x;
}
[[gnu::noinline, gnu::cold]] inline void store_part(float* p, Vec x, int64_t count) {
  for (int64_t l = 0; l < count; ++l) p[l] = x[l];
}
inline Vec load(const float* p, int64_t count) {
  if (count < kLanes) [[unlikely]]
    return load_part(p, count);
  return *reinterpret_cast<const AnyVec*>(p);
}
inline void store(float* p, Vec x, int64_t count) {
  if (count < kLanes) [[unlikely]]
    return store_part(p, x, count);
  *reinterpret_cast<AnyVec*>(p) = x;
}

enum class Start { zero, keep, row_scaled, column_scaled };  // what C is before the product

// A(m,k) = data[m * row + k * step]: a matrix or its transpose.
struct Left {
  const float* data;
  int64_t row, step;
};

template <Start start, int kRows, int kVecs>
inline void product_tile(float* C, int64_t ldc, const Left& A, const float* B, int64_t ldb,
                         int64_t K, const float* row_scale, const float* column_scale) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      const Vec& c = at(C + m * ldc + v * kLanes);
      if constexpr (start == Start::zero) acc[m][v] = Vec{};
      if constexpr (start == Start::keep) acc[m][v] = c;
      if constexpr (start == Start::row_scaled) acc[m][v] = c * row_scale[m];
      if constexpr (start == Start::column_scaled) acc[m][v] = c * at(column_scale + v * kLanes);
    }
  const float* a = A.data;
  for (int64_t k = 0; k < K; ++k, a += A.step, B += ldb) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const float left = a[m * A.row];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[m][v] += left * at(B + v * kLanes);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) at(C + m * ldc + v * kLanes) = acc[m][v];
}

// C (M,N) = start(C) + A (M,K) B (K,N); M a multiple of 8. scale: M or N factors.
template <Start start>
inline void product(float* C, const Left& A, const float* B, int64_t M, int64_t N, int64_t K,
                    const float* scale = nullptr) {
  constexpr int kRows = kVecBytes == 64 ? 8 : 4, kVecs = 2;  // of 32 registers or 16
  int64_t j = 0;
  const auto rows = [&]<int vecs>() {
    for (int64_t m = 0; m < M; m += kRows)
      product_tile<start, kRows, vecs>(C + m * N + j, N, {A.data + m * A.row, A.row, A.step}, B + j,
                                       N, K, scale ? scale + m : scale, scale ? scale + j : scale);
  };
  for (; j + kVecs * kLanes <= N; j += kVecs * kLanes) rows.template operator()<kVecs>();
  for (; j < N; j += kLanes) rows.template operator()<1>();
}

// Of two vectors, what a butterfly over `half` lanes exchanges: kept lanes and moved ones.
template <int half>
struct Butterfly {
  Vec low, high;
  Butterfly(const Vec& a, const Vec& b) {
    IntVec from_low, from_high;
    for (int l = 0; l < kLanes; ++l) {
      from_low[l] = l & half ? kLanes + l - half : l;
      from_high[l] = l & half ? kLanes + l : l + half;
    }
    low = __builtin_shuffle(a, b, from_low);
    high = __builtin_shuffle(a, b, from_high);
  }
};

template <int half>
inline void transpose_stage(Vec* row) {
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r)
    if (!(r & half)) {
      const Butterfly<half> x(row[r], row[r + half]);
      row[r] = x.low;
      row[r + half] = x.high;
    }
  if constexpr (half > 1) transpose_stage<half / 2>(row);
}

// out (N,M) = in (M,N) transposed; both multiples of kLanes.
inline void transpose(float* out, const float* in, int64_t M, int64_t N) {
  for (int64_t m = 0; m < M; m += kLanes)
    for (int64_t j = 0; j < N; j += kLanes) {
      Vec row[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) row[r] = at(in + (m + r) * N + j);
      transpose_stage<kLanes / 2>(row);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) at(out + (j + r) * M + m) = row[r];
    }
}

// Lane l = the sum over the lanes of row[l]. The rows are overwritten.
template <int half = kLanes / 2>
inline Vec lane_sums(Vec* row) {
#pragma GCC unroll 8
  for (int r = 0; r < half; ++r) {
    const Butterfly<half> x(row[r], row[r + half]);
    row[r] = x.low + x.high;
  }
  if constexpr (half > 1)
    return lane_sums<half / 2>(row);
  else
    return row[0];
}

}  // namespace HGRN_ISA
}  // namespace hgrn::cpu

#pragma GCC diagnostic pop

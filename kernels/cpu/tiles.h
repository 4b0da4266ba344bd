// Small dense products on tiles in cache, in 16-lane vectors (one AVX-512 register, two AVX2 ones).
// Tiles are row-major, 64-byte aligned, their widths multiples of 16.
// Test: tests/ops/test_hgru2.cpp, through the chunked kernel
#pragma once
#include <cstdint>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed inline only

namespace hgrn::cpu {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));

inline Vec& at(float* p) {
  return *reinterpret_cast<Vec*>(p);
}
inline const Vec& at(const float* p) {
  return *reinterpret_cast<const Vec*>(p);
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

// C (M,N) = start(C) + A (M,K) B (K,N); M a multiple of 8, N of 16. scale: M or N factors.
template <Start start>
inline void product(float* C, const Left& A, const float* B, int64_t M, int64_t N, int64_t K,
                    const float* scale = nullptr) {
#ifdef __AVX512F__
  constexpr int kRows = 8, kVecs = 2;
#else
  constexpr int kRows = 4, kVecs = 1;
#endif
  int64_t j = 0;
  const auto rows = [&]<int vecs>() {
    for (int64_t m = 0; m < M; m += kRows)
      product_tile<start, kRows, vecs>(C + m * N + j, N, {A.data + m * A.row, A.row, A.step}, B + j,
                                       N, K, scale ? scale + m : scale, scale ? scale + j : scale);
  };
  for (; j + kVecs * kLanes <= N; j += kVecs * kLanes) rows.template operator()<kVecs>();
  for (; j < N; j += kLanes) rows.template operator()<1>();
}

// One butterfly of the 16 x 16 transpose: rows r and r+half exchange half of their lanes.
template <int half>
inline void transpose_stage(Vec* row) {
  IntVec low, high;
  for (int l = 0; l < kLanes; ++l) {
    low[l] = l & half ? kLanes + l - half : l;
    high[l] = l & half ? kLanes + l : l + half;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r)
    if (!(r & half)) {
      const Vec a = row[r], b = row[r + half];
      row[r] = __builtin_shuffle(a, b, low);
      row[r + half] = __builtin_shuffle(a, b, high);
    }
}

// out (N,M) = in (M,N) transposed; both multiples of 16.
inline void transpose(float* out, const float* in, int64_t M, int64_t N) {
  for (int64_t m = 0; m < M; m += kLanes)
    for (int64_t j = 0; j < N; j += kLanes) {
      Vec row[kLanes];
      for (int r = 0; r < kLanes; ++r) row[r] = at(in + (m + r) * N + j);
      transpose_stage<8>(row);
      transpose_stage<4>(row);
      transpose_stage<2>(row);
      transpose_stage<1>(row);
      for (int r = 0; r < kLanes; ++r) at(out + (j + r) * M + m) = row[r];
    }
}

}  // namespace hgrn::cpu

#pragma GCC diagnostic pop

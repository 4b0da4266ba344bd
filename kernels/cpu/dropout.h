// Dropout factors of one row: 0 or 1/(1-p) for each column, as core/rng.h defines them. The
// generator is written out over kQuads counters side by side, so that it vectorises.
// Test: tests/ops/test_dropout.cpp
#pragma once
#include <algorithm>

#include "core/rng.h"

namespace hgrn::cpu {

constexpr int kQuads = 16;

// words[i][q] = philox(key, row, first_quad + q).v[i]
inline void philox_quads(uint32_t (&words)[4][kQuads], uint64_t key, uint64_t row,
                         uint64_t first_quad) {
  uint32_t c0[kQuads], c1[kQuads], c2[kQuads], c3[kQuads];
  for (int q = 0; q < kQuads; ++q) {
    const uint64_t counter = first_quad + uint64_t(q);
    c0[q] = uint32_t(counter), c1[q] = uint32_t(counter >> 32);
    c2[q] = uint32_t(row), c3[q] = uint32_t(row >> 32);
  }
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma omp simd
    for (int q = 0; q < kQuads; ++q) {
      const uint64_t p0 = uint64_t(0xD2511F53u) * c0[q], p1 = uint64_t(0xCD9E8D57u) * c2[q];
      c0[q] = uint32_t(p1 >> 32) ^ c1[q] ^ k0;
      c2[q] = uint32_t(p0 >> 32) ^ c3[q] ^ k1;
      c1[q] = uint32_t(p1);
      c3[q] = uint32_t(p0);
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  std::copy_n(c0, kQuads, words[0]);
  std::copy_n(c1, kQuads, words[1]);
  std::copy_n(c2, kQuads, words[2]);
  std::copy_n(c3, kQuads, words[3]);
}

// Columns [begin, end) of `row`; begin is a multiple of 4. out[0] belongs to column begin.
template <class T>
inline void dropout_factors(T* out, const Dropout& drop, uint64_t key, int64_t row, int64_t begin,
                            int64_t end) {
  const T scale = T(drop.scale());
  const float p = drop.p;
  for (int64_t c = begin; c < end; c += 4 * kQuads) {
    uint32_t words[4][kQuads];
    T factor[4 * kQuads];
    philox_quads(words, key, uint64_t(drop.row0 + row), uint64_t(c / 4));
    for (int q = 0; q < kQuads; ++q) {
      factor[4 * q] = uniform01(words[0][q]) >= p ? scale : T(0);
      factor[4 * q + 1] = uniform01(words[1][q]) >= p ? scale : T(0);
      factor[4 * q + 2] = uniform01(words[2][q]) >= p ? scale : T(0);
      factor[4 * q + 3] = uniform01(words[3][q]) >= p ? scale : T(0);
    }
    std::copy_n(factor, std::min<int64_t>(end - c, 4 * kQuads), out + (c - begin));
  }
}

}  // namespace hgrn::cpu

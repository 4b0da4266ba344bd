// Dropout factors of one row: 0 or Dropout::scale() for each column, as core/rng.h defines them.
// The generator is written out over kCalls counters side by side, so that it vectorises.
//
// Test: tests/ops/test_dropout.cpp
#pragma once
#include <algorithm>

#include "core/rng.h"

namespace hgrn::cpu {

constexpr int kCalls = 8, kColumns = 8 * kCalls;  // what a task of the embedding's backward has

// words[i][q] = Dropout::bits(key, row, first + q).v[i]
inline void philox_calls(uint32_t (&words)[4][kCalls], uint64_t key, uint64_t row, uint64_t first) {
  uint32_t c0[kCalls], c1[kCalls], c2[kCalls], c3[kCalls];
  for (int q = 0; q < kCalls; ++q) {
    const uint64_t counter = first + uint64_t(q);
    c0[q] = uint32_t(counter), c1[q] = uint32_t(counter >> 32);
    c2[q] = uint32_t(row), c3[q] = uint32_t(row >> 32);
  }
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < kDropoutRounds; ++round) {
#pragma omp simd
    for (int q = 0; q < kCalls; ++q) {
      const uint64_t p0 = uint64_t(0xD2511F53u) * c0[q], p1 = uint64_t(0xCD9E8D57u) * c2[q];
      c0[q] = uint32_t(p1 >> 32) ^ c1[q] ^ k0;
      c2[q] = uint32_t(p0 >> 32) ^ c3[q] ^ k1;
      c1[q] = uint32_t(p1);
      c3[q] = uint32_t(p0);
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  std::copy_n(c0, kCalls, words[0]);
  std::copy_n(c1, kCalls, words[1]);
  std::copy_n(c2, kCalls, words[2]);
  std::copy_n(c3, kCalls, words[3]);
}

// Columns [begin, end) of `row`; begin is a multiple of 8. out[0] belongs to column begin.
template <class T>
inline void dropout_factors(T* out, const Dropout& drop, uint64_t key, int64_t row, int64_t begin,
                            int64_t end) {
  const T scale = T(drop.scale());
  const uint32_t threshold = drop.threshold();
  for (int64_t c = begin; c < end; c += kColumns) {
    uint32_t words[4][kCalls];
    T factor[kColumns];
    philox_calls(words, key, uint64_t(drop.row0 + row), uint64_t(c / 8));
    for (int q = 0; q < kCalls; ++q)
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = words[i][q];
        factor[8 * q + 2 * i] = (word & 0xffff) >= threshold ? scale : T(0);
        factor[8 * q + 2 * i + 1] = word >> 16 >= threshold ? scale : T(0);
      }
    std::copy_n(factor, std::min<int64_t>(end - c, kColumns), out + (c - begin));
  }
}

}  // namespace hgrn::cpu

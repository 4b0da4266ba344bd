// Dropout factors of one row: 0 or 1/(1-p) for each column, as core/rng.h defines them.
// Test: tests/ops/test_dropout.cpp
#pragma once
#include "core/rng.h"

namespace hgrn::cpu {

// Columns [begin, end) of `row`; begin is a multiple of 4. out[0] belongs to column begin.
template <class T>
inline void dropout_factors(T* out, const Dropout& drop, uint64_t key, int64_t row, int64_t begin,
                            int64_t end) {
  const T scale = T(drop.scale());
  const int64_t global_row = drop.row0 + row;
  for (int64_t c = begin; c < end; c += 4) {
    const Philox random = Dropout::bits(key, global_row, c / 4);
    const int64_t count = end - c < 4 ? end - c : 4;
    for (int64_t i = 0; i < count; ++i)
      out[c - begin + i] = uniform01(random.v[i]) >= drop.p ? scale : T(0);
  }
}

}  // namespace hgrn::cpu

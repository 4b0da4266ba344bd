// Counter-based random numbers: Philox4x32 (Salmon et al., SC'11). A number is a function of
// (key, counter) alone, so dropout masks and initial weights do not depend on threads, ranks,
// micro-batches or the backend, and a resumed run draws what the undisturbed one would have.
// Ten rounds, the paper's recommendation; for dropout seven, the fewest that pass BigCrush there.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace hgrn {

struct Philox {
  uint32_t v[4];
};

constexpr int kPhiloxRounds = 10, kDropoutRounds = 7;

template <int kRounds = kPhiloxRounds>
HGRN_HD inline Philox philox(uint64_t key, uint64_t counter_hi, uint64_t counter_lo) {
  uint32_t c0 = uint32_t(counter_lo), c1 = uint32_t(counter_lo >> 32);
  uint32_t c2 = uint32_t(counter_hi), c3 = uint32_t(counter_hi >> 32);
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1), c3 = uint32_t(p0), c0 = n0, c2 = n2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// [0, 1), 24 bits.
HGRN_HD inline float uniform01(uint32_t bits) {
  return float(bits >> 8) * (1.0f / 16777216.0f);
}

// splitmix64's finaliser: spreads seeds and hashes over 64 bits.
HGRN_HD inline uint64_t mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Which elements a dropout layer keeps. Element (row, col) of a tensor is dropped where its 16
// random bits are below threshold(), p in units of 2^-16, and else multiplied by scale(): with that
// p, so that the mean stays exact. Eight elements a Philox call: with four, the residual norms took
// a tenth longer (docs/benchmarks_history.md). `row0` is the global row of the tensor's first row
// (sample index in the global batch times T), so that splitting a batch over ranks or micro-batches
// changes no mask.
struct Dropout {
  float p = 0;        // 0: off
  uint64_t seed = 0;  // train.seed
  uint64_t step = 0;  // optimizer step that this forward belongs to
  uint32_t site = 0;  // which dropout layer of the model
  int64_t row0 = 0;
  // In the backend's memory: {step, row0}, read by the operation when it runs, in place of the two
  // above. Absent: those. So that recorded operations (Ops::record) draw anew in every replay.
  const int64_t* clock = nullptr;

  // With what the clock says by now. Where the clock's memory can be read.
  HGRN_HD Dropout now() const {
    Dropout d = *this;
    if (p > 0 && clock) d.step = uint64_t(clock[0]), d.row0 = clock[1];
    d.clock = nullptr;
    return d;
  }
  HGRN_HD uint64_t key() const { return mix64(seed ^ mix64(step ^ (uint64_t(site) << 48))); }
  // For columns 8 octet .. 8 octet + 7: 16 bits a column, the even one's low in its word.
  HGRN_HD static Philox bits(uint64_t key, int64_t global_row, int64_t octet) {
    return philox<kDropoutRounds>(key, uint64_t(global_row), uint64_t(octet));
  }
  HGRN_HD uint32_t threshold() const {
    const uint32_t nearest = uint32_t(p * 65536.0f + 0.5f);
    return nearest < 0xffff ? nearest : 0xffff;
  }
  HGRN_HD float scale() const { return 65536.0f / float(65536 - threshold()); }
  // The factor of a column, as the backends' kernels work it out for many.
  HGRN_HD float factor(uint64_t key, int64_t global_row, int64_t col) const {
    const uint32_t word = bits(key, global_row, col / 8).v[col % 8 / 2];
    return (col % 2 ? word >> 16 : word & 0xffff) >= threshold() ? scale() : 0.0f;
  }
};

}  // namespace hgrn

// Drawing a token from logits, exactly: the arithmetic that every backend shares, so that equal
// logits and an equal seed give the same token whatever the device, the number of threads or the
// order of sums. Weights are whole numbers, and sums of whole numbers do not depend on order.
//
//   x = the logit, with the repetition penalty (Keskar et al. 2019, arXiv 1909.05858) where the
//       token was seen: x / penalty if x > 0, else x * penalty
//   weight = floor(2^38 exp((x - max x) / temperature)); what is below 2^-38 of the top is never
//       drawn
//   tokens are ordered by x downwards, equal ones by id upwards; kept are the first top_k, and of
//       those the fewest whose weights reach top_p of theirs (nucleus sampling, Holtzman et al.
//       2020, arXiv 1904.09751)
//   the draw falls on [0, sum of the kept weights) in the order of ids
#pragma once
#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/rng.h"

namespace hgrn {

struct Sampling {
  float temperature = 1;  // below 1e-6: the most likely token
  int64_t top_k = 0;      // 0: off
  double top_p = 1;       // 1: off
  float repetition_penalty = 1;
  uint64_t seed = 0;
  int64_t row0 = 0;  // number of the first row, so that a row's draws do not depend on its batch
  HGRN_HD bool greedy() const { return temperature < 1e-6f || top_k == 1; }
};

namespace sampling {

constexpr int kWeightBits = 38;  // 2^24 tokens of 2^38 stay within 63 bits

// Larger floats have larger keys; NaN is below all.
HGRN_HD inline uint32_t key_of(float x) {
  if (x != x) return 0;
  const uint32_t b = bits_of(x + 0.0f);  // -0 becomes 0
  return b & 0x80000000u ? ~b : b | 0x80000000u;
}
HGRN_HD inline float of_key(uint32_t key) {
  return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

HGRN_HD inline float penalised(float x, float penalty) {
  return x > 0 ? x / penalty : x * penalty;
}

// floor(2^38 exp((x - top) / temperature)) to about 1e-7 of itself. Every operation is one IEEE
// rounding (fmaf where two belong together), so that host and device agree in all bits.
HGRN_HD inline uint64_t weight_of(float x, float top, float inverse_temperature) {
  const float z = (x - top) * inverse_temperature;
  if (!(z > -40.0f)) return z >= 0 ? uint64_t(1) << kWeightBits : 0;  // NaN: 0
  constexpr float kLog2E = 1.44269504f;
  const float whole = floorf(z * kLog2E);
  const float f = fmaf(z, kLog2E, -whole);
  float p = 0.000218657849f;  // 2^f on [0,1), 6.4e-8 at most
  p = fmaf(p, f, 0.00123913318f);
  p = fmaf(p, f, 0.00968418643f);
  p = fmaf(p, f, 0.0554806292f);
  p = fmaf(p, f, 0.240230456f);
  p = fmaf(p, f, 0.693146944f);
  p = fmaf(p, f, 1.0f);
  const uint64_t scaled = uint64_t(p * 1073741824.0f) << (kWeightBits - 30);
  const int shift = -int(whole);
  return shift >= 64 ? 0 : scaled >> shift;
}

// floor(a b / 2^64)
HGRN_HD inline uint64_t mul_high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return uint64_t((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// The weight that the nucleus must reach: at least 1, at most `total`.
HGRN_HD inline uint64_t nucleus_mass(uint64_t total, double top_p) {
  if (!(top_p < 1)) return total;
  const uint64_t part = mul_high(total, uint64_t(top_p * 18446744073709549568.0)) + 1;
  return part < total ? part : total;
}

// A number in [0, total) for draw `step` of row `row`.
HGRN_HD inline uint64_t draw(uint64_t total, uint64_t seed, int64_t row, int64_t step) {
  const Philox r = philox(seed, uint64_t(row), uint64_t(step));
  return mul_high(uint64_t(r.v[1]) << 32 | r.v[0], total);
}

}  // namespace sampling
}  // namespace hgrn

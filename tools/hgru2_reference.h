// What tools/hgru2_check.cu holds the kernels to: cases of HGRU2, inputs for them, and the
// recurrence in fp64, token by token, with its gradients (docs/notation.md).
#pragma once
#include <cstdint>
#include <vector>

#include "ops/seq_kernel.h"

namespace hgrn::hgru2_cases {

struct Regime {
  const char* name;
  double mean, deviation, bound;
};
inline constexpr Regime kRegimes[] = {
    {"std normal", 0, 1, 0},      {"wide", 0, 4, 0},      {"forgetful", -4, 3, 0},
    {"very forgetful", -9, 3, 0}, {"f->0", -30, 10, 0},   {"keep", 4, 2, 0},
    {"bound .03", -3, 3, .03},    {"bound .5", 0, 2, .5}, {"bound .95", -3, 3, .95},
};

struct Case {
  Regime regime;
  SeqShape shape;
  DType dtype = DType::bf16;
  SeqOptions options;
  bool states = false;  // h0, dhT, hT, dh0
  double reset = 0;     // probability of a reset
};

inline constexpr const char* kNames[] = {"y", "dx_q", "dx_f", "dx_i", "dbound", "hT", "dh0"};
constexpr int kOutputs = 7;
constexpr int kSlots = 8;  // and: dh0 before the first token's gate
using Results = std::vector<double>[kSlots];

struct Data {
  std::vector<float> x, dy, bound, h0, dhT;
  std::vector<uint8_t> reset;
};

// Inputs as the kernel sees them: rounded to the case's dtype.
Data draw(const Case& c, uint64_t seed);

// One head, both directions. `out` is sized and, of dbound, zero: a slot a row of the batch.
void reference_head(const Case& c, const Data& d, Results& out, int64_t b, int64_t head);

}  // namespace hgrn::hgru2_cases

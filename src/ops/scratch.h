// How much memory the GPU's operations take for temporaries inside a call: one formula, read by the
// backend that takes it and by the plan that counts it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hgrn {

// Bytes for a training step over N rows of width D: the embedding's backward sorts N tokens (two
// rows of 4-byte indices) and keeps two partial rows for every 32 of them; partial sums of norms
// and biases, a few rows a CTA, lie below the constant. An operation that needs more, of an unusual
// shape, allocates once.
inline size_t gpu_scratch_bytes(int64_t N, int64_t D) {
  return (size_t(32) << 20) + size_t(N) * 8 + size_t(N) * size_t(D) / 4;
}

}  // namespace hgrn

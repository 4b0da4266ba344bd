// How much memory the GPU's operations take for temporaries inside a call: one formula, read by the
// backend that takes it and by the plan that counts it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hgrn {

// The embedding's backward takes rows sorted by token in pieces of so many, and columns in parts of
// 32 or more.
constexpr int kEmbeddingPiece = 32;
constexpr int64_t embedding_column_parts(int64_t D) {
  return (D + 31) / 32;
}

// Ops::embedding_order_size: rows and tokens in order, where each token's begin, and a counter for
// every piece and part.
inline int64_t gpu_embedding_order(int64_t N, int64_t V, int64_t D) {
  const int64_t pieces = (N + kEmbeddingPiece - 1) / kEmbeddingPiece;
  return 2 * N + V + 1 + pieces * embedding_column_parts(D);
}

// Bytes for a training step over N rows of width D: the embedding's backward keeps two partial rows
// for every piece; partial sums of norms and biases, a few rows a CTA, lie below the constant,
// those of the GLU's bias are made where they fit. An operation that needs more, of an unusual
// shape, allocates once.
inline size_t gpu_scratch_bytes(int64_t N, int64_t D) {
  return (size_t(32) << 20) + size_t(N) * size_t(D) * 2 * sizeof(float) / kEmbeddingPiece;
}

}  // namespace hgrn

// The algorithms that products of linear layers take where measurements found better ones than
// cuBLASLt's heuristic ranks first.
#pragma once
#include <cublasLt.h>

#include <vector>

#include "cuda/gemm.h"

namespace hgrn {

constexpr int kAnySwizzle = -1;
// How many of the heuristic's candidates a choice is looked for among.
constexpr int kAskedCandidates = 16;

// swizzle: kAnySwizzle: the first candidate with this tile and cluster. 0 or 1 (the order of the
// tiles): made of the heuristic's first if none is ranked so, which the heuristic need not do.
struct GemmChoice {
  cublasLtMatmulTile_t tile;
  cublasLtClusterShape_t cluster;
  int swizzle;
};

// Those for a call on a card of this compute capability, the first that a library has is taken;
// none, and where it has none of them: the heuristic's first. HGRN_GEMM_CHOICES=0: none.
std::vector<GemmChoice> gemm_choices(int compute_major, const GemmCall& call);

}  // namespace hgrn

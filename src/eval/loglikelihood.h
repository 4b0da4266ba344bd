// Log-probabilities of continuations after contexts. Neighbours with the same context share it: it
// is run once, and each continuation goes on from its recurrent state.
#pragma once
#include <cstdint>
#include <vector>

#include "model/lm.h"

namespace hgrn {

struct ContextPair {
  std::vector<int32_t> context;       // not empty
  std::vector<int32_t> continuation;  // not empty
};

struct PairScore {
  double loglik = 0;       // sum over the continuation, nats
  bool likeliest = false;  // each of its tokens is the likeliest one where it stands
  std::vector<float> nll;  // of each of its tokens
};

// tokens_at_once: of one forward pass; 0: what suits the device.
std::vector<PairScore> loglikelihoods(LanguageModel& model, const std::vector<ContextPair>& pairs,
                                      int64_t tokens_at_once = 0);

}  // namespace hgrn

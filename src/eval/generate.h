// Sampling from a model with its recurrent state: constant memory and time a token.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "eval/load.h"

namespace hgrn {

struct GenerateOptions {
  std::string prompt;
  int64_t tokens = 128;
  double temperature = 1;  // 0: the most likely token
  int64_t top_k = 0;       // 0: off
  double top_p = 1;        // 1: off
  uint64_t seed = 0;
  int64_t batch = 1;  // independent samples of the same prompt
};

struct GenerateReport {
  int64_t prompt_tokens = 0, tokens = 0;  // over all rows
  double prompt_seconds = 0, seconds = 0;
};

// Called with each piece of text as it is made, in whole UTF-8 characters; prompt not included.
using TextSink = std::function<void(int64_t row, std::string_view text)>;

GenerateReport generate(LoadedModel& m, const GenerateOptions& options, const TextSink& sink);

// One draw from softmax(logits / temperature) restricted to the top k and the smallest set of mass
// p (nucleus sampling, Holtzman et al. 2020); u uniform in [0,1).
int32_t sample_token(const float* logits, int64_t vocab, const GenerateOptions& options, double u);

}  // namespace hgrn

// config.json of a checkpoint: fla's HGRN2Config, plus our keys where a model is outside of what
// fla's HGRN2 can express (LayerNorm, biases, other activations; docs/formats.md).
#pragma once
#include <string>

#include "model/config.h"

namespace hgrn {

// eos: end-of-text id, -1 if unknown. max_positions: the training row length, informative only.
std::string hf_config_json(const ModelConfig& m, int64_t eos, int64_t max_positions);

// Reads dir/config.json. Exit::data where it is missing, not an HGRN2, or contradicts itself.
ModelConfig read_hf_config(const std::string& dir);

// True where fla's HGRN2ForCausalLM computes the same function.
bool fla_can_load(const ModelConfig& m);

// Keys in which two models differ in what they compute ("hidden_size"); initialisation is ignored.
std::vector<std::string> model_differences(const ModelConfig& a, const ModelConfig& b);

}  // namespace hgrn

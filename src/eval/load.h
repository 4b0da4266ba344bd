// A trained model opened for evaluation or generation.
#pragma once
#include <memory>
#include <string>

#include "model/lm.h"
#include "text/tokenizer.h"

namespace hgrn {

struct LoadedModel {
  std::string dir;         // the checkpoint folder
  int64_t step = -1;       // -1: not a checkpoint of ours
  int64_t seq_len = 2048;  // rows it was trained on, where known
  int64_t eos = -1;        // end-of-text id, -1 unknown
  std::unique_ptr<Ops> ops;
  std::unique_ptr<LanguageModel> model;
  std::unique_ptr<Tokenizer> tokenizer;  // null: none given and none recorded
  WeightStore weights;
  void* weight_memory = nullptr;

  LoadedModel() = default;
  LoadedModel(LoadedModel&&) = default;
  ~LoadedModel();
};

// `dir`: a checkpoint, a run folder (its newest valid checkpoint), or any Hugging Face HGRN2
// folder. `tokenizer`: empty takes what the checkpoint holds or names. Exit::data, Exit::usage.
LoadedModel load_model(const std::string& dir, Device device, const std::string& tokenizer);

}  // namespace hgrn

#include "eval/load.h"

#include <nlohmann/json.hpp>

#include "core/file.h"
#include "model/hf_config.h"
#include "train/checkpoint.h"

namespace hgrn {
namespace {

// The tokenizer that a checkpoint carries: files copied beside the weights, else the run config's
// name for one without files ("byte").
std::string recorded_tokenizer(const std::string& dir, const TrainerState& state) {
  if (has_tokenizer_files(dir)) return dir;
  const auto j = nlohmann::json::parse(state.config_json, nullptr, /*allow_exceptions=*/false);
  return j.is_object() ? j.value(nlohmann::json::json_pointer("/data/tokenizer"), "") : "";
}

}  // namespace

LoadedModel::~LoadedModel() {
  model.reset();
  if (ops && weight_memory) ops->free(weight_memory);
}

LoadedModel load_model(const std::string& dir, Device device, const std::string& tokenizer) {
  LoadedModel l;
  check(is_folder(dir), Exit::data, "{}: no such folder; give a checkpoint or run folder", dir);
  l.dir = find_checkpoint(dir, Checksums::without_optimizer);
  const ModelConfig config = read_hf_config(l.dir);
  TrainerState state;
  std::string precision = "bf16";
  if (exists(l.dir + "/trainer.json")) {
    state = trainer_state_from_json(read_file(l.dir + "/trainer.json", 1 << 26),
                                    l.dir + "/trainer.json");
    l.step = state.step;
    const auto j = nlohmann::json::parse(state.config_json, nullptr, false);
    if (j.is_object()) {
      l.seq_len = j.value(nlohmann::json::json_pointer("/data/seq_len"), l.seq_len);
      precision = j.value(nlohmann::json::json_pointer("/train/precision"), precision);
    }
  }
  l.eos = config.eos_token_id;
  const std::string spec = tokenizer.empty() ? recorded_tokenizer(l.dir, state) : tokenizer;
  if (!spec.empty()) {
    l.tokenizer = open_tokenizer(spec);
    check(l.tokenizer->vocab_size() <= config.vocab_size, Exit::usage,
          "--tokenizer {}: its vocabulary of {} is larger than the model's {}; give the tokenizer "
          "that the model was trained with",
          spec, l.tokenizer->vocab_size(), config.vocab_size);
    if (l.eos < 0) l.eos = l.tokenizer->eos();
  }

  l.ops = open_ops(device, precision);
  l.model = std::make_unique<LanguageModel>(*l.ops, config);
  Arena arena("weights");
  l.weights.take(arena, *l.ops, l.model->params(), /*with_grad=*/false);
  l.weight_memory = l.ops->alloc(arena.peak(), arena.name());
  arena.bind(l.weight_memory);
  l.weights.take(arena, *l.ops, l.model->params(), /*with_grad=*/false);
  l.weights.set_zero(*l.ops);
  read_weights(l.dir, l.model->params(),
               [&](ParamId id, const float* values) { l.weights.set(*l.ops, id, values); });
  l.model->use(l.weights.weights());
  return l;
}

}  // namespace hgrn

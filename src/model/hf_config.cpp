#include "model/hf_config.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/file.h"

namespace hgrn {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

const char* hf_act(Act a) {
  return a == Act::silu ? "swish" : "none";
}

Act act_from(const std::string& text, const std::string& where) {
  if (text == "swish" || text == "silu") return Act::silu;
  if (text == "none" || text == "identity" || text == "linear") return Act::identity;
  if (text == "sigmoid") return Act::sigmoid;
  fail(Exit::data, "{}: activation \"{}\" is not one that HGRN2 has (swish, sigmoid, none)", where,
       text);
}

}  // namespace

bool fla_can_load(const ModelConfig& m) {
  return m.norm == Norm::rms && !m.bias && m.output_activation == Act::silu &&
         m.input_activation == Act::identity && m.hidden_act == Act::silu && !m.scale_embedding &&
         m.query_scale == QueryScale::rsqrt && m.mixer == "hgru2";
}

std::string hf_config_json(const ModelConfig& m, int64_t eos, int64_t max_positions) {
  ordered_json j;
  j["architectures"] = {"HGRN2ForCausalLM"};
  j["model_type"] = "hgrn2";
  j["hidden_size"] = m.hidden_size;
  j["num_hidden_layers"] = m.num_hidden_layers;
  j["num_heads"] = m.hidden_size / m.expand_ratio;
  j["expand_ratio"] = m.expand_ratio;
  j["attn_mode"] = "chunk";
  j["use_short_conv"] = false;
  j["conv_size"] = 4;
  j["use_lower_bound"] = m.use_lower_bound;
  j["hidden_ratio"] = 4;
  j["intermediate_size"] = m.intermediate_size;
  j["hidden_act"] = hf_act(m.hidden_act);
  j["max_position_embeddings"] = max_positions;
  j["elementwise_affine"] = true;
  j["norm_eps"] = m.norm_eps;
  j["use_cache"] = true;
  j["bos_token_id"] = eos >= 0 ? ordered_json(eos) : ordered_json();
  j["eos_token_id"] = eos >= 0 ? ordered_json(eos) : ordered_json();
  j["pad_token_id"] = nullptr;
  j["tie_word_embeddings"] = m.tie_word_embeddings;
  j["initializer_range"] = m.initializer_range;
  j["fuse_norm"] = true;
  j["fuse_swiglu"] = true;
  j["fuse_cross_entropy"] = true;
  j["vocab_size"] = m.vocab_size;
  j["torch_dtype"] = "float32";
  if (!fla_can_load(m)) {
    j["mixer"] = m.mixer;
    j["norm"] = m.norm == Norm::layer ? "layernorm" : "rmsnorm";
    j["bias"] = m.bias;
    j["output_activation"] = m.output_activation == Act::silu ? "silu" : "sigmoid";
    j["input_activation"] = m.input_activation == Act::silu ? "silu" : "none";
    j["query_scale"] = m.query_scale == QueryScale::one ? "one" : "rsqrt";
    j["scale_embedding"] = m.scale_embedding;
    j["dropout"] = m.dropout;
    j["initializer"] = m.initializer == InitKind::fairseq ? "fairseq" : "normal";
  }
  return j.dump(2) + "\n";
}

ModelConfig read_hf_config(const std::string& dir) {
  const std::string path = dir + "/config.json";
  const json j = json::parse(read_file(path, 1 << 24), nullptr, /*allow_exceptions=*/false);
  check(j.is_object(), Exit::data, "{}: not a JSON object; give a Hugging Face HGRN2 folder", path);
  try {
    check(j.value("model_type", "") == "hgrn2", Exit::data,
          "{}:model_type is \"{}\", not \"hgrn2\"; give an HGRN2 checkpoint", path,
          j.value("model_type", ""));
    check(!j.value("use_short_conv", false), Exit::data,
          "{}:use_short_conv: convolutions are not part of this model; give a checkpoint without",
          path);
    check(!j.contains("attn") || j["attn"].is_null(), Exit::data,
          "{}:attn: hybrid attention layers are not supported; give a pure HGRN2", path);
    ModelConfig m;
    m.mixer = j.value("mixer", m.mixer);
    m.hidden_size = j.at("hidden_size");
    m.num_hidden_layers = j.at("num_hidden_layers");
    m.vocab_size = j.at("vocab_size");
    check(j.value("elementwise_affine", true), Exit::data,
          "{}:elementwise_affine: norms without weights are not part of this model; give a "
          "checkpoint with",
          path);
    check(!j.contains("attnres_block_size") || j["attnres_block_size"].is_null(), Exit::data,
          "{}:attnres_block_size: attention over residuals is not supported; give a checkpoint "
          "without",
          path);
    // As fla reads it: null asks the number of heads, a key left out is its default.
    if (j.contains("expand_ratio") && j["expand_ratio"].is_null())
      m.expand_ratio = m.hidden_size / std::max<int64_t>(1, j.at("num_heads").get<int64_t>());
    else
      m.expand_ratio = j.value("expand_ratio", m.expand_ratio);
    if (j.contains("intermediate_size") && j["intermediate_size"].is_number()) {
      m.intermediate_size = j["intermediate_size"];
    } else {  // fla: 2/3 of hidden_ratio * hidden_size, rounded up to 256
      const double ratio = j.value("hidden_ratio", 4.0);
      m.intermediate_size = (int64_t(double(m.hidden_size) * ratio * 2 / 3) + 255) / 256 * 256;
    }
    m.use_lower_bound = j.value("use_lower_bound", true);
    m.tie_word_embeddings = j.value("tie_word_embeddings", false);
    m.norm_eps = j.value("norm_eps", 1e-6);
    m.initializer_range = j.value("initializer_range", 0.02);
    m.hidden_act = act_from(j.value("hidden_act", "swish"), path + ":hidden_act");
    m.norm = j.value("norm", "rmsnorm") == "layernorm" ? Norm::layer : Norm::rms;
    m.bias = j.value("bias", false);
    m.output_activation =
        act_from(j.value("output_activation", "silu"), path + ":output_activation");
    m.input_activation = act_from(j.value("input_activation", "none"), path + ":input_activation");
    m.query_scale = j.value("query_scale", "rsqrt") == "one" ? QueryScale::one : QueryScale::rsqrt;
    m.scale_embedding = j.value("scale_embedding", false);
    m.dropout = j.value("dropout", 0.0);
    m.initializer =
        j.value("initializer", "normal") == "fairseq" ? InitKind::fairseq : InitKind::normal;
    if (j.contains("eos_token_id") && j["eos_token_id"].is_number_integer())
      m.eos_token_id = j["eos_token_id"];
    const bool sizes = m.hidden_size > 0 && m.num_hidden_layers > 0 && m.vocab_size > 1 &&
                       m.expand_ratio > 0 && m.intermediate_size > 0;
    check(sizes && m.hidden_size % m.expand_ratio == 0, Exit::data,
          "{}: hidden_size {} , expand_ratio {}, num_hidden_layers {}, vocab_size {} do not make "
          "an HGRN2",
          path, m.hidden_size, m.expand_ratio, m.num_hidden_layers, m.vocab_size);
    return m;
  } catch (const json::exception& e) {
    fail(Exit::data, "{}: {}; give a Hugging Face HGRN2 folder", path, e.what());
  }
}

std::vector<std::string> model_differences(const ModelConfig& a, const ModelConfig& b) {
  std::vector<std::string> keys;
  auto differ = [&](const char* key, bool same) {
    if (!same) keys.push_back(key);
  };
  differ("mixer", a.mixer == b.mixer);
  differ("vocab_size", a.vocab_size == b.vocab_size);
  differ("hidden_size", a.hidden_size == b.hidden_size);
  differ("num_hidden_layers", a.num_hidden_layers == b.num_hidden_layers);
  differ("expand_ratio", a.expand_ratio == b.expand_ratio);
  differ("intermediate_size", a.intermediate_size == b.intermediate_size);
  differ("tie_word_embeddings", a.tie_word_embeddings == b.tie_word_embeddings);
  differ("use_lower_bound", a.use_lower_bound == b.use_lower_bound);
  differ("norm", a.norm == b.norm);
  differ("norm_eps", a.norm_eps == b.norm_eps);
  differ("bias", a.bias == b.bias);
  differ("output_activation", a.output_activation == b.output_activation);
  differ("input_activation", a.input_activation == b.input_activation);
  differ("hidden_act", a.hidden_act == b.hidden_act);
  differ("query_scale", a.query_scale == b.query_scale);
  differ("scale_embedding", a.scale_embedding == b.scale_embedding);
  return keys;
}

}  // namespace hgrn

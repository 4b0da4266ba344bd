#include "model/config.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "model/fields.h"

namespace hgrn {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

// ---- the field lists: the names, defaults and ranges of every key stand here and nowhere else

void fields(Fields& f, ModelConfig& c) {
  for (const char* key : {"vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"})
    f.require(key);
  f("mixer", c.mixer);
  f("vocab_size", c.vocab_size, between(2, 1 << 24));
  f("hidden_size", c.hidden_size, between(1, 1 << 16));
  f("num_hidden_layers", c.num_hidden_layers, between(1, 1024));
  f("expand_ratio", c.expand_ratio, between(1, 256));
  f("intermediate_size", c.intermediate_size, between(1, 1 << 20));
  f("tie_word_embeddings", c.tie_word_embeddings);
  f("use_lower_bound", c.use_lower_bound);
  f.choice("norm", c.norm, {{"rmsnorm", Norm::rms}, {"layernorm", Norm::layer}});
  f("norm_eps", c.norm_eps, positive());
  f("bias", c.bias);
  f.choice("output_activation", c.output_activation,
           {{"silu", Act::silu}, {"sigmoid", Act::sigmoid}});
  f.choice("input_activation", c.input_activation, {{"none", Act::identity}, {"silu", Act::silu}});
  f.choice("hidden_act", c.hidden_act, {{"silu", Act::silu}, {"none", Act::identity}});
  f.choice("query_scale", c.query_scale, {{"rsqrt", QueryScale::rsqrt}, {"one", QueryScale::one}});
  f("scale_embedding", c.scale_embedding);
  f("dropout", c.dropout, below(0, 1));
  f.choice("initializer", c.initializer,
           {{"normal", InitKind::normal}, {"fairseq", InitKind::fairseq}});
  f("initializer_range", c.initializer_range, positive());
  f("eos_token_id", c.eos_token_id, at_least(-1));
}

void fields(Fields& f, DataConfig& c) {
  f.require("train");
  if (const json* j = f.raw("train")) {
    c.train.clear();
    const std::string where = "data.train";
    const char* wanted = "data.train: expected a glob or a list of {\"path\": GLOB, \"weight\": W}";
    if (j->is_string()) {
      c.train.push_back({j->get<std::string>(), 1});
    } else {
      check(j->is_array() && !j->empty(), Exit::usage, "{}; found {}", wanted, j->dump());
      for (size_t i = 0; i < j->size(); ++i) {
        Fields part = Fields::reader((*j)[i], fmt::format("data.train[{}]", i));
        MixturePart p;
        part.require("path");
        part("path", p.path);
        part("weight", p.weight, positive());
        part.finish();
        c.train.push_back(p);
      }
    }
  }
  if (!f.reading()) {
    ordered_json parts = ordered_json::array();
    for (const MixturePart& p : c.train) parts.push_back({{"path", p.path}, {"weight", p.weight}});
    f.write_raw("train", c.train.size() == 1 ? ordered_json(c.train[0].path) : parts);
  }
  f("valid", c.valid);
  f("tokenizer", c.tokenizer);
  f("seq_len", c.seq_len, between(1, 1 << 24));
  f("shuffle", c.shuffle);
  f("reset_at_eos", c.reset_at_eos);
  f("seed", c.seed);
}

void fields(Fields& f, OptimConfig& c) {
  f("lr", c.lr, at_least(0));
  f("betas", c.betas, below(0, 1));
  f("eps", c.eps, positive());
  f("weight_decay", c.weight_decay, at_least(0));
  f.choice("decay", c.decay, {{"matrices", DecayKind::matrices}, {"all", DecayKind::all}});
  f("clip_norm", c.clip_norm, at_least(0));
  f.choice("schedule", c.schedule,
           {{"cosine", ScheduleKind::cosine},
            {"inverse_sqrt", ScheduleKind::inverse_sqrt},
            {"wsd", ScheduleKind::wsd},
            {"linear", ScheduleKind::linear},
            {"constant", ScheduleKind::constant}});
  f("warmup_steps", c.warmup_steps, at_least(0));
  f("warmup_init_lr", c.warmup_init_lr, at_least(0));
  f("min_lr_ratio", c.min_lr_ratio, between(0, 1));
}

void fields(Fields& f, TrainConfig& c) {
  f.require("steps");
  f("steps", c.steps, at_least(0));
  f("global_batch", c.global_batch, between(1, 1 << 30));
  f("micro_batch", c.micro_batch, between(1, 1 << 24));
  f.choice("precision", c.precision, {{"bf16", Precision::bf16}, {"fp32", Precision::fp32}});
  f.choice("recompute", c.recompute, {{"none", Recompute::none}, {"block", Recompute::block}});
  f("seed", c.seed);
  f("log_every", c.log_every, at_least(0));
  f("eval_every", c.eval_every, at_least(0));
  f("eval_tokens", c.eval_tokens, at_least(1));
  f("monitor_every", c.monitor_every, at_least(0));
  f("sample_every", c.sample_every, at_least(0));
  f("sample_prompt", c.sample_prompt);
  f("checkpoint_every", c.checkpoint_every, at_least(0));
  f("keep_checkpoints", c.keep_checkpoints, at_least(1));
  f.choice("on_nonfinite", c.on_nonfinite,
           {{"skip", OnNonfinite::skip},
            {"abort", OnNonfinite::abort},
            {"rollback", OnNonfinite::rollback}});
  f("spike_zscore", c.spike_zscore, at_least(0));
  f("spike_window", c.spike_window, between(8, 4096));
  f.choice("on_spike", c.on_spike, {{"warn", OnSpike::warn}, {"skip", OnSpike::skip}});
  f("zero", c.zero, between(0, 1));
  f.choice("reduce_dtype", c.reduce_dtype,
           {{"fp32", ReduceDType::fp32}, {"bf16", ReduceDType::bf16}});
}

// ---- reading

template <class Section>
void read_section(const json& root, const char* name, const std::string& where, Section& section) {
  static const json empty = json::object();
  auto it = root.find(name);
  Fields f = Fields::reader(it == root.end() ? empty : *it, where + ":" + name);
  fields(f, section);
  f.finish();
}

constexpr int kMaxDepth = 64;  // deeper text would cost stack where values are copied or printed

json parse_json(const std::string& text, const std::string& where) {
  std::vector<std::set<std::string>> keys;  // of the objects that enclose the parser's position
  auto watch = [&](int depth, json::parse_event_t event, json& value) {
    check(depth < kMaxDepth || (event != json::parse_event_t::object_start &&
                                event != json::parse_event_t::array_start),
          Exit::usage, "{}: nested deeper than {} levels; no config is", where, int(kMaxDepth));
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key)
      check(keys.back().insert(value.get<std::string>()).second, Exit::usage,
            "{}: the key {} stands twice in one object; remove one", where, value.dump());
    return true;
  };
  try {
    return json::parse(text, watch, /*allow_exceptions=*/true, /*ignore_comments=*/true);
  } catch (const json::exception& e) {
    fail(Exit::usage, "{}: not valid JSON ({}); correct the file", where, e.what());
  }
}

bool is_utf8(const std::string& text) {
  try {
    (void)json(text).dump();
    return true;
  } catch (const json::exception&) {
    return false;
  }
}

void apply_override(json& root, const std::string& text) {
  const size_t eq = text.find('=');
  check(eq != std::string::npos && eq > 0, Exit::usage,
        "--set {}: expected KEY=VALUE, for example --set optim.lr=1e-3", text);
  const std::string key = text.substr(0, eq), value_text = text.substr(eq + 1);
  check(
      is_utf8(text), Exit::usage,
      "--set {}: not UTF-8, which the saved config has to be; rename the file or link to it under "
      "such a name",
      key);
  const json value =
      json::accept(value_text) ? parse_json(value_text, "--set " + key) : json(value_text);
  const size_t dot = key.find('.');
  check(dot != std::string::npos, Exit::usage,
        "--set {}: the key needs its section, as in model.{}, data.{}, optim.{} or train.{}", key,
        key, key, key, key);
  json& section = root[key.substr(0, dot)];
  check(section.is_object() || section.is_null(), Exit::usage, "--set {}: {} is not a section", key,
        key.substr(0, dot));
  section[key.substr(dot + 1)] = value;
}

void check_model(const ModelConfig& m, const std::string& where) {
  check(m.hidden_size % m.expand_ratio == 0, Exit::usage,
        "{}:model.hidden_size: {} is not a multiple of expand_ratio {}; set model.expand_ratio or "
        "make hidden_size {}",
        where, m.hidden_size, m.expand_ratio,
        (m.hidden_size / m.expand_ratio + 1) * m.expand_ratio);
  check(m.eos_token_id < m.vocab_size, Exit::usage,
        "{}:model.eos_token_id: {} is outside the vocabulary of {}; ids start at 0", where,
        m.eos_token_id, m.vocab_size);
}

}  // namespace

Config parse_config(const std::string& text, const std::string& where,
                    const std::vector<std::string>& overrides) {
  json root = parse_json(text, where);
  check(root.is_object(), Exit::usage, "{}: expected an object with model, data, optim, train",
        where);
  for (const std::string& o : overrides) apply_override(root, o);
  const std::vector<std::string> sections = {"model", "data", "optim", "train"};
  for (const auto& item : root.items())
    check(std::find(sections.begin(), sections.end(), item.key()) != sections.end(), Exit::usage,
          "{}:{}: unknown section{}", where, item.key(), did_you_mean(item.key(), sections));
  Config c;
  read_section(root, "model", where, c.model);
  read_section(root, "data", where, c.data);
  read_section(root, "optim", where, c.optim);
  read_section(root, "train", where, c.train);
  check_model(c.model, where);
  return c;
}

Config load_config(const std::string& path, const std::vector<std::string>& overrides) {
  std::ifstream in(path);
  check(bool(in), Exit::data,
        "{}: cannot open the config; give an existing file, for example "
        "configs/quickstart.json",
        path);
  std::stringstream text;
  text << in.rdbuf();
  check(!in.bad(), Exit::data, "{}: cannot read the config", path);
  return parse_config(text.str(), path, overrides);
}

std::string config_to_json(const Config& c) {
  Config copy = c;  // field lists take references that a reader may set
  ordered_json root = ordered_json::object();
  auto write = [&](const char* name, auto& section) {
    root[name] = ordered_json::object();
    Fields f = Fields::writer(root[name]);
    fields(f, section);
  };
  write("model", copy.model);
  write("data", copy.data);
  write("optim", copy.optim);
  write("train", copy.train);
  return root.dump(2) + "\n";
}

void check_batch(const TrainConfig& t, int64_t ranks) {
  const int64_t unit = ranks * t.micro_batch;
  if (t.global_batch % unit == 0) return;
  const int64_t below = t.global_batch / unit * unit, above = below + unit;
  const int64_t nearest =
      below > 0 && t.global_batch - below <= above - t.global_batch ? below : above;
  fail(Exit::usage,
       "train.global_batch: {} is not a multiple of ranks x micro_batch = {} x {} = {}; the "
       "nearest that is: {}",
       t.global_batch, ranks, t.micro_batch, unit, nearest);
}

std::vector<std::string> forbidden_changes(const std::string& before_json,
                                           const std::string& now_json) {
  static const std::set<std::string> free = {"train.steps",
                                             "train.log_every",
                                             "train.eval_every",
                                             "train.eval_tokens",
                                             "train.monitor_every",
                                             "train.sample_every",
                                             "train.sample_prompt",
                                             "train.checkpoint_every",
                                             "train.keep_checkpoints",
                                             "train.micro_batch",
                                             "train.zero",
                                             "data.train",
                                             "data.valid",
                                             "data.tokenizer"};
  const json before = json::parse(before_json), now = json::parse(now_json);
  const json defaults = json::parse(config_to_json(Config()));
  std::vector<std::string> changed;
  for (const auto& [section, values] : now.items())
    for (const auto& [key, value] : values.items()) {
      const std::string name = section + "." + key;
      // A key that an older program did not know: what it did is the default.
      const json::json_pointer at("/" + section + "/" + key);
      const json old = before.value(at, defaults.value(at, json()));
      if (name == "data.train" && value.is_array()) {  // paths may move, weights may not change
        auto weights = [](const json& parts) {
          std::vector<double> w;
          if (parts.is_array())
            for (const json& p : parts) w.push_back(p.value("weight", 1.0));
          return w;
        };
        if (weights(value) != weights(old)) changed.push_back(name);
      } else if (!free.count(name) && value != old) {
        changed.push_back(name);
      }
    }
  return changed;
}

}  // namespace hgrn

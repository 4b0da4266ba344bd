#include "model/config.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "core/file.h"
#include "model/fields.h"

namespace hgrn {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

// ---- the field lists: the names, defaults and ranges of every key stand here and nowhere else

void fields(Fields& f, ModelConfig& c) {
  for (const char* key : {"vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"})
    f.require(key);
  f("mixer", c.mixer).doc("token mixer, a name of src/mixers/registry.cpp");
  f("vocab_size", c.vocab_size, between(2, 1 << 24)).doc("V");
  f("hidden_size", c.hidden_size, between(1, 1 << 16)).doc("D, a multiple of `expand_ratio`");
  f("num_hidden_layers", c.num_hidden_layers, between(1, 1024)).doc("L");
  f("expand_ratio", c.expand_ratio, between(1, 256)).doc("n, the head dimension");
  f("intermediate_size", c.intermediate_size, between(1, 1 << 20)).doc("F, width of the GLU");
  f("tie_word_embeddings", c.tie_word_embeddings).doc("the head is the embedding");
  f("use_lower_bound", c.use_lower_bound).doc("learned lower bounds of the forget gates");
  f.choice("norm", c.norm, {{"rmsnorm", Norm::rms}, {"layernorm", Norm::layer}})
      .doc("layernorm has a bias");
  f("norm_eps", c.norm_eps, positive())
      .doc("of all norms but the one after the recurrence, which has 1e-5");
  f("bias", c.bias).doc("biases on the linear layers of the blocks");
  f.choice("output_activation", c.output_activation,
           {{"silu", Act::silu}, {"sigmoid", Act::sigmoid}})
      .doc("of the output gate");
  f.choice("input_activation", c.input_activation, {{"none", Act::identity}, {"silu", Act::silu}})
      .doc("of the input");
  f.choice("hidden_act", c.hidden_act, {{"silu", Act::silu}, {"none", Act::identity}})
      .doc("of the GLU's gate");
  f.choice("query_scale", c.query_scale, {{"rsqrt", QueryScale::rsqrt}, {"one", QueryScale::one}})
      .doc("n^-1/2 or 1");
  f("scale_embedding", c.scale_embedding).doc("embeddings times sqrt(D)");
  f("dropout", c.dropout, below(0, 1)).doc("after the embedding and on both branches of a block");
  f.choice("initializer", c.initializer,
           {{"normal", InitKind::normal}, {"fairseq", InitKind::fairseq}})
      .doc("see notation.md");
  f("initializer_range", c.initializer_range, positive()).doc("standard deviation of `normal`");
  f("eos_token_id", c.eos_token_id, at_least(-1))
      .doc("end-of-text id, below V; -1: the tokenizer's, else none");
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
  f.doc("train", "text or list", "a glob, or `[{\"path\": GLOB, \"weight\": W}, ...]`, W > 0",
        "training shards; a list is a mixture, sampled by weight (1 unless given)");
  if (!f.reading()) {
    ordered_json parts = ordered_json::array();
    for (const MixturePart& p : c.train) parts.push_back({{"path", p.path}, {"weight", p.weight}});
    f.write_raw("train", c.train.size() == 1 ? ordered_json(c.train[0].path) : parts);
  }
  f("valid", c.valid).doc("validation shards, a glob");
  f("tokenizer", c.tokenizer)
      .doc(
          "`byte`, a file or a folder; recorded with the checkpoints, and its vocabulary must fit");
  f("seq_len", c.seq_len, between(1, 1 << 24)).doc("T, tokens a sequence");
  f("shuffle", c.shuffle).doc("false: in order");
  f("reset_at_eos", c.reset_at_eos)
      .doc("the state is zeroed before each end-of-text input; needs an end-of-text id");
  f("seed", c.seed).doc("of the order of samples");
}

void fields(Fields& f, OptimConfig& c) {
  f("lr", c.lr, at_least(0)).doc("peak learning rate");
  f("betas", c.betas, below(0, 1)).doc("of AdamW");
  f("eps", c.eps, positive()).doc("of AdamW");
  f("weight_decay", c.weight_decay, at_least(0)).doc("decoupled");
  f.choice("decay", c.decay, {{"matrices", DecayKind::matrices}, {"all", DecayKind::all}})
      .doc("which weights decay; `matrices`: 2-D weights but Gamma");
  f("clip_norm", c.clip_norm, at_least(0)).doc("of the whole gradient; 0: off");
  f.choice("schedule", c.schedule,
           {{"cosine", ScheduleKind::cosine},
            {"inverse_sqrt", ScheduleKind::inverse_sqrt},
            {"wsd", ScheduleKind::wsd},
            {"linear", ScheduleKind::linear},
            {"constant", ScheduleKind::constant}})
      .doc("see notation.md");
  f("warmup_steps", c.warmup_steps, at_least(0)).doc("steps from `warmup_init_lr` to `lr`");
  f("warmup_init_lr", c.warmup_init_lr, at_least(0)).doc("where the warm-up starts");
  f("min_lr_ratio", c.min_lr_ratio, between(0, 1))
      .doc("end of `cosine`, `linear` and `wsd`, as a share of `lr`");
}

void fields(Fields& f, TrainConfig& c) {
  f.require("steps");
  f("steps", c.steps, at_least(0)).doc("updates of the whole run; the schedule spans them");
  f("global_batch", c.global_batch, between(1, 1 << 30))
      .doc("sequences a step over all ranks, a multiple of ranks x `micro_batch`");
  f("micro_batch", c.micro_batch, between(1, 1 << 24))
      .doc("sequences a forward pass of one rank; the rest is accumulated");
  f.choice("precision", c.precision, {{"bf16", Precision::bf16}, {"fp32", Precision::fp32}})
      .doc("bf16: fp32 master weights, moments and gradients. The CPU computes both in fp32");
  f.choice("recompute", c.recompute,
           {{"none", Recompute::none},
            {"elementwise", Recompute::elementwise},
            {"block", Recompute::block}})
      .doc(
          "`elementwise`: what norms and the GLU hand to products is not kept but made again in "
          "backward; `block`: all activations of a block are");
  f("seed", c.seed).doc("of initial weights and dropout");
  f("log_every", c.log_every, at_least(0))
      .doc("steps; 0: off. With it on, the last step is logged too");
  f("eval_every", c.eval_every, at_least(0))
      .doc("steps; 0: off. With it on, the end of a run is evaluated too");
  f("eval_tokens", c.eval_tokens, at_least(1)).doc("validation tokens scored, from the start");
  f("monitor_every", c.monitor_every, at_least(0))
      .doc("steps between looks inside (`layers.jsonl`, monitoring.md); 0: off");
  f("sample_every", c.sample_every, at_least(0))
      .doc("steps between text samples of 128 tokens, where `data.tokenizer` is set; 0: off");
  f("sample_prompt", c.sample_prompt).doc("what they begin with, behind an end-of-text token");
  f("checkpoint_every", c.checkpoint_every, at_least(0))
      .doc("steps; 0: only at the end and at a stop");
  f("keep_checkpoints", c.keep_checkpoints, at_least(1)).doc("older ones are removed");
  f.choice("on_nonfinite", c.on_nonfinite,
           {{"skip", OnNonfinite::skip},
            {"abort", OnNonfinite::abort},
            {"rollback", OnNonfinite::rollback}})
      .doc(
          "loss or gradient not finite: leave the update out; end with exit 4; go back to the "
          "newest checkpoint, at most three times in a row, and leave the batches in between out");
  f("spike_zscore", c.spike_zscore, at_least(0))
      .doc(
          "a step is a loss spike where its loss lies more than this many robust standard "
          "deviations (1.4826 MAD) above the median of the window; 0: off. 6 is usual");
  f("spike_window", c.spike_window, between(8, 4096))
      .doc(
          "losses that the window holds; judged from half of them on. A loss that is not finite, "
          "or whose update was left out, never enters");
  f.choice("on_spike", c.on_spike, {{"warn", OnSpike::warn}, {"skip", OnSpike::skip}})
      .doc(
          "`skip`: the update of a spike is left out, decided before it (one more wait for the "
          "device a step). After 16 in a row the window starts anew");
  f("zero", c.zero, between(0, 1))
      .doc("1: optimizer states divided over the ranks (ZeRO-1, distributed.md)");
  f.choice("reduce_dtype", c.reduce_dtype,
           {{"fp32", ReduceDType::fp32}, {"bf16", ReduceDType::bf16}})
      .doc("of the gradients that travel between ranks");
}

// What a resumed run may change; of data.train the paths.
const std::set<std::string> kMayChange = {"train.steps",
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
  check(!is_folder(path), Exit::data, "{}: is a folder; give the config file in it", path);
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

std::string config_reference() {
  Config c;
  std::string out =
      "# Config\n\nWritten by `hgrn config` from the field lists in src/model/config.cpp; a test "
      "compares the two.\n\n"
      "JSON; `//` and `/* */` comments are allowed. `--set SECTION.KEY=VALUE` overrides a key; "
      "VALUE is JSON if it parses as\nJSON, else a text. A key twice in one object, an unknown key "
      "(the nearest known one is named), a wrong type and a value out\nof range are exit 2. Whole "
      "numbers may be written as 1e6 (seeds may not). An empty text means none.\n";
  const auto list = [&](const char* name, auto& section) {
    std::vector<FieldRow> rows;
    Fields f = Fields::lister(rows);
    fields(f, section);
    out += fmt::format("\n| `{}.` | Type | Default | Allowed | Meaning |\n|---|---|---|---|---|\n",
                       name);
    for (const FieldRow& r : rows)
      out += fmt::format("| `{}` | {} | {} | {} | {} |\n", r.key, r.type, r.fallback, r.allowed,
                         r.meaning);
  };
  list("model", c.model);
  list("data", c.data);
  list("optim", c.optim);
  list("train", c.train);
  out += "\nA resumed run may change the paths (not the weights) of `data.train`, and";
  for (const std::string& key : kMayChange)
    if (key != "data.train") out += fmt::format(" `{}`", key);
  return out + ".\nAnother difference is exit 2 naming the key.\n";
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
      } else if (!kMayChange.count(name) && value != old) {
        changed.push_back(name);
      }
    }
  return changed;
}

}  // namespace hgrn

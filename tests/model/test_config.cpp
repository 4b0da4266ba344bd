// Config: every shipped file, counts to the last parameter, overrides, and what bad input gets.
#include "model/config.h"

#include <fstream>
#include <functional>
#include <sstream>

#include "catch.h"
#include "model/fields.h"
#include "model/hf_config.h"
#include "model/lm.h"
#include "model/plan.h"
#include "ops/plan_ops.h"
#include "temp_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

const std::string kConfigs = HGRN_SOURCE_DIR "/configs/";
const char* kSmall =
    R"({"model": {"vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 2,
        "expand_ratio": 16, "intermediate_size": 128},
        "data": {"train": "x_*.bin"}, "train": {"steps": 10}})";

std::string error_of(const std::function<void()>& f, Exit code) {
  try {
    f();
  } catch (const Error& e) {
    CHECK(int(e.code()) == int(code));
    return e.what();
  }
  FAIL("no error");
  return "";
}

std::string usage_error(const std::string& set, const std::string& json = kSmall) {
  return error_of(
      [&] {
        parse_config(json, "f.json",
                     set.empty() ? std::vector<std::string>{} : std::vector<std::string>{set});
      },
      Exit::usage);
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

int64_t parameters(const std::string& file) {
  const Config c = load_config(kConfigs + file);
  const auto ops = make_plan_ops(DType::bf16, false);
  return LanguageModel(*ops, c.model).params().count();
}

}  // namespace

TEST_CASE("config: parameter counts of the paper's models", "[model]") {
  CHECK(parameters("wikitext103_44m.json") == 44'661'244);
  CHECK(parameters("hgrn2_150m.json") == 144'812'544);
  CHECK(parameters("hgrn2_385m.json") == 385'542'144);
  CHECK(parameters("hgrn2_1b.json") == 1'027'919'872);
  CHECK(parameters("hgrn2_2.9b.json") == 2'983'777'280);
  CHECK(has(plan_text(load_config(kConfigs + "hgrn2_150m.json"), {}), "144,812,544"));
}

TEST_CASE("config: what is left out takes the documented value, and survives a round trip",
          "[model]") {
  const Config c = parse_config(kSmall, "f.json");
  CHECK(c.model.mixer == "hgru2");
  CHECK(c.optim.lr == 3e-4);
  CHECK(c.train.global_batch == 208);
  CHECK(c.data.seq_len == 2048);
  const std::string text = config_to_json(c);
  CHECK(config_to_json(parse_config(text, "f.json")) == text);
  for (const char* file : {"wikitext103_44m.json", "hgrn2_150m.json", "quickstart.json"}) {
    const std::string once = config_to_json(load_config(kConfigs + file));
    CHECK(config_to_json(parse_config(once, file)) == once);
  }
}

TEST_CASE("config: overrides take JSON or text", "[model]") {
  const Config c = parse_config(
      kSmall, "f.json",
      {"optim.lr=1e-3", "data.valid=v_*.bin", "optim.betas=[0.8,0.9]", "train.steps=1e3",
       "model.bias=true", R"(data.train=[{"path":"a","weight":2},{"path":"b"}])"});
  CHECK(c.optim.lr == 1e-3);
  CHECK(c.data.valid == "v_*.bin");
  CHECK(c.optim.betas[1] == 0.9);
  CHECK(c.train.steps == 1000);
  CHECK(c.model.bias);
  REQUIRE(c.data.train.size() == 2);
  CHECK(c.data.train[0].weight == 2);
  CHECK(c.data.train[1].path == "b");
}

TEST_CASE("config: bad input names file, key and the mend", "[model]") {
  CHECK(has(usage_error("optim.learning_rate=1"), "f.json:optim.learning_rate: unknown key"));
  CHECK(has(usage_error("optim.wramup_steps=1"), "did you mean warmup_steps?"));
  CHECK(has(usage_error("optm.lr=1"), "did you mean optim?"));
  CHECK(has(usage_error("model.norm=rmsnrom"), "did you mean rmsnorm?"));
  CHECK(has(usage_error("optim.lr=fast"), "f.json:optim.lr: expected a number"));
  CHECK(has(usage_error("train.steps=1.5"), "whole number"));
  CHECK(has(usage_error("model.dropout=1"), "below 1"));
  CHECK(has(usage_error("optim.betas=[0.9]"), "two numbers"));
  CHECK(has(usage_error("optim.betas=[0.9,1]"), "below 1"));
  CHECK(has(usage_error("lr=1"), "optim.lr"));
  CHECK(has(usage_error("optim.lr"), "KEY=VALUE"));
  CHECK(has(usage_error("model.expand_ratio=48"), "hidden_size: 64 is not a multiple"));
  CHECK(has(usage_error("data.train=[]"), "data.train"));
  CHECK(has(usage_error(R"(data.train=[{"path":"a","weight":0}])"), "above 0"));
  CHECK(has(usage_error("", R"({"model": 3})"), "expected an object"));
  CHECK(has(usage_error("", R"({"model": {}, "model": {}})"), "twice"));
  CHECK(has(usage_error("", "{"), "not valid JSON"));
  CHECK(has(usage_error("", ""), "not valid JSON"));
  const std::string deep = std::string(100000, '[') + std::string(100000, ']');
  CHECK(has(usage_error("", R"({"model": )" + deep + "}"), "nested deeper"));
  CHECK(has(usage_error("data.train=" + deep), "nested deeper"));
  CHECK(has(usage_error("data.train=caf\xe9_*.bin"), "not UTF-8"));
  CHECK(has(usage_error("data.tr\xe9=1"), "not UTF-8"));
  CHECK(has(usage_error("train.global_batch=9223372036854775806"), "at most 1073741824"));
  CHECK(
      has(usage_error("", R"({"train": {"steps": 1}})"), "model.vocab_size: this key is required"));
  CHECK(has(error_of([] { load_config("/no/such.json"); }, Exit::data), "/no/such.json"));
  const auto ops = make_plan_ops(DType::bf16, false);
  CHECK(
      has(error_of([&] { make_mixer("mamba", *ops, {}); }, Exit::usage), "this build has: hgru2"));
}

TEST_CASE("config: a batch that does not divide names the nearest that does", "[model]") {
  TrainConfig t;
  t.global_batch = 208;
  t.micro_batch = 26;
  check_batch(t, 8);
  const std::string text = error_of([&] { check_batch(t, 3); }, Exit::usage);
  CHECK(has(text, "234"));
  t.global_batch = 10;
  CHECK(has(error_of([&] { check_batch(t, 1); }, Exit::usage), "26"));
}

TEST_CASE("config: what a resumed run may change", "[model]") {
  const std::string before = config_to_json(parse_config(kSmall, "f"));
  auto changed = [&](const std::string& set) {
    return forbidden_changes(before, config_to_json(parse_config(kSmall, "f", {set})));
  };
  CHECK(changed("train.steps=99").empty());
  CHECK(changed("train.micro_batch=13").empty());
  CHECK(changed("train.checkpoint_every=7").empty());
  CHECK(changed("data.train=elsewhere/x_*.bin").empty());
  CHECK(changed("optim.lr=1") == std::vector<std::string>{"optim.lr"});
  CHECK(changed("train.global_batch=26") == std::vector<std::string>{"train.global_batch"});
  CHECK(changed("model.dropout=0.1") == std::vector<std::string>{"model.dropout"});
  CHECK(changed("train.on_spike=skip") == std::vector<std::string>{"train.on_spike"});
  // A run of an older program lacks keys that came later: it did what their defaults do.
  std::string old = before;
  const size_t at = old.find("    \"spike_zscore\"");
  old.erase(at, old.find('\n', at) - at);
  CHECK(old.find("spike_zscore") == std::string::npos);
  CHECK(forbidden_changes(old, before).empty());
  CHECK(
      forbidden_changes(old, config_to_json(parse_config(kSmall, "f", {"train.spike_zscore=6"}))) ==
      std::vector<std::string>{"train.spike_zscore"});
}

TEST_CASE("config: the plan of the largest model says what fits", "[model]") {
  const Config c = load_config(kConfigs + "hgrn2_2.9b.json");
  const std::string text = plan_text(c, {.gpus = 1, .device_memory_gib = 80});
  CHECK(has(text, "2,983,777,280"));
  CHECK(has(text, "largest micro-batch that fits"));
  CHECK_FALSE(has(text, "none fits"));
  CHECK(has(plan_text(c, {.gpus = 1, .device_memory_gib = 24}), "none fits"));
}

TEST_CASE("config: fla's keys that change what a folder means", "[model]") {
  const TempFolder tmp;
  const auto read = [&](const std::string& more) {
    spill(tmp / "config.json",
          R"({"model_type": "hgrn2", "hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 9)" +
              more + "}");
    return read_hf_config(tmp.path());
  };
  CHECK(read("").expand_ratio == 128);  // fla's default
  CHECK(read(R"(, "num_heads": 4)").expand_ratio == 128);
  CHECK(read(R"(, "expand_ratio": null, "num_heads": 4)").expand_ratio == 64);
  CHECK(read(R"(, "expand_ratio": 32)").expand_ratio == 32);
  CHECK(read("").intermediate_size == 768);
  CHECK_FALSE(read("").tie_word_embeddings);
  for (const char* refused : {R"(, "elementwise_affine": false)", R"(, "attnres_block_size": 4)",
                              R"(, "use_short_conv": true)", R"(, "attn": {"layers": [1]})",
                              R"(, "expand_ratio": null, "num_heads": 0, "hidden_size": 0)"})
    CHECK(thrown_by([&] { read(refused); }).code == Exit::data);
  CHECK(read(R"(, "attnres_block_size": null, "elementwise_affine": true)").norm_eps == 1e-6);
}

TEST_CASE("config: docs/config.md is what the field lists say", "[model]") {
  std::ifstream in(HGRN_SOURCE_DIR "/docs/config.md");
  std::stringstream text;
  text << in.rdbuf();
  INFO("mend it with: build/hgrn config > docs/config.md");
  CHECK(text.str() == config_reference());
}

TEST_CASE("config: the reference shows every key that a config holds", "[model]") {
  const std::string reference = config_reference();
  const std::string written = config_to_json(parse_config(kSmall, "small"));
  int64_t keys = 0;
  for (size_t at = 0; (at = written.find("\": ", at)) != std::string::npos; ++at) {
    const size_t from = written.rfind('"', at - 1) + 1;
    const std::string key = written.substr(from, at - from);
    if (key == "model" || key == "data" || key == "optim" || key == "train") continue;
    INFO(key);
    CHECK(reference.find("| `" + key + "` |") != std::string::npos);
    ++keys;
  }
  CHECK(keys > 45);
  CHECK(reference.find("|  |\n") == std::string::npos);  // a key without a meaning
}

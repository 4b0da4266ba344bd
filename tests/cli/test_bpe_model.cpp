// A model of byte-level BPE tokens from text to a sample: its checkpoint carries the tokenizer, and
// tokenizers that do not fit or cannot be read are refused.
#include <filesystem>
#include <nlohmann/json.hpp>

#include "catch.h"
#include "cli/program.h"
#include "text/shard.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;
namespace fs = std::filesystem;

namespace {

using Words = std::vector<std::string>;

const std::string kGolden = HGRN_SOURCE_DIR "/tests/golden/tokenizers/";

std::string config_text(const std::string& data, const std::string& tokenizer, int vocab) {
  return R"({"model": {"vocab_size": )" + std::to_string(vocab) +
         R"(, "hidden_size": 32, "num_hidden_layers": 1, "expand_ratio": 16,
              "intermediate_size": 32},
    "data": {"train": ")" +
         data + R"(", "tokenizer": ")" + tokenizer + R"(", "seq_len": 32},
    "optim": {"lr": 1e-2, "warmup_steps": 5},
    "train": {"steps": 30, "global_batch": 4, "micro_batch": 4, "precision": "fp32"}})";
}

void refused(const TempFolder& tmp, const Words& words, int code, const Words& parts) {
  const Ended e = Program(tmp, words).wait();
  INFO(e.err);
  CHECK(e.code == code);
  CHECK(e.errors() == 1);
  for (const std::string& part : parts) CHECK(e.says(part));
}

}  // namespace

TEST_CASE("bpe model: its checkpoint is evaluated and sampled with the tokenizer it carries",
          "[cli]") {
  const TempFolder tmp;
  std::string text;
  for (int i = 0; i < 300; ++i)
    text += "The state decides what isn't forgotten: naïve 日本語, " + std::to_string(i) + ".\n";
  spill(tmp / "text.txt", text);
  const auto ok = [&](const Words& words) {
    const Ended e = Program(tmp, words).wait();
    INFO(e.err);
    REQUIRE(e.code == 0);
    return e;
  };
  for (const std::string style : {"gpt2", "llama3", "neox"}) {
    INFO(style);
    fs::create_directory(tmp / style);
    fs::copy(kGolden + style + ".json", tmp / (style + "/tokenizer.json"));
    const std::string tokenizer = tmp / style, run = tmp / (style + "-run");
    ok({"tokenize", "--tokenizer", tokenizer, "--out", tmp / (style + "-t"), tmp / "text.txt"});
    const int64_t count = Shard(tmp / (style + "-t_000000.bin")).count();
    spill(tmp / "c.json", config_text(tmp / (style + "-t_*.bin"), tokenizer, 720));
    ok({"train", "--config", tmp / "c.json", "--out", run, "--device", "cpu"});
    fs::remove_all(tokenizer);  // only the checkpoint has it now
    ok({"eval", "--checkpoint", run, "--text", tmp / "text.txt", "--json", tmp / "e.json"});
    const auto j = nlohmann::json::parse(slurp(tmp / "e.json"));
    CHECK(j["tokens"] == count - 1);  // all but the end-of-text in front
    CHECK(j["bytes"] == text.size());
    CHECK(j["ppl"] < 720);
    const Ended e = ok({"generate", "--checkpoint", run, "--prompt", "The state", "--tokens", "8"});
    CHECK(e.says("8 tokens"));
    ok({"inspect", run, "--verify"});
    fs::create_directory(tmp / "moved");  // and one checkpoint alone, elsewhere
    fs::rename(run + "/checkpoints/step-00000030", tmp / "moved/here");
    ok({"generate", "--checkpoint", tmp / "moved/here", "--prompt", "The", "--tokens", "2"});
    fs::remove_all(tmp / "moved");
  }
}

TEST_CASE("bpe model: tokenizers that do not fit or cannot be read are refused", "[cli]") {
  const TempFolder tmp;
  write_shard(tmp / "t_000000.bin", learnable_tokens(2000, 256, 1));
  spill(tmp / "c.json", config_text(tmp / "t_*.bin", "byte", 300));
  REQUIRE(Program(tmp, {"train", "--config", tmp / "c.json", "--out", tmp / "run", "--device",
                        "cpu", "--steps", "1"})
              .wait()
              .code == 0);
  spill(tmp / "text.txt", "some text");
  const auto eval = [&](const std::string& tokenizer) {
    return Words{"eval",           "--checkpoint", tmp / "run", "--text",
                 tmp / "text.txt", "--tokenizer",  tokenizer};
  };
  // Larger than the model: both sizes, and what to do.
  const std::string large = kGolden + "gpt2.json";
  const Words both = {"701", "300", "gpt2.json"};
  refused(tmp, eval(large), 2, {"701 is larger than the model's 300", "gpt2.json", "trained with"});
  refused(tmp, {"generate", "--checkpoint", tmp / "run", "--prompt", "a", "--tokenizer", large}, 2,
          both);
  refused(tmp,
          {"train", "--config", tmp / "c.json", "--out", tmp / "r2", "--device", "cpu", "--set",
           "data.tokenizer=" + large},
          2, both);

  const std::string good = slurp(large), file = tmp / "tokenizer.json";
  const auto tokenize = [&](const std::string& tokenizer) {
    return Words{"tokenize", "--tokenizer", tokenizer, "--out", tmp / "x", tmp / "text.txt"};
  };
  const auto both_refuse = [&](const std::string& content, const Words& parts) {
    spill(file, content);
    refused(tmp, eval(file), 3, parts);
    refused(tmp, tokenize(file), 3, parts);
  };
  both_refuse(good.substr(0, good.size() / 2),
              {"tokenizer.json: not valid JSON at byte", "line 1"});
  auto j = nlohmann::json::parse(good);
  j["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", "_"}};
  both_refuse(j.dump(), {"tokenizer.json", "Metaspace", "ByteLevel"});
  j = nlohmann::json::parse(good);
  j["model"]["type"] = "WordPiece";
  both_refuse(j.dump(), {"tokenizer.json", "WordPiece", "BPE"});
  j = nlohmann::json::parse(good);
  j["model"]["merges"][3] = "a";
  both_refuse(j.dump(), {"tokenizer.json", "merge 4"});
  refused(tmp, tokenize(tmp / "none.json"), 3, {"none.json", "no such file"});
  CHECK_FALSE(fs::exists(tmp / "x_000000.bin"));

  // A task's line without a field: file, line, and the form of a line.
  spill(tmp / "task.jsonl",
        "{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": 1}\n\n{\"query\": \"q\"}\n");
  refused(
      tmp,
      {"eval", "--checkpoint", tmp / "run", "--task", "piqa", "--task-data", tmp / "task.jsonl"}, 3,
      {"task.jsonl:3: no field \"choices\"", "\"gold\": index"});
}

// Inputs at the edge of what a user may give: paths with spaces, quotes and non-ASCII letters
// through the whole of a run, and files of 0 bytes of every kind.
#include <filesystem>

#include "catch.h"
#include "cli/program.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;
namespace fs = std::filesystem;

namespace {

using Words = std::vector<std::string>;

Ended run(const TempFolder& tmp, const Words& words) {
  return Program(tmp, words).wait();
}

}  // namespace

TEST_CASE("limits: any path works from text to a resumed run", "[cli]") {
  const TempFolder tmp;
  const std::string odd = "ein 'Ordner' \"ж 日本\" é\\n $HOME;-x";
  fs::create_directory(tmp / odd);
  const std::string base = tmp / odd + "/";
  std::string text;
  for (int i = 0; i < 200; ++i) text += "Größe, размер, 大きさ.\n";
  spill(base + "a téxt.txt", text);
  Ended e = run(
      tmp, {"tokenize", "--tokenizer", "byte", "--out", base + "tokéns t", base + "a téxt.txt"});
  INFO(e.err);
  REQUIRE(e.code == 0);
  spill(base + "cönfig c.json", R"({
    "model": {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "expand_ratio": 8,
              "intermediate_size": 16},
    "data": {"train": "x", "tokenizer": "byte", "seq_len": 32},
    "train": {"steps": 9, "global_batch": 2, "micro_batch": 2, "precision": "fp32"}})");
  const auto train = [&](const std::string& out, const Words& more) {
    Words w = {"train", "--config", base + "cönfig c.json",
               "--out", base + out, "--device",
               "cpu",   "--set",    "data.train=" + base + "tokéns t_000000.bin"};
    w.insert(w.end(), more.begin(), more.end());
    return run(tmp, w);
  };
  REQUIRE(train("run r", {"--steps", "4"}).code == 0);
  e = train("run r", {});
  CHECK(e.code == 0);
  CHECK(e.says("at step 4"));
  REQUIRE(train("whole", {}).code == 0);
  const std::string end = "/checkpoints/step-00000009";
  CHECK(slurp(base + "run r" + end + "/model.safetensors").size() > 1000);
  CHECK(slurp(base + "run r" + end + "/model.safetensors") ==
        slurp(base + "whole" + end + "/model.safetensors"));
  CHECK(run(tmp, {"eval", "--checkpoint", base + "run r", "--text", base + "a téxt.txt", "--json",
                  base + "e é.json"})
            .code == 0);
  CHECK(slurp(base + "e é.json").find("\"ppl\"") != std::string::npos);
  CHECK(run(tmp, {"inspect", base + "run r", "--verify"}).code == 0);
  CHECK(train("third", {"--resume", base + "run r" + end}).code == 0);
  CHECK(train("fourth", {"--init-from", base + "run r" + end, "--steps", "1"}).code == 0);
  CHECK(run(tmp, {"generate", "--checkpoint", base + "run r", "--prompt", "ж", "--tokens", "3"})
            .code == 0);
}

TEST_CASE("limits: a file of 0 bytes is named, whatever it should be", "[cli]") {
  const RunFolder r;
  const Words train = {"train", "--config",       r.folder / "config.json",
                       "--out", r.folder / "run", "--device",
                       "cpu",   "--set",          "train.checkpoint_every=6"};
  REQUIRE(run(r.folder, train).code == 0);
  const std::string newest = r.folder / "run/checkpoints/step-00000012/";
  const auto with_empty = [&](const std::string& path, const Words& words, int code,
                              const std::string& part) {
    const std::string before = slurp(path);
    spill(path, "");
    const Ended e = run(r.folder, words);
    INFO(path << "\n" << e.err);
    CHECK(e.signal == 0);
    CHECK(e.code == code);
    CHECK(e.errors() == (code == 0 ? 0 : 1));
    CHECK(e.says(part));
    spill(path, before);
  };
  with_empty(r.folder / "config.json", train, 2, "config.json: not valid JSON");
  with_empty(r.folder / "train_000001.bin", train, 3, "train_000001.bin");
  with_empty(r.folder / "valid_000000.bin",
             {"eval", "--checkpoint", r.folder / "run", "--data", r.folder / "valid_*.bin"}, 3,
             "valid_000000.bin");
  for (const char* name : {"model.safetensors", "optimizer-00000-of-00001.safetensors",
                           "trainer.json", "MANIFEST.json", "config.json"}) {
    with_empty(newest + name, {"inspect", newest, "--verify"}, 3, name);
    Words resume = train;
    resume.insert(resume.end(), {"--resume", newest});
    with_empty(newest + name, resume, 3, name);
  }
  // Left alone in a Hugging Face folder, without a manifest that would notice.
  fs::create_directory(r.folder / "hf");
  for (const char* name : {"config.json", "model.safetensors"})
    fs::copy(newest + name, r.folder / (std::string("hf/") + name));
  for (const char* name : {"config.json", "model.safetensors"}) {
    Words init = {"train", "--config",        r.folder / "config.json",
                  "--out", r.folder / "init", "--device",
                  "cpu",   "--init-from",     r.folder / "hf"};
    with_empty(r.folder / (std::string("hf/") + name), init, 3, name);
  }
  // A text without a byte gives no token to train on; that is said, not a shard of nothing.
  spill(r.folder / "empty.txt", "");
  const Ended e = run(r.folder, {"tokenize", "--tokenizer", "byte", "--out", r.folder / "e",
                                 r.folder / "empty.txt"});
  INFO(e.err);
  CHECK((e.code == 0 || e.code == 3));
  CHECK(e.signal == 0);
  CHECK(e.says(e.code == 0 ? "0 tokens" : "empty.txt"));

  // What is no input but a by-product may be empty: the run goes on.
  Words more = train;
  more.insert(more.end(), {"--set", "train.steps=13"});
  for (const char* name : {"metrics.jsonl", "log.txt", ".lock"})
    spill(r.folder / (std::string("run/") + name), "");
  CHECK(run(r.folder, more).code == 0);
  // And an automatic resume passes over what lacks its bytes.
  spill(r.folder / "run/checkpoints/step-00000013/trainer.json", "");
  more.back() = "train.steps=14";
  const Ended over = run(r.folder, more);
  INFO(over.err);
  CHECK(over.code == 0);
  CHECK(over.says("not resumed from"));
}

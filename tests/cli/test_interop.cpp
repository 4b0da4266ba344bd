// Checkpoints in the hands of others, and others' in ours: the safetensors package of PyPI and a
// float64 model in NumPy (tools/interop/hgrn2_numpy.py). Skipped where the packages are absent.
// fla itself needs a GPU: tools/peers/fla_open.py.
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "catch.h"
#include "launch/process.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

const std::string kTool = HGRN_SOURCE_DIR "/tools/interop/hgrn2_numpy.py";

// A Python with the packages: $HGRN_PYTHON or python3. Empty: none.
std::string python(const TempFolder& tmp) {
  const char* given = std::getenv("HGRN_PYTHON");
  const std::string program = given ? given : "python3";
  Process probe(program, {"-c", "import numpy, safetensors; safetensors.serialize_file"}, {},
                tmp / "probe");
  if (probe.wait() == 0) return program;
  WARN("skipped: " << program
                   << " lacks the packages; pip install safetensors numpy, or set HGRN_PYTHON");
  return "";
}

void run(const TempFolder& tmp, const std::string& program, const std::vector<std::string>& words,
         const std::string& log) {
  std::filesystem::remove(tmp / log);
  Process p(program, words, {}, tmp / log);
  const int code = p.wait();
  INFO(p.output());
  REQUIRE(code == 0);
}

std::vector<double> nlls_of(const std::string& jsonl) {
  std::vector<double> nlls;
  std::istringstream in(slurp(jsonl));
  for (std::string line; std::getline(in, line);)
    if (!line.empty() && line[0] == '{') nlls.push_back(nlohmann::json::parse(line)["nll"]);
  return nlls;
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  double most = 0;
  for (size_t i = 0; i < a.size(); ++i) most = std::max(most, std::fabs(a[i] - b[i]));
  return most;
}

std::string shell_quoted(const std::string& s) {
  return "'" + s + "'";
}

// Both sides' nll of each token of the text, ours through `hgrn eval --per-token`.
void compare(const TempFolder& tmp, const std::string& py, const std::string& folder) {
  const std::string text = "A state of fixed size, whatever was read.";
  spill(tmp / "text", text);
  std::string tokens = "[256";
  for (unsigned char c : text) tokens += "," + std::to_string(int(c));
  spill(tmp / "tokens.json", tokens + "]");
  run(tmp, "sh",
      {"-c", shell_quoted(py) + " " + shell_quoted(kTool) + " score " + shell_quoted(folder) + " " +
                 shell_quoted(tmp / "tokens.json") + " > " + shell_quoted(tmp / "theirs")},
      "score.log");
  std::vector<std::string> words = {
      "eval",       "--checkpoint", folder,     "--text", tmp / "text",  "--tokenizer", "byte",
      "--protocol", "carry",        "--device", "cpu",    "--per-token", tmp / "ours"};
  run(tmp, HGRN_BINARY, words, "eval.log");
  const std::vector<double> ours = nlls_of(tmp / "ours"), theirs = nlls_of(tmp / "theirs");
  REQUIRE(theirs.size() == text.size());
  REQUIRE(ours.size() == text.size());
  CHECK(largest_difference(ours, theirs) < 2e-4);
}

}  // namespace

TEST_CASE("interop: a checkpoint opens in safetensors as it is, and means the same", "[cli]") {
  const TempFolder tmp;
  const std::string py = python(tmp);
  if (py.empty()) return;
  write_shard(tmp / "t.bin", learnable_tokens(3000, 256, 1));
  for (const char* more : {"", R"(, "tie_word_embeddings": false, "use_lower_bound": false)"}) {
    spill(tmp / "c.json",
          std::string(R"({"model": {"vocab_size": 257, "hidden_size": 24, "num_hidden_layers": 3,
          "expand_ratio": 8, "intermediate_size": 40, "initializer_range": 0.3)") +
              more + R"(}, "data": {"train": ")" + (tmp / "t.bin") +
              R"(", "tokenizer": "byte", "seq_len": 32}, "optim": {"lr": 1e-2, "warmup_steps": 2},
              "train": {"steps": 6, "global_batch": 4, "micro_batch": 4, "precision": "fp32"}})");
    run(tmp, HGRN_BINARY,
        {"train", "--config", tmp / "c.json", "--out", tmp / "run", "--device", "cpu", "--resume",
         "never"},
        "train.log");
    compare(tmp, py, tmp / "run/checkpoints/step-00000006");
  }
}

TEST_CASE("interop: folders of fla's layout open as they are, and training starts from them",
          "[cli]") {
  const TempFolder tmp;
  const std::string py = python(tmp);
  if (py.empty()) return;
  write_shard(tmp / "t.bin", learnable_tokens(3000, 256, 1));
  const std::vector<std::vector<std::string>> kinds = {
      {"--dtype", "F32", "--tied"},
      {"--dtype", "BF16", "--shards", "3"},
      {"--dtype", "F16", "--shards", "2", "--tied", "--heads"}};
  for (size_t i = 0; i < kinds.size(); ++i) {
    const std::string folder = tmp / ("fla-" + std::to_string(i));
    std::vector<std::string> words = {kTool, "make", folder};
    words.insert(words.end(), kinds[i].begin(), kinds[i].end());
    run(tmp, py, words, "make.log");
    if (kinds[i][1] != "BF16") compare(tmp, py, folder);  // NumPy has no bf16 to read it with
    // The weights arrive: after no step the checkpoint holds them, in fp32.
    const bool tied = kinds[i].back() != "3";
    spill(tmp / "c.json",
          std::string(R"({"model": {"vocab_size": 257, "hidden_size": 24, "num_hidden_layers": 3,
          "expand_ratio": 8, "intermediate_size": 40, "tie_word_embeddings": )") +
              (tied ? "true" : "false") + R"(}, "data": {"train": ")" + (tmp / "t.bin") +
              R"(", "tokenizer": "byte", "seq_len": 32}, "optim": {"lr": 1e-3, "warmup_steps": 0},
              "train": {"steps": 4, "global_batch": 4, "micro_batch": 4, "precision": "fp32"}})");
    run(tmp, HGRN_BINARY,
        {"train", "--config", tmp / "c.json", "--out", tmp / "run", "--device", "cpu", "--resume",
         "never", "--init-from", folder, "--steps", "0"},
        "train.log");
    const std::string start = tmp / "run/checkpoints/step-00000000";
    compare(tmp, py, start);
    const auto whole = [&](const std::string& dir) {
      run(tmp, HGRN_BINARY,
          {"eval", "--checkpoint", dir, "--text", HGRN_SOURCE_DIR "/LICENSE", "--tokenizer", "byte",
           "--device", "cpu", "--seq-len", "64", "--per-token", tmp / "all"},
          "eval.log");
      return nlls_of(tmp / "all");
    };
    const std::vector<double> theirs = whole(folder), ours = whole(start);
    REQUIRE(ours.size() == theirs.size());
    CHECK(largest_difference(ours, theirs) < 1e-5);
    run(tmp, HGRN_BINARY,
        {"train", "--config", tmp / "c.json", "--out", tmp / "run", "--device", "cpu"},
        "train.log");
    compare(tmp, py, tmp / "run/checkpoints/step-00000004");
  }
}

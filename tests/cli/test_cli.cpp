// The program from outside: exit codes, one-line errors that name the mend, and a whole round from
// text to a sample.
#include <algorithm>
#include <array>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <sstream>

#include "catch.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

struct Result {
  int code;
  std::string out, err;
  bool says(const std::string& part) const { return err.find(part) != std::string::npos; }
};

std::string quoted(const std::string& word) {
  std::string q(1, '\'');
  for (char c : word) {
    if (c == '\'')
      q.append("'\\''");
    else
      q.push_back(c);
  }
  q.push_back('\'');
  return q;
}

Result hgrn_(const TempFolder& tmp, const std::vector<std::string>& words) {
  std::string command = quoted(HGRN_BINARY);
  for (const std::string& w : words) command += " " + quoted(w);
  const std::string err = tmp / "stderr";
  std::FILE* pipe = popen((command + " 2>" + quoted(err) + " </dev/null").c_str(), "r");
  REQUIRE(pipe != nullptr);
  Result r;
  std::array<char, 4096> chunk;
  for (size_t n; (n = fread(chunk.data(), 1, chunk.size(), pipe)) > 0;)
    r.out.append(chunk.data(), n);
  const int status = pclose(pipe);
  r.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  r.err = slurp(err);
  return r;
}

int64_t error_lines(const Result& r) {
  int64_t n = 0;
  for (size_t at = 0; (at = r.err.find("error: ", at)) != std::string::npos; ++at) ++n;
  return n;
}

}  // namespace

TEST_CASE("cli: help on every level shows an example", "[cli]") {
  const TempFolder tmp;
  CHECK(hgrn_(tmp, {"--help"}).code == 0);
  CHECK(hgrn_(tmp, {"--version"}).out.rfind("hgrn ", 0) == 0);
  for (const char* command : {"train", "eval", "generate", "tokenize", "plan", "inspect", "launch",
                              "sweep", "completion", "report", "compare", "config"}) {
    const Result r = hgrn_(tmp, {command, "--help"});
    INFO(command);
    CHECK(r.code == 0);
    CHECK(r.out.find("Example:\n  hgrn " + std::string(command)) != std::string::npos);
  }
}

TEST_CASE("cli: completions and the manual know every command and flag", "[cli]") {
  const TempFolder tmp;
  const std::string help = hgrn_(tmp, {"sweep", "--help"}).out;
  CHECK(help.find("--grid") != std::string::npos);
  for (const char* kind : {"bash", "zsh", "fish", "man"}) {
    const Result r = hgrn_(tmp, {"completion", kind});
    INFO(kind);
    CHECK(r.code == 0);
    for (const char* word : {"train", "sweep", "completion", "init-from", "price-per-gpu-hour"}) {
      std::string text = r.out;
      for (size_t at; (at = text.find("\\-")) != std::string::npos;) text.erase(at, 1);
      CHECK(text.find(word) != std::string::npos);
    }
  }
  spill(tmp / "complete.sh", hgrn_(tmp, {"completion", "bash"}).out +
                                 "COMP_WORDS=(hgrn plan --ca) COMP_CWORD=2; _hgrn\n"
                                 "[ \"${COMPREPLY[*]}\" = --card ]\n");
  CHECK(std::system(("bash " + quoted(tmp / "complete.sh")).c_str()) == 0);
  CHECK(hgrn_(tmp, {"completion", "tcsh"}).code == 2);
}

TEST_CASE("cli: wrong usage is exit 2 and names the nearest valid word", "[cli]") {
  const TempFolder tmp;
  auto usage = [&](const std::vector<std::string>& words, const std::string& part) {
    const Result r = hgrn_(tmp, words);
    INFO(r.err);
    CHECK(r.code == 2);
    CHECK(error_lines(r) == 1);
    CHECK(r.says(part));
    CHECK(r.out.empty());
  };
  usage({}, "give a command: train");
  usage({"trian"}, "did you mean train?");
  usage({"train", "--confg", "x"}, "did you mean --config?");
  usage({"train", "--config", "x", "--steps", "many"}, "--steps");
  usage({"train"}, "--config");
  usage({"eval", "--checkpoint", "x"}, "--data");
  usage({"eval", "--checkpoint", "x", "--data", "y", "--protocol", "block"}, "protocol");
  usage({"eval", "--checkpoint", "x", "--data", "y", "--task", "piqa"}, "one of the three");
  usage({"eval", "--checkpoint", "x", "--task", "piqa"}, "--task-data");
  usage({"eval", "--checkpoint", "x", "--task", "piqua", "--task-data", "y"}, "did you mean piqa?");
  usage({"generate", "--checkpoint", "x", "--prompt", "a", "--prompts", "b"}, "one of the two");
  const std::string config = HGRN_SOURCE_DIR "/configs/quickstart.json";
  usage({"plan", "--config", config, "--card", "B300"}, "H100, H200, A100");
  usage({"plan", "--config", config, "--tflops", "3"}, "give both");
  usage({"plan", "--config", config, "--tokens", "many"}, "100B");
  usage({"sweep", "--config", config, "--out", tmp / "s"}, "no --grid");
  usage({"sweep", "--config", config, "--out", tmp / "s", "--grid", "optim.lr"}, "KEY=VALUE");
  usage({"generate", "--checkpoint", "x", "--prompt", "a", "--top-p", "2"}, "--top-p");
  usage({"train", "--config", HGRN_SOURCE_DIR "/configs/quickstart.json", "--set", "optim.lrr=1"},
        "did you mean lr?");
  usage({"train", "--config", HGRN_SOURCE_DIR "/configs/quickstart.json", "--set",
         "model.expand_ratio=100"},
        "model.hidden_size: 128 is not a multiple of expand_ratio 100");
  usage({"train", "--config", HGRN_SOURCE_DIR "/configs/quickstart.json", "--set",
         "train.micro_batch=5"},
        "the nearest that is: 10");
}

TEST_CASE("cli: missing and damaged files are exit 3 and named", "[cli]") {
  const TempFolder tmp;
  const std::string cut = tmp / "cut.bin";
  write_shard(cut, std::vector<int32_t>(100, 1));
  spill(cut, slurp(cut).substr(0, 1100));
  spill(tmp / "zero.bin", "");
  auto data = [&](const std::vector<std::string>& words, const std::string& part) {
    const Result r = hgrn_(tmp, words);
    INFO(r.err);
    CHECK(r.code == 3);
    CHECK(error_lines(r) == 1);
    CHECK(r.says(part));
  };
  data({"train", "--config", "/no/such.json"}, "/no/such.json");
  data({"inspect", cut}, "cut.bin");
  data({"inspect", tmp / "zero.bin"}, "zero.bin");
  data({"inspect", "/no/such"}, "/no/such");
  data({"generate", "--checkpoint", "/no/such", "--prompt", "x"}, "/no/such");
  data({"eval", "--checkpoint", tmp.path(), "--data", "x"}, "config.json");
}

TEST_CASE("cli: text to shards to a model to numbers and a sample", "[cli]") {
  const TempFolder tmp;
  std::string text;
  for (int i = 0; i < 400; ++i) text += "the cat sat on the mat and the dog ran.\n";
  spill(tmp / "a text.txt", text);
  Result r =
      hgrn_(tmp, {"tokenize", "--tokenizer", "byte", "--out", tmp / "t", tmp / "a text.txt"});
  INFO(r.err);
  REQUIRE(r.code == 0);
  CHECK(r.out == (tmp / "t_000000.bin") + "\n");

  spill(tmp / "c.json", R"({
    "model": {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "expand_ratio": 16,
              "intermediate_size": 64},  // comments are allowed
    "data": {"train": ")" + (tmp / "t_*.bin") +
                            R"(", "tokenizer": "byte", "seq_len": 64},
    "optim": {"lr": 1e-2, "warmup_steps": 5},
    "train": {"steps": 80, "global_batch": 4, "micro_batch": 4, "precision": "fp32"}})");
  r = hgrn_(tmp, {"train", "--config", tmp / "c.json", "--out", tmp / "run", "--device", "cpu"});
  REQUIRE(r.code == 0);
  CHECK(r.out.empty());  // stdout carries results, stderr the log

  CHECK(hgrn_(tmp, {"inspect", tmp / "run", "--verify"}).out.find("verified") != std::string::npos);
  CHECK(hgrn_(tmp, {"inspect", tmp / "run/metrics.jsonl"}).code == 0);
  CHECK(hgrn_(tmp, {"plan", "--config", tmp / "c.json"}).code == 0);

  double ppl[3];
  int i = 0;
  for (const char* protocol : {"blocks", "carry", "lines"}) {
    // Underscores and dashes are the same in flags.
    r = hgrn_(tmp, {"eval", "--checkpoint", tmp / "run", "--text", tmp / "a text.txt", "--protocol",
                    protocol, "--json", tmp / "e.json", "--per_token", tmp / "p.jsonl"});
    REQUIRE(r.code == 0);
    const auto j = nlohmann::json::parse(slurp(tmp / "e.json"));
    CHECK(j["tokens"] == text.size());
    CHECK(j["bytes"] == text.size());
    CHECK(j["words"] == 400 * 11);  // ten words and one end a line
    CHECK(j["step"] == 80);
    CHECK(j["protocol"] == protocol);
    ppl[i++] = j["ppl"];
    double nll = 0;
    int64_t lines = 0;
    std::istringstream in(slurp(tmp / "p.jsonl"));
    for (std::string line; std::getline(in, line); ++lines) {
      const auto t = nlohmann::json::parse(line);
      CHECK(t["i"] == lines);
      nll += t["nll"].get<double>();
    }
    CHECK(lines == int64_t(text.size()));
    CHECK(nll == Approx(j["nll"].get<double>()).epsilon(1e-5));
  }
  for (double p : ppl) CHECK(p < 2.5);
  CHECK(ppl[1] < ppl[0]);  // more context helps

  r = hgrn_(tmp, {"generate", "--checkpoint", tmp / "run", "--prompt", "the ", "--tokens", "12",
                  "--temperature", "0"});
  REQUIRE(r.code == 0);
  CHECK(r.out.rfind("the ", 0) == 0);
  CHECK(r.says("tokens/s"));
  const Result again = hgrn_(tmp, {"generate", "--checkpoint", tmp / "run", "--prompt", "the ",
                                   "--tokens", "30", "--seed", "4"});
  const Result same = hgrn_(tmp, {"generate", "--checkpoint", tmp / "run", "--prompt", "the ",
                                  "--tokens", "30", "--seed", "4"});
  CHECK(again.out == same.out);

  // Prompts from a file, JSON, stop texts.
  spill(tmp / "prompts.txt", "the cat \n\nand the dog\n");
  r = hgrn_(tmp,
            {"generate", "--checkpoint", tmp / "run", "--prompts", tmp / "prompts.txt", "--tokens",
             "16", "--temperature", "0", "--stop", "ma", "--stop", "ran", "--json"});
  REQUIRE(r.code == 0);
  CHECK(r.says("time to first token"));
  std::istringstream rows(r.out);
  int64_t index = 0;
  for (std::string line; std::getline(rows, line); ++index) {
    const auto j = nlohmann::json::parse(line);
    CHECK(j["index"] == index);
    CHECK(j["prompt"] == std::vector<std::string>{"the cat ", "", "and the dog"}.at(size_t(index)));
    CHECK(j["text"].get<std::string>().find("ma") == std::string::npos);
    CHECK((j["finish"] == "length" || j["finish"] == "stop" || j["finish"] == "end_of_text"));
    CHECK(j["tokens"] <= 16);
  }
  CHECK(index == 3);

  // A task: the model knows its one sentence.
  std::string items;
  for (int n = 0; n < 5; ++n)
    items += R"({"query": "the cat sat on", "choices": ["the dog", "the mat"], "gold": 1})"
             "\n";
  spill(tmp / "task.jsonl", items);
  r = hgrn_(tmp, {"eval", "--checkpoint", tmp / "run", "--task", "piqa", "--task-data",
                  tmp / "task.jsonl", "--task-suffix", "", "--json", tmp / "t.json", "--per-token",
                  tmp / "tp.jsonl"});
  INFO(r.err);
  REQUIRE(r.code == 0);
  CHECK(r.out.find("acc_norm") != std::string::npos);
  const auto task = nlohmann::json::parse(slurp(tmp / "t.json"));
  CHECK(task["results"]["piqa"]["acc,none"] == 1);
  CHECK(task["results"]["piqa"]["acc_stderr,none"] == 0);
  CHECK(task["n-samples"]["piqa"]["effective"] == 5);
  CHECK(task["config"]["query_suffix"] == "");
  const std::string each = slurp(tmp / "tp.jsonl");
  CHECK(std::count(each.begin(), each.end(), '\n') == 5 * 2 * 8);
  spill(tmp / "task.jsonl", items + "{\"query\": \"q\"}\n");
  r = hgrn_(tmp, {"eval", "--checkpoint", tmp / "run", "--task", "piqa", "--task-data",
                  tmp / "task.jsonl"});
  CHECK(r.code == 3);
  CHECK(error_lines(r) == 1);
  CHECK(r.says("task.jsonl:6: no field \"choices\""));

  // A tokenizer larger than the model.
  spill(tmp / "small.json", R"({
    "model": {"vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 1, "expand_ratio": 16,
              "intermediate_size": 16},
    "data": {"train": ")" + (tmp / "t_*.bin") +
                                R"(", "seq_len": 64},
    "train": {"steps": 0, "global_batch": 1, "micro_batch": 1, "precision": "fp32"}})");
  REQUIRE(hgrn_(tmp, {"train", "--config", tmp / "small.json", "--out", tmp / "small", "--device",
                      "cpu"})
              .code == 0);
  r = hgrn_(tmp,
            {"generate", "--checkpoint", tmp / "small", "--prompt", "x", "--tokenizer", "byte"});
  CHECK(r.code == 2);
  CHECK(error_lines(r) == 1);
  CHECK(r.says("257 is larger than the model's 200"));
}

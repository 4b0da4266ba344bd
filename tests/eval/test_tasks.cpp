// Zero-shot tasks: golden figures of an independent computation (tools/make_task_golden.py), shared
// contexts against whole passes, texts to tokens, and damaged files.
#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>

#include "catch.h"
#include "eval/byte_model.h"
#include "eval/loglikelihood.h"
#include "eval/tasks.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

const std::string kGolden = HGRN_SOURCE_DIR "/tests/golden/tasks";

// Exit code and message of what `f` throws.
template <class F>
std::pair<Exit, std::string> error_of(const F& f) {
  try {
    f();
  } catch (const Error& e) {
    return {e.code(), e.what()};
  }
  return {Exit::ok, "nothing was thrown"};
}

void check_golden(Device device, double tolerance, bool figures) {
  LoadedModel m = load_model(kGolden, device, "byte");
  const auto golden = nlohmann::json::parse(slurp(kGolden + "/golden.json"));
  for (const char* task : {"lambada_openai", "arc_easy", "winogrande"}) {
    INFO(task);
    std::map<std::pair<int64_t, int64_t>, std::vector<double>> nll;
    const TaskOptions o{task, kGolden + "/" + task + ".jsonl", ""};
    const TaskResult r =
        run_task(m, o, [&](int64_t item, int64_t pair, int64_t i, int32_t, double x) {
          auto& of_pair = nll[{item, pair}];
          REQUIRE(i == int64_t(of_pair.size()));
          of_pair.push_back(x);
        });
    const auto& want = golden[task]["nll"];
    REQUIRE(r.items == int64_t(want.size()));
    double error = 0, norm = 0;
    for (size_t i = 0; i < want.size(); ++i)
      for (size_t p = 0; p < want[i].size(); ++p) {
        const auto& got = nll.at({int64_t(i), int64_t(p)});
        REQUIRE(got.size() == want[i][p].size());
        for (size_t t = 0; t < got.size(); ++t) {
          const double x = want[i][p][t].get<double>();
          error += (got[t] - x) * (got[t] - x);
          norm += x * x;
        }
      }
    CHECK(std::sqrt(error / norm) < tolerance);
    if (!figures) continue;
    const auto j = nlohmann::json::parse(task_json(r, o, m))["results"][task];
    const auto& results = golden[task]["results"];
    CHECK(j.size() == results.size() + 1);  // and an alias
    for (const auto& [name, value] : results.items()) {
      INFO(name);
      CHECK(j.at(name).get<double>() == Approx(value.get<double>()).epsilon(2e-4));
    }
  }
}

}  // namespace

TEST_CASE("tasks: log-probabilities and figures are those of the independent computation",
          "[eval]") {
  check_golden(Device::cpu, 2e-6, true);
}

TEST_CASE("tasks: the same on a GPU", "[eval][gpu]") {
  if (!cuda_available()) {
    WARN("no GPU: skipped");
    return;
  }
  check_golden(Device::cuda, 2e-2, false);  // without trainer.json the device computes in bf16
}

TEST_CASE("tasks: shared contexts give the scores of whole passes, in batches of any size",
          "[eval]") {
  const ByteModel b;
  LoadedModel m = b.open();
  std::vector<ContextPair> pairs;
  for (uint64_t g = 0; g < 9; ++g) {
    const auto tokens = [&](uint64_t salt, int64_t count) {
      std::vector<int32_t> out;
      for (int64_t i = 0; i < count; ++i)
        out.push_back(int32_t(philox(salt, g, uint64_t(i)).v[0] % 257));
      return out;
    };
    const auto context = tokens(1, g == 4 ? 1 : int64_t(5 + 13 * g));  // one of a single token
    for (uint64_t k = 0; k < 1 + g % 4; ++k)
      pairs.push_back({context, tokens(2 + k, int64_t(1 + 7 * k + g))});
  }
  for (int64_t at_once : {0, 24, 200}) {
    INFO(at_once << " tokens at once");
    const std::vector<PairScore> got = loglikelihoods(*m.model, pairs, at_once);
    REQUIRE(got.size() == pairs.size());
    for (size_t i = 0; i < pairs.size(); ++i) {
      const auto &c = pairs[i].context, &k = pairs[i].continuation;
      std::vector<int32_t> inputs = c, targets(c.size() + k.size() - 1, -1);
      inputs.insert(inputs.end(), k.begin(), k.end() - 1);
      std::copy(k.begin(), k.end(), targets.end() - int64_t(k.size()));
      const int64_t T = int64_t(inputs.size());
      m.model->prepare({.B = 1, .T = T});
      const Tensor t = m.model->forward({1, T, inputs.data(), targets.data(), nullptr});
      std::vector<float> nll(static_cast<size_t>(T));
      m.ops->download(nll.data(), t);
      double sum = 0;
      for (size_t j = 0; j < k.size(); ++j) {
        const float want = nll[c.size() - 1 + j];
        sum -= double(want);
        CHECK(got[i].nll.at(j) == Approx(want).epsilon(1e-4).margin(1e-5));
      }
      CHECK(got[i].nll.size() == k.size());
      CHECK(got[i].loglik == Approx(sum).epsilon(1e-4));
    }
  }
}

TEST_CASE("tasks: whitespace moves to the continuation; an empty context is end-of-text",
          "[eval]") {
  const auto tokenizer = open_tokenizer("byte");
  const auto text = [&](const std::vector<int32_t>& ids) { return tokenizer->decode(ids); };
  EncodedPair p = encode_pair(*tokenizer, 256, "ab \n", " c");
  CHECK(text(p.context) == "ab");
  CHECK(text(p.continuation) == " \n c");
  p = encode_pair(*tokenizer, 256, "", " c");
  CHECK(p.context == std::vector<int32_t>{256});
  CHECK(text(p.continuation) == " c");
  p = encode_pair(*tokenizer, 256, "a\xC2\xA0", "b");  // a no-break space is whitespace too
  CHECK(text(p.context) == "a");
  CHECK(text(p.continuation) ==
        "\xC2\xA0"
        "b");
}

TEST_CASE("tasks: damaged files and unknown names say file, line and what is wanted", "[eval]") {
  const TempFolder tmp;
  const std::string path = tmp / "t.jsonl";
  const auto complains = [&](const char* task, const std::string& text, const std::string& part) {
    spill(path, text);
    const auto [code, message] = error_of([&] { read_task(find_task(task), path); });
    INFO(message);
    CHECK(code == Exit::data);
    CHECK(message.find(part) != std::string::npos);
    CHECK(message.find(path) != std::string::npos);
  };
  const std::string good = R"({"query": "q", "choices": ["a", "b"], "gold": 1})"
                           "\n";
  complains("piqa", good + "\n" + good + "{\"query\": \"q\", \"choi", ":4: not valid JSON");
  complains("piqa", good + R"({"query": "q", "choices": ["a"]})", ":2: no field \"gold\"");
  complains("piqa", R"({"query": 3, "choices": ["a"], "gold": 0})", ":1: \"query\" is not a text");
  complains("piqa", R"({"query": "", "choices": [], "gold": 0})", "is not a list of texts");
  complains("piqa", R"({"query": "", "choices": ["a", 1], "gold": 0})", "is not a list of texts");
  complains("piqa", R"({"query": "q", "choices": ["a", "b"], "gold": 2})", "0 to 1");
  complains("piqa", R"({"query": "q", "choices": ["a", "b"], "gold": "0"})", "0 to 1");
  complains("piqa", "[1]\n", ":1: not a JSON object");
  complains("piqa", "\n \n", "no line");
  complains("lambada", good, ":1: no field \"continuation\"");
  complains("winogrande", good, ":1: no field \"continuation\"");
  CHECK(error_of([&] { read_task(find_task("piqa"), tmp / "none"); }).first == Exit::data);

  spill(path, good);
  const std::vector<TaskItem> items = read_task(find_task("arc-easy"), path, "\nAnswer:");
  REQUIRE(items.size() == 1);
  CHECK(items[0].gold == 1);
  CHECK(items[0].pairs[1].context == "q\nAnswer:");
  CHECK(items[0].pairs[1].continuation == " b");

  const auto [code, message] = error_of([] { find_task("hellaswg"); });
  CHECK(code == Exit::usage);
  CHECK(message.find("did you mean hellaswag?") != std::string::npos);
  CHECK(message.find("winogrande") != std::string::npos);
}

TEST_CASE("tasks: prompts are the harness' unless a suffix is given", "[eval]") {
  const TempFolder tmp;
  const auto context = [&](const char* task, const std::string& query,
                           std::optional<std::string> suffix = {}) {
    spill(tmp / "t.jsonl",
          nlohmann::json{{"query", query}, {"choices", {"a", "b"}}, {"gold", 0}}.dump());
    const TaskItem item = read_task(find_task(task), tmp / "t.jsonl", suffix).at(0);
    CHECK(item.pairs.at(1).continuation == " b");
    return item.pairs.at(0).context;
  };
  for (const char* task : {"piqa", "arc_easy", "arc_challenge"}) {
    const std::string want = "Question: Why?\nAnswer:";
    for (const char* query : {"Question: Why?\n", "Question: Why?", "Why?", "Why?\n",
                              "Question: Why?\nAnswer:", "Why?\nAnswer:"})
      CHECK(context(task, query) == want);
    CHECK(context(task, "") == "Question: \nAnswer:");
    CHECK(context(task, "Question: Why?\n", "") == "Question: Why?\n");
    CHECK(context(task, "Why?", " So:") == "Why? So:");
  }
  for (const char* task : {"hellaswag", "openbookqa"}) {
    CHECK(context(task, "A man sits") == "A man sits");
    CHECK(context(task, "A man sits", ".") == "A man sits.");
  }
  spill(tmp / "w.jsonl", R"({"context_options": ["x", "y"], "continuation": "z.", "gold": 1})");
  CHECK(read_task(find_task("winogrande"), tmp / "w.jsonl")[0].pairs[1].context == "y");
}

TEST_CASE("tasks: the shared data sets can be read whole", "[eval]") {
  const char* set = std::getenv("HGRN_SHARED");
  const std::string dir = set ? set : HGRN_SOURCE_DIR "/../shared";
  const std::map<std::string, std::pair<const char*, size_t>> sets = {
      {"lambada_openai.jsonl", {"lambada", 5153}},
      {"hellaswag_val_1000.jsonl", {"hellaswag", 1000}},
      {"piqa.jsonl", {"piqa", 1838}},
      {"winogrande.jsonl", {"winogrande", 1267}},
      {"arc_easy.jsonl", {"arc_easy", 2376}},
      {"arc_challenge.jsonl", {"arc_challenge", 1172}},
      {"openbook_qa.jsonl", {"openbookqa", 500}},
  };
  if (!exists(dir + "/data/eval")) {
    WARN("no shared data sets: skipped");
    return;
  }
  for (const auto& [file, task] : sets) {
    const auto items = read_task(find_task(task.first), dir + "/data/eval/" + file);
    CHECK(items.size() == task.second);
    if (!find_task(task.first).question) continue;
    for (const TaskItem& item : items) {
      const std::string& prompt = item.pairs[0].context;
      REQUIRE(prompt.rfind("Question: ", 0) == 0);
      REQUIRE(prompt.find("\nAnswer:") == prompt.size() - 8);
      REQUIRE(prompt.find("\n\nAnswer:") == std::string::npos);
    }
  }
}

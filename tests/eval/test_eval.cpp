// Perplexity protocols and sampling on a small random model.
#include <cmath>
#include <map>

#include "catch.h"
#include "eval/generate.h"
#include "eval/perplexity.h"
#include "train/run_folder.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

// A byte model whose weights are random and large enough that context matters.
struct ByteModel {
  TempFolder folder;
  std::string dir;
  ByteModel() {
    write_shard(folder / "t_000000.bin", learnable_tokens(2000, 256, 1));
    spill(folder / "c.json", R"({
      "model": {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8,
                "intermediate_size": 24, "initializer_range": 0.3},
      "data": {"train": ")" + (folder / "t_*.bin") +
                                 R"(", "tokenizer": "byte", "seq_len": 50},
      "train": {"steps": 0, "global_batch": 1, "micro_batch": 1, "precision": "fp32"}})");
    TrainArgs a;
    a.config = folder / "c.json";
    a.out = folder / "run";
    a.device = Device::cpu;
    train(a);
    dir = folder / "run";
  }
  LoadedModel open() const { return load_model(dir, Device::cpu, ""); }
};

std::map<int64_t, std::pair<int32_t, double>> per_token(LoadedModel& m, const PerplexityOptions& o,
                                                        PerplexityResult* result = nullptr) {
  std::map<int64_t, std::pair<int32_t, double>> out;
  const PerplexityResult r = perplexity(m, o, [&](int64_t i, int32_t t, double nll) {
    out[i] = {t, nll};
  });
  if (result) *result = r;
  return out;
}

std::string sample_text(int64_t bytes) {
  std::string text;
  for (int64_t i = 0; i < bytes; ++i)
    text += i % 37 == 36 ? '\n' : char('a' + philox(5, 0, uint64_t(i)).v[0] % 26);
  return text;
}

}  // namespace

TEST_CASE("eval: carry equals one unbroken pass, blocks of the whole text too", "[eval]") {
  const ByteModel b;
  const std::string text = sample_text(9000);  // several carry segments
  spill(b.folder / "x.txt", text);
  LoadedModel m = b.open();
  PerplexityOptions o;
  o.text = b.folder / "x.txt";
  o.protocol = Protocol::carry;
  const auto carry = per_token(m, o);
  o.protocol = Protocol::blocks;
  o.seq_len = 9000;
  const auto whole = per_token(m, o);
  REQUIRE(carry.size() == 9000);
  REQUIRE(whole.size() == 9000);
  for (const auto& [i, entry] : whole) {
    REQUIRE(carry.at(i).first == entry.first);
    REQUIRE(carry.at(i).second == Approx(entry.second).epsilon(1e-4).margin(1e-5));
  }
}

TEST_CASE("eval: blocks start afresh, score every token once, the last partial row too", "[eval]") {
  const ByteModel b;
  spill(b.folder / "x.txt", sample_text(123));
  LoadedModel m = b.open();
  PerplexityOptions o;
  o.text = b.folder / "x.txt";
  PerplexityResult r;
  const auto blocks = per_token(m, o, &r);
  CHECK(r.seq_len == 50);  // the checkpoint's
  CHECK(r.tokens == 123);
  CHECK(r.bytes == 123);
  o.seq_len = 123;
  const auto whole = per_token(m, o);
  for (int64_t i = 0; i < 50; ++i)  // the first block has the same context
    CHECK(blocks.at(i).second == Approx(whole.at(i).second).epsilon(1e-4));
  int64_t different = 0;
  for (int64_t i = 50; i < 100; ++i)
    different += std::fabs(blocks.at(i).second - whole.at(i).second) > 1e-3;
  CHECK(different > 10);
  double nll = 0;
  for (const auto& [i, entry] : blocks) nll += entry.second;
  CHECK(r.nll == Approx(nll));
  CHECK(r.bits_per_byte() == Approx(nll / std::log(2.0) / 123));
}

TEST_CASE("eval: shards and text of the same bytes agree; a leading end-of-text is not doubled",
          "[eval]") {
  const ByteModel b;
  const std::string text = sample_text(200);
  spill(b.folder / "x.txt", text);
  std::vector<int32_t> tokens(text.begin(), text.end());
  write_shard(b.folder / "plain.bin", tokens);
  tokens.insert(tokens.begin(), 256);
  write_shard(b.folder / "led.bin", tokens);
  LoadedModel m = b.open();
  PerplexityOptions o;
  o.text = b.folder / "x.txt";
  const PerplexityResult from_text = perplexity(m, o);
  o.text.clear();
  for (const char* name : {"plain.bin", "led.bin"}) {
    o.data = b.folder / name;
    const PerplexityResult r = perplexity(m, o);
    CHECK(r.tokens == 200);
    CHECK(r.nll == Approx(from_text.nll));
    CHECK(r.bytes == 200);
  }
}

TEST_CASE("eval: lines are independent of each other", "[eval]") {
  const ByteModel b;
  spill(b.folder / "two.txt", "first line\n\nsecond one\n");
  spill(b.folder / "second.txt", "second one\n");
  LoadedModel m = b.open();
  PerplexityOptions o;
  o.protocol = Protocol::lines;
  o.text = b.folder / "two.txt";
  const auto two = per_token(m, o);
  o.text = b.folder / "second.txt";
  const auto second = per_token(m, o);
  REQUIRE(two.size() == 22);  // the empty line is not scored
  REQUIRE(second.size() == 11);
  for (int64_t i = 0; i < 11; ++i) {
    CHECK(two.at(11 + i).first == second.at(i).first);
    CHECK(two.at(11 + i).second == Approx(second.at(i).second).epsilon(1e-4));
  }
}

TEST_CASE("eval: line-end tokens", "[eval]") {
  const ByteModel b;
  spill(b.folder / "x.txt", " ab \n\ncd\n");
  LoadedModel m = b.open();
  PerplexityOptions o;
  o.text = b.folder / "x.txt";
  o.line_end_token = true;
  const auto t = per_token(m, o);
  std::vector<int32_t> ids;
  for (const auto& [i, entry] : t) ids.push_back(entry.first);
  CHECK(ids == std::vector<int32_t>{'a', 'b', 256, 256, 'c', 'd', 256});
}

TEST_CASE("generate: the likeliest tokens are those of repeated whole passes", "[eval]") {
  const ByteModel b;
  LoadedModel m = b.open();
  GenerateOptions o;
  o.prompt = "Some prompt";
  o.tokens = 20;
  o.temperature = 0;
  o.batch = 2;
  std::string rows[2];
  const GenerateReport report =
      generate(m, o, [&](int64_t row, std::string_view text) { rows[row] += text; });
  CHECK(rows[0] == rows[1]);
  CHECK(report.tokens <= 40);
  CHECK(report.prompt_tokens == 24);

  std::vector<int32_t> tokens = {256};
  tokens.insert(tokens.end(), o.prompt.begin(), o.prompt.end());
  std::string want;
  const int64_t V = m.model->config().vocab_size;
  for (int64_t i = 0; i < 20; ++i) {
    const int64_t T = int64_t(tokens.size());
    m.model->prepare({.B = 1, .T = T});
    const Tensor l = m.model->forward_last_logits({1, T, tokens.data(), nullptr, nullptr});
    std::vector<float> logits(size_t(l.numel()));
    m.ops->download(logits.data(), l);
    const int32_t next =
        int32_t(std::max_element(logits.begin(), logits.begin() + V) - logits.begin());
    if (next == 256) break;
    tokens.push_back(next);
    want += char(next);
  }
  CHECK(rows[0] == want);
}

TEST_CASE("generate: sampling keeps to temperature, top-k and top-p", "[eval]") {
  const float logits[5] = {std::log(0.4f), std::log(0.1f), std::log(0.3f), std::log(0.15f),
                           std::log(0.05f)};
  auto frequencies = [&](const GenerateOptions& o) {
    std::vector<double> f(5, 0);
    const int64_t draws = 20000;
    for (int64_t i = 0; i < draws; ++i)
      f[size_t(sample_token(logits, 5, o, (double(i) + 0.5) / double(draws)))] += 1.0 / draws;
    return f;
  };
  GenerateOptions o;
  std::vector<double> f = frequencies(o);
  CHECK(f[0] == Approx(0.4).margin(1e-3));
  CHECK(f[4] == Approx(0.05).margin(1e-3));
  o.top_k = 2;
  f = frequencies(o);
  CHECK(f[0] == Approx(4.0 / 7).margin(1e-3));
  CHECK(f[2] == Approx(3.0 / 7).margin(1e-3));
  o.top_k = 0;
  o.top_p = 0.75;  // 0.4 + 0.3 < 0.75 <= 0.85
  f = frequencies(o);
  CHECK(f[3] == Approx(0.15 / 0.85).margin(1e-3));
  CHECK(f[1] == 0);
  o.top_p = 1;
  o.temperature = 0.5;
  f = frequencies(o);
  CHECK(f[0] == Approx(0.16 / 0.285).margin(1e-3));
  o.temperature = 0;
  f = frequencies(o);
  CHECK(f[0] == Approx(1));
}

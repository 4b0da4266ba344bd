// Generation: prompts of unequal length, recorded steps, streaming, stops, constant memory.
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "catch.h"
#include "eval/byte_model.h"
#include "eval/generate.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

std::vector<std::string> texts_of(LoadedModel& m, const GenerateOptions& o,
                                  GenerateReport* report = nullptr) {
  std::vector<std::string> rows(o.prompts.size() * size_t(o.batch));
  const GenerateReport r =
      generate(m, o, [&](int64_t row, std::string_view text) { rows[size_t(row)] += text; });
  if (report) *report = r;
  return rows;
}

// The likeliest continuation by whole passes over everything so far.
std::string by_whole_passes(LoadedModel& m, const std::string& prompt, int64_t count) {
  std::vector<int32_t> tokens = {256};
  for (unsigned char c : prompt) tokens.push_back(c);
  std::string text;
  const int64_t V = m.model->config().vocab_size;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t T = int64_t(tokens.size());
    m.model->prepare({.B = 1, .T = T});
    const Tensor l = m.model->forward_last_logits({1, T, tokens.data(), nullptr, nullptr});
    std::vector<float> logits(size_t(l.numel()));
    m.ops->download(logits.data(), l);
    const int32_t next =
        int32_t(std::max_element(logits.begin(), logits.begin() + V) - logits.begin());
    if (next == 256) break;
    tokens.push_back(next);
    text += char(next);
  }
  return text;
}

// What TextStream shows of these pieces, one by one and at the end.
std::vector<std::string> streamed(const std::vector<std::string>& pieces,
                                  const std::vector<std::string>& stop = {}) {
  TextStream s(stop);
  std::vector<std::string> out;
  for (const std::string& p : pieces) out.push_back(s.push(p));
  out.push_back(s.finish());
  return out;
}

int64_t resident_kib() {
  std::ifstream file("/proc/self/status");
  std::string word;
  while (file >> word)
    if (word == "VmRSS:") {
      int64_t kib = 0;
      file >> kib;
      return kib;
    }
  return -1;
}

}  // namespace

TEST_CASE("generate: the likeliest tokens are those of repeated whole passes", "[eval]") {
  const ByteModel b;
  LoadedModel m = b.open();
  GenerateOptions o;
  o.prompts = {"Some prompt", "x", "", std::string(70, 'y') + "!"};  // padded to one length
  o.tokens = 40;
  o.sampling.temperature = 0;
  o.batch = 2;
  GenerateReport report;
  const std::vector<std::string> rows = texts_of(m, o, &report);
  CHECK(report.prompt_tokens == 2 * (12 + 2 + 1 + 72));
  CHECK(report.tokens <= 8 * 40);
  for (size_t p = 0; p < o.prompts.size(); ++p) {
    INFO(o.prompts[p]);
    CHECK(rows[2 * p] == rows[2 * p + 1]);
    // A byte that no character finishes is U+FFFD at the very end alone.
    std::string want = by_whole_passes(m, o.prompts[p], 40);
    TextStream s(o.stop);
    want = s.push(want);
    want += s.finish();
    CHECK(rows[2 * p] == want);
  }
}

TEST_CASE("generate: equal seeds give equal text, rows and seeds differ", "[eval]") {
  const ByteModel b;
  LoadedModel m = b.open();
  GenerateOptions o;
  o.prompts = {"a", "a"};
  o.batch = 2;
  o.tokens = 100;
  o.sampling = {.temperature = 0.9f, .top_k = 60, .top_p = 0.97, .repetition_penalty = 1.1f};
  o.sampling.seed = 12;
  const std::vector<std::string> first = texts_of(m, o);
  CHECK(texts_of(m, o) == first);
  LoadedModel again = b.open();
  CHECK(texts_of(again, o) == first);
  for (size_t i = 1; i < first.size(); ++i) CHECK(first[i] != first[0]);
  o.sampling.seed = 13;
  CHECK(texts_of(m, o) != first);
}

TEST_CASE("generate: more rows than fit at once are the same rows", "[eval]") {
  const ByteModel b;
  LoadedModel m = b.open();
  GenerateOptions o;
  o.tokens = 5;
  for (int i = 0; i < 70; ++i) o.prompts.push_back(std::string(1, char('a' + i % 7)));
  GenerateReport report;
  const std::vector<std::string> all = texts_of(m, o, &report);
  REQUIRE(all.size() == 70);
  CHECK(report.rows.size() == 70);
  o.prompts.resize(66);
  std::vector<std::string> fewer = texts_of(m, o);
  CHECK(std::equal(fewer.begin(), fewer.end(), all.begin()));
}

TEST_CASE("generate: text streams in whole characters and stops before stop texts", "[eval]") {
  using V = std::vector<std::string>;
  CHECK(streamed({"a", "\xC3", "\xA9", "b"}) == V{"a", "", "\xC3\xA9", "b", ""});
  CHECK(streamed({"\xF0\x9F", "\x98\x80!"}) == V{"", "\xF0\x9F\x98\x80!", ""});
  CHECK(streamed({"x\xE2\x82"}) == V{"x", "\xEF\xBF\xBD"});      // never finished
  CHECK(streamed({"\x80\x80", "y"}) == V{"\x80\x80", "y", ""});  // never began: as it is
  CHECK(streamed({"Q: a", "\n", "b\n", "\nQ: c", "d"}, {"\n\nQ:"}) ==
        V{"Q: a", "", "\nb", "", "", ""});
  CHECK(streamed({"ab", "ab", "c"}, {"abac"}) == V{"", "ab", "abc", ""});
  CHECK(streamed({"one two"}, {"two", "one"}) == V{"", ""});  // the earliest counts
  CHECK(streamed({"END"}, {"END"}) == V{"", ""});
  CHECK(streamed({"EN"}, {"END"}) == V{"", "EN"});  // it did not come
  CHECK(streamed({"\xC3", "\xA9"}, {"\xA9"}) == V{"", "\xEF\xBF\xBD", ""});
}

TEST_CASE("generate: stop texts end a row, and the report says how each row ended", "[eval]") {
  const ByteModel b;
  LoadedModel m = b.open();
  GenerateOptions o;
  o.prompts = {"Some prompt"};
  o.tokens = 300;
  o.sampling.seed = 3;
  GenerateReport report;
  const std::string free = texts_of(m, o, &report)[0];
  REQUIRE(free.size() > 40);
  CHECK((report.rows[0].finish == Finish::length || report.rows[0].finish == Finish::end_of_text));
  o.stop = {free.substr(20, 3)};
  const std::string stopped = texts_of(m, o, &report)[0];
  CHECK(report.rows[0].finish == Finish::stop);
  CHECK(free.rfind(stopped, 0) == 0);
  CHECK(stopped.size() <= 20);
  CHECK(stopped.find(o.stop[0]) == std::string::npos);
  const auto j = nlohmann::json::parse(generated_json(report, 0, "p\xFF", stopped));
  CHECK(j["finish"] == "stop");
  CHECK(j["prompt"] == "p\xEF\xBF\xBD");
  CHECK(j["tokens"] == report.rows[0].tokens);
  CHECK(j["prompt_tokens"] == 12);
}

TEST_CASE("generate: 100,000 tokens take no more memory than 2,000", "[eval]") {
  const ByteModel b;
  LoadedModel m = b.open();
  DecodeOptions o;
  o.tokens = 100000;
  int64_t seen = 0, early = 0, late = 0;
  const DecodeReport r = decode(*m.model, {{256, 65}}, o, [&](int64_t, int32_t) {
    if (++seen == 2000) early = resident_kib();
    if (seen == o.tokens) late = resident_kib();
    return true;
  });
  CHECK(seen == 100000);
  CHECK(r.steps == 100000);
  REQUIRE(early > 0);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they keep freed memory
  CHECK(late - early < 512);
#endif
}

TEST_CASE("generate: unusable requests are refused", "[eval]") {
  const ByteModel b;
  LoadedModel m = b.open();
  GenerateOptions o;
  o.prompts = {"a"};
  o.stop = {""};
  CHECK_THROWS_AS(texts_of(m, o), Error);
  CHECK_THROWS_AS(decode(*m.model, {{}}, {}, [](int64_t, int32_t) { return true; }), Error);
}

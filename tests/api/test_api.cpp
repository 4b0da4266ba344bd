#include <algorithm>
#include <cmath>
#include <numeric>

#include "api/hgrn.h"
#include "catch.h"
#include "eval/byte_model.h"
#include "eval/generate.h"
#include "eval/perplexity.h"

using namespace hgrn::test;
using hgrn::api::Model;
using hgrn::api::State;

namespace {

Model open_cpu(const ByteModel& b) {
  return Model(b.dir, {.device = "cpu"});
}

std::vector<int32_t> some_tokens(int64_t count) {
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i)
    tokens.push_back(int32_t(hgrn::philox(9, 0, uint64_t(i)).v[0] % 256));
  return tokens;
}

double log_softmax_at(const std::vector<float>& logits, int32_t token) {
  double most = -INFINITY, sum = 0;
  for (float x : logits) most = std::max(most, double(x));
  for (float x : logits) sum += std::exp(double(x) - most);
  return double(logits[size_t(token)]) - most - std::log(sum);
}

struct Caught {
  int code = 0;
  std::string text;
};
template <class F>
Caught caught(F&& f) {
  try {
    f();
  } catch (const hgrn::api::Error& e) {
    return {e.code(), e.what()};
  }
  return {};
}

}  // namespace

TEST_CASE("api: score is the evaluation's", "[api]") {
  const ByteModel b;
  Model m = open_cpu(b);
  CHECK(m.vocab_size() == 257);
  CHECK(m.end_of_text() == 256);
  CHECK(m.layers() == 2);
  CHECK(m.hidden_size() == 16);
  CHECK(m.step() == 0);
  CHECK(m.parameters() > 0);
  CHECK(m.device().rfind("cpu fp32", 0) == 0);
  CHECK(m.folder().rfind(b.dir, 0) == 0);

  const std::string text = sample_text(3000);  // three segments
  const std::vector<float> mine = m.score(m.encode(text));
  spill(b.folder / "text", text);
  hgrn::LoadedModel reference = b.open();
  hgrn::PerplexityOptions o;
  o.text = b.folder / "text";
  o.protocol = hgrn::Protocol::carry;
  std::vector<float> expected;
  hgrn::perplexity(reference, o,
                   [&](int64_t, int32_t, double nll) { expected.push_back(float(-nll)); });
  REQUIRE(mine.size() == expected.size());
  for (size_t i = 0; i < mine.size(); ++i) CHECK(mine[i] == Approx(expected[i]).margin(2e-4));
  // A context stands before the tokens and is not scored.
  const std::vector<int32_t> all = m.encode(text), head(all.begin(), all.begin() + 1500),
                             tail(all.begin() + 1500, all.end());
  std::vector<int32_t> context = {256};
  context.insert(context.end(), head.begin(), head.end());
  const std::vector<float> rest = m.score(tail, context);
  REQUIRE(rest.size() == tail.size());
  for (size_t i = 0; i < rest.size(); ++i) CHECK(rest[i] == Approx(mine[i + 1500]).margin(2e-4));
  CHECK(m.score({}).empty());
}

TEST_CASE("api: steps, passes and copies of a state agree with scores", "[api]") {
  const ByteModel b;
  Model m = open_cpu(b);
  const std::vector<int32_t> tokens = some_tokens(60);
  const std::vector<float> scores = m.score(tokens);
  State s(m);
  CHECK(s.position() == 0);
  CHECK(s.bytes() == 2 * 16 * 8 * sizeof(float));  // L D n
  std::vector<float> logits = s.step(256);
  for (size_t i = 0; i < 30; ++i) {
    CHECK(log_softmax_at(logits, tokens[i]) == Approx(scores[i]).margin(1e-4));
    logits = s.step(tokens[i]);
  }
  // A copy goes on by itself, while the other states and calls of the model come in between.
  State copy = s;
  State other(m);
  other.advance(some_tokens(7));
  m.score(some_tokens(20));
  m.generate(some_tokens(3), {.tokens = 4});
  std::vector<float> a = logits, c = logits;
  for (size_t i = 30; i < 60; ++i) {
    CHECK(log_softmax_at(a, tokens[i]) == Approx(scores[i]).margin(1e-4));
    a = s.step(tokens[i]);
    CHECK(log_softmax_at(c, tokens[i]) == Approx(scores[i]).margin(1e-4));
    c = copy.step(tokens[i]);
    CHECK(a == c);
  }
  CHECK(s.position() == 61);
  // One pass gives what single steps give.
  State whole(m);
  std::vector<int32_t> all = {256};
  all.insert(all.end(), tokens.begin(), tokens.end());
  const std::vector<float> last = whole.advance(all);
  for (size_t v = 0; v < last.size(); ++v) CHECK(last[v] == Approx(a[v]).margin(1e-3));
  State moved = std::move(whole);
  whole = other;  // a moved-from state can be assigned to
  CHECK(moved.step(1).size() == 257);
  CHECK(whole.position() == 7);
}

TEST_CASE("api: states keep the weights alive", "[api]") {
  const ByteModel b;
  auto m = std::make_unique<Model>(open_cpu(b));
  const std::vector<float> expected = State(*m).step(5);
  State s(*m);
  m.reset();
  CHECK(s.step(5) == expected);
}

TEST_CASE("api: generation is the program's", "[api]") {
  const ByteModel b;
  Model m = open_cpu(b);
  hgrn::LoadedModel reference = b.open();
  hgrn::GenerateOptions o;
  o.prompts = {"the "};
  o.tokens = 40;
  o.sampling.seed = 3;
  std::string expected;
  hgrn::generate(reference, o, [&](int64_t, std::string_view piece) { expected += piece; });
  std::string pieces;
  const std::string text = m.generate("the ", {.tokens = 40, .seed = 3}, [&](std::string_view p) {
    pieces += p;
    return true;
  });
  CHECK(text == expected);
  CHECK(pieces == expected);
  CHECK(m.generate("the ", {.tokens = 40, .seed = 3}) == expected);
  int count = 0;
  m.generate("the ", {.tokens = 40, .seed = 3}, [&](std::string_view) { return ++count < 3; });
  CHECK(count == 3);
  std::vector<int32_t> prompt = {256};
  for (int32_t t : m.encode("the ")) prompt.push_back(t);
  const std::vector<int32_t> ids = m.generate(prompt, {.tokens = 12, .temperature = 0});
  State s(m);
  std::vector<float> logits = s.advance(prompt);
  for (int32_t id : ids) {
    CHECK(id == int32_t(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    logits = s.step(id);
  }
}

TEST_CASE("api: errors come as one exception with the exit code", "[api]") {
  const ByteModel b;
  CHECK(caught([] { Model("/no/such"); }).code == 3);
  CHECK(caught([&] { Model(b.dir, {.device = "tpu"}); }).code == 2);
  CHECK(caught([&] { Model(b.dir, {.device = "cpu", .tokenizer = "/no/such"}); }).code == 3);
  Model m = open_cpu(b);
  CHECK(caught([&] { m.score({1, 257}); }).text.find("token 1 is 257") != std::string::npos);
  CHECK(caught([&] { State(m).advance({}); }).code == 2);
  CHECK(caught([&] { m.generate("x", {.tokens = 0}); }).code == 2);
  CHECK(caught([&] { m.generate(std::vector<int32_t>{}); }).code == 2);
  CHECK(m.score({1, 2}).size() == 2);  // and the model goes on
  CHECK(hgrn::api::version().rfind("0.", 0) == 0);
}

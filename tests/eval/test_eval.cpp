// Perplexity protocols on a small random model.
#include <cmath>
#include <map>

#include "catch.h"
#include "eval/byte_model.h"
#include "eval/perplexity.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

std::map<int64_t, std::pair<int32_t, double>> per_token(LoadedModel& m, const PerplexityOptions& o,
                                                        PerplexityResult* result = nullptr) {
  std::map<int64_t, std::pair<int32_t, double>> out;
  const PerplexityResult r = perplexity(m, o, [&](int64_t i, int32_t t, double nll) {
    out[i] = {t, nll};
  });
  if (result) *result = r;
  return out;
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
  LoadedModel m = b.open();
  PerplexityOptions o;
  o.text = b.folder / "x.txt";
  o.line_end_token = true;
  const auto scored = [&](const char* text) {
    spill(o.text, text);
    std::vector<int32_t> ids;
    for (const auto& [i, entry] : per_token(m, o)) ids.push_back(entry.first);
    return ids;
  };
  using Ids = std::vector<int32_t>;
  CHECK(scored(" ab \n\ncd\n") == Ids{'a', 'b', 256, 256, 'c', 'd', 256});
  CHECK(scored(" \nab\n") == Ids{256, 'a', 'b', 256});  // an empty first line, as WikiText's, too
}

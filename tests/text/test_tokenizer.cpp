#include "text/tokenizer.h"

#include <random>

#include "catch.h"
#include "text/shard_files.h"

using namespace hgrn;
using namespace hgrn::test;

TEST_CASE("byte: 256 bytes, then end-of-text", "[text]") {
  const auto byte = open_tokenizer("byte");
  CHECK(byte->vocab_size() == 257);
  CHECK(byte->eos() == 256);
  CHECK(byte->name() == "byte");
  CHECK(byte->files().empty());
  std::vector<int32_t> tokens = {9};
  byte->encode(std::string_view("a\0\xff\n", 4), tokens);
  CHECK(tokens == std::vector<int32_t>{9, 97, 0, 255, 10});  // appended
  CHECK(byte->decode(std::vector<int32_t>{104, 256, 105, 256}) == "hi");
  for (int32_t outside : {-1, 257, 50'000}) {
    const Error error = error_of([&] { byte->decode(std::vector<int32_t>{1, outside}); });
    CHECK(error.code() == Exit::data);
    CHECK(has(error, std::to_string(outside)));
  }
}

TEST_CASE("byte: decode(encode(x)) is x for any bytes", "[text]") {
  const auto byte = open_tokenizer("byte");
  std::mt19937 random(3);
  for (int size : {0, 1, 2, 100, 4097}) {
    std::string text(size_t(size), '\0');
    for (char& c : text) c = char(random());
    std::vector<int32_t> tokens;
    byte->encode(text, tokens);
    CHECK(tokens.size() == text.size());
    CHECK(byte->decode(tokens) == text);
    CHECK(byte->safe_prefix(text) == text.size());
  }
}

TEST_CASE("a tokenizer that cannot be opened says what can", "[text]") {
  TempFolder folder;
  write_bytes(folder / "tokenizer.json", "{}");
  const Error empty = error_of([&] { open_tokenizer(folder / "tokenizer.json"); });
  CHECK(empty.code() == Exit::data);
  CHECK(has(empty, "model"));
  const Error absent = error_of([&] { open_tokenizer(folder / "absent.json"); });
  CHECK(absent.code() == Exit::data);
  CHECK(has(absent, "absent.json"));
  CHECK(has(absent, "byte"));
}

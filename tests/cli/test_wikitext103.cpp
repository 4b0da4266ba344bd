// scripts/get_wikitext103.sh: its preparation half on the valid and test sets where they are at
// hand, and what it says where it cannot go on.
#include <algorithm>
#include <filesystem>

#include "catch.h"
#include "cli/program.h"
#include "text/shard.h"

using namespace hgrn;
using namespace hgrn::test;

namespace {

Ended script(const TempFolder& tmp, const std::vector<std::string>& words) {
  std::vector<std::string> all = {HGRN_SOURCE_DIR "/scripts/get_wikitext103.sh", "--out",
                                  tmp / "out"};
  all.insert(all.end(), words.begin(), words.end());
  // No way out of this machine, whether it has one or not.
  const std::string nowhere = "http://127.0.0.1:9";
  return Program(tmp, all,
                 {{"HGRN", HGRN_BINARY}, {"https_proxy", nowhere}, {"HTTPS_PROXY", nowhere}},
                 "bash")
      .wait();
}

}  // namespace

TEST_CASE("wikitext103: the valid and test sets become shards of the known counts", "[cli]") {
  const TempFolder tmp;
  const char* set = std::getenv("HGRN_SHARED");
  const std::string data = std::string(set ? set : HGRN_SOURCE_DIR "/../shared") + "/data/";
  if (!std::filesystem::exists(data + "wikitext") || !std::filesystem::exists(data + "gpt2-bpe")) {
    WARN("no " << data << "wikitext or gpt2-bpe: skipped");
    return;
  }
  const Ended e = script(tmp, {"--tokenizer", data + "gpt2-bpe", "--from", data + "wikitext"});
  INFO(e.err);
  REQUIRE(e.code == 0);
  CHECK(e.says("no train shards"));
  const Shard valid(tmp / "out/wikitext103_valid_000000.bin"),
      test(tmp / "out/wikitext103_test_000000.bin");
  CHECK(valid.count() == 246403);
  CHECK(test.count() == 282211);
  std::vector<int32_t> tokens(size_t(test.count()));
  test.read(0, test.count(), tokens.data(), 50257);
  CHECK(std::count(tokens.begin(), tokens.end(), 50256) == 4358);  // one a line
  CHECK(tokens.back() == 50256);
  CHECK_FALSE(std::filesystem::exists(tmp / "out/wikitext103_train_000000.bin"));

  // Another text under that name is refused, not prepared.
  std::filesystem::create_directory(tmp / "other");
  std::string text = slurp(data + "wikitext/wiki.test.raw");
  text[1000] ^= 1;
  spill(tmp / "other/wiki.test.raw", text);
  const Ended other = script(tmp, {"--tokenizer", data + "gpt2-bpe", "--from", tmp / "other"});
  CHECK(other.code == 3);
  CHECK(other.says("is not WikiText's"));
  const Ended none = script(tmp, {"--tokenizer", data + "gpt2-bpe", "--from", tmp.path()});
  CHECK(none.code == 3);
  CHECK(none.says("wikitext-103-raw-v1.zip is there"));
  spill(tmp / "other/wikitext-103-raw-v1.zip", "PK");
  const Ended zip = script(tmp, {"--tokenizer", data + "gpt2-bpe", "--from", tmp / "other"});
  CHECK(zip.code == 3);
  CHECK(zip.says("SHA-256"));
}

TEST_CASE("wikitext103: without a network, or with wrong words, it says what to do", "[cli]") {
  const TempFolder tmp;
  if (std::system("command -v curl >/dev/null") == 0) {
    const Ended e = script(tmp, {});
    INFO(e.err);
    CHECK(e.code == 1);
    CHECK(e.says("cannot reach openaipublic.blob.core.windows.net"));
    CHECK(e.says("--tokenizer DIR"));
    CHECK_FALSE(std::filesystem::exists(tmp / "out/gpt2"));
  }
  Ended e = script(tmp, {"--tokenizer", HGRN_SOURCE_DIR "/tests/golden/tokenizers/gpt2.json"});
  CHECK(e.code == 3);
  CHECK(e.says("is not GPT-2's tokenizer"));
  e = script(tmp, {"--form", "x"});
  CHECK(e.code == 2);
  CHECK(e.says("unknown argument --form"));
  CHECK(script(tmp, {"--from"}).code == 2);
}

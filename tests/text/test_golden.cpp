// Ids of Hugging Face tokenizers for small vocabularies (tools/tokenizer/make_golden.py), and the
// inputs that the fuzzers of tokenizers start from or once tripped over.
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "catch.h"
#include "fuzz/tokenizer_target.h"
#include "text/shard_files.h"
#include "text/tokenizer.h"

using namespace hgrn;
using namespace hgrn::test;

TEST_CASE("golden: the tokens of Hugging Face tokenizers, special tokens as text and recognised",
          "[text]") {
  const std::string folder = HGRN_SOURCE_DIR "/tests/golden/tokenizers/";
  const std::vector<std::string> styles = {"gpt2", "neox", "llama3"};
  std::vector<std::unique_ptr<Tokenizer>> as_text, recognised;
  for (const std::string& s : styles) {
    as_text.push_back(open_tokenizer(folder + s + ".json"));
    recognised.push_back(open_tokenizer(folder + s + ".json", SpecialTokens::recognised));
  }
  std::istringstream lines(read_bytes(folder + "golden.jsonl"));
  int64_t texts = 0, with_specials = 0, round = 0;
  for (std::string line; std::getline(lines, line); ++texts) {
    const auto j = nlohmann::json::parse(line);
    const std::string text = j["text"];
    for (size_t s = 0; s < styles.size(); ++s) {
      INFO(styles[s] << ": " << text);
      const auto& want = j[styles[s]];
      std::vector<int32_t> plain, special;
      as_text[s]->encode(text, plain);
      recognised[s]->encode(text, special);
      CHECK(plain == want[0].get<std::vector<int32_t>>());
      CHECK(special == want[want.size() - 1].get<std::vector<int32_t>>());
      with_specials += want.size() > 1 ? 1 : 0;
      if (styles[s] == "neox") continue;  // NFC changes text
      CHECK(as_text[s]->decode(plain) == text);
      ++round;
    }
  }
  CHECK(texts > 500);
  CHECK(with_specials > 50);
  CHECK(round == 2 * texts);
}

TEST_CASE("the fuzzers' corpora of tokenizers are read or refused", "[text]") {
  const auto replay = [](const std::string& name, void (*target)(const uint8_t*, size_t)) {
    size_t files = 0;
    for (const auto& entry :
         std::filesystem::directory_iterator(HGRN_SOURCE_DIR "/tests/fuzz/corpus/" + name)) {
      INFO(entry.path().string());
      const std::string bytes = read_bytes(entry.path().string());
      CHECK_NOTHROW(target(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()));
      ++files;
    }
    CHECK(files > 3);
  };
  replay("tokenizer", fuzz::tokenizer);
  replay("bpe", fuzz::bpe);
  replay("shard_json", fuzz::shard_json);
}

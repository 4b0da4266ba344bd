// Byte-level BPE: small vocabularies made here, and GPT-2's and GPT-NeoX's where they are at hand.
#include <nlohmann/json.hpp>
#include <random>

#include "catch.h"
#include "text/bpe.h"
#include "text/nfc.h"
#include "text/shard_files.h"
#include "text/tokenizer.h"
#include "text/utf8.h"
#include "text/words.h"

using namespace hgrn;
using namespace hgrn::test;
using nlohmann::json;

namespace {

std::string from_code_point(uint32_t c) {
  if (c < 0x80) return {char(c)};
  if (c < 0x800) return {char(0xc0 | c >> 6), char(0x80 | (c & 63))};
  if (c < 0x10000) return {char(0xe0 | c >> 12), char(0x80 | (c >> 6 & 63)), char(0x80 | (c & 63))};
  return {char(0xf0 | c >> 18), char(0x80 | (c >> 12 & 63)), char(0x80 | (c >> 6 & 63)),
          char(0x80 | (c & 63))};
}

// The character of GPT-2's byte alphabet.
std::string alphabet(int byte) {
  const auto itself = [](int b) {
    return (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
  };
  if (itself(byte)) return from_code_point(uint32_t(byte));
  uint32_t next = 256;
  for (int b = 0; b < byte; ++b) next += itself(b) ? 0 : 1;
  return from_code_point(next);
}

// 256 bytes with their own ids, merges in the order given, then end-of-text.
json small_tokenizer(const std::vector<std::pair<std::string, std::string>>& merges) {
  json j;
  json& vocab = j["model"]["vocab"] = json::object();
  for (int b = 0; b < 256; ++b) vocab[alphabet(b)] = b;
  j["model"]["type"] = "BPE";
  j["model"]["merges"] = json::array();
  for (const auto& [a, b] : merges) {
    if (!vocab.contains(a + b)) vocab[a + b] = int(vocab.size());
    j["model"]["merges"].push_back(a + " " + b);
  }
  j["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", false}};
  j["added_tokens"] = {{{"id", vocab.size()}, {"content", "<|endoftext|>"}, {"special", true}}};
  return j;
}

std::unique_ptr<Tokenizer> open_json(const TempFolder& folder, const json& j,
                                     SpecialTokens special = SpecialTokens::as_text) {
  write_bytes(folder / "tokenizer.json", j.dump());
  return open_tokenizer(folder / "tokenizer.json", special);
}

std::vector<int32_t> encode(const Tokenizer& t, std::string_view text) {
  std::vector<int32_t> tokens;
  t.encode(text, tokens);
  return tokens;
}

std::vector<std::string> pieces(const Words& words, std::string_view text, bool fast) {
  Pattern::Matcher matcher;
  std::vector<std::string> out;
  const auto add = [&](std::string_view w) { out.emplace_back(w); };
  fast ? words.split(text, matcher, add) : words.split_by_pattern(text, matcher, add);
  return out;
}

const std::string kShared = std::string(HGRN_SOURCE_DIR) + "/../shared/data/";

std::string random_bytes(std::mt19937& random, size_t most) {
  std::string s(random() % (most + 1), '\0');
  for (char& c : s) {
    const unsigned what = random() % 8;
    c = what < 5 ? "abc 's\n."[random() % 8] : char(random());
  }
  return s;
}

}  // namespace

TEST_CASE("bpe: the lowest rank first, the leftmost of equals", "[text]") {
  TempFolder folder;
  const auto t =
      open_json(folder, small_tokenizer({{"b", "c"}, {"a", "b"}, {"a", "a"}, {"aa", "a"}}));
  CHECK(encode(*t, "abc") == std::vector<int32_t>{'a', 256});
  CHECK(encode(*t, "ab") == std::vector<int32_t>{257});
  CHECK(encode(*t, "aaaaa") == std::vector<int32_t>{258, 259});
  CHECK(encode(*t, "").empty());
  CHECK(t->vocab_size() == 261);
  CHECK(t->eos() == 260);
  CHECK(t->decode(encode(*t, "abcaaab")) == "abcaaab");
}

TEST_CASE("bpe: short and long words merge alike, and a huge one is not quadratic", "[text]") {
  // The same merges on both sides of the length where the algorithm changes: a long word of parts
  // that no merge joins must be the parts' tokens one after another.
  TempFolder folder;
  const auto t = open_json(folder, small_tokenizer({{"a", "b"},
                                                    {"ab", "a"},
                                                    {"b", "a"},
                                                    {"aba", "b"},
                                                    {"b", "b"},
                                                    {"a", "a"},
                                                    {"bb", "aa"}}));
  std::mt19937 random(5);
  for (int round = 0; round < 200; ++round) {
    std::string word;
    std::vector<int32_t> want;
    for (int part = 0; part < 12; ++part) {
      std::string p;
      for (unsigned n = 1 + random() % 14; n > 0; --n) p += random() % 2 ? 'a' : 'b';
      const std::vector<int32_t> tokens = encode(*t, p);
      want.insert(want.end(), tokens.begin(), tokens.end());
      want.push_back('z');
      word += p + 'z';
    }
    REQUIRE(encode(*t, word) == want);
  }
  const std::string huge(1 << 20, 'a');
  CHECK(encode(*t, huge).size() == huge.size() / 2);
  CHECK(t->decode(encode(*t, huge)) == huge);
}

TEST_CASE("bpe: decode(encode(x)) is x for any bytes", "[text]") {
  TempFolder folder;
  const auto t = open_json(folder, small_tokenizer({{"a", "b"}, {alphabet(' '), "a"}}));
  std::mt19937 random(1);
  for (int round = 0; round < 3000; ++round) {
    const std::string x = random_bytes(random, 60);
    REQUIRE(t->decode(encode(*t, x)) == x);
  }
  // A byte that is no UTF-8 is its own token, and nothing merges across it.
  CHECK(encode(*t,
               "a\xff"
               "b\xc3") == std::vector<int32_t>{'a', 0xff, 'b', 0xc3});
  CHECK(encode(*t, "<|endoftext|>").size() == 13);  // a text cannot end itself
  const auto special = open_json(folder, small_tokenizer({{"a", "b"}}), SpecialTokens::recognised);
  CHECK(encode(*special, "a<|endoftext|>") == std::vector<int32_t>{'a', special->eos()});
}

TEST_CASE("words: the ASCII scanners equal their patterns on every short text", "[text]") {
  const std::vector<std::string> characters = {
      "s",           "l",  "e", "R",  "S",        "7",        "'",        " ",
      "\t",          "\n", ".", "\r", "\xc5\xbf", "\xc3\xa9", "\xd9\xa3", "\xe3\x80\x80",
      "\xe2\x82\xac"};
  for (const char* pattern : {kGpt2Pattern, kLlama3Pattern, kQwen2Pattern}) {
    const Words words({{pattern, false}}, "test");
    REQUIRE(words.cuts_at_space());
    Pattern::Matcher matcher;
    int64_t different = 0, texts = 0;
    std::vector<size_t> at;  // odometer over all texts of up to 4 characters
    std::vector<std::string_view> fast, slow;
    for (size_t length = 1; length <= 4; ++length) {
      at.assign(length, 0);
      for (bool more = true; more;) {
        std::string text;
        for (size_t k : at) text += characters[k];
        fast.clear(), slow.clear();
        words.split(text, matcher, [&](std::string_view w) { fast.push_back(w); });
        words.split_by_pattern(text, matcher, [&](std::string_view w) { slow.push_back(w); });
        different += fast != slow;
        ++texts;
        more = false;
        for (size_t k = 0; k < length && !more; ++k) {
          more = ++at[k] < characters.size();
          if (!more) at[k] = 0;
        }
      }
    }
    CHECK(different == 0);
    CHECK(texts == 17 + 17 * 17 + 17 * 17 * 17 + 17 * 17 * 17 * 17);
    std::mt19937 random(2);
    for (int round = 0; round < 5000; ++round) {
      std::string text;
      for (unsigned n = random() % 30; n > 0; --n) text += characters[random() % characters.size()];
      REQUIRE(pieces(words, text, true) == pieces(words, text, false));
    }
  }
}

TEST_CASE("pattern: newer characters, \\s and what is refused", "[text]") {
  const auto words = [](const char* pattern, std::string_view text) {
    return pieces(Words({{pattern, false}}, "test"), text, false);
  };
  using List = std::vector<std::string>;
  CHECK(words(R"(\p{L}+)", "ab1") == List{"ab", "1"});
  CHECK(words(R"(\p{L}+)",
              "a\xf0\xb1\x8d\x90"
              "1") == List{"a\xf0\xb1\x8d\x90", "1"});  // U+31350
  CHECK(words(R"(\s)",
              "a\xe1\xa0\x8e"
              "b") == List{"a\xe1\xa0\x8e"
                           "b"});  // U+180E
  CHECK(words(R"([^\S\n]+)", "a \n") == List{"a", " ", "\n"});
  CHECK(words(R"(a{,2}b)", "aab") == List{"aab"});
  for (const char* bad : {R"(\w+)", R"(\bx)", "^a", "[[a]b]", "[a&&b]", R"(\p{Han})", "(?<n>a)",
                          "(?i:ss)", "a{2}+", "(a", "a)", "[a", "a*", R"([\P{L}])", R"(\1)"}) {
    const Error error = error_of([&] { words(bad, "a"); });
    INFO(bad << ": " << error.what());
    CHECK(error.code() == Exit::data);
    CHECK(has(error, "test"));
  }
}

TEST_CASE("nfc: composes, orders, and leaves what is plain", "[text]") {
  std::string buffer;
  const std::string plain = "abc \xc3\xa9 \xe6\xbc\xa2";
  CHECK(to_nfc(plain, buffer).data() == plain.data());
  CHECK(to_nfc("xe\xcc\x81y", buffer) == "x\xc3\xa9y");              // e + acute
  CHECK(to_nfc("a\xcc\x81\xcc\x96", buffer) == "\xc3\xa1\xcc\x96");  // marks in order
  CHECK(to_nfc("\xe1\x84\x80\xe1\x85\xa1\xe1\x86\xa8!", buffer) == "\xea\xb0\x81!");  // Hangul
  CHECK(to_nfc("\xe2\x84\xab", buffer) == "\xc3\x85");                                // Angstrom
}

TEST_CASE("bpe: added tokens strip, stand alone, and hide what they overlap", "[text]") {
  TempFolder folder;
  json j = small_tokenizer({{"a", "b"}});
  const int first = int(j["model"]["vocab"].size()) + 1;
  const auto add = [&](const std::string& content, const char* flag) {
    json t = {{"id", first + int(j["added_tokens"].size()) - 1}, {"content", content}};
    if (*flag) t[flag] = true;
    j["added_tokens"].push_back(t);
  };
  add("<m>", "lstrip");       // first
  add("<r>", "rstrip");       // first + 1
  add("one", "single_word");  // first + 2
  add("yy", "");              // first + 3
  add("yyy", "");             // first + 4
  const auto t = open_json(folder, j);
  using Ids = std::vector<int32_t>;
  CHECK(encode(*t, "b  <m>b") == Ids{'b', first, 'b'});
  CHECK(encode(*t, "<r>\xe3\x80\x80 b") == Ids{first + 1, 'b'});
  CHECK(encode(*t, "one") == Ids{first + 2});
  CHECK(encode(*t, "bone") == Ids{'b', 'o', 'n', 'e'});
  CHECK(encode(*t, ".one.") == Ids{'.', first + 2, '.'});
  CHECK(encode(*t, "yyyyy") == Ids{first + 4, first + 3});
  CHECK(t->decode(encode(*t, "byyyab")) == "byyyab");
}

TEST_CASE("bpe: a safe prefix is safe, for patterns known and unknown", "[text]") {
  TempFolder folder;
  json unknown = small_tokenizer({{"a", "b"}, {alphabet(' '), "a"}, {"s", "s"}});
  unknown["pre_tokenizer"] = json::parse(R"J({"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": "[a-c]+ ?|[^a-c]"}, "behavior": "Isolated"},
    {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]})J");
  const json known = small_tokenizer({{"a", "b"}, {alphabet(' '), "a"}, {"s", "s"}});
  std::mt19937 random(9);
  for (const json& j : {known, unknown}) {
    const auto t = open_json(folder, j);
    int64_t cuts = 0;
    for (int round = 0; round < 3000; ++round) {
      const std::string text = random_bytes(random, 30), more = random_bytes(random, 12);
      const size_t p = t->safe_prefix(text);
      REQUIRE(p <= text.size());
      cuts += p > 0;
      std::vector<int32_t> parts = encode(*t, text.substr(0, p));
      t->encode((text + more).substr(p), parts);
      REQUIRE(parts == encode(*t, text + more));
    }
    CHECK(cuts > 100);
  }
}

TEST_CASE("bpe: a text without ASCII letters can be cut, too", "[text]") {
  const std::vector<std::string> parts = {
      "\xe4\xb8\xad",  "\xe3\x80\x82", "\n", "\n\n", " ",        "a", ".",
      "\xc3\xa9",      "\xe3\x80\x80", "\t", "\r",   "\xcc\x81", "1", "\xf0\x9f\x91\x8d",
      "<|endoftext|>", "    ",         "'s", "\xff"};
  std::string lines;  // whole sentences, one a line, not one space
  for (int i = 0; i < 40'000; ++i) lines += "\xe4\xb8\xad\xe6\x96\x87\xe7\x9a\x84\xe3\x80\x82\n";
  for (const char* style : {"gpt2", "neox", "llama3"}) {
    INFO(style);
    for (SpecialTokens special : {SpecialTokens::as_text, SpecialTokens::recognised}) {
      const auto t = open_tokenizer(
          HGRN_SOURCE_DIR "/tests/golden/tokenizers/" + std::string(style) + ".json", special);
      const size_t all = t->safe_prefix(lines);
      CHECK(all + 16 > lines.size());
      std::mt19937 random(3);
      int64_t cuts = 0;
      for (int round = 0; round < 4000; ++round) {
        std::string text, more;
        for (unsigned n = random() % 12; n > 0; --n) text += parts[random() % parts.size()];
        for (unsigned n = random() % 5; n > 0; --n) more += parts[random() % parts.size()];
        const size_t p = t->safe_prefix(text);
        cuts += p > 0;
        std::vector<int32_t> halves = encode(*t, text.substr(0, p));
        t->encode((text + more).substr(p), halves);
        REQUIRE(halves == encode(*t, text + more));
      }
      CHECK(cuts > 500);
    }
  }
}

TEST_CASE("bpe: damaged tokenizers are refused with the place", "[text]") {
  TempFolder folder;
  const auto refused = [&](const char* says, const std::function<void(json&)>& change) {
    json j = small_tokenizer({{"a", "b"}, {"ab", "c"}});
    change(j);
    const Error error = error_of([&] { open_json(folder, j); });
    INFO(says << ": " << error.what());
    CHECK(error.code() == Exit::data);
    CHECK(has(error, "tokenizer.json"));
    CHECK(has(error, says));
  };
  refused("not in the vocabulary", [](json& j) { j["model"]["merges"].push_back("q zz"); });
  refused("merge 3", [](json& j) { j["model"]["merges"].push_back("q"); });
  refused("id 5", [](json& j) { j["model"]["vocab"]["ab"] = 5; });
  refused("without a hole", [](json& j) { j["added_tokens"][0]["id"] = 300; });
  refused("byte 7a", [](json& j) {
    j["model"]["vocab"].erase("z");
    j["model"]["vocab"]["zq"] = int('z');
  });
  refused("\"Metaspace\"", [](json& j) { j["pre_tokenizer"]["type"] = "Metaspace"; });
  refused("\"Lowercase\"", [](json& j) { j["normalizer"] = {{"type", "Lowercase"}}; });
  refused("\"Unigram\"", [](json& j) { j["model"]["type"] = "Unigram"; });
  refused("add_prefix_space", [](json& j) { j["pre_tokenizer"]["add_prefix_space"] = true; });
  refused("end-of-text", [](json& j) { j["added_tokens"][0]["content"] = "<other>"; });
  refused("dropout", [](json& j) { j["model"]["dropout"] = 0.1; });
  refused("vocab", [](json& j) { j["model"]["vocab"] = 3; });
  refused("appears twice", [](json& j) {
    json t = j["added_tokens"][0];
    j["added_tokens"].push_back(t);
  });
  write_bytes(folder / "tokenizer.json", "{\n\"model\": {\n  \"vocab\": {]}");
  const Error broken = error_of([&] { open_tokenizer(folder / "tokenizer.json"); });
  CHECK(broken.code() == Exit::data);
  CHECK(has(broken, "line 3"));
}

TEST_CASE("bpe: GPT-2's two files are the same tokenizer as tokenizer.json", "[text]") {
  TempFolder one, two;
  const json j = small_tokenizer({{"a", "b"}, {"ab", "c"}});
  const auto from_json = open_json(one, j);
  json vocab = j["model"]["vocab"];
  vocab["<|endoftext|>"] = from_json->eos();
  write_bytes(two / "vocab.json", vocab.dump());
  write_bytes(two / "merges.txt", "#version: 0.2\na b\nab c\n");
  for (const std::string& spec : {two / "", two / "vocab.json", two / "merges.txt"}) {
    const auto pair = open_tokenizer(spec);
    CHECK(encode(*pair, "abcab ") == encode(*from_json, "abcab "));
    CHECK(pair->vocab_size() == from_json->vocab_size());
    CHECK(pair->eos() == from_json->eos());
    REQUIRE(pair->files().size() == 2);
    CHECK(pair->files()[0].name == "vocab.json");  // the names that a checkpoint is searched for
    CHECK(pair->files()[1].name == "merges.txt");
  }
  write_bytes(two / "merges.txt", "#version: 0.2\na b\nabc\n");
  CHECK(has(error_of([&] { open_tokenizer(two / ""); }), "merges.txt:3"));
  write_bytes(two / "merges.txt", "#version: 0.2\na b\n\nab q\n");
  CHECK(has(error_of([&] { open_tokenizer(two / ""); }), "merges.txt:3"));
  write_bytes(two / "merges.txt", "a b\nab q\n");
  CHECK(has(error_of([&] { open_tokenizer(two / ""); }), "line 2"));
  std::filesystem::remove(two / "merges.txt");
  CHECK(has(error_of([&] { open_tokenizer(two / ""); }), "merges.txt or vocab.bpe is missing"));
}

TEST_CASE("bpe: known token counts of WikiText", "[text]") {
  const std::string gpt2 = kShared + "gpt2-bpe", wikitext = kShared + "wikitext/";
  if (!std::filesystem::exists(gpt2) || !std::filesystem::exists(wikitext)) {
    WARN("no " << gpt2 << " or " << wikitext << ": skipped");
    return;
  }
  const auto t = open_tokenizer(gpt2);
  CHECK(t->vocab_size() == 50257);
  CHECK(t->eos() == 50256);
  for (const auto& [name, count] :
       {std::pair("wiki.test.raw", 286221), {"wiki.valid.raw", 249887}}) {
    const std::string text = read_bytes(wikitext + name);
    const std::vector<int32_t> tokens = encode(*t, text);
    CHECK(tokens.size() == size_t(count));
    CHECK(t->decode(tokens) == text);
  }
  const std::string neox = kShared + "tokenizers/20B_tokenizer.json";
  if (!std::filesystem::exists(neox)) return;
  const auto n = open_tokenizer(neox);
  CHECK(encode(*n, read_bytes(wikitext + "wiki.test.raw")).size() == 287159);
  CHECK(n->decode(encode(*n, "a\xff")) == "a\xef\xbf\xbd");  // it has no token for this byte
}

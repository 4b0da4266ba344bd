// What the fuzzers of tokenizers feed; the test that replays their corpora shares it. A file may be
// refused with Exit::data; anything else that is thrown, and any broken invariant, is a finding.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/check.h"
#include "text/bpe_tokenizer.h"
#include "text/json_document.h"
#include "text/shard_manifest.h"
#include "text/tokenizer_file.h"

namespace hgrn::fuzz {

inline void tokenizer_require(bool ok) {
  if (!ok) std::abort();
}

inline std::vector<int32_t> encoded(const Tokenizer& t, std::string_view text) {
  // Behind it ends the memory: AddressSanitizer sees a byte read too far.
  const std::vector<char> own(text.begin(), text.end());
  std::vector<int32_t> out;
  t.encode({own.data(), own.size()}, out);
  return out;
}

// A whole tokenizer.json: read, built, and used on some short texts (short, since a regular
// expression may take exponential time).
inline void tokenizer(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  try {
    TokenizerDefinition d = read_tokenizer_json(text, "fuzz");
    for (SpecialTokens special : {SpecialTokens::as_text, SpecialTokens::recognised}) {
      const auto t = make_bpe_tokenizer(d, {}, special);
      const int64_t vocab = t->vocab_size();
      tokenizer_require(t->eos() >= 0 && t->eos() < vocab && !t->describe().empty());
      for (std::string_view x :
           {"", "a", "ab  a's\n", "\xff<|x|>\xc3", "e\xcc\x81 12 \xe3\x80\x80"}) {
        const std::vector<int32_t> ids = encoded(*t, x);
        for (int32_t id : ids) tokenizer_require(id >= 0 && id < vocab);
        const std::string back = t->decode(ids);
        const bool changes = d.nfc || special == SpecialTokens::recognised || !d.added.empty();
        if (!changes && x.find('\xff') == std::string_view::npos) tokenizer_require(back == x);
        tokenizer_require(t->safe_prefix(x) <= x.size());
      }
    }
  } catch (const Error& e) {
    tokenizer_require(e.code() == Exit::data);
  }
}

// The character of GPT-2's byte alphabet, in UTF-8.
inline std::string byte_character(int byte) {
  const auto itself = [](int b) {
    return (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
  };
  int c = byte;
  if (!itself(byte)) {
    c = 256;
    for (int b = 0; b < byte; ++b) c += itself(b) ? 0 : 1;
  }
  if (c < 0x80) return {char(c)};
  return {char(0xc0 | c >> 6), char(0x80 | (c & 63))};
}

// Bytes that merge in many ways, within characters and across words, for each kind of pattern.
inline std::unique_ptr<Tokenizer> small_bpe(const char* pattern, bool nfc) {
  nlohmann::json j;
  nlohmann::json& vocab = j["model"]["vocab"] = nlohmann::json::object();
  for (int b = 0; b < 256; ++b) vocab[byte_character(b)] = b;
  j["model"]["type"] = "BPE";
  j["model"]["merges"] = nlohmann::json::array();
  const auto merge = [&](std::string_view a, std::string_view b) {
    std::string left, right;
    for (char c : a) left += byte_character(static_cast<unsigned char>(c));
    for (char c : b) right += byte_character(static_cast<unsigned char>(c));
    if (!vocab.contains(left + right)) vocab[left + right] = int(vocab.size());
    j["model"]["merges"].push_back(left + " " + right);
  };
  for (const auto& [a, b] : std::vector<std::pair<const char*, const char*>>{
           {"a", "b"},       {"b", "a"},           {"ab", "a"},      {"a", "a"},   {"aa", "aa"},
           {" ", "a"},       {" ", " "},           {"  ", "  "},     {"\n", "\n"}, {"'", "s"},
           {"\xc3", "\xa9"}, {"\xe3\x80", "\x80"}, {"\xe3", "\x80"}, {" a", "b"},  {"1", "2"},
           {".", "\n"},      {"\xcc", "\x81"},     {"e", "\xcc"},    {"aba", "b"}, {"b", "b"},
           {"bb", "aa"}})
    merge(a, b);
  j["pre_tokenizer"] = *pattern
                           ? nlohmann::json{{"type", "Sequence"},
                                            {"pretokenizers",
                                             {{{"type", "Split"},
                                               {"pattern", {{"Regex", pattern}}},
                                               {"behavior", "Isolated"}},
                                              {{"type", "ByteLevel"},
                                               {"add_prefix_space", false},
                                               {"use_regex", false}}}}}
                           : nlohmann::json{{"type", "ByteLevel"}, {"add_prefix_space", false}};
  if (nfc) j["normalizer"] = {{"type", "NFC"}};
  j["added_tokens"] = {{{"id", vocab.size()}, {"content", "<|endoftext|>"}, {"special", true}},
                       {{"id", vocab.size() + 1}, {"content", "aab"}, {"normalized", true}}};
  return make_bpe_tokenizer(read_tokenizer_json(j.dump(), "small"), {}, SpecialTokens::as_text);
}

// Any bytes: decode(encode(x)) is x, and cutting at a safe place changes no token.
inline void bpe(const uint8_t* data, size_t size) {
  static const std::unique_ptr<Tokenizer> tokenizers[] = {
      small_bpe("", false), small_bpe(kLlama3Pattern, false), small_bpe(kQwen2Pattern, false),
      small_bpe("[a-c]+ ?|[^a-c]", false), small_bpe("", true)};
  if (size < 2) return;
  const Tokenizer& t = *tokenizers[data[0] % 5];
  const bool nfc = data[0] % 5 == 4;
  const std::string_view all(reinterpret_cast<const char*>(data) + 2, size - 2);
  const std::string_view x = all.substr(0, all.size() * (256 - data[1]) / 256);
  const std::vector<int32_t> ids = encoded(t, all);
  if (!nfc) tokenizer_require(t.decode(ids) == all);
  const size_t p = t.safe_prefix(x);  // whatever follows x
  tokenizer_require(p <= x.size());
  std::vector<int32_t> parts = encoded(t, all.substr(0, p)), rest = encoded(t, all.substr(p));
  parts.insert(parts.end(), rest.begin(), rest.end());
  tokenizer_require(parts == ids);
}

// A line of JSON lines, and a manifest of shards.
inline void shard_json(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  try {
    const std::string document = json_document(text, "text", "fuzz", 1);
    tokenizer_require(nlohmann::json::parse(text).at("text") == document);
  } catch (const Error& e) {
    tokenizer_require(e.code() == Exit::data);
    tokenizer_require(std::string_view(e.what()).rfind("fuzz:1: ", 0) == 0);
  }
  try {
    const std::string once = shard_manifest_to_json(shard_manifest_from_json(text, "fuzz"));
    tokenizer_require(shard_manifest_to_json(shard_manifest_from_json(once, "fuzz")) == once);
  } catch (const Error& e) {
    tokenizer_require(e.code() == Exit::data);
  }
}

}  // namespace hgrn::fuzz

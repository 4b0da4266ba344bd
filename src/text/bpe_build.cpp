#include "text/bpe_build.h"

#include <algorithm>
#include <array>
#include <unordered_map>

#include "core/check.h"
#include "text/utf8.h"

namespace hgrn {
namespace {

constexpr int64_t kMaxVocab = int64_t(1) << 24;
constexpr std::array kUsualEndOfText = {"<|endoftext|>", "<|end_of_text|>", "<|endofdoc|>",
                                        "</s>",          "<eos>",           "<|eos|>",
                                        "[EOS]",         "<|im_end|>"};

using Ids = std::unordered_map<std::string_view, int32_t>;

// GPT-2's byte alphabet: printable bytes of Latin-1 stand for themselves, the other 68 for the
// characters from U+0100 on, in order. byte_of[c]: the byte that character c stands for, else -1.
std::array<int16_t, 324> byte_alphabet() {
  std::array<int16_t, 324> byte_of;
  byte_of.fill(-1);
  size_t next = 256;
  for (size_t b = 0; b < 256; ++b) {
    const bool itself = (b >= '!' && b <= '~') || (b >= 0xa1 && b != 0xad);
    byte_of[itself ? b : next++] = int16_t(b);
  }
  return byte_of;
}

// The bytes that a vocabulary entry stands for; false: a character is outside of the alphabet, so
// that no text gives this token, and it stands for itself.
bool to_bytes(std::string_view token, std::string& bytes) {
  static const std::array<int16_t, 324> byte_of = byte_alphabet();
  bytes.clear();
  for (size_t at = 0; at < token.size();) {
    const size_t n = utf8::length_at(token, at);
    const uint32_t c = n > 0 ? utf8::code_point(token.data() + at, n) : 0;
    if (c >= byte_of.size() || byte_of[c] < 0) return bytes = token, false;
    bytes += char(byte_of[c]);
    at += n;
  }
  return true;
}

// Thirteen bytes stand in no UTF-8 text; vocabularies trained on text may lack them.
bool in_utf8(int byte) {
  return byte != 0xc0 && byte != 0xc1 && byte < 0xf5;
}

// ids of the vocabulary's entries; each id once, from 0 without holes once the added ones are in.
Ids number_tokens(const TokenizerDefinition& d, std::vector<std::string_view>& tokens) {
  Ids ids;
  ids.reserve(d.vocab.size());
  check(!d.vocab.empty(), Exit::data, "{}: the vocabulary is empty", d.file);
  const int64_t most = int64_t(d.vocab.size() + d.added.size());
  check(most <= kMaxVocab, Exit::data, "{}: {} tokens are more than the {} supported", d.file, most,
        kMaxVocab);
  tokens.assign(size_t(most), {});
  std::vector<bool> taken(size_t(most), false);
  const auto take = [&](std::string_view token, int64_t id) {
    check(id >= 0 && id < most, Exit::data,
          "{}: the id of \"{}\" is {}, but {} tokens must have the ids 0 to {} without a hole",
          d.file, token, id, most, most - 1);
    check(!taken[size_t(id)], Exit::data,
          "{}: the id {} is of both \"{}\" and \"{}\"; number one anew", d.file, id,
          tokens[size_t(id)], token);
    taken[size_t(id)] = true;
    tokens[size_t(id)] = token;
  };
  for (const auto& [token, id] : d.vocab) {
    check(!token.empty(), Exit::data, "{}: the token with the id {} is empty", d.file, id);
    take(token, id);
    check(ids.emplace(token, int32_t(id)).second, Exit::data,
          "{}: the token \"{}\" appears twice; remove one", d.file, token);
  }
  const auto vocab_only = ids;
  for (const AddedToken& a : d.added) {
    const auto known = ids.find(a.content);
    if (known != ids.end()) {
      check(known->second == a.id, Exit::data,
            "{}: the added token \"{}\" has the id {}, but elsewhere {}; make them equal", d.file,
            a.content, a.id, known->second);
      check(vocab_only.count(a.content) > 0, Exit::data,
            "{}: the added token \"{}\" appears twice; remove one", d.file, a.content);
    } else {
      take(a.content, a.id);
      ids.emplace(a.content, a.id);
    }
  }
  const size_t count = ids.size();
  for (size_t id = 0; id < count; ++id)
    check(taken[id], Exit::data,
          "{}: no token has the id {}, but there are {}; ids must be 0 to {} without a hole",
          d.file, id, count, count - 1);
  tokens.resize(count);
  return ids;
}

std::vector<Bpe::Merge> number_merges(const TokenizerDefinition& d, const Ids& ids) {
  std::vector<Bpe::Merge> merges;
  merges.reserve(d.merges.size());
  std::string joined;
  const auto id_of = [&](const std::string& token, const TokenizerDefinition::Merge& m) {
    const auto found = ids.find(token);
    check(
        found != ids.end(), Exit::data,
        "{}: {} {} joins \"{}\" and \"{}\", but \"{}\" is not in the vocabulary ({}); the two are "
        "not of one tokenizer",
        d.merges_file, d.merge_unit, m.line, m.left, m.right, token, d.file);
    return found->second;
  };
  for (const TokenizerDefinition::Merge& m : d.merges) {
    joined = m.left;
    joined += m.right;
    merges.push_back({id_of(m.left, m), id_of(m.right, m), id_of(joined, m)});
  }
  return merges;
}

const AddedToken* find_end_of_text(const TokenizerDefinition& d) {
  const auto added = [&](std::string_view content) -> const AddedToken* {
    for (const AddedToken& a : d.added)
      if (a.content == content) return &a;
    return nullptr;
  };
  if (!d.end_of_text.empty()) {
    const AddedToken* found = added(d.end_of_text);
    check(found != nullptr, Exit::data,
          "{}: the end-of-text token \"{}\" (eos_token) is not among its added_tokens; add it",
          d.file, d.end_of_text);
    return found;
  }
  for (const char* usual : kUsualEndOfText)
    if (const AddedToken* found = added(usual)) return found;
  fail(Exit::data,
       "{}: no end-of-text token is known: none of added_tokens has a usual name (<|endoftext|>, "
       "</s>, ...); name it as eos_token in a tokenizer_config.json beside the file",
       d.file);
}

}  // namespace

BuiltBpe build_bpe(const TokenizerDefinition& d) {
  std::vector<std::string_view> tokens;
  const Ids ids = number_tokens(d, tokens);
  std::vector<Bpe::Merge> merges = number_merges(d, ids);

  std::vector<std::string> bytes(tokens.size());
  std::vector<int32_t> in_alphabet;
  int32_t byte_ids[256];
  std::fill_n(byte_ids, 256, -1);
  for (const auto& [token, id] : d.vocab) {
    std::string& b = bytes[size_t(id)];
    const bool reachable = to_bytes(token, b);
    if (reachable) in_alphabet.push_back(int32_t(id));
    if (reachable && b.size() == 1) byte_ids[static_cast<unsigned char>(b[0])] = int32_t(id);
  }
  for (int b = 0; b < 256; ++b)
    check(byte_ids[b] >= 0 || !in_utf8(b), Exit::data,
          "{}: no token stands for the byte {:02x} alone, so that not every text could be encoded; "
          "a byte-level vocabulary has all bytes",
          d.file, b);

  const AddedToken* eos = find_end_of_text(d);
  BuiltBpe built{Bpe(bytes, byte_ids, std::move(merges),
                     d.ignore_merges ? in_alphabet : std::vector<int32_t>{}),
                 {},
                 {},
                 eos->id,
                 eos->content};
  for (const AddedToken& a : d.added) bytes[size_t(a.id)] = a.content;  // found in text as it is
  built.bytes = std::move(bytes);
  std::copy_n(byte_ids, 256, built.byte_ids);
  return built;
}

}  // namespace hgrn

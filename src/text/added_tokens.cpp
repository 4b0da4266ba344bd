#include "text/added_tokens.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <mutex>

#include "core/check.h"
#include "text/utf8.h"

namespace hgrn {

// A word character, as the `regex` library of Rust has it for \w.
struct AddedTokens::WordTest {
  pcre2_code* code;
  WordTest() {
    int error = 0;
    size_t offset = 0;
    code = pcre2_compile(
        reinterpret_cast<PCRE2_SPTR>(R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d}])"),
        PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_ANCHORED, &error, &offset, nullptr);
    check(code != nullptr, "the regular expression of word characters: error {}", error);
  }
  ~WordTest() { pcre2_code_free(code); }
  bool is_word(std::string_view character) const {
    pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
    check(data != nullptr, "no memory for a regular expression's match");
    const int rc = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(character.data()),
                               character.size(), 0, PCRE2_NO_UTF_CHECK, data, nullptr);
    pcre2_match_data_free(data);
    return rc >= 0;
  }
};

AddedTokens::~AddedTokens() = default;
AddedTokens::AddedTokens(AddedTokens&&) noexcept = default;

AddedTokens::AddedTokens(std::vector<AddedToken> tokens, bool match_special)
    : tokens_(std::move(tokens)), match_special_(match_special) {
  const auto first = [](const AddedToken& t) { return static_cast<unsigned char>(t.content[0]); };
  std::stable_sort(tokens_.begin(), tokens_.end(), [&](const AddedToken& a, const AddedToken& b) {
    if (first(a) != first(b)) return first(a) < first(b);
    return a.content.size() > b.content.size();
  });
  if (!tokens_.empty()) starts_.assign(1024, 0);
  for (const AddedToken& t : tokens_) {
    ++bucket_[first(t) + 1];
    for (size_t second = 0; second < 256; ++second)
      if (t.content.size() == 1 || second == static_cast<unsigned char>(t.content[1])) {
        const size_t bits = size_t(first(t)) << 8 | second;
        starts_[bits >> 6] |= uint64_t(1) << (bits & 63);
      }
    if (t.single_word && !word_) word_ = std::make_unique<WordTest>();
  }
  for (size_t b = 0; b < 256; ++b) bucket_[b + 1] += bucket_[b];

  // A cut in front of a space changes what is found where a token lies across it, where one that
  // ends there would take the space, and where one that starts there looks at what stands before.
  for (const AddedToken& t : tokens_) {
    for (size_t i = 0; i + 1 < t.content.size(); ++i)
      if (t.content[i + 1] == ' ') cut_matters_[static_cast<unsigned char>(t.content[i])] = true;
    if (t.rstrip) cut_matters_[static_cast<unsigned char>(t.content.back())] = true;
    if (t.single_word && t.content[0] == ' ') std::fill_n(cut_matters_, 256, true);
  }
}

const AddedToken* AddedTokens::longest_at(std::string_view text, size_t at) const {
  const size_t first = static_cast<unsigned char>(text[at]);
  for (uint32_t k = bucket_[first]; k < bucket_[first + 1]; ++k) {
    const std::string& content = tokens_[k].content;
    if (text.size() - at >= content.size() &&
        std::memcmp(text.data() + at, content.data(), content.size()) == 0)
      return &tokens_[k];
  }
  return nullptr;
}

bool AddedTokens::beside_word(std::string_view text, size_t begin, size_t end) const {
  if (begin > 0) {
    size_t at = begin - 1;
    while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
    if (word_->is_word(text.substr(at, begin - at))) return true;
  }
  return end < text.size() && word_->is_word(text.substr(end, utf8::length_at(text, end)));
}

bool AddedTokens::find(std::string_view text, size_t& at, size_t done, Found& found) const {
  if (tokens_.empty()) return false;
  while (at < text.size()) {
    const size_t second = at + 1 < text.size() ? static_cast<unsigned char>(text[at + 1]) : 0;
    const size_t bits = size_t(static_cast<unsigned char>(text[at])) << 8 | second;
    if ((starts_[bits >> 6] >> (bits & 63) & 1) == 0) {
      ++at;
      continue;
    }
    const AddedToken* t = longest_at(text, at);
    if (!t) {
      ++at;
      continue;
    }
    size_t begin = at, end = at + t->content.size();
    at = end;
    if (t->special && !match_special_) continue;
    if (t->single_word && beside_word(text, begin, end)) continue;
    if (t->lstrip) begin = std::max(begin - utf8::trailing_space(text.substr(0, begin)), done);
    if (t->rstrip) end += utf8::leading_space(text.substr(end));
    found = {begin, end, t->id};
    return true;
  }
  return false;
}

}  // namespace hgrn

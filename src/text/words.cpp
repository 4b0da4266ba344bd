// The two ASCII scanners say what the patterns in words.h say, for words that are decided by ASCII
// characters alone; anything else is left to PCRE2. The test compares them on every short text.
#include "text/words.h"

#include <array>

namespace hgrn {
namespace {

enum Kind : uint8_t { kOther, kLetter, kDigit, kSpace, kNewline, kWide };  // kSpace: not \r, \n

constexpr std::array<Kind, 256> kKinds = [] {
  std::array<Kind, 256> kinds{};
  for (int c = 0; c < 256; ++c) {
    Kind k = kOther;
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) k = kLetter;
    if (c >= '0' && c <= '9') k = kDigit;
    if (c == ' ' || c == '\t' || c == '\v' || c == '\f') k = kSpace;
    if (c == '\r' || c == '\n') k = kNewline;
    if (c >= 0x80) k = kWide;
    kinds[size_t(c)] = k;
  }
  return kinds;
}();

Kind kind(char c) {
  return kKinds[static_cast<unsigned char>(c)];
}

// The end of the run of `k` that reaches text[at] or starts there.
size_t run_end(std::string_view text, size_t at, Kind k) {
  while (at < text.size() && kind(text[at]) == k) ++at;
  return at;
}

// Bytes of 's 't 'm 'd 're 've 'll at text[at]; 0: none of them.
size_t contraction(std::string_view text, size_t at, bool any_case) {
  const auto letter = [&](size_t i) {
    const char c = at + i < text.size() ? text[at + i] : '\0';
    return any_case && c >= 'A' && c <= 'Z' ? char(c - 'A' + 'a') : c;
  };
  const char a = letter(1);
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
  const char b = letter(2);
  return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

// \s+(?!\S)|\s+ on the whitespace text[at, end): all of it at the end of the text, else the last
// character goes with the next word.
size_t space_end(std::string_view text, size_t at, size_t end) {
  return end == text.size() || end == at + 1 ? end : end - 1;
}

bool wide_at(std::string_view text, size_t at) {
  return at < text.size() && kind(text[at]) == kWide;
}

}  // namespace

size_t Words::ascii_gpt2(std::string_view text, size_t at) {
  if (text[at] == '\'')
    if (const size_t n = contraction(text, at, false)) return at + n;
  size_t from = at + (text[at] == ' ' ? 1 : 0);
  if (from < text.size()) {
    const Kind k = kind(text[from]);
    if (k == kWide) return 0;
    if (k == kLetter || k == kDigit || k == kOther) {
      const size_t end = run_end(text, from, k);
      return wide_at(text, end) ? 0 : end;
    }
  }
  size_t end = at;
  while (end < text.size() && (kind(text[end]) == kSpace || kind(text[end]) == kNewline)) ++end;
  return wide_at(text, end) ? 0 : space_end(text, at, end);
}

size_t Words::ascii_llama3(std::string_view text, size_t at) const {
  const char c = text[at];
  if (c == '\'') {
    if (const size_t n = contraction(text, at, true)) return at + n;
    if (wide_at(text, at + 1)) return 0;  // the long s is an s in any case
  }
  const Kind k = kind(c);
  if (k == kWide) return 0;
  if (k == kLetter || ((k == kSpace || k == kOther) && at + 1 < text.size())) {
    const size_t from = at + (k == kLetter ? 0 : 1);
    if (wide_at(text, from)) return 0;
    if (kind(text[from]) == kLetter) {
      const size_t end = run_end(text, from, kLetter);
      return wide_at(text, end) ? 0 : end;
    }
  }
  if (k == kDigit) {
    size_t end = at + 1;
    while (end < text.size() && end - at < digits_ && kind(text[end]) == kDigit) ++end;
    return end - at < digits_ && wide_at(text, end) ? 0 : end;
  }
  const size_t from = at + (c == ' ' ? 1 : 0);
  if (from < text.size() && kind(text[from]) == kOther) {
    size_t end = run_end(text, from, kOther);
    if (wide_at(text, end)) return 0;
    return run_end(text, end, kNewline);
  }
  size_t end = at, newline = 0;  // behind the last newline
  for (; end < text.size() && (kind(text[end]) == kSpace || kind(text[end]) == kNewline); ++end)
    if (kind(text[end]) == kNewline) newline = end + 1;
  if (wide_at(text, end)) return 0;
  return newline > 0 ? newline : space_end(text, at, end);
}

Words::Words(const std::vector<Split>& steps, const std::string& where) {
  for (const Split& s : steps) {
    steps_.emplace_back(s.pattern, where);
    contiguous_.push_back(s.contiguous);
  }
  if (steps.size() != 1 || steps[0].contiguous) return;
  if (steps[0].pattern == kGpt2Pattern) fast_ = Fast::gpt2;
  if (steps[0].pattern == kLlama3Pattern) fast_ = Fast::llama3, digits_ = 3;
  if (steps[0].pattern == kQwen2Pattern) fast_ = Fast::llama3, digits_ = 1;
}

size_t Words::next_end(size_t step, std::string_view text, size_t at,
                       Pattern::Matcher& matcher) const {
  Pattern::Match m;
  if (!steps_[step].find(text, at, matcher, m)) return text.size();
  return m.begin > at ? m.begin : m.end;
}

}  // namespace hgrn

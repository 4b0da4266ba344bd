// UTF-8: well-formed sequences as Unicode defines them (no surrogates, no overlong forms, nothing
// above U+10FFFF), and the whitespace of Unicode.
#pragma once
#include <cstdint>
#include <cstring>
#include <string_view>

namespace hgrn::utf8 {

// Length in bytes (1 to 4) of the well-formed character that starts at text[at]; 0: none does.
inline size_t length_at(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const auto follows = [&](size_t i, unsigned low, unsigned high) {
    return at + i < text.size() && byte(i) >= low && byte(i) <= high;
  };
  const unsigned b = byte(0);
  if (b < 0x80) return 1;
  if (b < 0xc2) return 0;
  if (b < 0xe0) return follows(1, 0x80, 0xbf) ? 2 : 0;
  if (b < 0xf0) {
    const bool second = follows(1, b == 0xe0 ? 0xa0 : 0x80, b == 0xed ? 0x9f : 0xbf);
    return second && follows(2, 0x80, 0xbf) ? 3 : 0;
  }
  if (b > 0xf4) return 0;
  const bool second = follows(1, b == 0xf0 ? 0x90 : 0x80, b == 0xf4 ? 0x8f : 0xbf);
  return second && follows(2, 0x80, 0xbf) && follows(3, 0x80, 0xbf) ? 4 : 0;
}

// Whether text[at, at + 8) is there and ASCII throughout.
inline bool eight_ascii(std::string_view text, size_t at) {
  if (at + 8 > text.size()) return false;
  uint64_t eight;
  std::memcpy(&eight, text.data() + at, 8);
  return (eight & 0x8080808080808080u) == 0;
}

// Bytes of the longest well-formed stretch that starts at text[at].
inline size_t valid_prefix(std::string_view text, size_t at = 0) {
  const size_t start = at;
  while (at < text.size()) {
    if (eight_ascii(text, at)) {
      at += 8;
      continue;
    }
    const size_t n = length_at(text, at);
    if (n == 0) break;
    at += n;
  }
  return at - start;
}

// The code point of a well-formed character of n bytes.
inline uint32_t code_point(const char* s, size_t n) {
  const auto low = [&](size_t i) { return uint32_t(static_cast<unsigned char>(s[i])) & 0x3f; };
  const uint32_t b = static_cast<unsigned char>(s[0]);
  if (n == 1) return b;
  if (n == 2) return (b & 0x1f) << 6 | low(1);
  if (n == 3) return (b & 0x0f) << 12 | low(1) << 6 | low(2);
  return (b & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3);
}

// Unicode's White_Space: what \s means to the tokenizers.
inline bool is_white_space(uint32_t c) {
  return c == 0x20 || (c >= 0x09 && c <= 0x0d) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

// Bytes of the White_Space run that well-formed `text` starts with, ends with.
inline size_t leading_space(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const size_t n = length_at(text, at);
    if (n == 0 || !is_white_space(code_point(text.data() + at, n))) break;
    at += n;
  }
  return at;
}
inline size_t trailing_space(std::string_view text) {
  size_t end = text.size();
  while (end > 0) {
    size_t at = end - 1;
    while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
    if (!is_white_space(code_point(text.data() + at, end - at))) break;
    end = at;
  }
  return text.size() - end;
}

}  // namespace hgrn::utf8

#include "text/tokenize.h"

namespace hgrn {
namespace {

// Code points above ASCII that Unicode calls White_Space.
bool is_wide_space(uint32_t c) {
  return c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 ||
         c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

bool is_continuation(char c) {
  return (static_cast<unsigned char>(c) & 0xc0) == 0x80;
}

// Length in bytes of the whitespace character that `s` starts with; 0: it starts with none.
size_t space_at(std::string_view s) {
  const auto byte = [&](size_t i) { return uint32_t(static_cast<unsigned char>(s[i])); };
  if (s.empty()) return 0;
  const uint32_t c = byte(0);
  if (c == 0x20 || (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x1f)) return 1;
  if ((c & 0xe0) == 0xc0 && s.size() >= 2 && is_continuation(s[1]))
    return is_wide_space((c & 0x1f) << 6 | (byte(1) & 0x3f)) ? 2 : 0;
  if ((c & 0xf0) == 0xe0 && s.size() >= 3 && is_continuation(s[1]) && is_continuation(s[2]))
    return is_wide_space((c & 0x0f) << 12 | (byte(1) & 0x3f) << 6 | (byte(2) & 0x3f)) ? 3 : 0;
  return 0;
}

}  // namespace

std::string_view strip_left(std::string_view text) {
  while (const size_t n = space_at(text)) text.remove_prefix(n);
  return text;
}

std::string_view strip_right(std::string_view text) {
  while (!text.empty()) {
    size_t n = 1;  // bytes of the last character
    while (n < 3 && n < text.size() && is_continuation(text[text.size() - n])) ++n;
    const std::string_view last = text.substr(text.size() - n);
    if (space_at(last) != n) break;
    text.remove_suffix(n);
  }
  return text;
}

std::string_view strip(std::string_view text) {
  return strip_right(strip_left(text));
}

}  // namespace hgrn

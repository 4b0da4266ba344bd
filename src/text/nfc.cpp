#include "text/nfc.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <memory>

#include "core/check.h"
#include "text/unicode_supplement.h"
#include "text/utf8.h"

namespace hgrn {
namespace {

// Blocks whose every character has NFC_Quick_Check=Yes and no combining class, so that text of
// them alone is in NFC (UAX #15, section 9). The test walks through all of them.
bool is_plain(uint32_t c) {
  return c < 0x300 || (c >= 0x3041 && c <= 0x3096) || (c >= 0x30a0 && c <= 0x30ff) ||
         (c >= 0x3400 && c <= 0x9fff) || (c >= 0xac00 && c <= 0xd7a3) ||
         (c >= 0x0388 && c <= 0x0482) || (c >= 0x048a && c <= 0x0590) ||
         (c >= 0x2002 && c <= 0x20cf) || (c >= 0x2190 && c <= 0x2328) ||
         (c >= 0x232b && c <= 0x2adb) || (c >= 0x3001 && c <= 0x3029) ||
         (c >= 0xff00 && c <= 0xffef) || (c >= 0x1f000 && c <= 0x1faff);
}

// Where the next character from `at` on that is not plain starts; the end if there is none.
size_t next_odd(std::string_view text, size_t at) {
  while (at < text.size()) {
    if (utf8::eight_ascii(text, at)) {
      at += 8;
      continue;
    }
    const size_t n = utf8::length_at(text, at);
    if (n > 1 && !is_plain(utf8::code_point(text.data() + at, n))) return at;
    at += n;
  }
  return at;
}

size_t odd_end(std::string_view text, size_t at) {
  while (at < text.size()) {
    const size_t n = utf8::length_at(text, at);
    if (n == 1 || is_plain(utf8::code_point(text.data() + at, n))) break;
    at += n;
  }
  return at;
}

bool is_unknown(uint32_t c) {
  const auto* end = std::end(kNfcUnknown);
  const auto* range = std::lower_bound(std::begin(kNfcUnknown), end, c,
                                       [](const uint32_t(&r)[2], uint32_t x) { return r[1] < x; });
  return range != end && (*range)[0] <= c;
}

void append_known(std::string_view text, std::string& to) {
  if (text.empty()) return;
  utf8proc_uint8_t* out = nullptr;
  const utf8proc_ssize_t n = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                          utf8proc_ssize_t(text.size()), &out,
                                          utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  const std::unique_ptr<utf8proc_uint8_t, void (*)(void*)> owner(out, std::free);
  check(n >= 0, "cannot bring {} bytes of text into NFC: {}", text.size(), utf8proc_errmsg(n));
  to.append(reinterpret_cast<const char*>(out), size_t(n));
}

void append_nfc(std::string_view text, std::string& to) {
  size_t begin = 0;  // of what is not in `to` yet
  for (size_t at = 0, n; at < text.size(); at += n) {
    n = utf8::length_at(text, at);
    if (n == 1 || !is_unknown(utf8::code_point(text.data() + at, n))) continue;
    append_known(text.substr(begin, at - begin), to);
    to.append(text.substr(at, n));
    begin = at + n;
  }
  append_known(text.substr(begin), to);
}

}  // namespace

std::string_view to_nfc(std::string_view text, std::string& buffer) {
  buffer.clear();
  std::string piece;
  bool changed = false;
  size_t done = 0;  // text before it is in the buffer, once something has changed
  for (size_t odd; (odd = next_odd(text, done)) < text.size();) {
    // The plain character before may compose with what follows; nothing composes across it.
    size_t begin = odd;
    if (begin > done) --begin;
    while (begin > done && (static_cast<unsigned char>(text[begin]) & 0xc0) == 0x80) --begin;
    const size_t end = odd_end(text, odd);
    piece.clear();
    append_nfc(text.substr(begin, end - begin), piece);
    if (!changed && piece != text.substr(begin, end - begin)) {
      changed = true;
      buffer.assign(text.substr(0, done));
    }
    if (changed) buffer.append(text.substr(done, begin - done)).append(piece);
    done = end;
  }
  if (!changed) return text;
  return buffer.append(text.substr(done));
}

}  // namespace hgrn

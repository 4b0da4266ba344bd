#include "core/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>
#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>

namespace hgrn {
namespace {

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

int positive(const char* name, int otherwise) {
  const int value = std::atoi(environment(name).c_str());
  return value > 0 ? value : otherwise;
}

struct Glyph {
  size_t bytes = 1;
  int columns = 0;
};

Glyph next_glyph(std::string_view text) {
  const unsigned char first = static_cast<unsigned char>(text[0]);
  if (first == 0x1b && text.size() > 1 && text[1] == '[') {
    size_t end = 2;
    while (end < text.size() && (text[end] < 0x40 || text[end] > 0x7e)) ++end;
    return {std::min(end + 1, text.size()), 0};
  }
  if (first < 0x20 || first == 0x7f) return {1, 0};
  utf8proc_int32_t code = 0;
  const utf8proc_ssize_t n = utf8proc_iterate(
      reinterpret_cast<const utf8proc_uint8_t*>(text.data()), utf8proc_ssize_t(text.size()), &code);
  if (n <= 0) return {1, 1};
  return {size_t(n), utf8proc_charwidth(code)};
}

}  // namespace

bool stderr_is_terminal() {
  return isatty(STDERR_FILENO) == 1;
}

bool terminal_moves() {
  const std::string term = environment("TERM");
  return stderr_is_terminal() && !term.empty() && term != "dumb";
}

bool terminal_colour() {
  return stderr_is_terminal() && environment("NO_COLOR").empty();
}

bool terminal_utf8() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"})
    if (const std::string v = environment(name); !v.empty())
      return v.find("UTF-8") != std::string::npos || v.find("utf8") != std::string::npos ||
             v.find("utf-8") != std::string::npos || v.find("UTF8") != std::string::npos;
  return false;
}

TerminalSize terminal_size(int fd) {
  TerminalSize size;
  winsize w{};
  const bool known = ::ioctl(fd, TIOCGWINSZ, &w) == 0;
  size.columns = known && w.ws_col > 0 ? w.ws_col : positive("COLUMNS", size.columns);
  size.rows = known && w.ws_row > 0 ? w.ws_row : positive("LINES", size.rows);
  return size;
}

int display_width(std::string_view text) {
  int columns = 0;
  while (!text.empty()) {
    const Glyph g = next_glyph(text);
    columns += g.columns;
    text.remove_prefix(g.bytes);
  }
  return columns;
}

std::string cut_to(std::string_view text, int columns) {
  std::string out;
  while (!text.empty()) {
    const Glyph g = next_glyph(text);
    const bool control = text[0] == '\x1b';
    columns -= g.columns;  // below 0 from the first glyph on that does not fit
    if (control || columns >= 0) out.append(text.substr(0, g.bytes));
    text.remove_prefix(g.bytes);
  }
  return out;
}

}  // namespace hgrn

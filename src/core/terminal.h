// What stderr's terminal can show, and how wide texts are on it.
#pragma once
#include <string>
#include <string_view>

namespace hgrn {

bool stderr_is_terminal();
bool terminal_moves();   // it can move its cursor (TERM is set, and not "dumb")
bool terminal_colour();  // a terminal, and NO_COLOR (no-color.org) is unset or empty
bool terminal_utf8();    // by LC_ALL, LC_CTYPE, LANG
struct TerminalSize {
  int columns = 80, rows = 24;
};
// Of the terminal behind this descriptor; else COLUMNS and LINES; else 80 x 24.
TerminalSize terminal_size(int fd);

// Columns that a text takes; control sequences (ESC [ ... letter) and control characters take none.
int display_width(std::string_view text);
// The text, cut to so many columns; control sequences behind the cut are kept.
std::string cut_to(std::string_view text, int columns);

}  // namespace hgrn

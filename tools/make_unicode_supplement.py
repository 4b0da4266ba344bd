#!/usr/bin/env python3
"""Writes src/text/unicode_supplement.h: where the Unicode of our libraries is not that of the peer's.

PCRE2 10.42 (Debian 12, Ubuntu 24.04) knows Unicode 14; the regular-expression engine of Hugging Face
`tokenizers` knows a later one. src/text/pattern_syntax.cpp adds the characters gained since to \\p{..}, so
that both cut text alike. The normaliser of `tokenizers` knows an earlier Unicode than utf8proc: to it,
newer combining marks are characters that nothing reorders or composes, and src/text/nfc.cpp leaves them
so. Both lists are read from `tokenizers` itself.

usage: tools/make_unicode_supplement.py       needs: pip install tokenizers, a Python with Unicode 14 (3.11)
"""
import os
import sys
import unicodedata

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

CATEGORIES = ["Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No",
              "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp"]
OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../src/text/unicode_supplement.h")


def nfc_unknown(codes, newer):
    nfc = normalizers.NFC().normalize_str
    found = [c for a, b, _ in newer for c in range(a, b + 1)]
    seconds = set()
    for c in codes:
        if unicodedata.combining(chr(c)):
            after, before = "\u0531\u0345" + chr(c), "\u0531" + chr(c) + "\u0334"
            if any(nfc(s) != unicodedata.normalize("NFC", s) for s in (after, before)):
                found.append(c)
        parts = unicodedata.normalize("NFD", chr(c))
        if len(parts) > 1 and nfc(parts) != unicodedata.normalize("NFC", parts):
            seconds.add(ord(parts[-1]))
    ranges = []
    for c in sorted(set(found) | seconds):
        if ranges and ranges[-1][1] == c - 1:
            ranges[-1][1] = c
        else:
            ranges.append([c, c])
    return ranges


def wrapped(rows):
    lines, line = [], "   "
    for row in rows:
        if len(line) + len(row) + 2 > 99:
            lines.append(line)
            line = "   "
        line += f" {row},"
    return lines + [line]


def main():
    if unicodedata.unidata_version != "14.0.0":
        sys.exit(f"this Python knows Unicode {unicodedata.unidata_version}, the baseline is 14.0.0: use Python 3.11")
    codes = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    text = "".join(map(chr, codes))
    category = {}
    for name in CATEGORIES:
        keep = pre_tokenizers.Split(Regex(r"\p{%s}" % name), "removed", invert=True)
        for piece, _ in keep.pre_tokenize_str(text):
            for c in piece:
                category[ord(c)] = name
    ranges, moved = [], []
    for c in codes:
        old, new = unicodedata.category(chr(c)), category.get(c)
        if old == new or (new is None and old in ("Cc", "Cf", "Co", "Cn")):
            continue
        if old != "Cn":  # moved; harmless inside a major category, which is all that patterns ask for
            moved.append(f"U+{c:04X} {old} to {new}")
            if new is None or old[0] != new[0]:
                sys.exit(f"{moved[-1]}: a table of additions cannot say that")
            continue
        if ranges and ranges[-1][1] == c - 1 and ranges[-1][2] == new:
            ranges[-1][1] = c
        else:
            ranges.append([c, c, new])
    print("moved inside a major category:", ", ".join(moved))
    unknown = nfc_unknown(codes, ranges)
    rows = [f'{{0x{a:05x}, 0x{b:05x}, "{n}"}}' for a, b, n in ranges]
    lines = wrapped(rows)
    count = sum(b - a + 1 for a, b, _ in ranges)
    with open(OUT, "w") as f:
        f.write(f"""// Characters assigned after Unicode 14, with their general category: what the engine of Hugging Face
// tokenizers {tokenizers.__version__} (Oniguruma) knows and PCRE2 10.42 does not. {count} characters.
// Made by tools/make_unicode_supplement.py.
#pragma once
#include <cstdint>

namespace hgrn {{

struct UnicodeRange {{
  uint32_t first, last;
  char category[3];
}};

// clang-format off
inline constexpr UnicodeRange kUnicodeSupplement[] = {{
""" + "\n".join(lines) + """
};

// First and last of ranges of characters that the normaliser of tokenizers does not reorder or compose.
inline constexpr uint32_t kNfcUnknown[][2] = {
""" + "\n".join(wrapped([f"{{0x{a:05x}, 0x{b:05x}}}" for a, b in unknown])) + """
};
// clang-format on

}  // namespace hgrn
""")


main()

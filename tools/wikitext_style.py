#!/usr/bin/env python3
"""Plain text into the conventions of WikiText-103's raw text, for models that are trained on other
text and evaluated on WikiText's. Needs no packages.

    python3 tools/wikitext_style.py --out wiki_style.txt articles.txt
    python3 tools/wikitext_style.py --out wiki_style.txt --tokenizer gpt2/ articles.gpt2.u16.xz

Input: documents separated by a line "<|endoftext|>", or GPT-2 tokens (.u16, .u16.xz) with 50256
between documents, for which --tokenizer names the folder with encoder.json. Output: one paragraph a
line, blank lines around headings, each line's tokens separated by spaces:
    The squad (a 19-man team) cost $1,250.50, didn't it?
    The squad ( a 19 @-@ man team ) cost $ 1 @,@ 250 @.@ 50 , didn 't it ?
The rules are those of the Moses tokenizer's English, which WikiText was made with: every sign but
. ' , - stands alone; hyphens inside words are @-@, commas and points inside numbers @,@ and @.@; a
full stop stands alone unless it ends an abbreviation. Headings are guessed: a document's first line,
and short lines between blank ones that do not end as sentences do; Markdown's # counts levels.
"""
from __future__ import annotations

import argparse
import json
import lzma
import multiprocessing
import re
import sys
import time
from pathlib import Path

SEPARATOR = "<|endoftext|>"
END_OF_TEXT = 50256

# Abbreviations after which a full stop stays (some only before a number).
ABBREVIATIONS = frozenset(
    "Adj Adm Adv Asst Bart Bldg Brig Bros Capt Cmdr Col Comdr Con Corp Cpl Dr Drs Ens Gen Gov Hon "
    "Hosp Insp Lt Maj Messrs Mlle Mme Mr Mrs Ms Msgr Op Ord Pfc Ph Prof Pvt Rep Reps Res Rev Rt Sen "
    "Sens Sgt Sr St Supt Surg vs i.e rev e.g Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Ave "
    "Blvd Rd Mt Ft".split())
BEFORE_NUMBER = frozenset("No Nos Art Nr pp Vol vol p".split())

SIGNS = re.compile(r"([^\w\s.',\-]|_)")
HYPHEN = re.compile(r"(?<=[^\W_])-(?=[^\W_])")
COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
POINT_IN_NUMBER = re.compile(r"(?<=\d)\.(?=\d)")
COMMA = re.compile(r"(?<!@),(?!@)")
DOTS = re.compile(r"\.{2,}")
APOSTROPHE = re.compile(r"(?<=[^\W\d_])'(?=[^\W\d_])")
OTHER_APOSTROPHE = re.compile(r"(?<![^\W_])'(?=\S)|'(?![^\W_])")
DECADE = re.compile(r"(?<=\d)'(?=s\b)")
SPACES = re.compile(r"\s+")
END_OF_SENTENCE = re.compile(r"[.!?:;,\"')\]…]$")


def full_stops(words: list[str]) -> list[str]:
    """Splits a full stop off the word before it, unless that is an abbreviation."""
    out = []
    for i, word in enumerate(words):
        stem = word[:-1]
        if word.endswith(".") and stem and not stem.endswith("."):
            following = words[i + 1] if i + 1 < len(words) else ""
            stays = (("." in stem and any(c.isalpha() for c in stem)) or stem in ABBREVIATIONS
                     or (len(stem) == 1 and stem.isupper())
                     or (stem in BEFORE_NUMBER and following[:1].isdigit())
                     or following[:1].islower())
            if not (stays and following):  # the last word of a line always gives its full stop away
                out += [stem, "."]
                continue
        out.append(word)
    return out


def paragraph(text: str) -> str:
    text = text.replace("’", "'").replace("“", '"').replace("”", '"').replace("‘", "'")
    text = DOTS.sub(" ... ", text)
    text = SIGNS.sub(r" \1 ", text)
    text = HYPHEN.sub(" @-@ ", text)
    text = COMMA_IN_NUMBER.sub(" @,@ ", text)
    text = POINT_IN_NUMBER.sub(" @.@ ", text)
    text = COMMA.sub(" , ", text)
    text = OTHER_APOSTROPHE.sub(" ' ", text)
    text = DECADE.sub(" '", text)
    text = APOSTROPHE.sub(" '", text)
    return " ".join(full_stops(SPACES.sub(" ", text).strip().split(" ")))


def heading_level(line: str, first: bool, alone: bool) -> int:
    """0: no heading; 1: the document's; 2 and on: sections."""
    marks = len(line) - len(line.lstrip("#"))
    if marks:
        return max(2, marks)
    if first and len(line) <= 120:
        return 1
    short = len(line) <= 60 and len(line.split()) <= 8
    return 2 if alone and short and not END_OF_SENTENCE.search(line) else 0


def document(text: str) -> str:
    """One document in WikiText's layout: paragraphs on lines of their own, headings between blank
    ones."""
    lines = [line.strip() for line in text.split("\n")]
    out = []
    first = True
    for i, line in enumerate(lines):
        if not line:
            continue
        alone = (i == 0 or not lines[i - 1]) and (i + 1 == len(lines) or not lines[i + 1])
        level = heading_level(line, first, alone)
        first = False
        body = paragraph(line.lstrip("# ") if level else line)
        if not body:
            continue
        if level:
            marks = " ".join("=" * level)
            out += ["", f" {marks} {body} {marks} ", ""]
        else:
            out.append(f" {body} ")
    return "\n".join(out) + "\n" if out else ""


# ---- reading

def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and on."""
    table, extra = {}, 0
    for b in range(256):
        if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255:
            table[chr(b)] = b
        else:
            table[chr(256 + extra)] = b
            extra += 1
    return table


def token_bytes(tokenizer: Path) -> list[bytes]:
    file = next((tokenizer / n for n in ("encoder.json", "vocab.json") if (tokenizer / n).exists()),
                None)
    if file is None:
        sys.exit(f"{tokenizer}: neither encoder.json nor vocab.json is there")
    ids, alphabet = json.loads(file.read_text()), byte_of_character()
    table = [b""] * (max(ids.values()) + 1)
    for text, i in ids.items():
        if i != END_OF_TEXT:
            table[i] = bytes(alphabet[c] for c in text)
    return table


def documents(path: Path, tokenizer: Path | None):
    """The documents of a file, as text."""
    opened = lzma.open(path, "rb") if path.suffix == ".xz" else open(path, "rb")
    with opened as file:
        if ".u16" not in path.suffixes:
            yield from file.read().decode("utf-8", "replace").split(SEPARATOR + "\n")
            return
        if tokenizer is None:
            sys.exit(f"{path} holds tokens: give --tokenizer DIR")
        table, parts = token_bytes(tokenizer), []
        while data := file.read(1 << 22):
            ids = memoryview(data).cast("H").tolist()
            start = 0
            for at in [i for i, t in enumerate(ids) if t == END_OF_TEXT]:
                parts += [table[t] for t in ids[start:at]]
                yield b"".join(parts).decode("utf-8", "replace")
                parts, start = [], at + 1
            parts += [table[t] for t in ids[start:]]
        yield b"".join(parts).decode("utf-8", "replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--tokenizer", type=Path, metavar="DIR")
    parser.add_argument("--documents", type=int, metavar="N", help="stop after so many of each file")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    a = parser.parse_args()
    started, count, size = time.time(), 0, 0
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool(a.jobs) as pool, open(a.out, "w", encoding="utf-8") as out:
        for path in a.files:
            source = (d for i, d in enumerate(documents(path, a.tokenizer))
                      if a.documents is None or i < a.documents)
            for text in pool.imap(document, source, chunksize=16):
                out.write(text)
                count += bool(text)
                size += len(text)
    print(f"{a.out}: {count} documents, {size} characters, {time.time() - started:.1f} s")


if __name__ == "__main__":
    main()

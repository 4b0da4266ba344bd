#!/usr/bin/env python3
"""Perplexity by position in a text, from `hgrn eval --per-token` files of separate texts.

    hgrn eval --checkpoint RUN --data text0.bin --protocol carry --per-token text0.jsonl     # and so on
    python3 tools/position_ppl.py --svg position.svg books=text*.jsonl
    python3 tools/position_ppl.py cut --length 65536 --out pieces/book books_valid_000000.bin

Each file is one text whose state began at zero; position i is the i-th scored token. A bin holds the
positions from 2^(k/2) to 2^((k+1)/2) of all texts of a LABEL=GLOB. Its perplexity is exp of the mean nll; the
error bar is the standard error over the texts' own means (texts are independent, neighbouring tokens are
not). `cut` cuts a shard's documents into shards of --length tokens behind an end-of-text token, each to be
evaluated by itself; documents give as many as they hold, the rest is left out. Needs no packages.
"""
from __future__ import annotations

import argparse
import array
import glob
import json
import math
import struct
import sys
from pathlib import Path

from plot import Axis, Series, chart

MAGIC, VERSION = 20240520, 1


# ---- cutting

def read_shard(path: Path) -> array.array:
    data = path.read_bytes()
    magic, version = struct.unpack_from("<2i", data)
    if (magic, version) != (MAGIC, VERSION):
        sys.exit(f"{path}: not a shard of 16-bit tokens")
    return array.array("H", data[1024:])


def write_shard(path: Path, tokens: array.array) -> None:
    path.write_bytes(struct.pack("<2iq", MAGIC, VERSION, len(tokens)) + bytes(1008) + tokens.tobytes())


def pieces(tokens: array.array, eos: int, length: int, most: int) -> list[array.array]:
    """From each document its consecutive pieces of `length` tokens, without end-of-text."""
    starts = [i + 1 for i, t in enumerate(tokens) if t == eos]
    if not starts or starts[0] != 1:
        starts.insert(0, 0)
    ends = [s - 1 for s in starts[1:]] + [len(tokens)]
    by_document = [[tokens[i:i + length] for i in range(s, e - length + 1, length)]
                   for s, e in zip(starts, ends)]
    out = []  # first pieces first: as many different documents as there are
    for depth in range(max(map(len, by_document), default=0)):
        out += [p[depth] for p in by_document if depth < len(p)]
    return out[:most]


def cut(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="position_ppl.py cut")
    parser.add_argument("shard", type=Path)
    parser.add_argument("--out", required=True, metavar="PREFIX")
    parser.add_argument("--length", type=int, default=65536, metavar="TOKENS")
    parser.add_argument("--most", type=int, default=1 << 30, metavar="PIECES")
    parser.add_argument("--eos", type=int, default=50256, metavar="TOKEN")
    parser.add_argument("--across", action="store_true",
                        help="cut across documents: for sets of short ones; end-of-text stays in")
    a = parser.parse_args(argv)
    tokens = read_shard(a.shard)
    found = pieces(tokens, -1 if a.across else a.eos, a.length, a.most)
    if not found:
        sys.exit(f"{a.shard}: no document holds {a.length} tokens; lower --length, or use --across")
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    for i, piece in enumerate(found):
        write_shard(Path(f"{a.out}_{i:04}.bin"), array.array("H", [a.eos]) + piece)
    print(f"{a.out}_*.bin: {len(found)} pieces of {a.length} tokens")


# ---- perplexity by position

LEAST_DRAWN = 50  # tokens of a bin: with fewer it stands in the table alone


def bin_of(position: int) -> int:
    """From 1 on; halves of octaves."""
    return int(math.floor(2 * math.log2(position) + 1e-9))


def by_position(files: list[str]) -> list[dict]:
    sums: dict[int, list[tuple[float, int]]] = {}  # bin -> (nll, tokens) of each text
    for path in files:
        mine: dict[int, tuple[float, int]] = {}
        with open(path) as lines:
            for line in lines:
                token = json.loads(line)
                b = bin_of(token["i"] + 1)
                nll, count = mine.get(b, (0.0, 0))
                mine[b] = nll + token["nll"], count + 1
        for b, value in mine.items():
            sums.setdefault(b, []).append(value)
    rows = []
    for b in sorted(sums):
        texts = sums[b]
        tokens = sum(n for _, n in texts)
        mean = sum(v for v, _ in texts) / tokens
        error = math.nan
        if len(texts) > 1:  # texts of like length here: their means weigh alike
            means = [v / n for v, n in texts]
            middle = sum(means) / len(means)
            error = math.sqrt(sum((m - middle) ** 2 for m in means) / (len(means) - 1) / len(means))
        rows.append({"from": math.ceil(2 ** (b / 2) - 1e-9), "to": math.ceil(2 ** ((b + 1) / 2) - 1e-9) - 1,
                     "texts": len(texts), "tokens": tokens, "nll": mean, "nll_stderr": error,
                     "ppl": math.exp(mean)})
    return rows


def main() -> None:
    if sys.argv[1:2] == ["cut"]:
        return cut(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("groups", nargs="+", metavar="LABEL=GLOB")
    parser.add_argument("--trained-at", type=int, default=2048, metavar="T", help="marked in the table")
    parser.add_argument("--svg", metavar="FILE")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--note", default="", help="small print of the chart")
    a = parser.parse_args()
    result, series = {}, []
    for group in a.groups:
        label, _, pattern = group.partition("=")
        files = sorted(glob.glob(pattern))
        if not files:
            sys.exit(f"{group}: no file matches")
        rows = result[label] = by_position(files)
        print(f"{label}: {len(files)} texts\n\n| positions | tokens | perplexity |\n|---|---|---|")
        for r in rows:
            beyond = " *" if r["from"] > a.trained_at else ""
            error = "" if math.isnan(r["nll_stderr"]) else f" +- {r['ppl'] * r['nll_stderr']:.2f}"
            print(f"| {r['from']} to {r['to']}{beyond} | {r['tokens']:,} | {r['ppl']:.2f}{error} |")
        print(f"\n* beyond the {a.trained_at} tokens of a training sequence\n")
        drawn = [r for r in rows if r["tokens"] >= LEAST_DRAWN] or rows
        points = [(math.sqrt(r["from"] * max(r["to"], 1)), r["ppl"]) for r in drawn]
        errors = [0.0 if math.isnan(r["nll_stderr"]) else r["ppl"] * r["nll_stderr"] for r in drawn]
        series.append(Series(label, points, errors, marks=True))
    if a.json:
        Path(a.json).write_text(json.dumps(result, indent=1) + "\n")
    if a.svg:
        low = min(p[1] for s in series for p in s.points)
        high = max(p[1] for s in series for p in s.points)
        series.append(Series(f"T = {a.trained_at}", [(a.trained_at, low), (a.trained_at, high)], dashed=True))
        Path(a.svg).write_text(chart("Perplexity by position", Axis("position, tokens", log=True, octaves=True),
                                     Axis("perplexity", log=True), series, a.note))


if __name__ == "__main__":
    main()

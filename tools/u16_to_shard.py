#!/usr/bin/env python3
"""Raw token ids (little-endian uint16 without a header, as nanoGPT's prepare.py writes train.bin; also
packed with xz or gzip) to a token shard of docs/formats.md. Needs no packages.

    python3 tools/u16_to_shard.py train.u16.xz data/train_000000.bin
    python3 tools/u16_to_shard.py train.u16.xz data/train_000000.bin --first 1000000 --count 500000
"""
from __future__ import annotations

import argparse
import gzip
import lzma
import os
import struct
import sys
from pathlib import Path

MAGIC, VERSION = 20240520, 1
PIECE = 1 << 24  # bytes


def open_packed(path: Path):
    return {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)(path, "rb")


def convert(source: Path, target: Path, first: int, count: int | None) -> int:
    """Returns the number of tokens. The shard appears under its name when it is complete."""
    temporary = target.with_name(target.name + ".tmp")
    written = 0
    with open_packed(source) as file, open(temporary, "wb") as out:
        out.write(bytes(1024))
        skip = 2 * first
        left = None if count is None else 2 * count
        while data := file.read(PIECE):
            data, skip = data[skip:], max(0, skip - len(data))
            data = data if left is None else data[:left - written]
            out.write(data)
            written += len(data)
            if left is not None and written == left:
                break
        if written == 0 or written % 2:
            temporary.unlink()
            sys.exit(f"{source}: {written} bytes from token {first} on; not a list of 16-bit tokens")
        out.seek(0)
        out.write(struct.pack("<2iq", MAGIC, VERSION, written // 2))
    os.replace(temporary, target)
    return written // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--first", type=int, default=0, metavar="TOKEN")
    parser.add_argument("--count", type=int, metavar="TOKENS", help="default: to the end")
    a = parser.parse_args()
    a.shard.parent.mkdir(parents=True, exist_ok=True)
    print(f"{a.shard}: {convert(a.source, a.shard, a.first, a.count)} tokens")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Compares hgrn's tokens with those of Hugging Face `tokenizers`, id by id, and measures both.

    python3 tools/tokenizer/compare.py TOKENIZER [--files F ...] [--fuzz N] [--seed S] [--bench F] [--jobs J]

TOKENIZER: a tokenizer.json or a folder with GPT-2's two files. Files may be .xz. Needs build/hgrn (or --hgrn)
and: pip install tokenizers. Exit 1 at the first difference, with the text that shows it.
"""
import argparse
import array
import glob
import lzma
import os
import random
import resource
import subprocess
import sys
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
import tokenizers  # noqa: E402
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402


def open_reference(path):
    if os.path.isdir(path) and not os.path.exists(f"{path}/tokenizer.json"):
        names = [n for n in ("vocab.json", "encoder.json") if os.path.exists(f"{path}/{n}")]
        merges = [n for n in ("merges.txt", "vocab.bpe") if os.path.exists(f"{path}/{n}")]
        reference = Tokenizer(models.BPE.from_file(f"{path}/{names[0]}", f"{path}/{merges[0]}"))
        reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        reference.decoder = decoders.ByteLevel()
        reference.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
        return reference
    return Tokenizer.from_file(f"{path}/tokenizer.json" if os.path.isdir(path) else path)


def read(path):
    with (lzma.open(path) if path.endswith(".xz") else open(path, "rb")) as f:
        return f.read()


def read_shards(prefix):
    ids = []
    for path in sorted(glob.glob(prefix + "_[0-9]*.bin")):
        data = open(path, "rb").read()
        wide = data[:4] == (20240801).to_bytes(4, "little")
        part = array.array("I" if wide else "H")
        part.frombytes(data[1024:])
        ids.extend(part.tolist())
    return ids


def hgrn_tokens(args, paths, folder, *flags, parse=True):
    prefix = os.path.join(folder, "out")
    for old in glob.glob(prefix + "*"):
        os.remove(old)
    command = [args.hgrn, "tokenize", "--tokenizer", args.tokenizer, "--out", prefix, *flags, *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command[:8])} ...: exit {done.returncode}: {done.stderr.strip()}")
    return read_shards(prefix) if parse else None


# What texts are made of: characters that pre-tokenisers, normalisers and decoders treat in a way of their own.
PARTS = (
    ["a", "b", "e", "s", "t", "The", "the ", "re", "ll", "Straße", "naïve", "İstanbul", "ﬁ", "ſ", "K", "Å", "ŉ"]
    + ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'Re", "'ſ", "’s", "''", "'"]
    + ["0", "7", "42", "2024", "१२३", "٣", "²", "½", "Ⅷ", "〇", "𝟙", "1,000.50"]
    + [" ", "  ", "   ", "        ", "\t", "\n", "\r\n", "\n\n", "\r", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0",
       "\u1680", "\u180e", "\u2003", "\u200b", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\ufeff"]
    + [".", ",", "!", "?", "-", "--", "...", "(", ")", "[", "]", "{", "}", "\"", "\\", "/", "_", "@", "#", "$", "€", "<",
       ">", "|", "<|", "|>", "&amp;", "–", "—", "…", "「", "」", "©", "™", "¬", "\xad"]
    + ["\x00", "\x01", "\x07", "\x1b", "\x7f", "\x80", "\x9f", "\ufffd", "\uffff", "\U0010ffff", "\ue000"]
    + ["é", "e\u0301", "o\u0302\u0323", "a\u0316\u0301", "\u0301", "\u0344", "\u0340", "ｶﾞ", "が", "か\u3099", "각",
       "\u1100\u1161\u11a8", "\u0958", "\u09c7\u09be", "\u212b", "\u2126", "\u0f73", "\u1e9b\u0323", "\U0001d15e"]
    + ["👍", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "☃️", "❤", "⁉️", "🫠", "\u200d", "\ufe0f"]
    + ["中文", "日本語", "漢", "한국어", "ไทย", "עברית", "العربية", "हिन्दी", "Ελλάδα", "Россия", "Ünïcödé", "𠮷", "🜁", "𐍈"]
    + ["<|endoftext|>", "<|endoftex", "<|padding|>"]
)


def random_text(rng, unassigned_after_14):
    kind = rng.random()
    n = rng.choice([1, 2, 3, 5, 8, 13, 30, 80])
    if kind < 0.55:
        return "".join(rng.choice(PARTS) for _ in range(n))
    if kind < 0.75:  # any character
        out = []
        for _ in range(n):
            c = rng.choice([rng.randrange(0x80), rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0x10000),
                            rng.randrange(0x20000), rng.randrange(0x110000), rng.choice(unassigned_after_14)])
            out.append(" " if 0xD800 <= c <= 0xDFFF else chr(c))
        return "".join(out)
    if kind < 0.85:  # long runs
        return "".join(rng.choice(PARTS) * rng.choice([1, 2, 7, 40, 150]) for _ in range(rng.randrange(1, 6)))
    words = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randrange(1, 14)))
             for _ in range(n)]
    return rng.choice([" ", "  ", "\n", ", ", "'", "_"]).join(words)


def fuzz(args, reference, folder):
    """Texts go through one file with a separator that no text has."""
    rng = random.Random(args.seed)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    newer = list(range(0x31350, 0x323B0, 97)) + [0x1E4D0, 0x11F02, 0x10D50, 0x1C89, 0x1E5F1, 0x16D40, 0x1CC00]
    separator = "\x02\x03\x02\x05"
    contents = [t.content for t in reference.get_added_tokens_decoder().values()]
    PARTS.extend(contents * 2)
    texts = []
    while len(texts) < args.fuzz:
        text = random_text(rng, newer)
        if text and separator not in text and not text.startswith("\x03") and not text.endswith("\x02"):
            texts.append(text)
    path = os.path.join(folder, "fuzz.txt")
    with open(path, "wb") as f:
        f.write(separator.join(texts).encode())
    size = reference.get_vocab_size()
    for special in (False, True):
        reference.encode_special_tokens = not special
        flags = ["--document-separator", separator] + (["--special-tokens"] if special else [])
        ours = hgrn_tokens(args, [path], folder, *flags)
        eos = ours[0]
        at = 0
        for text in texts:
            want = reference.encode(text, add_special_tokens=False).ids
            got = list(ours[at + 1:at + 1 + len(want)])
            if ours[at] != eos or got != want:
                print(f"differs (special tokens {'recognised' if special else 'as text'}): {text!r}\n"
                      f"  hgrn         {got}\n  tokenizers   {want}")
                sys.exit(1)
            at += 1 + len(want)
        if at != len(ours):
            sys.exit(f"hgrn gave {len(ours) - at} tokens more")
    print(f"fuzz: {args.fuzz} texts of seed {args.seed} equal, special tokens as text and recognised ({size} tokens)")


def compare_files(args, reference, folder):
    reference.encode_special_tokens = True
    for path in args.files:
        data = read(path)
        plain = os.path.join(folder, "text")
        with open(plain, "wb") as f:
            f.write(data)
        want = reference.encode(data.decode(), add_special_tokens=False).ids
        got = hgrn_tokens(args, [plain], folder)
        if list(got[1:]) != want:
            first = next((i for i, (a, b) in enumerate(zip(got[1:], want)) if a != b), min(len(got) - 1, len(want)))
            sys.exit(f"{path}: {len(got) - 1} tokens here, {len(want)} there; first difference at {first}")
        print(f"{path}: {len(want)} tokens, equal")


def bench(args, reference, folder):
    data = read(args.bench)
    data = data * max(1, (args.bench_bytes + len(data) - 1) // len(data))
    plain = os.path.join(folder, "text")
    with open(plain, "wb") as f:
        f.write(data)
    # The peer gets the text in pieces of about 100 KB, cut at line ends: it is slower on one huge text.
    text = data[:args.peer_bytes].decode(errors="ignore")
    pieces = [text[i:i + 100_000] for i in range(0, len(text), 100_000)]
    # Beside the wall clock, CPU time: on a machine that others use it is what can be compared.
    def timed(work, cpu_clock):
        wall, cpu = time.perf_counter(), cpu_clock()
        work()
        return time.perf_counter() - wall, cpu_clock() - cpu

    def medians(runs, megabytes):
        return [sorted(megabytes / run[i] for run in runs)[len(runs) // 2] for i in (0, 1)]

    def children():
        r = resource.getrusage(resource.RUSAGE_CHILDREN)
        return r.ru_utime + r.ru_stime

    def peer():
        for piece in pieces:
            reference.encode(piece, add_special_tokens=False)

    theirs = medians([timed(peer, time.process_time) for _ in range(3)], len(text.encode()) / 1e6)
    print(f"tokenizers {tokenizers.__version__}, one thread: {theirs[0]:.2f} MB/s, {theirs[1]:.2f} MB a CPU second "
          "(medians of 3)")
    for jobs in range(1, args.jobs + 1):
        runs = [timed(lambda: hgrn_tokens(args, [plain], folder, "--jobs", str(jobs), parse=False), children)
                for _ in range(3)]
        ours = medians(runs, len(data) / 1e6)
        print(f"hgrn tokenize --jobs {jobs}, start, reading and writing included: {ours[0]:.1f} MB/s, {ours[1]:.1f} MB a "
              f"CPU second, {ours[0] / theirs[0]:.1f} and {ours[1] / theirs[1]:.1f} x tokenizers")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tokenizer")
    p.add_argument("--files", nargs="*", default=[])
    p.add_argument("--fuzz", type=int, default=0, help="random texts")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--bench", help="a text file to measure with")
    p.add_argument("--bench-bytes", type=int, default=50_000_000, help="hgrn's input: the file, repeated")
    p.add_argument("--peer-bytes", type=int, default=5_000_000, help="the peer's input: the start of that")
    p.add_argument("--jobs", type=int, default=1, help="measure 1 to J threads")
    p.add_argument("--hgrn", default="build/hgrn")
    args = p.parse_args()
    reference = open_reference(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        if args.files:
            compare_files(args, reference, folder)
        if args.fuzz:
            fuzz(args, reference, folder)
        if args.bench:
            bench(args, reference, folder)


if __name__ == "__main__":
    main()

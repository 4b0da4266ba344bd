#!/usr/bin/env python3
"""Golden ids of Hugging Face `tokenizers` for tests/text/test_golden.cpp, so that exactness is tested without it.

    python3 tools/tokenizer/make_golden.py            # writes tests/golden/tokenizers
    python3 tools/tokenizer/make_golden.py --check    # encodes again with what is there, and compares

Three small byte-level BPEs are trained on the text below: as GPT-2's (its pattern, no normaliser), as GPT-NeoX's
(the same pattern, NFC, runs of spaces as added tokens) and as Llama 3's (its pattern, whole words before merges).
Their texts are those of compare.py's fuzzer: every part by itself and between letters, and random mixtures.
Needs: pip install tokenizers (0.23.3 made what is committed).
"""
import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from compare import PARTS, random_text  # noqa: E402
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: E402
from tokenizers import trainers  # noqa: E402

HERE = Path(__file__).resolve().parent.parent.parent / "tests" / "golden" / "tokenizers"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
SENTENCES = """
The gate decides what is kept of the state, and what isn't kept is gone; that's why it's called forgetting.
We'll write the numbers 1, 22, 333 and 4444 in a row, then 2024-11-25 and 3.14159, and they're all different.
She said: "I'd rather not," and he'd have agreed if you'd asked. They've been there; I'm here. Don't shout: DON'T!
    indented = [x for x in range(10) if x % 2 == 0]  # four spaces before, two before the comment
for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];\n}\n
Der Fluß war über die Ufer getreten, naïve Gäste saßen im Café und aßen Crème brûlée.
Съешь же ещё этих мягких французских булок, да выпей чаю. Ελλάδα, Ἀθῆναι, και άλλα.
日本語の文章と中文的句子，以及 한국어 문장도 있습니다. ไทย हिन्दी עברית العربية
The model has a state of fixed size, so generating a token costs the same time and memory after ten tokens as after
ten million. A layer carries the state from one token to the next, and nothing else of what was read.
👍 👍🏽 👩‍👩‍👧‍👦 🇩🇪 … — “quotes” ‘single’ © ™ € ½ ²
"""


def train(style):
    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    if style == "llama3":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if style == "neox":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(7)
    corpus = [SENTENCES] * 4 + [" ".join(rng.choice(PARTS) for _ in range(60)) for _ in range(40)]
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=700, min_frequency=2, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    end = {"gpt2": "<|endoftext|>", "neox": "<|endoftext|>", "llama3": "<|end_of_text|>"}[style]
    specials = [AddedToken(end, special=True, normalized=False)]
    if style != "gpt2":
        specials.append(AddedToken("<|padding|>" if style == "neox" else "<|begin_of_text|>", special=True,
                                   normalized=False))
    tokenizer.add_special_tokens(specials)
    if style == "neox":
        tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (8, 4, 3, 2)])
    return tokenizer


def texts():
    rng = random.Random(11)
    specials = ["<|endoftext|>", "<|padding|>", "<|end_of_text|>", "<|begin_of_text|>"]
    out = [""] + PARTS + specials
    out += [f"a{p}b {p} {p}{p}" for p in PARTS]
    mixed = PARTS + specials * 3
    out += ["".join(rng.choice(mixed) for _ in range(rng.choice([2, 3, 5, 9]))) for _ in range(120)]
    newer = [0x31350, 0x1E4D0, 0x11F02, 0x10D50, 0x1C89, 0x1E5F1, 0x16D40, 0x1CC00]
    while len(out) < 560:
        text = random_text(rng, newer)
        if len(text) <= 120:
            out.append(text)
    out += [SENTENCES, " " * 50 + "x" + " " * 7, "\n" * 9 + "\t\t y", "'" * 20, "a" * 200, "1" * 31]
    return list(dict.fromkeys(out))


def ids_of(tokenizer, text):
    found = []
    for special in (False, True):
        tokenizer.encode_special_tokens = not special
        found.append(tokenizer.encode(text, add_special_tokens=False).ids)
    return found[:1] if found[0] == found[1] else found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true")
    args = p.parse_args()
    styles = ("gpt2", "neox", "llama3")
    if args.check:
        opened = {s: Tokenizer.from_file(str(HERE / f"{s}.json")) for s in styles}
        for number, line in enumerate((HERE / "golden.jsonl").read_text().splitlines(), 1):
            golden = json.loads(line)
            for s in styles:
                if ids_of(opened[s], golden["text"]) != golden[s]:
                    sys.exit(f"golden.jsonl:{number}: {s} differs on {golden['text']!r}")
        print(f"{number} texts, equal")
        return
    HERE.mkdir(parents=True, exist_ok=True)
    trained = {s: train(s) for s in styles}
    for s in styles:
        (HERE / f"{s}.json").write_text(json.dumps(json.loads(trained[s].to_str()), separators=(",", ":")) + "\n")
    with open(HERE / "golden.jsonl", "w") as f:
        for text in texts():
            line = {"text": text, **{s: ids_of(trained[s], text) for s in styles}}
            f.write(json.dumps(line, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()

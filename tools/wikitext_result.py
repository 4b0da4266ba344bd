#!/usr/bin/env python3
"""What scripts/reproduce_wikitext103.sh says at its end: a table of the four evaluations of a run folder,
beside the paper's numbers where the model was trained on WikiText-103. Also writes RUN/result.json and
RUN/curve.svg. Needs no packages."""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from plot import Axis, Series, chart, curve, read_metrics

PAPER = {"valid": 23.10, "test": 23.73}  # Table 5, blocks of 512
PROTOCOLS = {"blocks": "blocks of 512, state zero at each", "carry": "carried state"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--label", default="", help="what it was trained on, if not WikiText-103")
    a = parser.parse_args()
    results = {}
    for name in PAPER:
        for protocol in PROTOCOLS:
            file = a.run / f"eval_{name}_{protocol}.json"
            if not file.exists():
                sys.exit(f"{file} is missing: evaluate first")
            results[name, protocol] = json.loads(file.read_text())
    steps = [m for m in read_metrics(a.run) if m.get("loss") is not None]
    if not steps:
        sys.exit(f"{a.run}/metrics.jsonl holds no training loss")
    last = steps[-1]
    trained = f"trained on {a.label}, not on WikiText-103" if a.label else "trained on WikiText-103"

    print(f"{trained}: {last['step']} steps, {last['tokens']:,} tokens, {last['seconds'] / 60:.1f} minutes of "
          f"training, {last['tokens'] / last['seconds']:,.0f} tokens/s\n")
    print("| set | protocol | tokens | perplexity a token | a word |" + ("" if a.label else " paper |"))
    print("|---|---|---|---|---|" + ("" if a.label else "---|"))
    for (name, protocol), r in results.items():
        word = f"{r['word_ppl']:.2f}" if r.get("word_ppl") else ""
        paper = f"{PAPER[name]:.2f}" if protocol == "blocks" else ""
        print(f"| {name} | {PROTOCOLS[protocol]} | {r['tokens']:,} | {r['ppl']:.2f} +- {r['ppl_stderr']:.2f} | "
              f"{word} |" + ("" if a.label else f" {paper} |"))
    summary = {"trained": trained, "steps": last["step"], "tokens": last["tokens"],
               "training_s": last["seconds"],
               "ppl": {f"{n}_{p}": r["ppl"] for (n, p), r in results.items()},
               "paper": None if a.label else PAPER}
    (a.run / "result.json").write_text(json.dumps(summary, indent=1) + "\n")
    series = [Series("training (with dropout)", curve(a.run, "tokens", "loss", 50))]
    if any("valid_loss" in m for m in read_metrics(a.run)):
        tokens = {m["step"]: m["tokens"] for m in steps}
        points = [(tokens[m["step"]], m["valid_loss"]) for m in read_metrics(a.run)
                  if m.get("valid_loss") is not None and m["step"] in tokens]
        series.append(Series("WikiText-103 valid", points))
    (a.run / "curve.svg").write_text(chart("The 44M model, " + trained, Axis("tokens"),
                                           Axis("loss, nats a token"), series))


if __name__ == "__main__":
    main()

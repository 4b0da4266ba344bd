#!/usr/bin/env python3
"""Table and charts of scripts/ablations.sh: reads the runs that are done in its folder. Needs no packages.

    python3 tools/ablation_table.py runs/ablations

Prints the table; writes result/results.json, result/expand_ratio.svg (perplexity by expand ratio) and
result/curves.svg (training loss of all runs).
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from plot import Axis, Series, chart, curve, read_metrics

ORDER = ["n1", "n2", "n4", "n8", "n16", "n32", "n64", "n128", "no_lower_bound", "llm"]
WHAT = {"no_lower_bound": "without lower bounds", "llm": "the language models' parameterisation"}


def read_config(path: str | Path) -> dict:
    """A training config: JSON with // and /* */ comments."""
    comment = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.S)
    return json.loads(comment.sub(lambda m: m.group(1) or "", Path(path).read_text()))


def result(run: Path) -> dict:
    lines = read_metrics(run)
    valid = [m for m in lines if m.get("valid_loss") is not None]
    train = [m for m in lines if m.get("loss") is not None]
    if not valid or not train:
        sys.exit(f"{run}/metrics.jsonl: no validation or no training loss; was data.valid given?")
    model = json.loads((run / "config.json").read_text())["model"]
    n, D, L = model["expand_ratio"], model["hidden_size"], model["num_hidden_layers"]
    return {"name": run.name, "n": n, "state": L * D * n, "steps": train[-1]["step"],
            "tokens": train[-1]["tokens"], "valid_ppl": valid[-1]["valid_ppl"],
            "valid_loss": valid[-1]["valid_loss"], "valid_tokens": valid[-1]["valid_tokens"],
            "tokens_per_s": train[-1]["tokens"] / train[-1]["seconds"],
            "seconds": train[-1]["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    a = parser.parse_args()
    runs = [result(a.folder / name) for name in ORDER if (a.folder / name / "done").exists()]
    missing = [name for name in ORDER if not (a.folder / name / "done").exists()]
    if not runs:
        sys.exit(f"{a.folder}: no run is done")
    if len({r["tokens"] for r in runs}) > 1:
        sys.exit(f"{a.folder}: its runs had different budgets ("
                 + ", ".join(f"{r['name']} {r['tokens']:,} tokens" for r in runs)
                 + "); give each budget an --out of its own")
    print("| run | numbers of state | valid loss | perplexity | tokens/s |")
    print("|---|---|---|---|---|")
    for r in runs:
        label = f"n = {r['n']}" + (", " + WHAT[r["name"]] if r["name"] in WHAT else "")
        print(f"| {label} | {r['state']:,} | {r['valid_loss']:.4f} | {r['valid_ppl']:.2f} | "
              f"{r['tokens_per_s']:,.0f} |")
    print(f"\n{runs[0]['tokens']:,} tokens in {runs[0]['steps']} steps a run; scored: "
          f"{runs[0]['valid_tokens']:,} tokens" + (f"; not run: {', '.join(missing)}" if missing else ""))
    out = a.folder / "result"
    out.mkdir(exist_ok=True)
    (out / "results.json").write_text(json.dumps(runs, indent=1) + "\n")

    by_n = [(r["n"], r["valid_ppl"]) for r in runs if r["name"].startswith("n") and r["name"] not in WHAT]
    note = f"{runs[0]['tokens']:,} tokens a run"
    if by_n:
        series = [Series("", by_n, marks=True)]
        for name, text in WHAT.items():
            series += [Series(text, [(r["n"], r["valid_ppl"])], marks=True)
                       for r in runs if r["name"] == name]
        if len(series) > 1:
            series[0].label = "expand ratio"
        (out / "expand_ratio.svg").write_text(
            chart("Validation perplexity by expand ratio", Axis("expand ratio n", log=True, octaves=True),
                  Axis("validation perplexity"), series, note))
    curves = [Series(r["name"], curve(a.folder / r["name"], "tokens", "loss", 5)) for r in runs]
    (out / "curves.svg").write_text(chart("Training loss", Axis("tokens"), Axis("loss, nats a token"),
                                          curves, note))


if __name__ == "__main__":
    main()

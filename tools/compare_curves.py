#!/usr/bin/env python3
"""Two loss curves of the same batches beside each other: how far apart, and who is first where.

    python3 tools/compare_curves.py runs/ours runs/fla --names hgrn fla --svg curve.svg --json curve.json

Prints the mean absolute difference of the losses over the last --last steps, as a share of the mean
loss there (second run), and for each loss level the training time at which the mean of the last
--window steps first reached it. Time is the sum of step_ms: no evaluation, no saving, no compiling.
Both runs need a line for every step (train.log_every 1). With --most P the exit code is 1 where the
difference is above P percent, or where fewer than --last steps can be compared. Needs no packages.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from plot import Axis, Series, chart, read_metrics, smooth


class Curve:
    def __init__(self, run: str, window: int):
        lines = [m for m in read_metrics(run) if m.get("loss") is not None]
        if not lines:
            sys.exit(f"{run}: metrics.jsonl holds no loss")
        self.loss = {m["step"]: m["loss"] for m in lines}
        self.seconds = {m["step"]: m["seconds"] for m in lines}
        self.smooth = list(zip(self.loss, smooth(list(self.loss.values()), window)))
        self.tokens_per_s = lines[-1]["tokens"] / lines[-1]["seconds"]

    def reached(self, level: float) -> tuple[float, int] | None:
        """(training seconds, step) at which the smoothed loss first was at or below `level`."""
        for step, loss in self.smooth:
            if loss <= level:
                return self.seconds[step], step
        return None


def levels(a: Curve, b: Curve) -> list[float]:
    """Round losses that both reached, about eight of them: fewer high up, where all is quick."""
    low = max(min(v for _, v in c.smooth) for c in (a, b))
    high = min(c.smooth[0][1] for c in (a, b))
    for step in (0.05, 0.1, 0.25, 0.5, 1.0):
        found = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(found) <= 10:
            return found[::-1]
    return found[::-1]


def compare(a: Curve, b: Curve, last: int) -> dict:
    common = sorted(a.loss.keys() & b.loss.keys())
    end = common[-last:]
    if not end:
        sys.exit("the two runs have no step in common")
    apart = [abs(a.loss[s] - b.loss[s]) for s in end]
    mean = sum(b.loss[s] for s in end) / len(end)
    signed = sum(a.loss[s] - b.loss[s] for s in end) / len(end)
    whole = [abs(a.loss[s] - b.loss[s]) / b.loss[s] for s in common]
    return {"steps": len(common), "first_step": end[0], "last_step": end[-1], "compared": len(end),
            "mean_abs_percent": 100 * sum(apart) / len(end) / mean,
            "max_abs_percent": 100 * max(apart) / mean, "signed_percent": 100 * signed / mean,
            "whole_run_max_percent": 100 * max(whole),
            "first_loss": [a.loss[common[0]], b.loss[common[0]]],
            "mean_loss": [sum(c.loss[s] for s in end) / len(end) for c in (a, b)],
            "tokens_per_s": [a.tokens_per_s, b.tokens_per_s]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("a", metavar="RUN")
    parser.add_argument("b", metavar="RUN")
    parser.add_argument("--names", nargs=2, default=["hgrn", "fla"])
    parser.add_argument("--last", type=int, default=200, metavar="STEPS")
    parser.add_argument("--window", type=int, default=20, metavar="STEPS")
    parser.add_argument("--most", type=float, metavar="PERCENT")
    parser.add_argument("--svg", metavar="FILE")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--note", default="", help="small print of the chart: card, date")
    args = parser.parse_args()
    a, b = Curve(args.a, args.window), Curve(args.b, args.window)
    na, nb = args.names
    r = compare(a, b, args.last)
    print(f"first step: {na} {r['first_loss'][0]:.6f}, {nb} {r['first_loss'][1]:.6f}")
    print(f"steps {r['first_step']}..{r['last_step']} ({r['compared']}): mean absolute difference "
          f"{r['mean_abs_percent']:.4f} % of the loss, largest {r['max_abs_percent']:.4f} %, "
          f"{na} - {nb} {r['signed_percent']:+.4f} %")
    print(f"mean loss there: {na} {r['mean_loss'][0]:.4f}, {nb} {r['mean_loss'][1]:.4f}")
    print(f"tokens/s over the run: {na} {a.tokens_per_s:,.0f}, {nb} {b.tokens_per_s:,.0f}, "
          f"ratio {a.tokens_per_s / b.tokens_per_s:.2f}")
    print(f"\n| loss (mean of {args.window} steps) | {na}, s | {nb}, s | ratio | {na}, step | {nb}, step |")
    print("|---|---|---|---|---|---|")
    r["levels"] = []
    for level in levels(a, b):
        (sa, ka), (sb, kb) = a.reached(level), b.reached(level)
        r["levels"].append({"loss": level, "seconds": [sa, sb], "step": [ka, kb]})
        print(f"| {level:.4g} | {sa:.1f} | {sb:.1f} | {sb / sa:.2f} | {ka} | {kb} |")
    if args.json:
        Path(args.json).write_text(json.dumps(r, indent=1) + "\n")
    if args.svg:
        draw(a, b, args)
    good = args.most is None or (r["mean_abs_percent"] <= args.most and r["compared"] >= args.last)
    if not good:
        print(f"NOT within {args.most} % over {args.last} steps", file=sys.stderr)
    return 0 if good else 1


def draw(a: Curve, b: Curve, args: argparse.Namespace) -> None:
    """FILE.svg over steps, FILE_time.svg over training time, FILE_difference.svg."""
    path = Path(args.svg)
    for x, target in (("step", path), ("seconds", path.with_name(path.stem + "_time.svg"))):
        series = []
        for name, c, dashed in ((args.names[0], a, False), (args.names[1], b, x == "step")):
            points = [(s if x == "step" else c.seconds[s], v) for s, v in c.smooth]
            series.append(Series(name, points, dashed=dashed))
        label = "step" if x == "step" else "training time, s"
        svg = chart(f"Training loss, mean of {args.window} steps", Axis(label),
                    Axis("loss, nats a token"), series, args.note)
        target.write_text(svg)
    apart = [(s, 100 * (a.loss[s] - b.loss[s]) / b.loss[s]) for s in sorted(a.loss.keys() & b.loss.keys())]
    svg = chart(f"Loss of {args.names[0]} over {args.names[1]}, each step", Axis("step"),
                Axis("difference, % of the loss"), [Series("", apart)], args.note)
    path.with_name(path.stem + "_difference.svg").write_text(svg)


if __name__ == "__main__":
    sys.exit(main())

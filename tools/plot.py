#!/usr/bin/env python3
"""Line charts as SVG, from metrics.jsonl or from numbers. Python's standard library is enough.

    python3 tools/plot.py --out curve.svg runs/a runs/b=with_dropout      # training loss by step
    python3 tools/plot.py --out curve.svg --x seconds --y loss runs/a     # ... by training time
    python3 tools/plot.py --out valid.svg --y valid_ppl --log-y runs/a

A run is a run folder or a metrics.jsonl, a label may follow after "=". --x: step, tokens or
seconds (the sum of step_ms, so without evaluation and saving). --y: any key of metrics.jsonl.
--smooth N draws the mean of the last N lines. chart() serves the other tools.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8b6914",
          "#882255", "#999933"]
WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 68, 20, 44, 52
MAX_POINTS = 1500  # of a line: more than there are pixels


@dataclass
class Series:
    label: str
    points: list[tuple[float, float]]
    error: list[float] = field(default_factory=list)  # half a bar, of each point; empty: none
    marks: bool = False
    dashed: bool = False


@dataclass
class Axis:
    label: str
    log: bool = False
    octaves: bool = False  # ticks at powers of two; with log
    low: float = 0.0
    high: float = 1.0

    def place(self, v: float) -> float:
        """v as a share of the axis, 0 at its start."""
        if self.log:
            v, low, high = (math.log10(max(x, 1e-300)) for x in (v, self.low, self.high))
        else:
            low, high = self.low, self.high
        return (v - low) / (high - low)

    def fit(self, values: list[float]) -> None:
        values = [v for v in values if math.isfinite(v) and (v > 0 or not self.log)]
        if not values:
            sys.exit(f"plot: there is nothing to draw on the axis '{self.label}'")
        self.low, self.high = min(values), max(values)
        if self.high <= self.low:
            self.low, self.high = self.low - abs(self.low) * 0.1 - 1e-9, self.high * 1.1 + 1e-9
        if not self.log:
            room = 0.04 * (self.high - self.low)
            self.low, self.high = self.low - room, self.high + room
        else:
            room = (self.high / self.low) ** 0.04
            self.low, self.high = self.low / room, self.high * room

    def ticks(self) -> list[float]:
        if self.octaves:
            powers = range(math.ceil(math.log2(self.low)), math.floor(math.log2(self.high)) + 1)
            return [2.0 ** p for p in powers if p % (len(powers) // 9 + 1) == 0]
        if self.log:
            factors = (1, 2, 5)
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            ticks = [f * 10.0 ** p for p in powers for f in factors]
            ticks = [t for t in ticks if self.low <= t <= self.high]
            if len(ticks) > 9:
                ticks = [t for t in ticks if math.log10(t) % 1 < 1e-9]
            if len(ticks) >= 3:
                return ticks
        step = 10.0 ** math.floor(math.log10(self.high - self.low))
        while (self.high - self.low) / step > 8:
            step *= 2
        while (self.high - self.low) / step < 4:
            step /= 2
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]


def along(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points every few pixels of a polyline."""
    out = line[:1]
    for (x0, y0), (x1, y1) in zip(line, line[1:]):
        steps = 1 + int(max(abs(x1 - x0), abs(y1 - y0)) / 5)
        out += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(1, steps + 1)]
    return out


def number(v: float) -> str:
    if v != 0 and abs(v) < 1e-3:
        return f"{v:.0e}"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(v) >= size:
            scale = 1e3 if unit == "k" else size
            return f"{v / scale:.4g}{unit}"
    return f"{v:.4g}"


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MAX_POINTS:
        return points
    step = len(points) / MAX_POINTS
    return [points[int(i * step)] for i in range(MAX_POINTS)] + [points[-1]]


def chart(title: str, x: Axis, y: Axis, series: list[Series], note: str = "") -> str:
    """An SVG with its own white ground. Points that are not finite are left out."""
    drawn = []
    for s in series:
        errors = s.error or [0.0] * len(s.points)
        good = [(a, b, e) for (a, b), e in zip(s.points, errors)
                if math.isfinite(a) and math.isfinite(b) and (a > 0 or not x.log)
                and (b > 0 or not y.log)]
        drawn.append(good)
    x.fit([a for good in drawn for a, _, _ in good])
    y.fit([v for good in drawn for _, b, e in good for v in (b - e, b + e)])
    px = lambda v: LEFT + x.place(v) * (WIDTH - LEFT - RIGHT)
    py = lambda v: HEIGHT - BOTTOM - y.place(v) * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
           f'<text x="{LEFT}" y="24" font-size="15" font-weight="bold">{escape(title)}</text>']
    for t in x.ticks():
        out.append(f'<line x1="{px(t):.1f}" y1="{TOP}" x2="{px(t):.1f}" y2="{HEIGHT - BOTTOM}" '
                   f'stroke="#e4e4e4"/><text x="{px(t):.1f}" y="{HEIGHT - BOTTOM + 17}" '
                   f'text-anchor="middle">{f"{t:,.0f}" if x.octaves else number(t)}</text>')
    for t in y.ticks():
        out.append(f'<line x1="{LEFT}" y1="{py(t):.1f}" x2="{WIDTH - RIGHT}" y2="{py(t):.1f}" '
                   f'stroke="#e4e4e4"/><text x="{LEFT - 7}" y="{py(t) + 4:.1f}" '
                   f'text-anchor="end">{number(t)}</text>')
    out.append(f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
               f'height="{HEIGHT - TOP - BOTTOM}" fill="none" stroke="#888888"/>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">'
               f'{escape(x.label)}</text><text x="16" y="{middle}" text-anchor="middle" '
               f'transform="rotate(-90 16 {middle})">{escape(y.label)}</text>')
    for i, (s, good) in enumerate(zip(series, drawn)):
        color = COLORS[i % len(COLORS)]
        line = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in thinned([g[:2] for g in good]))
        dash = ' stroke-dasharray="6 4"' if s.dashed else ""
        out.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"{dash}/>')
        for a, b, e in good:
            if e > 0:
                low, high = max(b - e, y.low), min(b + e, y.high)
                out.append(f'<line x1="{px(a):.1f}" y1="{py(low):.1f}" x2="{px(a):.1f}" '
                           f'y2="{py(high):.1f}" stroke="{color}"/>')
            if s.marks:
                out.append(f'<circle cx="{px(a):.1f}" cy="{py(b):.1f}" r="3.2" fill="{color}"/>')
    out += legend(series, [place for good in drawn for place in along([(px(a), py(b)) for a, b, _ in good])])
    if note:
        out.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end" font-size="10" '
                   f'fill="#666666">{escape(note)}</text>')
    return "\n".join(out) + "\n</svg>\n"


def legend(series: list[Series], places: list[tuple[float, float]]) -> list[str]:
    """In the corner that hides the fewest points, of equal ones the upper right."""
    labels = [s.label for s in series]
    if not any(labels):
        return []
    width, height = 40 + 6.6 * max(map(len, labels)), 10 + 17 * len(labels)
    corners = [(x, y) for y in (TOP + 8, HEIGHT - BOTTOM - 8 - height)
               for x in (WIDTH - RIGHT - width - 8, LEFT + 8)]
    hidden = lambda c: sum(c[0] - 4 < px < c[0] + width + 4 and c[1] - 4 < py < c[1] + height + 4
                           for px, py in places)
    x, y = min(corners, key=hidden)
    out = [f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" '
           'fill="#ffffff" fill-opacity="0.85" stroke="#cccccc"/>']
    for i, s in enumerate(series):
        at = y + 17 + 17 * i
        dash = ' stroke-dasharray="6 4"' if s.dashed else ""
        out.append(f'<line x1="{x + 8:.1f}" y1="{at - 4}" x2="{x + 28:.1f}" y2="{at - 4}" '
                   f'stroke="{COLORS[i % len(COLORS)]}" stroke-width="2"{dash}/>'
                   f'<text x="{x + 34:.1f}" y="{at}">{escape(s.label)}</text>')
    return out


# ---- metrics.jsonl

def read_metrics(run: str | Path) -> list[dict]:
    """The lines of a run folder or metrics.jsonl that hold a loss or an evaluation. Each gets
    `seconds`, the training time up to it."""
    path = Path(run)
    if path.is_dir():
        path = path / "metrics.jsonl"
    if not path.exists():
        sys.exit(f"{path}: there is no such file; give a run folder or a metrics.jsonl")
    lines, seconds, before = [], 0.0, 0
    for n, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            sys.exit(f"{path}:{n}: not a JSON object")
        if "step_ms" in line:
            seconds += line["step_ms"] * (line["step"] - before) / 1e3
            before = line["step"]
        lines.append({**line, "seconds": seconds})
    return lines


def smooth(values: list[float], window: int) -> list[float]:
    """The mean of the last `window` values (of fewer at the start)."""
    out, total = [], 0.0
    for i, v in enumerate(values):
        total += v - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def curve(run: str | Path, x: str, y: str, window: int = 1) -> list[tuple[float, float]]:
    lines = [m for m in read_metrics(run) if m.get(y) is not None and m.get(x) is not None]
    if not lines:
        sys.exit(f"{run}: no line has both {x} and {y}")
    return list(zip([float(m[x]) for m in lines], smooth([float(m[y]) for m in lines], window)))


LABELS = {"seconds": "training time, s", "loss": "loss, nats a token", "tokens": "tokens",
          "valid_loss": "validation loss, nats a token", "valid_ppl": "validation perplexity",
          "step": "step"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN[=LABEL]")
    parser.add_argument("--out", required=True, metavar="FILE.svg")
    parser.add_argument("--x", default="step", choices=["step", "tokens", "seconds"])
    parser.add_argument("--y", default="loss", metavar="KEY")
    parser.add_argument("--log-x", action="store_true")
    parser.add_argument("--log-y", action="store_true")
    parser.add_argument("--smooth", type=int, default=1, metavar="N")
    parser.add_argument("--title", default="")
    parser.add_argument("--note", default="", help="small print: command, card, date")
    a = parser.parse_args()
    series = []
    for run in a.runs:
        path, _, label = run.partition("=")
        series.append(Series(label or Path(path).name, curve(path, a.x, a.y, a.smooth)))
    svg = chart(a.title or LABELS.get(a.y, a.y), Axis(LABELS[a.x], a.log_x),
                Axis(LABELS.get(a.y, a.y), a.log_y), series, a.note)
    Path(a.out).write_text(svg)


if __name__ == "__main__":
    main()

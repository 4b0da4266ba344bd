#!/usr/bin/env python3
"""Which sequence sample g of a training run is: src/train/sample_order.h in Python, for programs
that have to train on the same batches (tools/peers/fla_train.py). No packages are needed.

    python3 tools/sample_order.py --sequences 100 40 --weights 3 1 --seed 7 --samples 12
    python3 tools/sample_order.py --golden     # writes tests/golden/order/order.json

order.json is what this file gives for a few runs; a test of the trainer compares its own order
with it, so that the two cannot part unseen.
"""
from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

MASK = (1 << 64) - 1
MAX_PERIOD = 1 << 20
GOLDEN = Path(__file__).resolve().parent.parent / "tests/golden/order/order.json"


def mix64(x: int) -> int:
    """splitmix64's finaliser, as src/core/rng.h."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


class Permutation:
    """A keyed bijection of [0, n): six Feistel rounds on the smallest even number of bits that
    holds n, repeated until the value lies inside."""

    def __init__(self, n: int, key: int):
        self.n = n
        self.half_bits = 1
        while (1 << (2 * self.half_bits)) < n:
            self.half_bits += 1
        self.keys = []
        for _ in range(6):
            key = mix64(key)
            self.keys.append(key)

    def __call__(self, i: int) -> int:
        mask = (1 << self.half_bits) - 1
        while True:
            left, right = i >> self.half_bits, i & mask
            for key in self.keys:
                left, right = right, left ^ (mix64(right ^ key) & mask)
            i = left << self.half_bits | right
            if i < self.n:
                return i


def quotas(weights: list[float]) -> list[int]:
    """Weights as whole samples of a period: the smallest period that holds them exactly, else the
    nearest shares of MAX_PERIOD."""
    total = sum(weights)
    for period in range(1, MAX_PERIOD + 1):
        shares = [w / total * period for w in weights]
        quota = [math.floor(s + 0.5) for s in shares]
        if sum(quota) == period and all(q >= 1 and abs(s - q) < 1e-8
                                        for s, q in zip(shares, quota)):
            return quota
    shares = [w / total * MAX_PERIOD for w in weights]
    quota = [max(1, int(s)) for s in shares]
    left = MAX_PERIOD - sum(quota)
    by_remainder = [k for _, k in sorted((q - s, k) for k, (s, q) in enumerate(zip(shares, quota)))]
    for i in range(max(0, left)):
        quota[by_remainder[i % len(by_remainder)]] += 1
    for _ in range(max(0, -left)):
        quota[quota.index(max(quota))] -= 1
    return quota


class Mixture:
    """Deals samples to sources by Tijdeman's rule, in integers."""

    def __init__(self, weights: list[float]):
        self.quota = [1] if len(weights) == 1 else quotas(weights)
        self.period = sum(self.quota)
        self.picks: list[tuple[int, int]] = []
        if len(weights) == 1:
            return
        dealt = [0] * len(weights)
        scale = 2 * len(weights) - 2
        for n in range(1, self.period + 1):
            best, best_slack = -1, 0
            for k, quota in enumerate(self.quota):
                ahead = quota * n - self.period * dealt[k]
                if ahead * scale < self.period:
                    continue
                slack = (scale - 1) * self.period - scale * ahead
                if best < 0 or slack * self.quota[best] < best_slack * quota:
                    best, best_slack = k, slack
            self.picks.append((best, dealt[best]))
            dealt[best] += 1

    def pick(self, g: int) -> tuple[int, int]:
        """(source, how many earlier samples went to it)"""
        if not self.picks:
            return 0, g
        source, index = self.picks[g % self.period]
        return source, g // self.period * self.quota[source] + index


class SampleOrder:
    """sequences: of each source; at(g) is (source, epoch of that source, sequence)."""

    def __init__(self, sequences: list[int], weights: list[float], seed: int, shuffle: bool):
        self.sequences, self.seed, self.shuffle = sequences, seed, shuffle
        self.mixture = Mixture(weights)
        self.permutations: dict[tuple[int, int], Permutation] = {}

    def at(self, g: int) -> tuple[int, int, int]:
        source, index = self.mixture.pick(g)
        epoch, sequence = divmod(index, self.sequences[source])
        if self.shuffle:
            if (source, epoch) not in self.permutations:
                key = mix64(mix64(mix64(self.seed) ^ source) ^ epoch)
                self.permutations[source, epoch] = Permutation(self.sequences[source], key)
            sequence = self.permutations[source, epoch](sequence)
        return source, epoch, sequence


# Sizes around powers of two, one source and several, weights that are a ratio of small numbers and
# weights that are not, several epochs, seeds that fill 64 bits, no shuffling.
GOLDEN_RUNS = [
    dict(sequences=[1], weights=[1.0], seed=0, shuffle=True, first=0, count=3),
    dict(sequences=[7], weights=[1.0], seed=0, shuffle=True, first=0, count=30),
    dict(sequences=[1024], weights=[1.0], seed=1, shuffle=True, first=1000, count=60),
    dict(sequences=[1025], weights=[1.0], seed=2**64 - 1, shuffle=True, first=1000, count=60),
    dict(sequences=[22460], weights=[1.0], seed=0, shuffle=True, first=22440, count=40),
    dict(sequences=[22460], weights=[1.0], seed=0, shuffle=False, first=22440, count=40),
    dict(sequences=[100, 40, 9], weights=[0.7, 0.2, 0.1], seed=12345678901234567890, shuffle=True,
         first=90, count=90),
    dict(sequences=[50, 60], weights=[2.0, 1.0], seed=3, shuffle=False, first=60, count=50),
    dict(sequences=[1000, 2000], weights=[1.0, 3.14159265358979], seed=4, shuffle=True,
         first=3000, count=60),
]


def golden() -> list[dict]:
    runs = []
    for run in GOLDEN_RUNS:
        order = SampleOrder(run["sequences"], run["weights"], run["seed"], run["shuffle"])
        samples = [order.at(g) for g in range(run["first"], run["first"] + run["count"])]
        runs.append({**run, "samples": samples})
    return runs


def golden_text() -> str:
    return "[\n" + ",\n".join(json.dumps(run) for run in golden()) + "\n]\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--golden", action="store_true", help="write tests/golden/order/order.json")
    parser.add_argument("--sequences", type=int, nargs="+", metavar="S", help="of each source")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="default: equal")
    parser.add_argument("--seed", type=int, default=0, help="data.seed")
    parser.add_argument("--in-order", action="store_true", help="data.shuffle false")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--samples", type=int, default=20)
    a = parser.parse_args()
    if a.golden:
        GOLDEN.write_text(golden_text())
        return
    if not a.sequences:
        parser.error("give --sequences, or --golden")
    order = SampleOrder(a.sequences, a.weights or [1.0] * len(a.sequences), a.seed, not a.in_order)
    for g in range(a.first, a.first + a.samples):
        source, epoch, sequence = order.at(g)
        print(f"sample {g}: source {source}, epoch {epoch}, sequence {sequence}")


if __name__ == "__main__":
    main()

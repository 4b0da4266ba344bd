#!/usr/bin/env python3
"""The CPU peer of `hgrn-bench step`: one training step of the same model in eager PyTorch, fp32.

    python3 tools/peers/torch_cpu.py --config configs/quickstart.json --threads 2
    python3 tools/peers/torch_cpu.py --check      # loss and gradients against the fp64 recurrence

Two forms of the recurrence (--recurrence). `tuned` is meant to be as good as eager PyTorch gets
without a compiler: packed projections, a chunked recurrence in matrix form (a Python loop over
chunks, for the state alone), hand-written backward passes of the recurrence and of RMSNorm, the
fused AdamW where PyTorch has one for the CPU. `plain` is the same model with the chunked form as
one writes it down, its backward by autograd: what a PyTorch user has without writing derivatives.
A step is forward, backward, clipping and AdamW on one micro-batch. PyTorch 1.13 or later.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reference  # noqa: E402

from torch_model import RECURRENCES, Mixer, Model  # noqa: E402

# ---------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------

def read_config(path: Path) -> dict:
    """A training config: JSON with // and /* */ comments."""
    comment = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.S)
    return json.loads(comment.sub(lambda m: m.group(1) or "", path.read_text()))


def make_optimizer(model: Model, o: dict) -> torch.optim.Optimizer:
    everything = o.get("decay", "matrices") == "all"
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        groups[everything or (p.dim() == 2 and name != "lower_bounds")].append(p)
    settings = dict(lr=o.get("lr", 3e-4), betas=tuple(o.get("betas", (0.9, 0.95))),
                    eps=o.get("eps", 1e-8))
    decay = o.get("weight_decay", 0.1)
    groups = [dict(params=groups[True], weight_decay=decay),
              dict(params=groups[False], weight_decay=0.0)]
    try:
        return torch.optim.AdamW(groups, fused=True, **settings)  # on the CPU since 2.4
    except (TypeError, RuntimeError):
        return torch.optim.AdamW(groups, **settings)


class Step:
    def __init__(self, config: dict, B: int):
        m = config["model"]
        self.c = reference.Config.from_json(m)
        self.model = Model(self.c, bool(m.get("bias", False)))
        self.model.initialize(m.get("initializer", "normal"), m.get("initializer_range", 0.02),
                              config.get("train", {}).get("seed", 0))
        self.optimizer = make_optimizer(self.model, config.get("optim", {}))
        self.clip = config.get("optim", {}).get("clip_norm", 1.0)
        self.B, self.T = B, config.get("data", {}).get("seq_len", 2048)

    def run(self, tokens: Tensor, targets: Tensor, C: int) -> float:
        loss = self.model(tokens, targets, C)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.item()

    def batch(self, stream: np.ndarray, step: int) -> tuple[Tensor, Tensor]:
        size = self.B * self.T
        start = step * size % max(1, len(stream) - size)
        return reference.batch(stream[start:start + size + 1], self.B, self.T)


def measure(args: argparse.Namespace) -> None:
    config = read_config(args.config)
    B = args.micro_batch or config.get("train", {}).get("micro_batch", 26)
    step = Step(config, B)
    size = B * step.T
    if args.data:
        stream = reference.read_shard(args.data)
        if len(stream) < size + 1 or stream.max() >= step.c.vocab_size:
            sys.exit(f"{args.data}: needs at least {size + 1} tokens, all below vocab_size")
    else:
        stream = np.random.RandomState(0).randint(0, step.c.vocab_size, 4 * size + 1)

    def seconds(C: int, s: int) -> tuple[float, float]:
        tokens, targets = step.batch(stream, s)
        start = time.perf_counter()
        loss = step.run(tokens, targets, C)
        return time.perf_counter() - start, loss

    parameters = sum(p.numel() for p in step.model.parameters())
    print(f"torch {torch.__version__}, {args.recurrence} recurrence, {torch.get_num_threads()} threads, "
          f"{type(step.optimizer).__name__} fused={step.optimizer.defaults.get('fused')}, "
          f"MKL {torch.backends.mkl.is_available()}; {parameters:,} parameters, {B} x {step.T}")
    seconds(16, 0)
    if args.chunk == "auto":  # in turn, so that a busy moment does not fall on one of them
        tried: dict[int, list[float]] = {16: [], 32: [], 64: []}
        for s in range(5):
            for C, times in tried.items():
                times.append(seconds(C, s)[0])
        C = min(tried, key=lambda c: statistics.median(tried[c]))
        print("chunk: " + ", ".join(f"{c} {statistics.median(t) * 1e3:.0f} ms"
                                    for c, t in tried.items()))
    else:
        C = int(args.chunk)
        seconds(C, 1)
    if args.against:
        in_turn(args, B, lambda s: seconds(C, s)[0], size)
        return
    results = [seconds(C, s) for s in range(args.steps)]
    median = statistics.median(t for t, _ in results)
    flops = 6 * parameters * size
    print(f"chunk {C}: median of {args.steps} steps {median * 1e3:.1f} ms (fastest "
          f"{min(results)[0] * 1e3:.1f}), {size / median:,.0f} tokens/s, "
          f"{flops / median / 1e9:.0f} GFLOP/s (6 x parameters), loss {results[-1][1]:.4f}")


def in_turn(args: argparse.Namespace, B: int, seconds: Callable[[int], float],
            size: int) -> None:
    """Rounds of --steps steps here and as many of hgrn-bench: where other programs run, both meet
    them, and the ratio of a round means more than any of its times."""
    command = [args.against, "step", "--config", str(args.config), "--device", "cpu",
               "--micro-batch", str(B), "--steps", str(args.steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    here, there = [], []
    for _ in range(args.rounds):
        here.append(statistics.median(seconds(s) for s in range(args.steps)))
        out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        found = re.search(r"tokens\s+([\d.]+) ms", out.stdout)
        if out.returncode != 0 or not found:
            sys.exit(f"{args.against}: exit code {out.returncode}, and no line with the step's time; "
                     f"does `{' '.join(command)}` run?")
        there.append(float(found[1]) / 1e3)
    ratios = [h / t for h, t in zip(here, there)]
    for name, times in (("torch", here), ("hgrn", there)):
        print(f"{name}: " + " ".join(f"{t * 1e3:.1f}" for t in times) +
              f" ms a round, median {statistics.median(times) * 1e3:.1f} ms, "
              f"{size / statistics.median(times):,.0f} tokens/s")
    print("ratio: " + " ".join(f"{r:.2f}" for r in ratios) +
          f", median {statistics.median(ratios):.2f}")


def profile(args: argparse.Namespace) -> None:
    config = read_config(args.config)
    step = Step(config, args.micro_batch or config.get("train", {}).get("micro_batch", 26))
    stream = np.random.RandomState(0).randint(0, step.c.vocab_size, step.B * step.T + 1)
    C = 16 if args.chunk == "auto" else int(args.chunk)
    step.run(*step.batch(stream, 0), C)
    with torch.profiler.profile() as p:
        step.run(*step.batch(stream, 0), C)
    print(p.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


# ---------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------

def check_case(title: str, c: reference.Config, weights: dict[str, np.ndarray], tokens: Tensor,
               targets: Tensor, tolerance: float) -> bool:
    want = reference.loss_and_gradients(reference.to_double(weights), c, tokens, targets)
    model = Model(c, any(name.endswith("proj.bias") for name in weights))
    names = model.reference_names()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.cat([torch.from_numpy(weights[part].copy()) for part in names[name]]))
    good = True
    for C in (16, 32, 64):
        model.zero_grad()
        loss = model(tokens, targets, C)
        loss.backward()
        worst = abs(loss.item() - want["loss"]) / want["loss"]
        where = "loss"
        for name, p in model.named_parameters():
            exact = torch.cat([want["grads"][part] for part in names[name]])
            difference = reference.relative(p.grad.double().numpy(), exact.numpy())
            if not difference <= worst:
                worst, where = difference, name
        ok = worst <= tolerance
        good = good and ok
        print(f"{title}, chunk {C}: {'ok' if ok else 'FAILED'}, largest relative difference "
              f"{worst:.1e}, of {where} (allowed {tolerance:.0e})")
    return good


def check() -> bool:
    good = True
    for name in ("llm", "wikitext"):
        folder = reference.GOLDEN / name
        c = reference.Config.from_json(json.loads((folder / "config.json").read_text()))
        numbers = json.loads((folder / "golden.json").read_text())
        tokens, targets = reference.batch(reference.read_shard(folder / "stream.bin"),
                                          numbers["B"], numbers["T"])
        weights = reference.read_safetensors(folder / "model.safetensors")
        good = check_case(name, c, weights, tokens, targets, 1e-4) and good
    # several chunks, a part of one, and gates from wide open to shut
    rng = np.random.RandomState(5)
    c = reference.Config(64, 32, 3, 16, 40)
    stream = rng.randint(0, c.vocab_size, 2 * 203 + 1)
    for gain, title in ((1.0, "long rows"), (6.0, "long rows, extreme gates")):
        weights = reference.random_weights(c, False, rng)
        for name in weights:
            if "f_proj" in name:
                weights[name] = weights[name] * np.float32(gain)
        tolerance = 1e-4 if gain == 1 else 1e-3  # the clamp moves shut gates by up to e^-10
        good = check_case(title, c, weights, *reference.batch(stream, 2, 203), tolerance) and good
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, help="training config (JSON, comments allowed)")
    parser.add_argument("--data", type=Path, help="token shard; default: random tokens")
    parser.add_argument("--micro-batch", type=int, help="sequences a step; default: the config's")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default 10)")
    parser.add_argument("--threads", type=int, help="default: PyTorch's choice")
    parser.add_argument("--chunk", default="auto", choices=["auto", "16", "32", "64"],
                        help="tokens a chunk (default: the fastest of the three)")
    parser.add_argument("--recurrence", default="tuned", choices=list(RECURRENCES),
                        help="see above (default: tuned)")
    parser.add_argument("--against", metavar="HGRN_BENCH",
                        help="take turns with `HGRN_BENCH step` and print the ratio of each round")
    parser.add_argument("--rounds", type=int, default=10, help="of --against (default 10)")
    parser.add_argument("--profile", action="store_true", help="time by operation, one step")
    parser.add_argument("--check", action="store_true",
                        help="compare loss and gradients with the float64 recurrence")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    Mixer.recurrence = staticmethod(RECURRENCES[args.recurrence])
    if args.check:
        return 0 if check() else 1
    if not args.config:
        parser.error("--config or --check is required")
    if args.against and (args.profile or args.data):
        parser.error("--against takes turns on random tokens: leave out --profile and --data")
    if args.rounds < 1 or args.steps < 1:
        parser.error("--rounds and --steps must be at least 1")
    (profile if args.profile else measure)(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

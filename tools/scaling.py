#!/usr/bin/env python3
"""What scripts/bench_scaling.sh does: its --help says what. Python's own library alone.

Speeds come from `hgrn-bench comm`, one process a rank: it times whole steps, the same steps without
communication, and communication alone (tools/bench/comm.cpp). Resume and restart are runs of
`hgrn launch -- train`. The exit code is 1 where a part failed or two loss curves part.
"""
import argparse
import array
import datetime
import json
import os
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from ablation_table import read_config

HGRN = os.environ.get("HGRN", "build/hgrn")
BENCH = os.environ.get("HGRN_BENCH", str(Path(HGRN).parent / "hgrn-bench"))
PAPER = ["150m=configs/hgrn2_150m.json:26", "385m=configs/hgrn2_385m.json:15", "1b=configs/hgrn2_1b.json:10"]
PARTS = ["weak", "strong", "resume", "restart"]
APART = 2e-3    # the largest relative difference of two curves: another batch makes about 3e-2
SEGMENT = 4     # steps before the run goes on with another number of ranks
SHARD_TOKENS = 1 << 21


def fail(code, text):
    sys.stderr.write(f"error: {text}\n")
    sys.exit(code)


def gpus():
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                universal_newlines=True).stdout
    except FileNotFoundError:
        return 0
    there = sum(line.startswith("GPU ") for line in listed.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if visible is None else min(there, len([d for d in visible.split(",") if d]))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def children(pid):
    """Of all threads of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(k) for k in (task / "children").read_text().split()]
    return found


def rank_of(pid):
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if entry.startswith(b"RANK="):
            return int(entry[5:])
    return None


class Model:
    def __init__(self, text):
        try:
            self.name, rest = text.split("=", 1)
            self.config, batch = rest.rsplit(":", 1)
            self.micro_batch = int(batch)
        except ValueError:
            fail(2, f"--model {text}: NAME=CONFIG:MICRO_BATCH is expected")


class Bench:
    def __init__(self, a):
        self.a, self.began, self.rows, self.result = a, time.monotonic(), [], {}
        self.models = [Model(m) for m in a.model or PAPER]
        self.sets = [w for s in a.set for w in ("--set", s)]
        self.out = Path(a.out)
        if self.out.exists():
            fail(2, f"{self.out} is there already; remove it or give another --out")
        self.out.mkdir(parents=True)
        self.failures = []

    def late(self, what):
        if time.monotonic() - self.began < self.a.seconds:
            return False
        self.failures.append(f"{what}: not begun, --seconds is used up")
        return True

    # ---- one process a rank

    def start(self, starts):
        """Runs (environment, words) side by side; the first one's output once all have ended well, else None."""
        cores = max(1, len(os.sched_getaffinity(0)) // len(starts))
        ranks = []
        for extra, words in starts:
            env = {**os.environ, **{k: str(v) for k, v in extra.items()}}
            env.setdefault("OMP_NUM_THREADS", str(cores))
            ranks.append(subprocess.Popen([str(w) for w in words], env=env, stdin=subprocess.DEVNULL,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True))
        try:
            said = [r.communicate(timeout=self.a.limit)[0] for r in ranks]
        except subprocess.TimeoutExpired:
            said = None
        for r in ranks:
            if r.poll() is None:
                r.kill()
                r.wait()
        if said is None or any(r.returncode for r in ranks):
            text = "did not end in time" if said is None else "\n".join(said)[-2000:]
            self.failures.append(f"{' '.join(map(str, starts[0][1]))}, {len(ranks)} processes: {text}")
            return None
        return said[0]

    def speeds(self):
        for m in self.models:
            alone = None
            for n in self.a.ranks:
                batches = [n * m.micro_batch] if "weak" in self.a.parts else []
                strong = max(self.a.ranks) * m.micro_batch
                if m is self.models[0] and "strong" in self.a.parts and strong not in batches:
                    batches.append(strong)
                if not batches or self.late(f"{m.name}, {n} ranks"):
                    continue
                print(f"{time.monotonic() - self.began:6.0f} s  {m.name}, {n} ranks", file=sys.stderr, flush=True)
                words = [BENCH, "comm", "--config", m.config, "--micro-batch", m.micro_batch, "--steps",
                         self.a.steps, "--device", self.a.device, *self.sets]
                for b in batches:
                    words += ["--global-batch", b]
                if n == 1:
                    self.each_alone(m, words)
                    alone = words
                else:
                    self.together(m, n, words)
            if alone and max(self.a.ranks) > 1 and not self.late(f"{m.name}, one rank again"):
                self.each_alone(m, alone)
        for row in self.rows:
            row["efficiency"] = self.efficiency(row)
        self.result["speeds"] = self.rows

    def each_alone(self, m, words):
        """One rank on every GPU, all at the same time, as they are when they train together: no two are equal.
        Before and after the others, since a GPU is faster while it is cold; the row is the mean of both times."""
        tables = [self.out / f"{m.name}-alone-{i}.json" for i in range(max(self.a.ranks))]
        said = self.start([({"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": i}, [*words, "--json", t])
                           for i, t in enumerate(tables)])
        if said is None:
            return
        self.result["device"] = said.splitlines()[0]
        for same in zip(*(json.loads(t.read_text()) for t in tables)):
            run = [row["tokens_per_s"] for row in same], statistics.mean(row["step_ms"] for row in same)
            row = next((r for r in self.rows if r["ranks"] == 1 and r["model"] == m.name
                        and r["global_batch"] == same[0]["global_batch"]), None)
            if row is None:
                row = {"model": m.name, "micro_batch": m.micro_batch, **same[0], "runs": []}
                self.rows.append(row)
            row["runs"].append(run)
            row["each_tokens_per_s"] = [statistics.mean(each) for each in zip(*(r[0] for r in row["runs"]))]
            row["tokens_per_s"] = statistics.mean(row["each_tokens_per_s"])
            row["step_ms"] = statistics.mean(r[1] for r in row["runs"])

    def together(self, m, n, words):
        port, table = free_port(), self.out / f"{m.name}-{n}.json"
        if self.start([({"RANK": r, "WORLD_SIZE": n, "LOCAL_RANK": r, "LOCAL_WORLD_SIZE": n,
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, [*words, "--json", table])
                       for r in range(n)]) is not None:
            self.rows += [{"model": m.name, "micro_batch": m.micro_batch, **row}
                          for row in json.loads(table.read_text())]

    def is_weak(self, row):
        return row["global_batch"] == row["ranks"] * row["micro_batch"]

    def is_strong(self, row):
        return (row["model"] == self.models[0].name
                and row["global_batch"] == max(self.a.ranks) * row["micro_batch"])

    def alone(self, row):
        """One rank with the same sequences a rank, or where that is no row's, with the same global batch."""
        same = self.is_weak if self.is_weak(row) else self.is_strong
        return next((o for o in self.rows if o["ranks"] == 1 and o["model"] == row["model"] and same(o)), None)

    def efficiency(self, row):
        one = self.alone(row)
        return row["tokens_per_s"] / row["ranks"] / one["tokens_per_s"] if one else None

    def print_speeds(self, title, rows, base):
        if not rows:
            return
        heads = ["model", "ranks", "ZeRO", "sequences a step", "tokens/s", "efficiency", "of the slowest GPU", "step, ms",
                 "without communication, ms", "of it waiting for others, ms", "communication alone, ms",
                 "of it shown, ms", "hidden", "host in collectives, ms",
                 "weights and optimizer, GiB", "memory, GiB"]
        print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for r in rows:
            one = next((o for o in rows if o["ranks"] == 1 and o["model"] == r["model"] and base(o)), None)
            cells = [r["model"], r["ranks"], "-", r["global_batch"], f"{r['tokens_per_s']:.0f}", "-", "-",
                     f"{r['step_ms']:.2f}", *["-"] * 6, f"{r['state_gib']:.3f}",
                     f"{r['memory_gib']:.2f}" if r["memory_gib"] else "-"]
            if one:
                share = 100 * r["tokens_per_s"] / r["ranks"]
                cells[5] = f"{share / one['tokens_per_s']:.1f} %"
                cells[6] = f"{share / min(one['each_tokens_per_s']):.1f} %"
            if r["ranks"] > 1:
                cells[2] = r["zero"]
                cells[8:14] = [f"{r['silent_ms']:.2f}", f"{r['agreement_ms']:.2f}", f"{r['alone_ms']:.2f}",
                               f"{r['shown_ms']:.2f}", f"{100 * min(1, max(0, r['hidden'])):.0f} %",
                               f"{r['host_ms']:.2f}"]
            print(f"| {' | '.join(map(str, cells))} |")
        for r in rows:
            if r["ranks"] == 1:
                runs = "; ".join(", ".join(f"{t:.0f}" for t in each) for each, _ in r["runs"])
                print(f"\n{r['model']}, {r['global_batch']} sequences, one rank on each GPU at the same time: {runs} "
                      "tokens/s; the row is their mean.")
        sys.stdout.flush()

    # ---- runs

    def data(self, vocab, T):
        """Shards in which each stretch of T tokens draws from few or from many: batches differ in loss."""
        if self.a.data:
            return self.a.data
        rng, tokens = random.Random(1), array.array("H")
        while len(tokens) < max(SHARD_TOKENS if T >= 512 else 0, 400 * T) + 1:
            tokens.extend(rng.choices(range(min(vocab, rng.choice((16, 256, 4096)))), k=T))
        path = self.out / "made_up_000000.bin"
        path.write_bytes(struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + tokens.tobytes())
        return str(path)

    def train_words(self, n, name, steps, every=0, stop=None, flags=()):
        m = self.models[0]
        batch = max(self.a.ranks) * m.micro_batch
        keys = {"data.train": self.shards, "data.valid": "", "train.micro_batch": m.micro_batch,
                "train.global_batch": batch, "train.steps": steps, "train.log_every": 1, "train.eval_every": 0,
                "train.checkpoint_every": every, "train.keep_checkpoints": 1, "optim.warmup_steps": 2,
                "optim.lr": 1e-3, "train.recompute": "none"}
        words = [HGRN, "launch", "--nproc-per-node", n, *flags, "--", "train", "--config", m.config, "--out",
                 self.out / name, "--device", self.a.device, *self.sets]
        for k, v in keys.items():
            words += ["--set", f"{k}={v}"]
        return [str(w) for w in words + (["--steps", stop] if stop is not None else [])]

    def train(self, n, name, steps, stop=None):
        done = subprocess.run(self.train_words(n, name, steps, stop=stop), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
                              timeout=self.a.limit)
        if done.returncode:
            raise RuntimeError(f"{name} on {n} ranks ended with {done.returncode}: {done.stdout[-2000:]}")

    def lines(self, name):
        text = (self.out / name / "metrics.jsonl").read_text()
        return [j for j in map(json.loads, text.splitlines()) if "loss" in j]

    def resume(self):
        if self.late("resume"):
            return
        most = max(self.a.ranks)
        chain = sorted(self.a.ranks, reverse=True) + ([most] if len(self.a.ranks) > 1 else [])
        steps = SEGMENT * len(chain)
        self.train(most, "whole", steps)
        for i, n in enumerate(chain):
            self.train(n, "chain", steps, stop=SEGMENT * (i + 1))
        whole, other = self.lines("whole"), self.lines("chain")
        rows = [{"step": w["step"], "whole": w["loss"], "ranks": chain[i // SEGMENT], "chain": c["loss"],
                 "apart": abs(c["loss"] / w["loss"] - 1)} for i, (w, c) in enumerate(zip(whole, other))]
        speed = statistics.median(j["tokens_per_s"] for j in whole[2:])
        self.result["resume"] = {"chain": chain, "losses": rows, "train_tokens_per_s": speed}
        print(f"\n`hgrn train` on {most} ranks: {speed:.0f} tokens/s (median of steps 3 to {steps}).\n\n"
              f"Losses of an undisturbed run on {most} ranks and of one that goes on with "
              f"{', '.join(map(str, chain))}:\n")
        print("| step | undisturbed | ranks | loss | apart |\n|---|---|---|---|---|")
        for r in rows:
            print(f"| {r['step']} | {r['whole']:.6f} | {r['ranks']} | {r['chain']:.6f} | {r['apart']:.1e} |")
        sys.stdout.flush()
        if len(rows) != steps or not all(r["apart"] < APART for r in rows):
            self.failures.append(f"resume: {len(rows)} of {steps} steps, the curves part by more than {APART}")
        for name in ("whole", "chain"):
            shutil.rmtree(self.out / name / "checkpoints", ignore_errors=True)

    def restart(self):
        if self.late("restart"):
            return
        n, said = max(self.a.ranks), []
        victim = n - 1
        words = self.train_words(n, "killed", 1000000, every=10, flags=["--max-restarts", 1])
        p = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             universal_newlines=True)

        def read():
            for line in p.stdout:
                said.append((time.monotonic(), line))

        reader = threading.Thread(target=read)
        reader.start()

        def wait_for(what, is_there):
            until = time.monotonic() + self.a.limit
            while time.monotonic() < until and reader.is_alive():
                if (found := is_there()) is not None:
                    return found
                time.sleep(0.005)
            raise RuntimeError(f"no {what}:\n" + "".join(line for _, line in said)[-2000:])

        def line(part, since):
            """When the first line with `part` came after `since`."""
            return wait_for(f"'{part}'", lambda: next((t for t, x in list(said) if t >= since and part in x), None))

        try:
            manifests = self.out / "killed/checkpoints"
            wait_for("checkpoint", lambda: next(manifests.glob("step-*/MANIFEST.json"), None))
            line(" step ", time.monotonic())
            pid = next(k for k in children(p.pid) if rank_of(k) == victim)
            killed = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            again = line("launch: restart 1 of 1", killed)
            resumed = line("resumed from", again)
            stepped = line(" step ", resumed + 1e-6)
            p.terminate()
            code = p.wait(timeout=self.a.limit)
        finally:
            if p.poll() is None:
                p.kill()
            reader.join()
        marks = {"all ranks ended, started again": again - killed, "resumed from the checkpoint": resumed - killed,
                 "first step done after it": stepped - killed}
        self.result["restart"] = {"ranks": n, "killed": victim, "code": code, "seconds": marks}
        print(f"\nkill -9 of rank {victim} of {n} with --max-restarts 1, seconds from the kill:\n\n| | s |\n|---|---|")
        for what, seconds in marks.items():
            print(f"| {what} | {seconds:.2f} |")
        sys.stdout.flush()
        if code != 75:
            self.failures.append(f"restart: SIGTERM ended the run with {code}, not with 75")

    # ---- all

    def run(self):
        if {"weak", "strong"} & set(self.a.parts):
            self.speeds()
            self.print_speeds("Weak scaling: the same sequences a rank.",
                              [r for r in self.rows if self.is_weak(r)] if "weak" in self.a.parts else [],
                              self.is_weak)
            self.print_speeds("Strong scaling: the same global batch.",
                              [r for r in self.rows if self.is_strong(r)] if "strong" in self.a.parts else [],
                              self.is_strong)
        if {"resume", "restart"} & set(self.a.parts):
            c = read_config(self.models[0].config)
            self.shards = self.data(c["model"]["vocab_size"], c["data"]["seq_len"])
        for part in ("resume", "restart"):
            if part not in self.a.parts:
                continue
            print(f"{time.monotonic() - self.began:6.0f} s  {part}", file=sys.stderr, flush=True)
            try:
                getattr(self, part)()
            except (RuntimeError, subprocess.TimeoutExpired, StopIteration) as e:
                self.failures.append(f"{part}: {e}")
        self.result.update(date=datetime.date.today().isoformat(), seconds=time.monotonic() - self.began,
                           failures=self.failures)
        Path(self.a.json or self.out / "scaling.json").write_text(json.dumps(self.result, indent=1) + "\n")
        for f in self.failures:
            print(f"failed: {f}", file=sys.stderr)
        return 1 if self.failures else 0


def main():
    p = argparse.ArgumentParser(description="scripts/bench_scaling.sh --help describes the flags")
    p.add_argument("--ranks", type=lambda t: sorted({int(n) for n in t.split(",")}))
    p.add_argument("--parts", type=lambda t: t.split(","), default=PARTS)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--model", action="append", metavar="NAME=CONFIG:MICRO_BATCH")
    p.add_argument("--data")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    p.add_argument("--seconds", type=float, default=1e9)
    p.add_argument("--limit", type=float, default=300, help="seconds that one start of ranks may take")
    p.add_argument("--json")
    p.add_argument("--out", default="runs/scaling")
    a = p.parse_args()
    if unknown := set(a.parts) - set(PARTS):
        fail(2, f"--parts: {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if not a.ranks:
        there = gpus() if a.device == "cuda" else fail(2, "--device cpu needs --ranks")
        a.ranks = [n for n in (1, 2, 4, 8) if n <= there]
    if not a.ranks:
        fail(3, "no GPU is visible; --device cpu --ranks 1,2 measures CPU ranks")
    for program in (HGRN, BENCH):
        if not os.access(program, os.X_OK):
            fail(3, f"{program} is not there; build it, or set HGRN and HGRN_BENCH")
    return Bench(a).run()


if __name__ == "__main__":
    sys.exit(main())

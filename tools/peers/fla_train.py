#!/usr/bin/env python3
"""The training peer: flash-linear-attention's HGRN2 from our initial weights, on our batches, with
our optimizer and schedule, so that the two loss curves can be laid over each other.

    build/hgrn train --config configs/curve_150m.json --out runs/ours --steps 0   # weights of step 0
    build/hgrn train --config configs/curve_150m.json --out runs/ours
    PYTHONPATH=<folder of fla> python3 tools/peers/fla_train.py --run runs/ours --out runs/fla
    python3 tools/compare_curves.py runs/ours runs/fla

It reads RUN/config.json (every key is in it) and RUN/checkpoints/step-00000000, and writes
OUT/metrics.jsonl with the keys of ours and `time` (Unix seconds), and OUT/summary.json.

What is the same: initial weights, the sequences of each step (tools/sample_order.py), AdamW with
its decay groups, clipping, learning rates, the loss (all T targets of a row count). On a GPU with
train.precision bf16: fp32 weights, moments and gradients under bf16 autocast, fused AdamW. fla's
model has its defaults, which its own training configs use too: fused RMSNorm, SwiGLU and
cross-entropy (in place), `chunk` mode. Losses stay on the device until a line is due, so that
Python does not wait at each step. The first forward and backward, in which Triton compiles and
tunes, runs before the clock starts (summary.json: compile_s) and changes no weight.

--model reference trains the definition of the model (tools/reference.py, by autograd) in fp64
on the CPU instead: that shows that loop, order, schedule, decay groups and clipping here are those
of `hgrn train`. It needs PyTorch alone; fla needs a CUDA GPU, transformers and safetensors too. With
TRITON_INTERPRET=1 a tiny fla model trains on the CPU in Triton's interpreter, in fp32
(tools/peers/interpret.py).
"""
from __future__ import annotations

import argparse
import glob
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))
import reference  # noqa: E402
from sample_order import SampleOrder  # noqa: E402


# ---- data

class Shards:
    """A source's shards as one list of sequences of T + 1 tokens."""

    def __init__(self, pattern: str, T: int):
        if any(c in pattern for c in "{}~"):
            sys.exit(f"data.train: '{pattern}': only * ? [] are understood here")
        self.T, self.parts, self.count = T, [], 0
        for path in sorted(glob.glob(pattern), key=lambda p: p.encode()):
            tokens = self.open(path)
            self.parts.append((self.count, tokens))
            self.count += max(0, len(tokens) - 1) // T
        if self.count == 0:
            sys.exit(f"data.train: no shard of '{pattern}' holds a sequence of {T} tokens")

    @staticmethod
    def open(path: str) -> np.ndarray:
        head = np.fromfile(path, "<i4", 4)
        if len(head) < 4 or (head[0], head[1]) not in {(20240520, 1), (20240801, 7)}:
            sys.exit(f"{path}: not a token shard")
        count = int(head[2:4].view("<i8")[0])
        return np.memmap(path, "<u2" if head[1] == 1 else "<u4", "r", offset=1024, shape=(count,))

    def read(self, sequence: int) -> np.ndarray:
        first, tokens = next(p for p in reversed(self.parts) if p[0] <= sequence)
        at = (sequence - first) * self.T
        return np.asarray(tokens[at:at + self.T + 1])


class Batches:
    """The micro-batches of `hgrn train` on one rank, from its first step."""

    def __init__(self, data: dict, train: dict):
        sources = data["train"]
        if isinstance(sources, str):
            sources = [{"path": sources}]
        self.shards = [Shards(s["path"], data["seq_len"]) for s in sources]
        self.order = SampleOrder([s.count for s in self.shards],
                                 [float(s.get("weight", 1)) for s in sources], data["seed"],
                                 data["shuffle"])
        self.B, self.next_sample = train["micro_batch"], 0

    def next(self) -> tuple[Tensor, Tensor]:
        rows = []
        for g in range(self.next_sample, self.next_sample + self.B):
            source, _, sequence = self.order.at(g)
            rows.append(self.shards[source].read(sequence))
        self.next_sample += self.B
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# ---- models: each has named parameters and gives the mean loss of a batch

class Reference(torch.nn.Module):
    """The definition, from a checkpoint in either parameterisation."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        super().__init__()
        self.c = reference.Config.from_json(json.loads((folder / "config.json").read_text()))
        self.weights = {}
        for name, t in reference.read_safetensors(folder / "model.safetensors").items():
            p = torch.nn.Parameter(torch.from_numpy(t.copy()).to(dtype))
            self.weights[name] = p
            self.register_parameter(name.replace(".", "/"), p)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits, _ = reference.forward(self.weights, self.c, inputs)
        return reference.token_nll(logits, targets).mean()


class Fla(torch.nn.Module):
    def __init__(self, folder: Path, cuda: bool):
        super().__init__()
        from fla.models import HGRN2Config, HGRN2ForCausalLM
        from fla.modules import FusedCrossEntropyLoss
        from safetensors.torch import load_file
        if isinstance(HGRN2ForCausalLM._tied_weights_keys, list):  # transformers 5 wants a mapping
            HGRN2ForCausalLM._tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
        values = json.loads((folder / "config.json").read_text())
        for key in ("architectures", "model_type", "torch_dtype", "transformers_version"):
            values.pop(key, None)
        self.lm = HGRN2ForCausalLM(HGRN2Config(**values)).float()
        tied = values["tie_word_embeddings"]
        missing, unexpected = self.lm.load_state_dict(load_file(folder / "model.safetensors"),
                                                      strict=False)
        if unexpected or set(missing) - ({"lm_head.weight"} if tied else set()):
            sys.exit(f"{folder}: fla's model misses {missing} and does not know {unexpected}")
        if tied:
            self.lm.lm_head.weight = self.lm.model.embeddings.weight
        self.lm.train()
        # fla's loss wants a GPU; the interpreter below has none
        self.criterion = FusedCrossEntropyLoss(inplace_backward=True) if cuda else torch.nn.CrossEntropyLoss()

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """HGRN2ForCausalLM.forward, but its labels drop each row's last target."""
        hidden = self.lm.model(input_ids=inputs, use_cache=False, return_dict=True)[0]
        logits = self.lm.lm_head(hidden)
        return self.criterion(logits.view(-1, logits.shape[-1]), targets.view(-1))


# ---- optimizer

def learning_rate(o: dict, steps: int, s: int) -> float:
    """src/train/schedule.cpp."""
    lr, W, m = o["lr"], o["warmup_steps"], o["min_lr_ratio"]
    if s <= W:
        return o["warmup_init_lr"] + (lr - o["warmup_init_lr"]) * s / W
    p = min(1.0, (s - W) / (steps - W)) if steps > W else 1.0
    return {"cosine": lr * (m + (1 - m) * (1 + math.cos(math.pi * p)) / 2),
            "linear": lr * (1 - (1 - m) * p),
            "inverse_sqrt": lr * math.sqrt(max(W, 1) / s),
            "constant": lr,
            "wsd": lr if p <= 0.8 else lr * (1 - (1 - m) * (p - 0.8) / 0.2)}[o["schedule"]]


def make_optimizer(model: torch.nn.Module, o: dict, fused: bool) -> torch.optim.Optimizer:
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        matrix = p.dim() == 2 and not name.endswith("lower_bounds")
        groups[o["decay"] == "all" or matrix].append(p)
    groups = [{"params": groups[True], "weight_decay": o["weight_decay"]},
              {"params": groups[False], "weight_decay": 0.0}]
    settings = dict(lr=o["lr"], betas=tuple(o["betas"]), eps=o["eps"])
    if fused:
        settings["fused"] = True
    return torch.optim.AdamW([g for g in groups if g["params"]], **settings)


# ---- the loop

class Trainer:
    def __init__(self, a: argparse.Namespace):
        self.out = Path(a.out)
        self.config = json.loads((Path(a.run) / "config.json").read_text())
        start = Path(a.run) / "checkpoints/step-00000000"
        if not start.exists():
            sys.exit(f"{start}: there is no such folder; hgrn train --steps 0 writes it")
        model, train = self.config["model"], self.config["train"]
        if model["dropout"] > 0 or self.config["data"]["reset_at_eos"]:
            sys.exit("dropout draws other numbers here, and resets are not known: no comparison")
        self.cuda = a.model == "fla" and torch.cuda.is_available()
        if a.model == "fla" and not self.cuda and os.environ.get("TRITON_INTERPRET") != "1":
            sys.exit("fla needs a CUDA GPU (or TRITON_INTERPRET=1, for a model of a few thousand weights)")
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.autocast = self.cuda and train["precision"] == "bf16"
        torch.backends.cuda.matmul.allow_tf32 = train["precision"] == "bf16"
        self.model = Fla(start, self.cuda) if a.model == "fla" else Reference(start, torch.float64)
        self.model.to(self.device)
        self.parameters = list(self.model.parameters())
        self.optimizer = make_optimizer(self.model, self.config["optim"], fused=self.cuda)
        self.batches = Batches(self.config["data"], train)
        self.pieces = train["global_batch"] // train["micro_batch"]
        self.steps = train["steps"]
        self.last = min(self.steps, a.steps if a.steps is not None else self.steps)
        self.seconds_limit, self.log_every = a.seconds, a.log_every
        self.summary = {"model": a.model, "torch": torch.__version__,
                        "parameters": sum(p.numel() for p in self.parameters),
                        "device": torch.cuda.get_device_name() if self.cuda else "cpu"}

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def forward_backward(self) -> Tensor:
        """The loss of the global batch; gradients of its mean are added up."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for _ in range(self.pieces):
            inputs, targets = self.batches.next()
            if self.cuda:
                inputs = inputs.pin_memory().to(self.device, non_blocking=True)
                targets = targets.pin_memory().to(self.device, non_blocking=True)
            with torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext():
                loss = self.model(inputs, targets)
            (loss / self.pieces).backward()
            total += loss.detach().double() / self.pieces
        return total

    def compile(self) -> None:
        """Triton's compiling and tuning, without a change of the weights or the data's position."""
        started = time.perf_counter()
        loss = self.forward_backward().item()
        self.optimizer.zero_grad(set_to_none=True)
        self.batches.next_sample = 0
        self.wait()
        self.summary["compile_s"] = time.perf_counter() - started
        print(f"first loss {loss:.6f}; {self.summary['compile_s']:.1f} s to compile", flush=True)

    def step(self, s: int) -> tuple[int, float, Tensor, Tensor]:
        o = self.config["optim"]
        lr = learning_rate(o, self.steps, s)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.forward_backward()
        clip = o["clip_norm"] if o["clip_norm"] > 0 else math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return s, lr, loss, norm

    def run(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        if self.cuda:
            self.compile()
            torch.cuda.reset_peak_memory_stats()
        tokens = self.config["train"]["global_batch"] * self.config["data"]["seq_len"]
        started = marked = time.perf_counter()
        pending = []
        with open(self.out / "metrics.jsonl", "w") as file:
            for s in range(1, self.last + 1):
                pending.append(self.step(s))
                if len(pending) < self.log_every and s < self.last:
                    continue
                self.wait()
                now = time.perf_counter()
                self.write(file, pending, (now - marked) / len(pending), tokens)
                marked, pending = now, []
                if now - started > self.seconds_limit:
                    print(f"stopped after step {s} of {self.last}: --seconds is used up")
                    break
        self.summary.update(step=s, training_s=marked - started,
                            tokens_per_s=s * tokens / (marked - started),
                            peak_gib=torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None)
        (self.out / "summary.json").write_text(json.dumps(self.summary, indent=1) + "\n")
        print(json.dumps(self.summary))

    def write(self, file, pending: list, seconds: float, tokens: int) -> None:
        memory = torch.cuda.memory_allocated() / 2**30 if self.cuda else None
        for s, lr, loss, norm in pending:
            line = {"step": s, "tokens": s * tokens, "loss": loss.item(), "grad_norm": norm.item(),
                    "lr": lr, "step_ms": 1e3 * seconds, "tokens_per_s": tokens / seconds,
                    "mfu": None, "memory_gib": memory, "eta_s": (self.steps - s) * seconds,
                    "skipped": 0, "time": time.time()}
            file.write(json.dumps(line) + "\n")
        file.flush()
        print(f"step {s}/{self.steps}  loss {line['loss']:.4f}  norm {line['grad_norm']:.3f}  lr {lr:.2e}  "
              f"{line['tokens_per_s']:.0f} tok/s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", required=True, metavar="DIR",
                        help="run folder of hgrn train with its checkpoint of step 0")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--model", choices=["fla", "reference"], default="fla")
    parser.add_argument("--steps", type=int, help="stop after this step; the schedule stays")
    parser.add_argument("--seconds", type=float, default=math.inf,
                        help="stop when training took so long")
    parser.add_argument("--log-every", type=int, default=10, metavar="N",
                        help="steps between two waits for the device; every step has its line")
    a = parser.parse_args()
    Trainer(a).run()


if __name__ == "__main__":
    main()

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

The recurrence, per head (G = running sum of log f from the start of a chunk, C tokens a chunk,
sub-blocks of S = 16 tokens):
    A[t,s] = sum_c q[t,c] k[s,c] exp(G[t,c] - G[s,c])   s <= t
    y      = A v + (q exp(G)) h                         h: state before the chunk
    h     <- exp(G_end) h + (k exp(G_end - G))^T v
Inside a sub-block the exponents are taken from its middle: at most 8 steps away, and log f is
clamped at -10, so that exp stays finite in fp32. Between sub-blocks they are taken from a
boundary and are <= 0. Backward: dlog f = reverse running sum of q dq - k dk over the whole row.
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
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import make_golden as reference  # noqa: E402

S = 16          # tokens of a sub-block
MIN_LOG_F = -10.0


class ChunkedRecurrence(torch.autograd.Function):
    """q, k, v, g = log f, all (R,T,n) with R = B*H rows and T a multiple of C; returns y (R,T,n).
    States start at zero."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor, C: int) -> Tensor:
        R, T, n = q.shape
        M, NS = R * T // C, C // S  # chunks, sub-blocks of a chunk
        qc, kc, vc = (a.view(M, C, n) for a in (q, k, v))
        Gs = torch.cumsum(g.view(M * NS, S, n), dim=1)     # from the start of the sub-block
        mid = Gs - Gs[:, S // 2 - 1:S // 2]
        w = torch.exp(mid)
        w_inverse = torch.exp(mid.neg_())
        qs, ks = qc.view(-1, S, n) * w, kc.view(-1, S, n) * w_inverse
        A = torch.bmm(qs, ks.transpose(1, 2)).tril_()
        G = Gs.view(M, NS, S, n)
        if NS > 1:  # shift each sub-block by what precedes it in the chunk
            ends = torch.cumsum(G[:, :, -1], dim=1)
            G = G.clone()
            G[:, 1:] += ends[:, :-1, None]
            A = ChunkedRecurrence.whole_chunk(A, qc, kc, G, M, NS, n)
        G = G.view(M, C, n)
        into = torch.exp(G)                                # start of the chunk -> t
        out = torch.exp(G[:, -1:] - G)                     # t -> end of the chunk
        kv = torch.bmm((kc * out).transpose(1, 2), vc)
        decay = into[:, -1].contiguous().view(R, -1, n, 1)
        h = ChunkedRecurrence.scan(decay, kv.view(R, -1, n, n)).view(M, n, n)
        y = torch.bmm(A, vc).baddbmm_(qc * into, h)
        ctx.save_for_backward(q, k, v, w, w_inverse, G, into, out, A, h)
        ctx.C = C
        return y.view(R, T, n)

    @staticmethod
    def whole_chunk(diagonal: Tensor, q: Tensor, k: Tensor, G: Tensor, M: int, NS: int,
                    n: int) -> Tensor:
        """(M*NS,S,S) diagonal blocks -> (M,C,C) with the blocks below them."""
        A = q.new_zeros(M, NS, S, NS, S)
        diagonal = diagonal.view(M, NS, S, S)
        for b in range(NS):
            A[:, b, :, b] = diagonal[:, b]
            if b > 0:
                qb, kb, _, _ = ChunkedRecurrence.boundary(q, k, G, b)
                A[:, b, :, :b] = torch.bmm(qb, kb.transpose(1, 2)).view(M, S, b, S)
        return A.view(M, NS * S, NS * S)

    @staticmethod
    def boundary(q: Tensor, k: Tensor, G: Tensor, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sub-block b's queries and all earlier keys, weighted from the end of sub-block b-1."""
        G = G.view(q.shape)
        edge = G[:, b * S - 1:b * S]
        wq = torch.exp(G[:, b * S:(b + 1) * S] - edge)
        wk = torch.exp(edge - G[:, :b * S])
        return q[:, b * S:(b + 1) * S] * wq, k[:, :b * S] * wk, wq, wk

    @staticmethod
    def scan(decay: Tensor, kv: Tensor) -> Tensor:
        """States before each chunk: decay (R,NC,n,1), kv (R,NC,n,n) -> (R,NC,n,n)."""
        h = torch.empty_like(kv)
        h[:, 0] = 0
        for c in range(1, kv.shape[1]):
            torch.addcmul(kv[:, c - 1], h[:, c - 1], decay[:, c - 1], out=h[:, c])
        return h

    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k, v, w, w_inverse, G, into, out, A, h = ctx.saved_tensors
        R, T, n = q.shape
        C = ctx.C
        M, NS = R * T // C, C // S
        qc, kc, vc = (a.view(M, C, n) for a in (q, k, v))
        dy = dy.contiguous().view(M, C, n)
        # gradient of the state after each chunk: the same scan, from the right
        dkv_in = torch.bmm((qc * into).transpose(1, 2), dy).view(R, -1, n, n)
        decay = into[:, -1].view(R, -1, n, 1)
        dh = torch.empty_like(dkv_in)
        dh[:, -1] = 0
        for c in range(dh.shape[1] - 2, -1, -1):
            torch.addcmul(dkv_in[:, c + 1], dh[:, c + 1], decay[:, c + 1], out=dh[:, c])
        dh = dh.view(M, n, n)

        dA = torch.bmm(dy, vc.transpose(1, 2)).tril_()
        dv = torch.bmm(A.transpose(1, 2), dy).baddbmm_(kc * out, dh)
        dq = torch.bmm(dy, h.transpose(1, 2)).mul_(into)
        dk = torch.bmm(vc, dh.transpose(1, 2)).mul_(out)
        if NS == 1:
            diagonal = dA
        else:
            blocks = dA.view(M, NS, S, NS, S)
            diagonal = torch.stack([blocks[:, b, :, b] for b in range(NS)], 1).view(-1, S, S)
            for b in range(1, NS):
                qb, kb, wq, wk = ChunkedRecurrence.boundary(qc, kc, G, b)
                d = dA[:, b * S:(b + 1) * S, :b * S]
                dq[:, b * S:(b + 1) * S] += torch.bmm(d, kb).mul_(wq)
                dk[:, :b * S] += torch.bmm(d.transpose(1, 2), qb).mul_(wk)
        qs, ks = qc.view(-1, S, n), kc.view(-1, S, n)
        dq.view(-1, S, n).addcmul_(torch.bmm(diagonal, ks * w_inverse), w)
        dk.view(-1, S, n).addcmul_(torch.bmm(diagonal.transpose(1, 2), qs * w), w_inverse)
        dq, dk, dv = (a.view(R, T, n) for a in (dq, dk, dv))
        # sum over s >= t of e[s] = total - prefix + e[t]
        e = (q * dq).addcmul_(k, dk, value=-1)
        prefix = torch.cumsum(e, dim=1)
        dg = (prefix[:, -1:] - prefix).add_(e)
        return dq, dk, dv, dg, None


def plain_recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, C: int) -> Tensor:
    """As ChunkedRecurrence, by autograd. The decay between any two tokens of a chunk is a tensor of
    its own (R,C,C,n), so that no exponent is above 0."""
    R, T, n = q.shape
    future = torch.ones(C, C, dtype=torch.bool).triu(1)[:, :, None]
    h = q.new_zeros(R, n, n)
    out = []
    for s in range(0, T, C):
        qc, kc, vc = (a[:, s:s + C] for a in (q, k, v))
        G = torch.cumsum(g[:, s:s + C], dim=1)
        decay = (G[:, :, None] - G[:, None]).masked_fill(future, -torch.inf).exp()
        A = (qc[:, :, None] * kc[:, None] * decay).sum(-1)
        out.append(A @ vc + (qc * G.exp()) @ h)
        end = G[:, -1:]
        h = end.exp().transpose(1, 2) * h + (kc * (end - G).exp()).transpose(1, 2) @ vc
    return torch.cat(out, dim=1)


RECURRENCES = {"tuned": ChunkedRecurrence.apply, "plain": plain_recurrence}


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = torch.rsqrt(norm * norm / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, r = ctx.saved_tensors
        x_hat = x * r
        d = dy * weight
        mean = (d * x_hat).mean(-1, keepdim=True)
        dweight = (dy * x_hat).sum(tuple(range(dy.dim() - 1)))
        return d.sub_(x_hat.mul_(mean)).mul_(r), dweight, None


class RMSNorm(nn.Module):
    def __init__(self, D: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x, self.weight, self.eps)


ACTIVATIONS = {"none": lambda z: z, "silu": F.silu, "swish": F.silu, "sigmoid": torch.sigmoid}


class Mixer(nn.Module):
    recurrence = staticmethod(ChunkedRecurrence.apply)  # --recurrence

    def __init__(self, c: reference.Config, bias: bool, make_norm):
        super().__init__()
        D = c.hidden_size
        self.c = c
        self.qfi_proj = nn.Linear(D, 3 * D, bias=bias)
        self.g_norm = make_norm(1e-5)
        self.o_proj = nn.Linear(D, D, bias=bias)
        self.scale = c.expand_ratio ** -0.5 if c.query_scale == "rsqrt" else 1.0

    def forward(self, u: Tensor, beta: Tensor, C: int) -> Tensor:
        B, T, D = u.shape
        n = self.c.expand_ratio
        H = D // n
        x = self.qfi_proj(u)
        pad = -T % C
        if pad:
            x = F.pad(x, (0, 0, 0, pad))  # later tokens: they change nothing before them
        x = x.view(B, T + pad, 3, H, n).permute(2, 0, 3, 1, 4).contiguous()
        o, z, i = x.unbind(0)                                          # (B,H,T,n)
        o = ACTIVATIONS[self.c.output_activation](o) * self.scale
        i = ACTIVATIONS[self.c.input_activation](i)
        rest = 1 - beta.view(H, 1, n)
        f = torch.addcmul(beta.view(H, 1, n), rest, torch.sigmoid(z))
        k = rest * torch.sigmoid(-z)
        g = torch.log(f).clamp(min=MIN_LOG_F)
        o, k, i, g = (a.reshape(B * H, T + pad, n) for a in (o, k, i, g))
        y = self.recurrence(o, k, i, g, C)
        y = y.view(B, H, T + pad, n)[:, :, :T].transpose(1, 2).reshape(B, T, D)
        return self.o_proj(self.g_norm(y))


class Block(nn.Module):
    def __init__(self, c: reference.Config, bias: bool, make_norm):
        super().__init__()
        D, width = c.hidden_size, c.intermediate_size
        self.attn_norm = make_norm(c.norm_eps)
        self.attn = Mixer(c, bias, make_norm)
        self.mlp_norm = make_norm(c.norm_eps)
        self.gate_up_proj = nn.Linear(D, 2 * width, bias=bias)
        self.down_proj = nn.Linear(width, D, bias=bias)
        self.act = ACTIVATIONS[c.hidden_act]
        self.dropout = c.dropout

    def forward(self, x: Tensor, beta: Tensor, C: int) -> Tensor:
        x = x + self.drop(self.attn(self.attn_norm(x), beta, C))
        gate, up = self.gate_up_proj(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.drop(self.down_proj(self.act(gate) * up))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout > 0 else x


class Model(nn.Module):
    def __init__(self, c: reference.Config, bias: bool):
        super().__init__()
        self.c = c
        D = c.hidden_size
        norms = {"rmsnorm": lambda eps: RMSNorm(D, eps),
                 "layernorm": lambda eps: nn.LayerNorm(D, eps)}
        self.embeddings = nn.Embedding(c.vocab_size, D)
        self.lower_bounds = nn.Parameter(torch.zeros(c.num_hidden_layers, D))
        self.layers = nn.ModuleList(Block(c, bias, norms[c.norm])
                                    for _ in range(c.num_hidden_layers))
        self.norm = norms[c.norm](c.norm_eps)
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(D, c.vocab_size, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor, C: int) -> Tensor:
        """The mean loss; C: tokens a chunk."""
        x = self.embeddings(tokens)
        if self.c.scale_embedding:
            x = x * self.c.hidden_size ** 0.5
        if self.c.dropout > 0:
            x = F.dropout(x, self.c.dropout)
        s = torch.softmax(self.lower_bounds, dim=0)
        beta = torch.cumsum(s, dim=0) - s[0] if self.c.use_lower_bound else torch.zeros_like(s)
        for layer, block in enumerate(self.layers):
            x = block(x, beta[layer], C)
        head = self.embeddings.weight if self.lm_head is None else self.lm_head.weight
        logits = F.linear(self.norm(x), head)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    def reference_names(self) -> dict[str, list[str]]:
        """Parameter -> the reference's names of the tensors packed in it, in order."""
        packed = {"qfi_proj": ["q_proj", "f_proj", "i_proj"],
                  "gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"], "down_proj": ["mlp.down_proj"]}
        names = {}
        for name, _ in self.named_parameters():
            full = name if name.startswith("lm_head") else "model." + name
            parts = [full]
            for ours, theirs in packed.items():
                if f".{ours}." in full:
                    parts = [full.replace(f".{ours}.", f".{t}.") for t in theirs]
            names[name] = parts
        return names

    def initialize(self, initializer: str, std: float, seed: int) -> None:
        torch.manual_seed(seed)
        D = self.c.hidden_size
        for name, p in self.named_parameters():
            if initializer == "normal" and p.dim() == 2 and name != "lower_bounds":
                nn.init.normal_(p, std=std)
        if initializer == "fairseq":  # linear layers keep PyTorch's own
            nn.init.normal_(self.embeddings.weight, std=D ** -0.5)
            nn.init.ones_(self.lower_bounds)


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

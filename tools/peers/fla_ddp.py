#!/usr/bin/env python3
"""The peer of several GPUs: flash-linear-attention's HGRN2 under PyTorch's DistributedDataParallel.

    PYTHONPATH=<folder of fla> python3 tools/peers/fla_ddp.py --config configs/hgrn2_150m.json

Starts a process a GPU and times steps on random tokens, first of each GPU by itself, then of all under
DDP (NCCL): fp32 weights, moments and gradients under bf16 autocast, fused AdamW, clipping, fla's own
defaults (fused RMSNorm, SwiGLU and cross-entropy, `chunk` mode). Sequences a GPU, their length and the
model's sizes are the config's, which `hgrn-bench comm --config` takes too. Prints medians as they come:
Triton compiles and tunes in the first step, and after --limit seconds all is over, done or not.
--model reference takes the definition of the model from a checkpoint (tools/reference.py) on CPUs and
Gloo instead: that shows that this loop works where no GPU is.
"""
from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLS))
from ablation_table import read_config  # noqa: E402


# ---- a process

def make_fla(c: dict):
    from fla.models import HGRN2Config, HGRN2ForCausalLM
    if isinstance(HGRN2ForCausalLM._tied_weights_keys, list):  # transformers 5 wants a mapping
        HGRN2ForCausalLM._tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    m, vocab = c["model"], c["model"]["vocab_size"]
    return HGRN2ForCausalLM(HGRN2Config(
        hidden_size=m["hidden_size"], num_hidden_layers=m["num_hidden_layers"],
        expand_ratio=m["expand_ratio"], intermediate_size=m["intermediate_size"],
        vocab_size=(vocab + 127) // 128 * 128,  # as we pad it: an odd one would slow its products
        tie_word_embeddings=m.get("tie_word_embeddings", True), use_cache=False,
        max_position_embeddings=c["data"]["seq_len"], fuse_cross_entropy=True,
        fuse_linear_cross_entropy=False))


def worker(a: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = a.model == "fla"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    dist.init_process_group("nccl" if cuda else "gloo")
    c = read_config(a.config)
    B, T, vocab = a.micro_batch or c["train"]["micro_batch"], c["data"]["seq_len"], c["model"]["vocab_size"]
    torch.manual_seed(0)
    if cuda:
        model, loss_of = make_fla(c).to(device), lambda net, x: net(x, labels=x).loss
    else:
        import fla_train
        model, loss_of = fla_train.Reference(Path(a.checkpoint), torch.float32), lambda net, x: net(x, x)
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    out = {"model": a.model, "config": Path(a.config).stem, "B": B, "T": T, "gpus": world,
           "torch": torch.__version__, "device": torch.cuda.get_device_name() if cuda else "cpu",
           "parameters": sum(p.numel() for p in model.parameters())}

    def series(net, label: str, ranks: int) -> None:
        opt = torch.optim.AdamW(net.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1,
                                **({"fused": True} if cuda else {}))
        torch.manual_seed(rank + 1)
        times: list[float] = []
        began = time.perf_counter()
        for i in range(a.warm + a.steps):
            wait()
            started = time.perf_counter()
            x = torch.randint(0, vocab, (B, T), device=device)
            with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
                loss = loss_of(net, x)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
            wait()
            if i == 0:
                out[f"{label}_first_step_s"] = time.perf_counter() - began
            if i >= a.warm:
                times.append(time.perf_counter() - started)
                out[label] = {"steps": len(times), "step_ms": 1e3 * statistics.median(times),
                              "tokens_per_s": ranks * B * T / statistics.median(times),
                              "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None}
                if rank == 0 and a.json:
                    Path(a.json).write_text(json.dumps(out, indent=1) + "\n")
        if rank == 0:
            r = out[label]
            print(f"{label}: {ranks} GPU(s), {B} x {T} each: {r['step_ms']:.2f} ms, {r['tokens_per_s']:.0f} tokens/s "
                  f"(median of {r['steps']}), first step after {out[label + '_first_step_s']:.1f} s", flush=True)

    series(model, "alone", 1)  # every GPU at the same time: each compiles for itself
    dist.barrier()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    net = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank] if cuda else None,
                                                    gradient_as_bucket_view=True)
    series(net, "ddp", world)
    if rank == 0:
        print(f"ddp: {100 * out['ddp']['tokens_per_s'] / world / out['alone']['tokens_per_s']:.1f} % of "
              f"{world} x alone", flush=True)
    dist.destroy_process_group()


# ---- the one that starts them

def start(a: argparse.Namespace) -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [subprocess.Popen([sys.executable, *sys.argv, "--worker"], env={
        **os.environ, "RANK": str(r), "WORLD_SIZE": str(a.gpus), "LOCAL_RANK": str(r),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for r in range(a.gpus)]
    until, code = time.monotonic() + a.limit, 0
    while any(r.poll() is None for r in ranks):
        if time.monotonic() > until:
            print(f"stopped after --limit {a.limit:g} s; what was measured so far stands above", flush=True)
            code = 1
        elif any(r.returncode for r in ranks):
            code = 1
        if code:
            break
        time.sleep(0.1)
    for r in ranks:
        if r.poll() is None:
            r.kill()
        r.wait()
    if code and a.json and Path(a.json).exists():
        print(Path(a.json).read_text())
    return code or max(abs(r.returncode) for r in ranks)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--config", default="configs/hgrn2_150m.json")
    p.add_argument("--micro-batch", type=int, help="sequences a GPU (default: the config's)")
    p.add_argument("--gpus", type=int, default=2)
    p.add_argument("--steps", type=int, default=12)
    p.add_argument("--warm", type=int, default=4)
    p.add_argument("--limit", type=float, default=150, metavar="SECONDS")
    p.add_argument("--model", choices=["fla", "reference"], default="fla")
    p.add_argument("--checkpoint", help="of --model reference")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker:
        worker(a)
        return 0
    return start(a)


if __name__ == "__main__":
    sys.exit(main())

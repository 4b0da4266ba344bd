#!/usr/bin/env python3
"""The GPU peer of HGRU2 alone: flash-linear-attention's recurrence as its HGRN2 layer calls it.

    python3 tools/peers/fla_recurrence.py --shape 10,2048,16,128 --shape 26,2048,6,128

B, T, heads and head dimension. Two forms, forward and forward+backward each:
  kernel   chunk_gla alone: q, k, v in bf16 and g in fp32 are given
  layer    with what the layer does before it: silu of q, lower bound, log and 1-exp of the gates
The second is what our kernels do (gates and their gradients are inside). Medians of --runs by CUDA
events, after a warm-up in which Triton compiles and tunes; inputs rotate so that none stays in the L2.
Needs a CUDA GPU, PyTorch and fla (PYTHONPATH may name its folder).
"""
from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
from fla.ops.gla import chunk_gla


def median_us(call, runs: int, sets: int) -> float:
    for i in range(3 * sets):
        call(i % sets)
    times = []
    for i in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(i % sets)
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def kernel(q, k, v, g):
    return chunk_gla(q, k, v, g, state_v_first=True)[0]


def layer(q, f, v, bound):
    """fla/layers/hgrn2.py between the projections and the norm."""
    g = torch.logaddexp(bound.log(), torch.log1p(-bound) + F.logsigmoid(f.float()))
    return kernel(F.silu(q), (1 - g.exp()).to(v), v, g)


def inputs(form: str, shape: tuple[int, ...]):
    B, T, H, n = shape
    draw = lambda: torch.randn(B, T, H, n, device="cuda", dtype=torch.bfloat16)
    q, f, v, dy = draw(), draw(), draw(), draw()
    if form == "kernel":
        g = F.logsigmoid(f.float())
        given = [q, (1 - g.exp()).to(v), v, g]
    else:
        given = [q, f, v, torch.full((H, n), 0.1, device="cuda")]
    return [x.detach().requires_grad_() for x in given], dy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", action="append", metavar="B,T,H,N")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--sets", type=int, default=3, help="input sets in turn")
    a = parser.parse_args()
    print(f"fla, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for text in a.shape or ["10,2048,16,128"]:
        shape = tuple(int(x) for x in text.split(","))
        for form, function in (("kernel", kernel), ("layer", layer)):
            sets = [inputs(form, shape) for _ in range(a.sets)]

            def forward(i: int) -> None:
                with torch.no_grad():
                    function(*sets[i][0])

            def both(i: int) -> None:
                given, dy = sets[i]
                torch.autograd.grad(function(*given), given, dy)

            print(f"{form:7} B,T,H,n {text:18} forward {median_us(forward, a.runs, a.sets):8.1f} us   "
                  f"forward+backward {median_us(both, a.runs, a.sets):8.1f} us", flush=True)
            del sets
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

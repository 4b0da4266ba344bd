#!/usr/bin/env python3
"""The golden data that the reference model (reference.py) gives: the folders of tests/golden
(tests/golden/README.md says what lies in them).

    python3 tools/make_golden.py                 # write tests/golden again
    python3 tools/make_golden.py --check         # recompute, compare with the committed files
    python3 tools/make_golden.py --verify DIR    # recompute another folder of the same layout

Needs PyTorch (1.13 or later) and NumPy; on Debian: python3-torch python3-numpy.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reference import (GOLDEN, adamw_curve, batch, Config, global_norm, loss_and_gradients,
                       random_weights, read_safetensors, read_shard,
                       relative, to_double, to_float, write_safetensors, write_shard)

# ---------------------------------------------------------------------------------------------
# The golden sets
# ---------------------------------------------------------------------------------------------

ADAMW = {"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.1,
         "decay": "2-D weights except lower_bounds", "clip": 1.0,
         "clip_factor": "min(1, clip / (grad_norm + 1e-6))", "steps": 10,
         "batch": "the same B rows each step"}


@dataclass
class GoldenSet:
    seed: int
    B: int
    T: int
    sizes: dict            # the sizes of Config
    ours: dict | None      # the keys that fla does not have: the WikiText parameterisation
    with_state: bool = False


# D, F and V that are no powers of two (odd, too), T that is no multiple of a chunk.
SETS = {
    "llm": GoldenSet(21, 2, 40, dict(vocab_size=64, hidden_size=16, num_hidden_layers=3,
                                     expand_ratio=8, intermediate_size=40), None),
    "wikitext": GoldenSet(22, 2, 37, dict(vocab_size=61, hidden_size=24, num_hidden_layers=2,
                                          expand_ratio=8, intermediate_size=29),
                          dict(norm="layernorm", bias=True, output_activation="sigmoid",
                               input_activation="silu", hidden_act="none", query_scale="one",
                               scale_embedding=True, dropout=0.0, initializer="fairseq")),
    "state": GoldenSet(23, 3, 21, dict(vocab_size=32, hidden_size=16, num_hidden_layers=2,
                                       expand_ratio=8, intermediate_size=24), None, True),
}


def hf_config(s: GoldenSet) -> dict:
    """fla's Hugging Face layout; the WikiText parameterisation adds this project's keys."""
    z = s.sizes
    config = {
        "architectures": ["HGRN2ForCausalLM"], "model_type": "hgrn2",
        "hidden_size": z["hidden_size"], "num_hidden_layers": z["num_hidden_layers"],
        "attn_mode": "chunk", "num_heads": z["hidden_size"] // z["expand_ratio"],
        "expand_ratio": z["expand_ratio"], "use_short_conv": False, "conv_size": 4,
        "use_lower_bound": True, "hidden_ratio": 4,
        "intermediate_size": z["intermediate_size"], "hidden_act": "swish",
        "max_position_embeddings": 2048, "elementwise_affine": True,
        "norm_eps": 1e-6 if s.ours is None else 1e-5, "use_cache": True, "pad_token_id": None,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
        "initializer_range": 0.02, "fuse_norm": True, "fuse_swiglu": True,
        "fuse_cross_entropy": True, "vocab_size": z["vocab_size"], "torch_dtype": "float32",
    }
    return {**config, **(s.ours or {})}


def random_stream(s: GoldenSet, eos: int, rng: np.random.RandomState) -> np.ndarray:
    """B*T+1 tokens. The set with states places end-of-text where resets go wrong: row 0 in the
    middle, twice in a row and as the last input; row 1 nowhere; row 2 as the first input."""
    stream = rng.randint(0, s.sizes["vocab_size"], s.B * s.T + 1)
    if s.with_state:
        stream[stream == eos] = eos + 1
        stream[[9, 10, s.T - 1, 2 * s.T, 2 * s.T + 13]] = eos
    return stream


def reset_mask(c: Config, tokens: Tensor) -> Tensor:
    """data.reset_at_eos: the state is zeroed before each end-of-text input."""
    return tokens == c.eos_token_id


def results(c: Config, weights: dict[str, np.ndarray], tokens: Tensor, targets: Tensor,
            h0: np.ndarray | None, adamw: dict | None) -> tuple[dict[str, Tensor], dict]:
    """The tensors of golden.safetensors and the numbers of golden.json."""
    w = to_double(weights)
    reset = None if h0 is None else reset_mask(c, tokens)
    start = None if h0 is None else torch.from_numpy(h0.astype(np.float64))
    r = loss_and_gradients(w, c, tokens, targets, start, reset)
    tensors = {"logits": r["logits"], "nll": r["nll"]}
    if h0 is not None:
        tensors.update({"h0": start, "hT": r["hT"], "grad.h0": r["grad_h0"]})
    tensors.update({"grad." + name: g for name, g in r["grads"].items()})
    numbers = {"loss": r["loss"], "grad_norm": global_norm(r["grads"])}
    if adamw is not None:
        losses, norms = adamw_curve(w, c, tokens, targets, adamw)
        numbers.update({"adamw_losses": losses, "adamw_grad_norms": norms})
    return tensors, numbers


def make(s: GoldenSet, folder: Path) -> None:
    """Writes one folder of tests/golden."""
    rng = np.random.RandomState(s.seed)  # NumPy promises this generator's stream for good
    config = hf_config(s)
    c = Config.from_json(config)
    weights = random_weights(c, bool(config.get("bias")), rng)
    stream = random_stream(s, c.eos_token_id, rng)
    n, H = c.expand_ratio, c.hidden_size // c.expand_ratio
    h0 = None
    if s.with_state:
        h0 = rng.standard_normal((c.num_hidden_layers, s.B, H, n, n)).astype("<f4")
    adamw = None if s.with_state else ADAMW
    tensors, numbers = results(c, weights, *batch(stream, s.B, s.T), h0, adamw)
    numbers.update({"B": s.B, "T": s.T, "seed": s.seed})
    if adamw is not None:
        numbers["adamw"] = adamw

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "golden.json").write_text(json.dumps(numbers, indent=1) + "\n")
    write_safetensors(folder / "model.safetensors", weights)
    write_safetensors(folder / "golden.safetensors", {k: to_float(t) for k, t in tensors.items()})
    write_shard(folder / "stream.bin", stream)


# ---------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------

def verify(folder: Path, tolerance: float, tensor_tolerance: float) -> bool:
    """Recomputes what golden.json and golden.safetensors say of the folder's model and stream.
    The numbers are compared in float64, the tensors as they are stored (float32)."""
    want = json.loads((folder / "golden.json").read_text())
    stored = read_safetensors(folder / "golden.safetensors")
    c = Config.from_json(json.loads((folder / "config.json").read_text()))
    stream = read_shard(folder / "stream.bin")
    tokens, targets = batch(stream, want["B"], want["T"])
    tensors, numbers = results(c, read_safetensors(folder / "model.safetensors"), tokens, targets,
                               stored.get("h0"), want.get("adamw"))
    worst = {}
    for key, value in numbers.items():
        per_item = [relative(np.array(a), np.array(b)) for a, b in zip(np.atleast_1d(value),
                                                                       np.atleast_1d(want[key]))]
        worst[key] = (max(per_item), tolerance)
    for name, t in tensors.items():
        if name in stored:
            got = t.numpy().astype(stored[name].dtype)
            worst[name] = (relative(got, stored[name]), tensor_tolerance)
        else:
            worst[name] = (float("inf"), tensor_tolerance)
    for name in stored.keys() - tensors.keys():
        same = name == "tokens" and np.array_equal(stored[name], stream)
        worst[name] = (0.0 if same else float("inf"), tensor_tolerance)
    return report(folder, worst)


def report(folder: Path, worst: dict[str, tuple[float, float]]) -> bool:
    good = True
    for name, (difference, tolerance) in worst.items():
        if not difference <= tolerance:
            print(f"{folder}: {name} differs by {difference:.2e}, allowed {tolerance:.0e}")
            good = False
    name, (difference, _) = max(worst.items(), key=lambda e: e[1][0])
    print(f"{folder}: {len(worst)} values {'agree' if good else 'DO NOT AGREE'}; "
          f"largest relative difference {difference:.1e}, of {name}")
    return good


def check(scratch: Path) -> bool:
    """Makes every set again and compares each file with the committed one."""
    good = True
    for name, s in SETS.items():
        fresh, committed = scratch / name, GOLDEN / name
        make(s, fresh)
        for file in ("config.json", "stream.bin"):
            if (fresh / file).read_bytes() != (committed / file).read_bytes():
                print(f"{committed / file}: not what this program writes")
                good = False
        a = read_safetensors(fresh / "model.safetensors")
        b = read_safetensors(committed / "model.safetensors")
        worst = {k: (relative(a[k], b[k]) if k in a and k in b else float("inf"), 1e-6)
                 for k in a.keys() | b.keys()}
        good = report(committed / "model.safetensors", worst) and good
        good = verify(committed, 1e-6, 1e-6) and good
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true",
                        help="recompute and compare with tests/golden instead of writing it")
    parser.add_argument("--verify", type=Path, metavar="DIR",
                        help="recompute another golden folder and compare")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.verify:
        return 0 if verify(args.verify, 1e-9, 1e-6) else 1
    if args.check:
        import tempfile
        with tempfile.TemporaryDirectory() as scratch:
            return 0 if check(Path(scratch)) else 1
    for name, s in SETS.items():
        make(s, GOLDEN / name)
    size = sum(f.stat().st_size for f in GOLDEN.rglob("*") if f.is_file())
    print(f"{GOLDEN}: {len(SETS)} sets, {size:,} bytes with the README")
    return 0


if __name__ == "__main__":
    sys.exit(main())

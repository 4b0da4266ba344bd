#!/usr/bin/env python3
"""HGRN2 checkpoints seen from outside: the safetensors package and NumPy, nothing of hgrn.

    hgrn2_numpy.py score FOLDER TOKENS.json     nll of each token but the first, as JSON lines
    hgrn2_numpy.py make FOLDER [--dtype F16] [--shards 2] [--tied] [--heads]
                                                a folder with random weights as fla's
                                                HGRN2ForCausalLM.save_pretrained leaves it

`score` opens config.json and model.safetensors (or its shards), demands exactly the tensors that fla's
HGRN2ForCausalLM has, and computes the model token by token in float64 from the paper's equations.
Needs: pip install safetensors numpy.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open, serialize_file

try:
    from safetensors import TensorSpec
except ImportError:  # before 0.7
    TensorSpec = None

G_NORM_EPS = 1e-5  # fla's rms_norm_linear takes its default there, whatever norm_eps says


def expected_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    V, D, L, F = (c[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"))
    shapes = {"model.embeddings.weight": (V, D), "model.norm.weight": (D,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    if c["use_lower_bound"]:
        shapes["model.lower_bounds"] = (L, D)
    for layer in range(L):
        at = f"model.layers.{layer}."
        for name in ("attn_norm", "mlp_norm", "attn.g_norm"):
            shapes[f"{at}{name}.weight"] = (D,)
        for name in ("q_proj", "f_proj", "i_proj", "o_proj"):
            shapes[f"{at}attn.{name}.weight"] = (D, D)
        shapes[f"{at}mlp.gate_proj.weight"] = shapes[f"{at}mlp.up_proj.weight"] = (F, D)
        shapes[f"{at}mlp.down_proj.weight"] = (D, F)
    return shapes


def open_folder(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "hgrn2" and config["architectures"] == ["HGRN2ForCausalLM"], config
    index = folder / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() \
        else ["model.safetensors"]
    weights = {}
    for file in files:
        with safe_open(folder / file, framework="numpy") as f:
            assert f.metadata() == {"format": "pt"}, f.metadata()
            for name in f.keys():
                weights[name] = f.get_tensor(name).astype(np.float64)
    found = {name: w.shape for name, w in weights.items()}
    assert found == expected_shapes(config), set(found.items()) ^ set(expected_shapes(config).items())
    return config, weights


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rms_norm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x) + eps) * w


def score(folder: Path, tokens: list[int]) -> list[float]:
    c, w = open_folder(folder)
    L, D = c["num_hidden_layers"], c["hidden_size"]
    n = c["expand_ratio"] or D // c["num_heads"]
    H, eps = D // n, c["norm_eps"]
    bounds = np.zeros((L, D))
    if c["use_lower_bound"]:
        e = np.exp(w["model.lower_bounds"] - w["model.lower_bounds"].max(axis=0))
        share = e / e.sum(axis=0)
        bounds = np.cumsum(share, axis=0) - share[0]
    head = w["model.embeddings.weight"] if c["tie_word_embeddings"] else w["lm_head.weight"]
    states = np.zeros((L, H, n, n))
    nlls = []
    for token, target in zip(tokens[:-1], tokens[1:]):
        x = w["model.embeddings.weight"][token].copy()
        for layer in range(L):
            def p(name: str) -> np.ndarray:
                return w[f"model.layers.{layer}.{name}.weight"]
            u = rms_norm(x, p("attn_norm"), eps)
            o, i = silu(p("attn.q_proj") @ u), p("attn.i_proj") @ u
            forget = bounds[layer] + (1 - bounds[layer]) / (1 + np.exp(-(p("attn.f_proj") @ u)))
            f, k = forget.reshape(H, n), (1 - forget).reshape(H, n)
            states[layer] = f[:, :, None] * states[layer] + k[:, :, None] * i.reshape(H, 1, n)
            y = np.einsum("hk,hkv->hv", o.reshape(H, n) * n**-0.5, states[layer]).reshape(D)
            x = x + p("attn.o_proj") @ rms_norm(y, p("attn.g_norm"), G_NORM_EPS)
            u = rms_norm(x, p("mlp_norm"), eps)
            x = x + p("mlp.down_proj") @ (silu(p("mlp.gate_proj") @ u) * (p("mlp.up_proj") @ u))
        logits = head @ rms_norm(x, w["model.norm.weight"], eps)
        nlls.append(float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target]))
    return nlls


def to_bytes(x: np.ndarray, dtype: str) -> tuple[str, bytes]:
    if dtype == "BF16":  # NumPy has no such type: the upper half of an fp32, rounded to even
        bits = x.astype(np.float32).view(np.uint32)
        return "bfloat16", ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
    kind = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]
    return kind.__name__, x.astype(kind).tobytes()


def save(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    if TensorSpec is None:
        entries = {name: {"dtype": dtype, "shape": list(shape), "data": data}
                   for name, (dtype, shape, data) in tensors.items()}
    else:
        views = {name: np.frombuffer(data, np.uint8) for name, (_, _, data) in tensors.items()}
        entries = {name: TensorSpec(dtype=dtype, shape=shape, data_ptr=views[name].ctypes.data,
                                    data_len=len(data))
                   for name, (dtype, shape, data) in tensors.items()}
    serialize_file(entries, str(path), metadata={"format": "pt"})


def make(folder: Path, a: argparse.Namespace) -> None:
    """Keys and values as transformers writes them for fla's HGRN2Config at commit bc3b101."""
    config = {
        "architectures": ["HGRN2ForCausalLM"], "attn": None, "attn_mode": "chunk",
        "attnres_block_size": None, "bos_token_id": 256, "conv_size": 4, "dtype": "bfloat16",
        "elementwise_affine": True, "eos_token_id": 256, "expand_ratio": 8, "fuse_cross_entropy": True,
        "fuse_linear_cross_entropy": False, "fuse_norm": True, "fuse_swiglu": True,
        "hidden_act": "swish", "hidden_ratio": 4, "hidden_size": 24, "initializer_range": 0.02,
        "intermediate_size": 40, "max_position_embeddings": 2048, "model_type": "hgrn2",
        "norm_eps": 1e-06, "num_heads": 3, "num_hidden_layers": 3, "tie_word_embeddings": a.tied,
        "transformers_version": "5.17.0", "use_cache": True, "use_l2warp": False,
        "use_lower_bound": True, "use_short_conv": False, "vocab_size": 257}
    if a.heads:
        config["expand_ratio"] = None  # num_heads says it
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    rng = np.random.default_rng(5)
    entries, total = {}, 0
    for name, shape in sorted(expected_shapes(config).items()):
        around = 1.0 if "norm" in name else 0.0
        dtype, data = to_bytes(around + rng.normal(0, 0.3, shape), a.dtype)
        entries[name] = (dtype, shape, data)
        total += len(data)
    names = list(entries)
    if a.shards == 1:
        save(folder / "model.safetensors", entries)
        return
    where = {}
    for i in range(a.shards):
        file = f"model-{i + 1:05d}-of-{a.shards:05d}.safetensors"
        part = names[i::a.shards]
        where |= {name: file for name in part}
        save(folder / file, {name: entries[name] for name in part})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["score", "make"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", nargs="?")
    parser.add_argument("--dtype", default="F32", choices=["BF16", "F16", "F32", "F64"])
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--heads", action="store_true")
    a = parser.parse_args()
    if a.what == "make":
        return make(a.folder, a)
    tokens = json.loads(Path(a.tokens).read_text())
    for i, nll in enumerate(score(a.folder, tokens)):
        sys.stdout.write(json.dumps({"i": i, "token": tokens[i + 1], "nll": nll}) + "\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""HGRN2 (arXiv 2404.07904) in float64, one step of the recurrence at a time, and the golden data
that it gives.

The first half of this file is the reference: read it as the definition of what `hgrn` computes.
It is slow and plain on purpose; gradients come from autograd. The second half turns it into the
folders of tests/golden (tests/golden/README.md says what lies in them):

    python3 tools/make_golden.py                 # write tests/golden again
    python3 tools/make_golden.py --check         # recompute, compare with the committed files
    python3 tools/make_golden.py --verify DIR    # recompute another folder of the same layout

Needs PyTorch (1.13 or later) and NumPy; on Debian: python3-torch python3-numpy.

Letters: B rows, T tokens a row, D channels, n expand ratio = head dimension, H = D/n heads,
L layers, F GLU width, V vocabulary.
"""
from __future__ import annotations

import argparse
import json
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------

@dataclass
class Config:
    """What the maths depends on. The defaults are the LLM parameterisation."""
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    expand_ratio: int
    intermediate_size: int
    norm: str = "rmsnorm"             # rmsnorm | layernorm
    norm_eps: float = 1e-6            # of the norms around the sub-layers; norm_g has 1e-5
    output_activation: str = "silu"   # act_o: silu | sigmoid
    input_activation: str = "none"    # act_i: none | silu
    hidden_act: str = "silu"          # act_h: silu (fla calls it swish) | none
    query_scale: str = "rsqrt"        # s: rsqrt = n^-0.5 | one
    scale_embedding: bool = False     # multiply embeddings by sqrt(D)
    use_lower_bound: bool = True
    tie_word_embeddings: bool = True
    eos_token_id: int | None = None
    dropout: float = 0.0

    @staticmethod
    def from_json(values: dict) -> "Config":
        """Takes the keys it knows from a Hugging Face config or from a training config's model."""
        known = {k: v for k, v in values.items() if k in Config.__dataclass_fields__}
        return Config(**known)


Weights = dict[str, Tensor]

ACTIVATIONS = {
    "none": lambda z: z,
    "silu": lambda z: z * torch.sigmoid(z),
    "swish": lambda z: z * torch.sigmoid(z),
    "sigmoid": torch.sigmoid,
}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """x W^T + b; W (outputs, inputs), b absent without biases."""
    y = x @ w[name + ".weight"].T
    return y + w[name + ".bias"] if name + ".bias" in w else y


def norm(w: Weights, name: str, x: Tensor, kind: str, eps: float) -> Tensor:
    """RMSNorm or LayerNorm over the channels; b absent without biases."""
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * w[name + ".weight"]
    return y + w[name + ".bias"] if name + ".bias" in w else y


def lower_bounds(w: Weights, c: Config) -> Tensor:
    """beta (L,D): the gates of layer l stay above row l. beta[0] = 0 and rows grow towards 1."""
    gamma = w["model.lower_bounds"]
    if not c.use_lower_bound:
        return torch.zeros_like(gamma)
    s = torch.softmax(gamma, dim=0)
    return torch.cumsum(s, dim=0) - s[0]


def recurrence(q: Tensor, f: Tensor, k: Tensor, i: Tensor, h: Tensor,
               reset: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = diag(f_t) h_{t-1} + k_t (x) i_t;  y_t = q_t h_t.

    q, f, k, i (B,T,H,n); h (B,H,n,n), rows are the channels of f and k, columns those of i;
    reset (B,T): the state is zeroed before such a token. Returns y (B,T,H,n) and the last h."""
    ys = []
    for t in range(q.shape[1]):
        h = torch.where(reset[:, t, None, None, None], torch.zeros_like(h), h)
        h = f[:, t, :, :, None] * h + k[:, t, :, :, None] * i[:, t, :, None, :]
        ys.append(torch.einsum("bhk,bhkv->bhv", q[:, t], h))
    return torch.stack(ys, dim=1), h


def mixer(w: Weights, c: Config, name: str, u: Tensor, beta: Tensor, h: Tensor,
          reset: Tensor) -> tuple[Tensor, Tensor]:
    """HGRU2 with its projections: u (B,T,D) -> (B,T,D), and the state after the last token."""
    B, T, D = u.shape
    n = c.expand_ratio
    s = n ** -0.5 if c.query_scale == "rsqrt" else 1.0
    o = ACTIVATIONS[c.output_activation](linear(w, name + "q_proj", u))
    z = linear(w, name + "f_proj", u)
    i = ACTIVATIONS[c.input_activation](linear(w, name + "i_proj", u))
    f = beta + (1 - beta) * torch.sigmoid(z)
    k = (1 - beta) * torch.sigmoid(-z)  # = 1 - f without its cancellation
    heads = [a.view(B, T, D // n, n) for a in (s * o, f, k, i)]
    y, h = recurrence(*heads, h, reset)
    y = norm(w, name + "g_norm", y.reshape(B, T, D), c.norm, 1e-5)
    return linear(w, name + "o_proj", y), h


def glu(w: Weights, c: Config, name: str, u: Tensor) -> Tensor:
    gate = ACTIVATIONS[c.hidden_act](linear(w, name + "gate_proj", u))
    return linear(w, name + "down_proj", gate * linear(w, name + "up_proj", u))


def forward(w: Weights, c: Config, tokens: Tensor, h0: Tensor | None = None,
            reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """tokens (B,T) -> logits (B,T,V) and the states after the last token (L,B,H,n,n).

    h0: the states before the first token, absent = zero. reset (B,T) bool, absent = never."""
    assert c.dropout == 0, "the reference has no dropout"
    B, T = tokens.shape
    D, n, L = c.hidden_size, c.expand_ratio, c.num_hidden_layers
    embedding = w["model.embeddings.weight"]
    if h0 is None:
        h0 = torch.zeros(L, B, D // n, n, n, dtype=embedding.dtype)
    if reset is None:
        reset = torch.zeros(B, T, dtype=torch.bool)

    beta = lower_bounds(w, c)
    x = embedding[tokens] * (D ** 0.5 if c.scale_embedding else 1.0)
    states = []
    for layer in range(L):
        name = f"model.layers.{layer}."
        u = norm(w, name + "attn_norm", x, c.norm, c.norm_eps)
        y, h = mixer(w, c, name + "attn.", u, beta[layer], h0[layer], reset)
        x = x + y
        states.append(h)
        u = norm(w, name + "mlp_norm", x, c.norm, c.norm_eps)
        x = x + glu(w, c, name + "mlp.", u)
    x = norm(w, "model.norm", x, c.norm, c.norm_eps)
    head = embedding if c.tie_word_embeddings else w["lm_head.weight"]
    return x @ head.T, torch.stack(states)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target], (B,T)."""
    return -torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1)


def loss_and_gradients(w: Weights, c: Config, tokens: Tensor, targets: Tensor,
                       h0: Tensor | None = None, reset: Tensor | None = None) -> dict:
    """The mean loss over all tokens and its gradient for every weight (and for h0, if given)."""
    leaves = {name: t.detach().requires_grad_() for name, t in w.items()}
    start = None if h0 is None else h0.detach().requires_grad_()
    logits, hT = forward(leaves, c, tokens, start, reset)
    nll = token_nll(logits, targets)
    loss = nll.mean()
    wanted = list(leaves.values()) + ([] if start is None else [start])
    got = torch.autograd.grad(loss, wanted, allow_unused=True)
    got = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, got)]
    return {
        "loss": loss.item(), "logits": logits.detach(), "nll": nll.detach(), "hT": hT.detach(),
        "grads": dict(zip(leaves, got)), "grad_h0": None if start is None else got[-1],
    }


def global_norm(grads: Weights) -> float:
    return sum((g * g).sum().item() for g in grads.values()) ** 0.5


def decays(name: str, p: Tensor) -> bool:
    return p.dim() == 2 and name != "model.lower_bounds"


def adamw_curve(w: Weights, c: Config, tokens: Tensor, targets: Tensor,
                a: dict) -> tuple[list[float], list[float]]:
    """a["steps"] AdamW updates on one batch: the loss before each, its gradient norm unclipped."""
    w = {name: p.clone() for name, p in w.items()}
    m = {name: torch.zeros_like(p) for name, p in w.items()}
    v = {name: torch.zeros_like(p) for name, p in w.items()}
    b1, b2 = a["betas"]
    losses, norms = [], []
    for step in range(1, a["steps"] + 1):
        r = loss_and_gradients(w, c, tokens, targets)
        losses.append(r["loss"])
        norms.append(global_norm(r["grads"]))
        clip = min(1.0, a["clip"] / (norms[-1] + 1e-6))  # as torch's clip_grad_norm_
        for name, p in w.items():
            g = r["grads"][name] * clip
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            if decays(name, p):  # decoupled: by the weight before the update
                p *= 1 - a["lr"] * a["weight_decay"]
            m_hat = m[name] / (1 - b1 ** step)
            v_hat = v[name] / (1 - b2 ** step)
            p -= a["lr"] * m_hat / (v_hat.sqrt() + a["eps"])
    return losses, norms


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------

def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """u64 header length, JSON header padded with spaces to a multiple of 8, then the bytes."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, t in tensors.items():
        assert t.dtype == np.dtype("<f4"), name
        header[name] = {"dtype": "F32", "shape": list(t.shape),
                        "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            out.write(np.ascontiguousarray(t).tobytes())


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    types = {"F32": "<f4", "F64": "<f8", "I32": "<i4"}
    return {name: np.frombuffer(raw[start:][slice(*e["data_offsets"])], types[e["dtype"]])
            .reshape(e["shape"]) for name, e in header.items()}


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """256 int32: 20240520, version 1, count; then uint16 tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def read_shard(path: Path) -> np.ndarray:
    raw = path.read_bytes()
    magic, version, count = np.frombuffer(raw, "<i4", 3)
    assert (magic, version) == (20240520, 1) and len(raw) == 1024 + 2 * count, path
    return np.frombuffer(raw, "<u2", count, 1024).astype(np.int64)


def batch(stream: np.ndarray, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Row b reads stream[bT .. bT+T-1] and predicts the token after each."""
    x = torch.from_numpy(stream[:B * T].reshape(B, T))
    y = torch.from_numpy(stream[1:B * T + 1].reshape(B, T))
    return x, y


def to_double(tensors: dict[str, np.ndarray]) -> Weights:
    return {name: torch.from_numpy(t.astype(np.float64)) for name, t in tensors.items()}


def to_float(t: Tensor) -> np.ndarray:
    return t.numpy().astype("<f4")


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


def random_weights(c: Config, bias: bool, rng: np.random.RandomState) -> dict[str, np.ndarray]:
    """Nothing at its neutral value: norm weights are not 1, biases not 0, the rows of Gamma
    differ, gates spread over (0,1) and logits are not flat."""
    D, F, V, L = c.hidden_size, c.intermediate_size, c.vocab_size, c.num_hidden_layers
    w: dict[str, np.ndarray] = {}

    def normal(name: str, shape: tuple, std: float, mean: float = 0.0) -> None:
        w[name] = (mean + std * rng.standard_normal(shape)).astype("<f4")

    def matrix(name: str, out: int, inp: int, gain: float) -> None:
        normal(name + ".weight", (out, inp), gain * inp ** -0.5)
        if bias:
            normal(name + ".bias", (out,), 0.3)

    def norm_weights(name: str) -> None:
        normal(name + ".weight", (D,), 0.2, 1.0)
        if c.norm == "layernorm":
            normal(name + ".bias", (D,), 0.2)

    normal("model.embeddings.weight", (V, D), D ** -0.5 if c.scale_embedding else 0.4)
    normal("model.lower_bounds", (L, D), 0.7)
    for layer in range(L):
        name = f"model.layers.{layer}."
        norm_weights(name + "attn_norm")
        for p in ("q_proj", "f_proj", "i_proj"):
            matrix(name + "attn." + p, D, D, 2.0 if p == "f_proj" else 1.0)
        norm_weights(name + "attn.g_norm")
        matrix(name + "attn.o_proj", D, D, 0.7)
        norm_weights(name + "mlp_norm")
        matrix(name + "mlp.gate_proj", F, D, 1.0)
        matrix(name + "mlp.up_proj", F, D, 1.0)
        matrix(name + "mlp.down_proj", D, F, 0.7)
    norm_weights("model.norm")
    return w


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

def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference over the largest magnitude of what is wanted."""
    if got.shape != want.shape:
        return float("inf")
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-300))


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

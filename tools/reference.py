"""HGRN2 (arXiv 2404.07904) in float64, one step of the recurrence at a time: the definition of what
`hgrn` computes. It is slow and plain on purpose; gradients come from autograd. make_golden.py turns it
into the golden data of the tests.

Needs PyTorch (1.13 or later) and NumPy; on Debian: python3-torch python3-numpy.

Letters: B rows, T tokens a row, D channels, n expand ratio = head dimension, H = D/n heads,
L layers, F GLU width, V vocabulary.
"""
from __future__ import annotations

import json
import struct
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


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference over the largest magnitude of what is wanted."""
    if got.shape != want.shape:
        return float("inf")
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-300))

#!/usr/bin/env python3
"""Golden data of the zero-shot tasks, from nothing but Python's standard library.

    python3 tools/make_task_golden.py            # writes tests/golden/tasks
    python3 tools/make_task_golden.py --check    # recomputes and compares
    python3 tools/make_task_golden.py --score TASK FILE --per-token OUT.jsonl
        # metrics of `hgrn eval --task TASK --task-data FILE --per-token OUT.jsonl`, recomputed from
        # its log-probabilities

A random byte-level model of 16 channels (docs/notation.md: RMSNorm, silu, untied head) is run one
token at a time in Python's doubles, whole context and choice together; the metrics follow
lm-evaluation-harness' definitions (docs/evaluation.md). hgrn must find the same figures, though it
runs each context once and goes on from the state.
"""
from __future__ import annotations

import argparse
import json
import math
import random
import struct
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent / "tests" / "golden" / "tasks"
D, L, N, F, V, EOS = 16, 2, 8, 24, 257, 256
HEAD_DIMS = D // N
Vector = list[float]
Matrix = list[Vector]

CONFIG = {
    "architectures": ["HGRN2ForCausalLM"], "model_type": "hgrn2", "hidden_size": D,
    "num_hidden_layers": L, "num_heads": HEAD_DIMS, "expand_ratio": N, "attn_mode": "chunk",
    "use_short_conv": False, "conv_size": 4, "use_lower_bound": True, "hidden_ratio": 4,
    "intermediate_size": F, "hidden_act": "swish", "max_position_embeddings": 64,
    "elementwise_affine": True, "norm_eps": 1e-06, "use_cache": True, "bos_token_id": EOS,
    "eos_token_id": EOS, "pad_token_id": None, "tie_word_embeddings": False,
    "initializer_range": 0.02, "vocab_size": V, "torch_dtype": "float32"}


# ---- the model
def f32(x: float) -> float:
    return struct.unpack("<f", struct.pack("<f", x))[0]


def make_weights() -> dict[str, Matrix]:
    rng = random.Random(2404)

    def matrix(rows: int, cols: int, scale: float, mean: float = 0.0) -> Matrix:
        return [[f32(mean + scale * rng.gauss(0, 1)) for _ in range(cols)] for _ in range(rows)]

    w = {"model.embeddings.weight": matrix(V, D, 1.0), "model.lower_bounds": matrix(L, D, 1.0)}
    for l in range(L):
        p = f"model.layers.{l}."
        for name in ("attn_norm", "attn.g_norm", "mlp_norm"):
            w[f"{p}{name}.weight"] = matrix(1, D, 0.2, 1.0)
        for name in ("q_proj", "f_proj", "i_proj", "o_proj"):
            w[f"{p}attn.{name}.weight"] = matrix(D, D, 0.4)
        w[f"{p}mlp.gate_proj.weight"] = matrix(F, D, 0.4)
        w[f"{p}mlp.up_proj.weight"] = matrix(F, D, 0.4)
        w[f"{p}mlp.down_proj.weight"] = matrix(D, F, 0.4)
    w["model.norm.weight"] = matrix(1, D, 0.2, 1.0)
    head = matrix(V, D, 0.5)
    for byte, row in enumerate(head):  # mostly printable ASCII, and many spaces, are likely
        scale = 1.6 if byte == 32 else 1.0 if 33 <= byte < 127 else 0.2
        head[byte] = [f32(scale * x) for x in row]
    w["lm_head.weight"] = head
    return w


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b))


def times(m: Matrix, x: Vector) -> Vector:
    return [dot(row, x) for row in m]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def silu(x: float) -> float:
    return x * sigmoid(x)


def rms_norm(x: Vector, w: Matrix, eps: float) -> Vector:
    r = 1 / math.sqrt(dot(x, x) / len(x) + eps)
    return [a * r * b for a, b in zip(x, w[0])]


class Model:
    def __init__(self, weights: dict[str, Matrix]) -> None:
        self.w = weights
        gamma = weights["model.lower_bounds"]
        self.beta: Matrix = [[0.0] * D for _ in range(L)]
        for d in range(D):
            top = max(gamma[l][d] for l in range(L))
            e = [math.exp(gamma[l][d] - top) for l in range(L)]
            for l in range(1, L):
                self.beta[l][d] = self.beta[l - 1][d] + e[l] / sum(e)

    def hidden(self, tokens: list[int]) -> Matrix:
        """The normed output at each token, from a zero state."""
        w, out = self.w, []
        h = [[[0.0] * N for _ in range(D)] for _ in range(L)]  # h[l][channel c][column v]
        for token in tokens:
            x = list(w["model.embeddings.weight"][token])
            for l in range(L):
                p = f"model.layers.{l}."
                u = rms_norm(x, w[p + "attn_norm.weight"], 1e-6)
                q = [silu(a) / math.sqrt(N) for a in times(w[p + "attn.q_proj.weight"], u)]
                s = [sigmoid(a) for a in times(w[p + "attn.f_proj.weight"], u)]
                i = times(w[p + "attn.i_proj.weight"], u)
                y = [0.0] * D
                for c in range(D):
                    f = self.beta[l][c] + (1 - self.beta[l][c]) * s[c]
                    first = c // N * N
                    row = h[l][c]
                    for v in range(N):
                        row[v] = f * row[v] + (1 - f) * i[first + v]
                        y[first + v] += q[c] * row[v]
                y = rms_norm(y, w[p + "attn.g_norm.weight"], 1e-5)
                x = [a + b for a, b in zip(x, times(w[p + "attn.o_proj.weight"], y))]
                u = rms_norm(x, w[p + "mlp_norm.weight"], 1e-6)
                g = [silu(a) * b for a, b in zip(times(w[p + "mlp.gate_proj.weight"], u),
                                                 times(w[p + "mlp.up_proj.weight"], u))]
                x = [a + b for a, b in zip(x, times(w[p + "mlp.down_proj.weight"], g))]
            out.append(rms_norm(x, w["model.norm.weight"], 1e-6))
        return out

    def log_probs(self, normed: Vector) -> Vector:
        z = times(self.w["lm_head.weight"], normed)
        top = max(z)
        total = top + math.log(sum(math.exp(a - top) for a in z))
        return [a - total for a in z]


# ---- the harness' texts and figures
def encode_pair(context: str, continuation: str) -> tuple[list[int], list[int]]:
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    return list(context.encode()) or [EOS], list(continuation.encode())


def pairs_of(task: str, item: dict) -> list[tuple[str, str]]:
    if task == "lambada_openai":
        return [(item["context"], " " + item["continuation"])]
    if task == "winogrande":
        return [(c, " " + item["continuation"]) for c in item["context_options"]]
    return [(item["query"], " " + c) for c in item["choices"]]


def mean_and_error(values: Vector) -> tuple[float, float]:
    n = len(values)
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def metrics(task: str, items: list[dict], nll: list[list[Vector]],
            likeliest: list[bool] | None) -> dict[str, float | None]:
    """nll[item][pair] = that of each token of the continuation."""
    out: dict[str, float | None] = {}

    def add(name: str, mean: float, error: float) -> None:
        out[name + ",none"], out[name + "_stderr,none"] = mean, error

    sums = [[-sum(pair) for pair in item] for item in nll]
    if task == "lambada_openai":
        mean, error = mean_and_error([s[0] for s in sums])
        add("perplexity", math.exp(-mean), math.exp(-mean) * error)
        if likeliest is not None:
            add("acc", *mean_and_error([float(x) for x in likeliest]))
        return out
    add("acc", *mean_and_error([float(s.index(max(s)) == i["gold"]) for s, i in zip(sums, items)]))
    if task != "winogrande":
        normed = [[x / len(c) for x, c in zip(s, i["choices"])] for s, i in zip(sums, items)]
        add("acc_norm", *mean_and_error([float(s.index(max(s)) == i["gold"])
                                         for s, i in zip(normed, items)]))
    return out


# ---- items, of this project's own making
def word_items(model: Model) -> list[dict]:
    """Half of them end as the model would have it."""
    rng = random.Random(7)
    words = "river stone morning letter window garden copper silence harbour engine".split()
    items = []
    while len(items) < 6:
        context = " ".join(rng.choice(words) for _ in range(rng.randint(1, 9)))
        tokens, made = list(context.encode()), []
        while len(items) % 2 == 0 and len(made) < 4:
            p = model.log_probs(model.hidden(tokens + made)[-1])
            best = p.index(max(p))
            if (best != 32) if not made else not 33 <= best < 127:
                break
            made.append(best)
        if len(items) % 2 == 1:
            items.append({"context": context, "continuation": rng.choice(words)})
        elif len(made) > 1:
            items.append({"context": context, "continuation": bytes(made[1:]).decode()})
    return items


def choice_items() -> list[dict]:
    rows = [
        ("Question: What falls from clouds?\n", ["rain", "granite boulders", "maps", "Tuesday"]),
        ("", ["a", "an empty question has the end of text as context"]),
        ("Which of these is written in Greek letters?", ["λόγος και γραφή", "logos", "слово"]),
        ("Spaces at the end move over:  \t", ["one", "one more", "one more time"]),
        ("The kettle boils because", ["it is heated", "x", "somebody forgot it on the stove"]),
        ("Short", ["y", "n"]),
        ("A longer question whose answer is not at all in doubt, or so one would think; is it?",
         ["yes", "no", "perhaps, in the fullness of time", "…"]),
    ]
    rng = random.Random(5)
    return [{"query": q, "choices": c, "gold": rng.randrange(len(c))} for q, c in rows]


def context_items() -> list[dict]:
    rows = [
        (["The cup did not fit the box because the cup", "The cup did not fit the box because the box"],
         "was too big."),
        (["Ada lent Bo a pen because Ada", "Ada lent Bo a pen because Bo"], "had none left."),
        (["Rain came, so the hay", "Rain came, so the barn"], "stayed dry."),
        (["x", "y "], "and so on"),
    ]
    rng = random.Random(6)
    return [{"context_options": o, "continuation": c, "gold": rng.randrange(2)} for o, c in rows]


def compute() -> tuple[dict[str, Matrix], dict[str, list[dict]], dict]:
    weights = make_weights()
    model = Model(weights)
    tasks = {"lambada_openai": word_items(model), "arc_easy": choice_items(),
             "winogrande": context_items()}
    golden = {}
    for task, items in tasks.items():
        nll: list[list[Vector]] = []
        likeliest = []
        for item in items:
            nll.append([])
            for context, continuation in pairs_of(task, item):
                c, k = encode_pair(context, continuation)
                hidden = model.hidden(c + k[:-1])[len(c) - 1:]
                rows = [model.log_probs(h) for h in hidden]
                nll[-1].append([-row[t] for row, t in zip(rows, k)])
                likeliest.append(all(row[t] == max(row) for row, t in zip(rows, k)))
        golden[task] = {"results": metrics(task, items, nll, likeliest), "nll": nll}
    return weights, tasks, golden


# ---- files
def safetensors(weights: dict[str, Matrix]) -> bytes:
    header: dict = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, m in weights.items():
        flat = [x for row in m for x in row]
        raw = struct.pack(f"<{len(flat)}f", *flat)
        shape = [len(m[0])] if name.endswith("norm.weight") else [len(m), len(m[0])]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def rounded(x):
    if isinstance(x, float):
        return float(f"{x:.9g}")
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return {k: rounded(v) for k, v in x.items()} if isinstance(x, dict) else x


def files() -> dict[str, bytes]:
    weights, tasks, golden = compute()
    out = {"config.json": (json.dumps(CONFIG, indent=1) + "\n").encode(),
           "model.safetensors": safetensors(weights),
           "golden.json": (json.dumps(rounded(golden)) + "\n").encode()}
    for task, items in tasks.items():
        out[task + ".jsonl"] = "".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items).encode()
    return out


def score(task: str, path: str, per_token: str) -> None:
    with open(path, encoding="utf-8") as f:
        items = [json.loads(line) for line in f if line.strip()]
    nll: list[list[Vector]] = [[[] for _ in pairs_of(task, item)] for item in items]
    with open(per_token, encoding="utf-8") as f:
        for line in f:
            t = json.loads(line)
            nll[t["item"]][t["choice"]].append(t["nll"])
    print(json.dumps(metrics(task, items, nll, None), indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--score", nargs=2, metavar=("TASK", "FILE"))
    parser.add_argument("--per-token")
    a = parser.parse_args()
    if a.score:
        score(a.score[0], a.score[1], a.per_token)
        return 0
    made = files()
    if a.check:
        bad = [n for n, b in made.items() if (HERE / n).read_bytes() != b]
        print("differ: " + ", ".join(bad) if bad else f"{len(made)} files are as computed")
        return 1 if bad else 0
    HERE.mkdir(parents=True, exist_ok=True)
    for name, data in made.items():
        (HERE / name).write_bytes(data)
    print(f"wrote {len(made)} files to {HERE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

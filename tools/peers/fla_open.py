#!/usr/bin/env python3
"""Our checkpoints in flash-linear-attention as they are, and fla's in ours.

    python3 tools/peers/fla_open.py --checkpoint runs/quickstart/checkpoints/step-00000960 --hgrn build/hgrn
    python3 tools/peers/fla_open.py --make /tmp/fla-model --hgrn build/hgrn [--dtype bf16] [--shard 1MB]

--checkpoint: opens the folder with HGRN2ForCausalLM.from_pretrained, demands that no weight was missing,
unexpected or newly made, runs a forward pass over the tokens of a shard that it writes, and compares
the nll of every token with `hgrn eval --per-token`. Saves it again with save_pretrained and compares
that too: hgrn opens what fla writes. --make: the second half alone, from a model of fla's own making,
in shards with an index; `hgrn train --init-from` starts from it.
Both sides run in fp32 (fla without autocast). Exit status 1 where they differ by more than --tolerance.
On a GPU, or without one: TRITON_INTERPRET=1 runs fla's kernels on the CPU, for small models.
Needs PyTorch, transformers and fla (PYTHONPATH may name its folder).
"""
from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

if os.environ.get("TRITON_INTERPRET") == "1":  # no driver to time kernels with: the first configuration
    from triton.runtime.autotuner import Autotuner

    tuned_run = Autotuner.run

    def first_configuration(self, *args, **kwargs):
        self.configs = self.configs[:1]
        return tuned_run(self, *args, **kwargs)

    Autotuner.run = first_configuration

from fla.models import HGRN2Config, HGRN2ForCausalLM  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cuda.matmul.allow_tf32 = False
if isinstance(HGRN2ForCausalLM._tied_weights_keys, list):  # transformers 5 wants a mapping
    HGRN2ForCausalLM._tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}


def write_shard(path: Path, tokens: list[int]) -> None:
    wide = max(tokens) >= 1 << 16
    header = [20240801, 7] if wide else [20240520, 1]
    header += [len(tokens)] + [0] * 253
    path.write_bytes(struct.pack("<256i", *header) +
                     struct.pack(f"<{len(tokens)}{'I' if wide else 'H'}", *tokens))


def their_nll(model: HGRN2ForCausalLM, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens], device=DEVICE)
    with torch.no_grad():
        logits = model(ids[:, :-1], use_cache=False).logits.double()
    return torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none").cpu()


def our_nll(hgrn: str, folder: Path, tokens: list[int], device: str) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as tmp:
        write_shard(Path(tmp) / "s.bin", tokens)
        subprocess.run([hgrn, "eval", "--checkpoint", str(folder), "--data", f"{tmp}/s.bin",
                        "--protocol", "carry", "--device", device, "--per-token", f"{tmp}/nll"],
                       check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in Path(f"{tmp}/nll").read_text().splitlines()]
    assert [r["token"] for r in rows] == tokens[1:], "the two sides scored other tokens"
    return torch.tensor([r["nll"] for r in rows], dtype=torch.float64)


def load(folder: Path) -> HGRN2ForCausalLM:
    model, info = HGRN2ForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                   output_loading_info=True)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = set(info["missing_keys"]) - tied
    assert not missing, f"fla misses {missing}"
    assert not info["unexpected_keys"], f"fla does not know {info['unexpected_keys']}"
    assert not info["mismatched_keys"], f"shapes differ: {info['mismatched_keys']}"
    return model.to(DEVICE).eval()


def compare(what: str, a: argparse.Namespace, folder: Path, model: HGRN2ForCausalLM) -> bool:
    config = json.loads((folder / "config.json").read_text())
    first = config.get("eos_token_id")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config["vocab_size"], (a.tokens,), generator=generator).tolist()
    tokens = [first if isinstance(first, int) else 0] + tokens
    theirs, ours = their_nll(model, tokens), our_nll(a.hgrn, folder, tokens, a.device)
    most = (theirs - ours).abs().max().item()
    print(f"{what}: {folder}: {a.tokens} tokens, nll fla {theirs.mean():.6f}, hgrn "
          f"{ours.mean():.6f}, largest difference of a token {most:.2e}", flush=True)
    return most <= a.tolerance


def make(a: argparse.Namespace) -> HGRN2ForCausalLM:
    torch.manual_seed(3)
    config = HGRN2Config(vocab_size=257, hidden_size=64, num_hidden_layers=3, expand_ratio=32,
                         hidden_ratio=4, bos_token_id=256, eos_token_id=256,
                         tie_word_embeddings=False, initializer_range=0.2)
    model = HGRN2ForCausalLM(config)
    with torch.no_grad():  # fla starts them at zero: every layer's bound would be the same
        model.model.lower_bounds.normal_()
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[a.dtype]
    model = model.to(kind)
    model.save_pretrained(a.make, max_shard_size=a.shard)
    return model.float().to(DEVICE).eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--make", type=Path)
    parser.add_argument("--hgrn", default="build/hgrn")
    parser.add_argument("--device", default="cpu", help="of hgrn")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--tolerance", type=float, default=2e-3)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--shard", default="100KB")
    a = parser.parse_args()
    if not (a.checkpoint or a.make):
        parser.error("give --checkpoint or --make")
    good = True
    if a.checkpoint:
        model = load(a.checkpoint)
        good &= compare("fla opens ours", a, a.checkpoint, model)
        with tempfile.TemporaryDirectory() as tmp:
            model.save_pretrained(tmp)
            good &= compare("we open what fla saved", a, Path(tmp), load(Path(tmp)))
    if a.make:
        model = make(a)
        files = sorted(f.name for f in a.make.iterdir())
        print(f"made {a.make}: {', '.join(files)}", flush=True)
        good &= compare("we open fla's", a, a.make, model)
        model = load(a.make)
        good &= compare("as fla opens it again", a, a.make, model)
    print("good" if good else "the two sides differ")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

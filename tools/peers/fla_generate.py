#!/usr/bin/env python3
"""The GPU peer of `hgrn-bench generate`: flash-linear-attention generating from the same model.

    python3 tools/peers/fla_generate.py --config configs/hgrn2_150m.json --tokens 128

Random weights in bf16, random prompts, sampling at temperature 1. Two ways of driving fla's
HGRN2ForCausalLM are timed after a warm-up each (Triton compiles then), with the state cached:
  generate   transformers' generate()
  loop       a bare Python loop: one forward call a token, torch.multinomial on the device
Prints one line each: tokens/s over all rows without the first token, and time to first token.
Needs a CUDA GPU, PyTorch, transformers and fla (PYTHONPATH may name its folder).
"""
from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
from fla.models import HGRN2Config, HGRN2ForCausalLM


def read_config(path: str) -> dict:
    """A run config's "model" section; comments are dropped (no text in it holds //)."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", Path(path).read_text(), flags=re.S)
    return json.loads(text)["model"]


def make_model(c: dict) -> HGRN2ForCausalLM:
    tied = c.get("tie_word_embeddings", True)
    if isinstance(HGRN2ForCausalLM._tied_weights_keys, list):  # transformers 5 wants a mapping
        HGRN2ForCausalLM._tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    config = HGRN2Config(
        vocab_size=c["vocab_size"], hidden_size=c["hidden_size"],
        num_hidden_layers=c["num_hidden_layers"], expand_ratio=c.get("expand_ratio", 128),
        intermediate_size=c["intermediate_size"], tie_word_embeddings=tied, use_cache=True)
    torch.manual_seed(0)
    return HGRN2ForCausalLM(config).to(torch.bfloat16).cuda().eval()


class Stopwatch:
    def __enter__(self) -> "Stopwatch":
        torch.cuda.synchronize()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start


def by_generate(model: HGRN2ForCausalLM, prompt: torch.Tensor, tokens: int) -> None:
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True,
                   temperature=1.0, top_k=0, use_cache=True, pad_token_id=0)


def by_loop(model: HGRN2ForCausalLM, prompt: torch.Tensor, tokens: int) -> None:
    out = model(prompt, use_cache=True)
    for i in range(tokens):
        p = torch.softmax(out.logits[:, -1].float(), dim=-1)
        token = torch.multinomial(p, 1)
        if i + 1 < tokens:
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
    token.cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/hgrn2_150m.json")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    a = parser.parse_args()
    c = read_config(a.config)
    model = make_model(c)
    prompt = torch.randint(0, c["vocab_size"], (a.batch, a.prompt), device="cuda")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}", flush=True)
    with torch.inference_mode():
        for name, run in (("generate", by_generate), ("loop", by_loop)):
            try:
                run(model, prompt, 4)
                with Stopwatch() as first:
                    run(model, prompt, 1)
                with Stopwatch() as whole:
                    run(model, prompt, a.tokens)
            except Exception as e:  # versions of transformers and fla do not always fit
                print(f"fla {name}  failed: {type(e).__name__}: {str(e)[:200]}", flush=True)
                continue
            rate = a.batch * (a.tokens - 1) / (whole.seconds - first.seconds)
            print(f"fla {name}  batch {a.batch}  prompt {a.prompt}  tokens {a.tokens}  "
                  f"{rate:.1f} tokens/s  first token {1e3 * first.seconds:.2f} ms", flush=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Tests of the Python tools and the scripts of docs/experiments.md, on the CPU, in seconds.

    HGRN=build/hgrn python3 tests/tools/test_tools.py [-v] [TestName]

What needs PyTorch or NumPy is skipped, with a message, where they are absent.
"""
import array
import importlib.util
import json
import math
import os
import random
import struct
import subprocess
import sys
import tempfile
import unittest
import xml.dom.minidom
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ROOT / "tools"
HGRN = os.environ.get("HGRN", str(ROOT / "build/hgrn"))
sys.path.insert(0, str(TOOLS))
sys.path.insert(0, str(TOOLS / "peers"))

import compare_curves  # noqa: E402
import plot  # noqa: E402
import sample_order  # noqa: E402


def lacks(*packages):
    return [p for p in packages if importlib.util.find_spec(p) is None]


def run(*command, code=0, cwd=ROOT, **environment):
    """stdout of a command that must end with `code`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HGRN": HGRN, "PYTHON": sys.executable,
           **environment}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)
    if done.returncode != code:
        raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def write_shard(path, tokens):
    """llm.c's format, uint16."""
    Path(path).write_bytes(struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
                           + array.array("H", tokens).tobytes())


def learnable(count, vocab, seed):
    """Tokens of which seven in eight follow from the one before."""
    rng, token, out = random.Random(seed), 1, []
    for _ in range(count):
        token = rng.randrange(vocab) if rng.random() < 0.125 else (token * 5 + 3) % vocab
        out.append(token)
    return out


class Order(unittest.TestCase):
    def test_golden(self):
        """The trainer's own test compares with the same file."""
        self.assertEqual(sample_order.GOLDEN.read_text(), sample_order.golden_text())

    def test_permutation(self):
        for n in (1, 2, 5, 64, 65, 1000):
            p = sample_order.Permutation(n, 3)
            self.assertEqual(sorted(p(i) for i in range(n)), list(range(n)))


class Plot(unittest.TestCase):
    def test_svg_is_xml_and_holds_every_series(self):
        series = [plot.Series("a<b", [(s, 10 / s) for s in range(1, 4000)]),
                  plot.Series("marks", [(1, 2.0), (3000, math.nan), (4000, 1.0)], [0.1] * 3, True)]
        text = plot.chart("title & more", plot.Axis("x", log=True), plot.Axis("y", log=True), series)
        svg = xml.dom.minidom.parseString(text)
        lines = svg.getElementsByTagName("polyline")
        self.assertEqual(len(lines), 2)
        self.assertLessEqual(len(lines[0].getAttribute("points").split()), plot.MAX_POINTS + 1)
        self.assertEqual(len(svg.getElementsByTagName("circle")), 2)  # NaN is left out
        for p in lines[0].getAttribute("points").split():
            x, y = map(float, p.split(","))
            self.assertTrue(plot.LEFT <= x <= plot.WIDTH and plot.TOP <= y <= plot.HEIGHT)

    def test_seconds_are_the_sum_of_steps(self):
        with tempfile.TemporaryDirectory() as d:
            lines = [{"step": s, "loss": 5.0 / s, "step_ms": 100.0 * s} for s in (2, 4, 6)]
            lines.insert(1, {"step": 2, "valid_loss": 3.0})
            Path(d, "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
            points = plot.curve(d, "seconds", "loss")
            self.assertEqual([round(x, 9) for x, _ in points], [0.4, 1.2, 2.4])

    def test_smooth(self):
        self.assertEqual(plot.smooth([4, 2, 6, 8], 2), [4, 3, 4, 7])


class Curves(unittest.TestCase):
    def metrics(self, folder, name, losses, ms):
        Path(folder, name).mkdir()
        with open(Path(folder, name, "metrics.jsonl"), "w") as f:
            for s, loss in enumerate(losses, 1):
                f.write(json.dumps({"step": s, "tokens": 100 * s, "loss": loss, "step_ms": ms}) + "\n")

    def test_difference_and_time_to_level(self):
        with tempfile.TemporaryDirectory() as d:
            losses = [8 - 0.01 * s for s in range(1, 401)]
            self.metrics(d, "a", [v * 1.01 for v in losses], 10)
            self.metrics(d, "b", losses, 20)
            out = Path(d, "c.json")
            command = [sys.executable, TOOLS / "compare_curves.py", Path(d, "a"), Path(d, "b"),
                       "--last", 100, "--window", 1, "--json", out, "--svg", Path(d, "c.svg")]
            run(*command, "--most", 1.01)
            run(*command, "--most", 0.99, code=1)
            run(*command[:4], "--last", 401, "--most", 5, code=1)  # fewer steps than asked for
            r = json.loads(out.read_text())
            self.assertAlmostEqual(r["mean_abs_percent"], 1.0, places=6)
            self.assertAlmostEqual(r["signed_percent"], 1.0, places=6)
            for level in r["levels"]:
                a, b = level["step"]
                self.assertLessEqual(losses[b - 1], level["loss"])
                self.assertGreater(losses[b - 2], level["loss"])
                self.assertAlmostEqual(level["seconds"][1], b * 0.02)
                self.assertAlmostEqual(level["seconds"][0], a * 0.01)
            for name in ("c.svg", "c_time.svg"):
                xml.dom.minidom.parse(str(Path(d, name)))


@unittest.skipIf(lacks("torch", "numpy"), f"no Python package {lacks('torch', 'numpy')}")
class PeerLoop(unittest.TestCase):
    """tools/peers/fla_train.py's loop with the definition of the model in fp64 against `hgrn
    train`: the same losses and gradient norms at every step, so the same order of samples,
    schedule, decay groups and clipping."""

    def both(self, d, model, optim, data, tolerance=2e-5):
        write_shard(Path(d, "a_0.bin"), learnable(700, 31, 1))
        write_shard(Path(d, "a_1.bin"), learnable(500, 31, 2))
        write_shard(Path(d, "b_0.bin"), learnable(300, 31, 3))
        config = {
            "model": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2,
                      "expand_ratio": 8, "intermediate_size": 24, "eos_token_id": 0, **model},
            "data": {"seq_len": 20, "seed": 5, **data},
            "optim": {"lr": 1e-2, "warmup_steps": 4, "weight_decay": 0.5, **optim},
            "train": {"steps": 40, "global_batch": 4, "micro_batch": 2, "precision": "fp32",
                      "log_every": 1, "eval_every": 0, "checkpoint_every": 0}}
        Path(d, "c.json").write_text(json.dumps(config))
        ours, peer = Path(d, "ours"), Path(d, "peer")
        train = [HGRN, "train", "--config", Path(d, "c.json"), "--out", ours, "--device", "cpu"]
        run(*train, "--steps", 0, cwd=d)
        run(*train, "--steps", 30, cwd=d)
        run(sys.executable, TOOLS / "peers/fla_train.py", "--model", "reference", "--run", ours,
            "--out", peer, "--steps", 30, "--log-every", 7, cwd=d)
        a, b = ([m for m in plot.read_metrics(p)] for p in (ours, peer))
        self.assertEqual([m["step"] for m in a], list(range(1, 31)))
        self.assertEqual([m["step"] for m in b], list(range(1, 31)))
        worst = 0.0
        for x, y in zip(a, b):
            for key in ("loss", "grad_norm", "lr"):
                worst = max(worst, abs(x[key] - y[key]) / abs(y[key]))
            self.assertEqual(x["tokens"], y["tokens"])
        print(f"losses {a[0]['loss']:.3f} to {a[-1]['loss']:.3f}, at most {worst:.1e} apart", file=sys.stderr)
        self.assertLess(worst, tolerance)
        self.assertLess(a[-1]["loss"], 0.95 * a[0]["loss"])  # it learned: the updates matter
        clip = optim.get("clip_norm", 1.0)
        self.assertTrue(any(m["grad_norm"] > clip for m in a))

    def test_language_model(self):
        with tempfile.TemporaryDirectory() as d:
            self.both(d, {"initializer_range": 0.3}, {"schedule": "cosine", "clip_norm": 0.5},
                      {"train": "a_*.bin"})

    def test_wikitext_mixture(self):
        """The other parameterisation, decay on all, inverse square root, two weighted sources."""
        with tempfile.TemporaryDirectory() as d:
            self.both(d, {"norm": "layernorm", "norm_eps": 1e-5, "bias": True,
                          "output_activation": "sigmoid", "input_activation": "silu",
                          "hidden_act": "none", "query_scale": "one", "scale_embedding": True,
                          "initializer": "fairseq"},
                      {"schedule": "inverse_sqrt", "decay": "all", "betas": [0.9, 0.98],
                       "warmup_init_lr": 1e-4, "clip_norm": 0.5},
                      {"train": [{"path": "a_*.bin", "weight": 2}, {"path": "b_0.bin"}]})


@unittest.skipIf(lacks("torch", "numpy"), f"no Python package {lacks('torch', 'numpy')}")
class CompareWithFla(unittest.TestCase):
    def test_script_with_the_reference_in_flas_place(self):
        with tempfile.TemporaryDirectory() as d:
            write_shard(Path(d, "t_0.bin"), learnable(900, 31, 1))
            out = Path(d, "out")
            tiny = ["model.vocab_size=32", "model.hidden_size=16", "model.num_hidden_layers=1",
                    "model.expand_ratio=8", "model.intermediate_size=24", "model.eos_token_id=0",
                    f"data.train={d}/t_*.bin", "data.seq_len=10", "train.steps=210",
                    "train.global_batch=2", "train.micro_batch=2", "optim.lr=3e-3",
                    "model.initializer_range=0.3", "train.precision=fp32"]
            text = run(ROOT / "scripts/compare_with_fla.sh", "--model", "reference", "--out", out,
                       *[w for s in tiny for w in ("--set", s)])
            self.assertIn("steps 11..210 (200): mean absolute difference 0.0", text)
            r = json.loads((out / "result/curve.json").read_text())
            self.assertLess(r["mean_abs_percent"], 0.01)
            self.assertEqual(sorted(p.name for p in (out / "result").iterdir()),
                             ["curve.json", "curve.md", "curve.svg", "curve_time.svg",
                              "hgrn.jsonl", "reference.jsonl", "reference.txt"])
            # a second call never trains over the first one's folder
            run(ROOT / "scripts/compare_with_fla.sh", "--out", out, code=2)


if __name__ == "__main__":
    unittest.main()

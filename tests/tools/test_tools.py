#!/usr/bin/env python3
"""Tests of the Python tools and of what stands beside their numbers, on the CPU, in seconds.

    HGRN=build/hgrn python3 tests/tools/test_tools.py [-v] [TestName]

What needs PyTorch or NumPy is skipped, with a message, where they are absent.
"""
import array
import json
import lzma
import math
import os
import sys
import tempfile
import unittest
import xml.dom.minidom
from pathlib import Path

# First: it puts tools/ on the path.
from support import HGRN, ROOT, TOOLS, bench_or_skip, lacks, learnable, run, write_shard

import plot
import position_ppl
import sample_order
import wikitext_style


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
            for name in ("c.svg", "c_time.svg", "c_difference.svg"):
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


class Shards(unittest.TestCase):
    def test_raw_tokens_become_a_shard(self):
        with tempfile.TemporaryDirectory() as d:
            tokens = array.array("H", range(5000))
            Path(d, "t.u16.xz").write_bytes(lzma.compress(tokens.tobytes()))
            command = [sys.executable, TOOLS / "u16_to_shard.py", Path(d, "t.u16.xz"), Path(d, "t.bin")]
            run(*command)
            self.assertIn("5000 tokens", run(HGRN, "inspect", Path(d, "t.bin"), "--verify"))
            self.assertEqual(position_ppl.read_shard(Path(d, "t.bin")), tokens)
            run(*command, "--first", 70, "--count", 9)
            self.assertEqual(list(position_ppl.read_shard(Path(d, "t.bin"))), list(range(70, 79)))
            Path(d, "odd.u16").write_bytes(b"abc")
            run(*command[:2], Path(d, "odd.u16"), Path(d, "odd.bin"), code=1)
            self.assertEqual(sorted(os.listdir(d)), ["odd.u16", "t.bin", "t.u16.xz"])


class WikitextStyle(unittest.TestCase):
    def test_paragraph(self):
        """Expected lines are in the manner of WikiText-103's raw text."""
        for plain, want in [
                ("The squad (a 19-man team) cost $1,250.50, didn't it?",
                 "The squad ( a 19 @-@ man team ) cost $ 1 @,@ 250 @.@ 50 , didn 't it ?"),
                ("He said \"No.\" in the 1920's; the U.S. team's St. Anne, J. R. Smith.",
                 "He said \" No . \" in the 1920 's ; the U.S. team 's St. Anne , J. R. Smith ."),
                ("At 10:30 a.m. the states' rights... 5% – see No. 7.",
                 "At 10 : 30 a.m. the states ' rights ... 5 % – see No. 7 .")]:
            self.assertEqual(wikitext_style.paragraph(plain), want)

    def test_document(self):
        got = wikitext_style.document("Title\n\nHistory\n\nIt began. So\nit did.\n\nIt ended.\n")
        self.assertEqual(got, "\n = Title = \n\n\n = = History = = \n\n It began . So \n it did . \n"
                              " It ended . \n")

    def test_tokens_and_text_give_the_same(self):
        with tempfile.TemporaryDirectory() as d:
            texts = ["Café\n\nOne, two.\n", "Other\n\nThree.\n"]
            Path(d, "a.txt").write_text("<|endoftext|>\n".join(texts), encoding="utf-8")
            alphabet = {b: c for c, b in wikitext_style.byte_of_character().items()}
            Path(d, "encoder.json").write_text(json.dumps(
                {**{alphabet[b]: b for b in range(256)}, "<|endoftext|>": 50256}))
            ids = [list(t.encode()) for t in texts]
            Path(d, "a.u16").write_bytes(array.array("H", ids[0] + [50256] + ids[1]).tobytes())
            for name in ("a.txt", "a.u16"):
                run(sys.executable, TOOLS / "wikitext_style.py", "--out", Path(d, name + ".out"),
                    "--tokenizer", d, "--jobs", 1, Path(d, name))
            self.assertEqual(Path(d, "a.txt.out").read_text(), Path(d, "a.u16.out").read_text())
            self.assertIn(" = Café = \n\n One , two . \n", Path(d, "a.txt.out").read_text())


class BenchOps(unittest.TestCase):
    def test_memory_bound_operations_stand_beside_a_copy(self):
        bench = bench_or_skip(self)
        with tempfile.TemporaryDirectory() as d:
            table = Path(d, "ops.json")
            run(bench, "ops", "--config", ROOT / "configs/quickstart.json", "--device", "cpu",
                "--set", "data.seq_len=32", "--json", table)
            rows = json.loads(table.read_text())
        self.assertGreater(len(rows), 15)
        for row in rows:
            self.assertGreater(row["us"], 0, row)
            bound_by_memory = row["tflops"] == 0
            self.assertEqual("of_copy" in row, bound_by_memory, row)
            if bound_by_memory:
                self.assertGreater(row["of_copy"], 0, row)


if __name__ == "__main__":
    unittest.main()

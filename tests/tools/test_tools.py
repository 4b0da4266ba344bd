#!/usr/bin/env python3
"""Tests of the Python tools and the scripts of docs/experiments.md, on the CPU, in seconds.

    HGRN=build/hgrn python3 tests/tools/test_tools.py [-v] [TestName]

What needs PyTorch or NumPy is skipped, with a message, where they are absent.
"""
import array
import importlib.util
import json
import lzma
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
import position_ppl  # noqa: E402
import sample_order  # noqa: E402
import wikitext_style  # noqa: E402


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
                             ["curve.json", "curve.md", "curve.svg", "curve_difference.svg",
                              "curve_time.svg", "hgrn.jsonl", "reference.jsonl", "reference.txt"])
            # a second call never trains over the first one's folder
            run(ROOT / "scripts/compare_with_fla.sh", "--out", out, code=2)


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


TINY = ["model.vocab_size=257", "model.hidden_size=16", "model.num_hidden_layers=1",
        "model.expand_ratio=8", "model.intermediate_size=24", "model.eos_token_id=256",
        "data.seq_len=32", "train.global_batch=4", "train.micro_batch=4"]


def as_sets(keys):
    return [w for key in keys for w in ("--set", key)]


class Wikitext103(unittest.TestCase):
    """scripts/reproduce_wikitext103.sh with a small text in the set's place and byte tokens."""

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.d = d = Path(self.folder.name)
        texts = sorted((ROOT / "docs").glob("*.md"))
        for name, pages in (("train", texts[2:]), ("valid", texts[:1]), ("test", texts[1:2])):
            (d / f"wiki.{name}.raw").write_text("".join(p.read_text() for p in pages)[:40000])
        # what scripts/get_wikitext103.sh leaves behind, for bytes
        (d / "get").write_text(f"""#!/bin/sh
            while [ "$1" != --out ]; do shift; done
            for set in train valid test; do
              "{HGRN}" tokenize --tokenizer byte --line-end-token --out "$2/wikitext103_$set" "{d}/wiki.$set.raw"
            done""")
        (d / "get").chmod(0o755)

    def tearDown(self):
        self.folder.cleanup()

    def script(self, *more, code=0):
        return run(ROOT / "scripts/reproduce_wikitext103.sh", "--data", self.d / "data", "--out",
                   self.d / "run", *more, code=code, GET_WIKITEXT103=str(self.d / "get"))

    def test_stop_resume_evaluate(self):
        (self.d / "data").mkdir()
        sets = as_sets(TINY + ["train.eval_every=50", "train.checkpoint_every=0"])
        # The time is used up early: a checkpoint and exit code 75. A busy machine may need longer
        # than the first of these to begin, and a program that has not begun dies of the signal.
        for minutes in (0.02, 0.1, 0.5):
            stop = (*sets, "--minutes", minutes, *as_sets(["train.steps=1000000"]))
            try:
                self.script(*stop, code=75)
                break
            except AssertionError as e:
                if minutes == 0.5 or "exit 143" not in str(e):
                    raise
        stopped = max(m["step"] for m in plot.read_metrics(self.d / "run"))
        text = self.script(*sets, *as_sets([f"train.steps={stopped + 20}"]))
        self.assertIn("trained on WikiText-103:", text)
        self.assertIn("| 23.73 |", text)
        result = json.loads((self.d / "run/result.json").read_text())
        self.assertEqual(result["steps"], stopped + 20)
        self.assertEqual(sorted(result["ppl"]), ["test_blocks", "test_carry", "valid_blocks",
                                                 "valid_carry"])
        for ppl in result["ppl"].values():
            # Untrained: about 257. After the few steps that a slow machine does, it may be above.
            self.assertTrue(1 < ppl < 2000, f"{ppl} after {stopped} + 20 steps")
        self.assertIn("resumed from", (self.d / "run/log.txt").read_text())
        xml.dom.minidom.parse(str(self.d / "run/curve.svg"))

    def test_stand_in_is_labelled(self):
        (self.d / "data").mkdir()
        shard = self.d / "other_000000.bin"
        write_shard(shard, learnable(20000, 200, 4))
        self.script("--train", f"{shard}=2", code=2)  # no label
        text = self.script("--train", f"{shard}=2", "--train", self.d / "data/wikitext103_valid_*.bin",
                           "--label", "something else", *as_sets(TINY + ["train.steps=3"]))
        self.assertIn("trained on something else, not on WikiText-103", text)
        self.assertNotIn("23.73", text)
        self.assertIsNone(json.loads((self.d / "run/result.json").read_text())["paper"])
        config = json.loads((self.d / "run/config.json").read_text())
        self.assertEqual([s["weight"] for s in config["data"]["train"]], [2, 1])


class Ablations(unittest.TestCase):
    def test_runs_resume_and_are_drawn(self):
        with tempfile.TemporaryDirectory() as d:
            write_shard(Path(d, "t.bin"), learnable(9000, 200, 1))
            write_shard(Path(d, "v.bin"), learnable(700, 200, 2))
            command = [ROOT / "scripts/ablations.sh", "--train", Path(d, "t.bin"), "--valid", Path(d, "v.bin"),
                       "--out", Path(d, "out"), "--tokens", 4096,
                       *as_sets(["model.vocab_size=257", "model.hidden_size=128", "model.eos_token_id=256",
                                 "model.num_hidden_layers=2", "model.intermediate_size=32",
                                 "data.seq_len=32", "train.global_batch=4"])]
            run(*command, "--only", "n3", code=2)
            text = run(*command, "--only", "n128,n1", "--minutes", 0)
            self.assertIn("| n = 128 | 32,768 |", text)  # one always runs
            self.assertNotIn("| n = 1 |", text)
            text = run(*command, "--only", "n128,n1,no_lower_bound,llm")
            self.assertIn("| n = 1 | 256 |", text)
            self.assertIn("not run: n2, n4", text)
            runs = {r["name"]: r for r in json.loads(Path(d, "out/result/results.json").read_text())}
            self.assertEqual(list(runs), ["n1", "n128", "no_lower_bound", "llm"])
            self.assertEqual({r["tokens"] for r in runs.values()}, {4096})
            self.assertEqual(len({r["valid_loss"] for r in runs.values()}), 4)  # they differ
            model = {n: json.loads(Path(d, "out", n, "config.json").read_text())["model"] for n in runs}
            self.assertEqual(model["llm"]["norm"], "rmsnorm")
            self.assertFalse(model["no_lower_bound"]["use_lower_bound"])
            self.assertEqual(model["n1"], {**model["n128"], "expand_ratio": 1})
            run(*command, "--only", "n2", "--tokens", 8192, code=1)  # budgets do not mix
            for name in ("expand_ratio.svg", "curves.svg"):
                xml.dom.minidom.parse(str(Path(d, "out/result", name)))


class BenchOps(unittest.TestCase):
    def test_memory_bound_operations_stand_beside_a_copy(self):
        bench = os.environ.get("HGRN_BENCH", str(Path(HGRN).parent / "hgrn-bench"))
        if not os.access(bench, os.X_OK):
            self.skipTest(f"{bench} was not built")
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


class Scaling(unittest.TestCase):
    """scripts/bench_scaling.sh on CPU ranks with a tiny model: every part runs, and its table says so."""

    def test_every_part(self):
        bench = os.environ.get("HGRN_BENCH", str(Path(HGRN).parent / "hgrn-bench"))
        if not os.access(bench, os.X_OK):
            self.skipTest(f"{bench} was not built")
        with tempfile.TemporaryDirectory() as d:
            config = {"model": {"vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 3,
                                "expand_ratio": 16, "intermediate_size": 128},
                      "data": {"train": "none", "seq_len": 64},
                      "train": {"steps": 9, "global_batch": 2, "micro_batch": 2, "precision": "fp32"}}
            Path(d, "c.json").write_text("// a comment\n" + json.dumps(config))
            command = [ROOT / "scripts/bench_scaling.sh", "--device", "cpu", "--model", f"tiny={d}/c.json:2",
                       "--steps", 3, "--out", Path(d, "out")]
            run(*command, code=2)  # how many ranks?
            run(*command, "--ranks", "1,2", "--parts", "week", code=2)
            environment = {"HGRN_BUCKET_ELEMENTS": "20000"}
            try:
                text = run(*command, "--ranks", "1,2", **environment)
            except AssertionError as e:
                if "built without it" not in str(e):
                    raise
                self.skipTest("built without Gloo, so CPU ranks cannot talk")
            r = json.loads(Path(d, "out/scaling.json").read_text())
            self.assertEqual(r["failures"], [])
            speeds = {(s["ranks"], s["zero"], s["global_batch"]): s for s in r["speeds"]}
            self.assertEqual(sorted(speeds), [(1, 0, 2), (1, 0, 4), (2, 0, 4), (2, 1, 4)])
            one = speeds[1, 0, 2]  # the mean of as many as there are ranks
            self.assertEqual((one["efficiency"], len(one["each_tokens_per_s"])), (1, 2))
            self.assertAlmostEqual(one["tokens_per_s"], sum(one["each_tokens_per_s"]) / 2)
            before, after = (each for each, _ in one["runs"])  # on each rank, before and after the others
            self.assertAlmostEqual(one["each_tokens_per_s"][1], (before[1] + after[1]) / 2)
            both = [speeds[2, zero, 4] for zero in (0, 1)]
            for s in both:
                self.assertAlmostEqual(s["tokens_per_s"], 1e3 * s["tokens"] / s["step_ms"], delta=1)
                self.assertAlmostEqual(s["efficiency"], s["tokens_per_s"] / 2 / speeds[1, 0, 2]["tokens_per_s"])
                self.assertAlmostEqual(s["shown_ms"], s["step_ms"] - s["silent_ms"])
                self.assertAlmostEqual(s["hidden"], 1 - s["shown_ms"] / s["alone_ms"])
                self.assertTrue(0 < s["host_ms"] < s["step_ms"], s)
                self.assertTrue(0 < s["agreement_ms"] < 2 * s["silent_ms"], s)
                # every gradient travels once, and with ZeRO-1 every weight too
                self.assertGreater(s["bytes"], 4 * 140000 * (1 + s["zero"]))
                self.assertLess(s["bytes"], 4 * 150000 * (1 + s["zero"]))
            moments = 2 * 4 * 140160 / 2**30  # ZeRO-1 keeps half of them
            self.assertAlmostEqual(both[0]["state_gib"] - both[1]["state_gib"], moments / 2, delta=0.05 * moments)
            self.assertEqual([x["ranks"] for x in r["resume"]["losses"]], [2] * 4 + [1] * 4 + [2] * 4)
            self.assertLess(max(x["apart"] for x in r["resume"]["losses"]), 1e-5)
            seconds = list(r["restart"]["seconds"].values())
            self.assertEqual(r["restart"]["code"], 75)
            self.assertEqual(seconds, sorted(seconds))
            self.assertIn("| tiny | 2 | 1 | 4 |", text)
            run(*command, "--ranks", "1", code=2)  # never over what is there
            late = Path(d, "late")  # nothing is begun: told, and not taken for success
            run(*command[:-1], late, "--ranks", "1", "--seconds", 0, code=1)
            self.assertIn("not begun", json.loads((late / "scaling.json").read_text())["failures"][0])

    @unittest.skipIf(lacks("torch", "numpy"), f"no Python package {lacks('torch', 'numpy')}")
    def test_peer_of_several(self):
        """tools/peers/fla_ddp.py's loop, over two processes, with the definition of the model."""
        with tempfile.TemporaryDirectory() as d:
            write_shard(Path(d, "t.bin"), learnable(900, 31, 1))
            config = {"model": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8,
                                "intermediate_size": 24}, "data": {"train": f"{d}/t.bin", "seq_len": 10},
                      "train": {"precision": "fp32", "global_batch": 2, "micro_batch": 2, "steps": 1}}
            Path(d, "c.json").write_text(json.dumps(config))
            run(HGRN, "train", "--config", Path(d, "c.json"), "--out", Path(d, "r"), "--device", "cpu", "--steps", 0)
            command = [sys.executable, TOOLS / "peers/fla_ddp.py", "--model", "reference", "--config",
                       Path(d, "c.json"), "--checkpoint", Path(d, "r/checkpoints/step-00000000"), "--steps", 10,
                       "--warm", 1, "--json", Path(d, "j.json")]
            text = run(*command)
            self.assertIn("% of 2 x alone", text)
            r = json.loads(Path(d, "j.json").read_text())
            self.assertEqual((r["gpus"], r["ddp"]["steps"], r["alone"]["steps"]), (2, 10, 10))
            self.assertAlmostEqual(r["ddp"]["tokens_per_s"], 2 * 20 / r["ddp"]["step_ms"] * 1e3, places=3)
            self.assertIn("stopped after --limit", run(*command, "--limit", 0.01, code=1))


class CheckKernels(unittest.TestCase):
    """The script around the checks, with stand-ins for the card, the sanitizer and the programs."""

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = Path(self.folder.name)
        for name, text in {
                "bin/nvidia-smi": 'case "$*" in *compute_cap*) echo ${CAP:-9.0};; *) echo GPU 0;; esac',
                "bin/compute-sanitizer": """case "$*" in *"${BAD:-none}"*) echo "RACECHECK SUMMARY: 4 hazards"; exit 9;; esac
while [ "${1#--}" != "$1" ]; do shift 2; done
exec "$@" """,
                "build/hgru2_check": 'echo "$HGRN_HGRU2_SM90 $*"; case "$*" in *"${SLOW:-none}"*) sleep 30;; esac',
                "build/glu_gemm_check": 'echo "$*"',
                "build/tests/hgrn_tests": 'case "$*" in *"${GONE:-none}"*) echo "No test cases matched";; esac',
        }.items():
            file = self.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("#!/bin/sh\n" + text + "\n")
            file.chmod(0o755)

    def check(self, *words, code=0, **environment):
        return run(ROOT / "scripts/check_kernels.sh", *words, code=code,
                   HGRN_BUILD=str(self.path / "build"),
                   PATH=f"{self.path / 'bin'}:{os.environ['PATH']}", **environment)

    def test_all_pass(self):
        out = self.check()
        self.assertRegex(out, r"check_kernels: (2\d) passed, 0 failed")
        self.assertIn("| products with the GLU, small, racecheck | passed |", out)
        self.assertNotIn("products with the GLU", self.check(CAP="8.0"))

    def test_failures_are_told(self):
        out = self.check("--log", self.path / "log", "--limit", "1", "GLU", "fp64", "operations", code=1,
                         BAD="racecheck", SLOW="accuracy", GONE="[ops]")
        self.assertIn("| products with the GLU, small, racecheck | FAILED: RACECHECK SUMMARY: 4 hazards |", out)
        self.assertIn("| hgru2 against fp64 | FAILED: not over after 1 s |", out)
        self.assertIn("| operations | FAILED: no test of that name |", out)
        self.assertRegex(out, r"check_kernels: \d+ passed, 5 failed")
        self.assertTrue(list((self.path / "log").glob("*.txt")))

    def test_nothing_to_check(self):
        self.check("nonsense", code=2)
        (self.path / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
        self.check(code=3)
        (self.path / "build/glu_gemm_check").unlink()
        self.check(code=3)


class LongContext(unittest.TestCase):
    def test_pieces(self):
        tokens = array.array("H", [9, 1, 2, 3, 4, 5, 9, 6, 7, 8, 9, 1, 2])
        got = position_ppl.pieces(tokens, 9, 2, 100)
        self.assertEqual([list(p) for p in got], [[1, 2], [6, 7], [1, 2], [3, 4]])
        self.assertEqual(len(position_ppl.pieces(tokens, 9, 2, 3)), 3)
        self.assertEqual([list(p) for p in position_ppl.pieces(tokens, -1, 6, 9)],
                         [[9, 1, 2, 3, 4, 5], [9, 6, 7, 8, 9, 1]])

    def test_bins(self):
        with tempfile.TemporaryDirectory() as d:
            for n, scale in ((0, 1.0), (1, 3.0)):
                Path(d, f"{n}.jsonl").write_text("".join(
                    json.dumps({"i": i, "token": 0, "nll": scale * i}) + "\n" for i in range(8)))
            rows = position_ppl.by_position([f"{d}/0.jsonl", f"{d}/1.jsonl"])
            self.assertEqual([(r["from"], r["to"]) for r in rows], [(1, 1), (2, 2), (3, 3), (4, 5), (6, 7), (8, 11)])
            self.assertEqual([r["nll"] for r in rows], [0, 2, 4, 7, 11, 14])
            self.assertEqual(rows[-1]["tokens"], 2)
            self.assertAlmostEqual(rows[1]["nll_stderr"], 1.0)  # 1 and 3

    def test_script(self):
        with tempfile.TemporaryDirectory() as d:
            write_shard(Path(d, "t.bin"), [0] + learnable(3000, 31, 1) + [0] + learnable(3000, 31, 2))
            Path(d, "c.json").write_text(json.dumps({
                "model": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "expand_ratio": 8,
                          "intermediate_size": 24, "eos_token_id": 0},
                "data": {"train": f"{d}/t.bin", "seq_len": 20},
                "train": {"steps": 3, "global_batch": 4, "micro_batch": 4, "precision": "fp32"}}))
            run(HGRN, "train", "--config", Path(d, "c.json"), "--out", Path(d, "run"))
            # a token 0 among the learnable ones cuts a document short: pieces across them
            text = run(ROOT / "scripts/long_context.sh", "--checkpoint", Path(d, "run"), "--length", 2500,
                       "--data", f"a={d}/t.bin", "--across", "a", "--trained-at", 20, "--out",
                       Path(d, "out"), EOS="0")
            self.assertIn("a: 2 texts", text)
            rows = json.loads(Path(d, "out/position.json").read_text())["a"]
            # carry puts end-of-text in front and scores every token of the piece
            self.assertEqual(sum(r["tokens"] for r in rows), 2 * 2500)
            self.assertEqual(rows[-1]["from"], 2048)
            xml.dom.minidom.parse(str(Path(d, "out/position.svg")))


if __name__ == "__main__":
    unittest.main()

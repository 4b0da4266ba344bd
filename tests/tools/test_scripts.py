#!/usr/bin/env python3
"""Tests of the scripts of docs/experiments.md and of those for GPUs, on the CPU, with tiny models.

    HGRN=build/hgrn python3 tests/tools/test_scripts.py [-v] [TestName]

What needs PyTorch or NumPy is skipped, with a message, where they are absent.
"""
import array
import json
import os
import sys
import tempfile
import unittest
import xml.dom.minidom
from pathlib import Path

# First: it puts tools/ on the path.
from support import HGRN, ROOT, TINY, TOOLS, as_sets, bench_or_skip, lacks, learnable, run, write_shard

import plot
import position_ppl


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


class Scaling(unittest.TestCase):
    """scripts/bench_scaling.sh on CPU ranks with a tiny model: every part runs, and its table says so."""

    def test_every_part(self):
        bench_or_skip(self)  # the script runs it
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

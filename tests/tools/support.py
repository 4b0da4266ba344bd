"""What the tests of the Python tools and of the scripts share. Importing it puts tools/ on the path."""
import array
import importlib.util
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ROOT / "tools"
HGRN = os.environ.get("HGRN", str(ROOT / "build/hgrn"))
sys.path.insert(0, str(TOOLS))
sys.path.insert(0, str(TOOLS / "peers"))

TINY = ["model.vocab_size=257", "model.hidden_size=16", "model.num_hidden_layers=1",
        "model.expand_ratio=8", "model.intermediate_size=24", "model.eos_token_id=256",
        "data.seq_len=32", "train.global_batch=4", "train.micro_batch=4"]


def lacks(*packages):
    return [p for p in packages if importlib.util.find_spec(p) is None]


def bench_or_skip(test):
    """The path of hgrn-bench, where it was built; skips the test where not."""
    bench = os.environ.get("HGRN_BENCH", str(Path(HGRN).parent / "hgrn-bench"))
    if not os.access(bench, os.X_OK):
        test.skipTest(f"{bench} was not built")
    return bench


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


def as_sets(keys):
    return [w for key in keys for w in ("--set", key)]

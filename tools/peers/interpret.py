#!/usr/bin/env python3
"""Runs a program whose Triton kernels are to be interpreted on the CPU, where there is no driver to time
them with: of each kernel's configurations the first is taken.

    PYTHONPATH=<folder of fla> python3 tools/peers/interpret.py tools/peers/fla_train.py --run ... --out ...

For models of a few thousand weights: a step takes seconds to minutes. Needs a NumPy below 2 (Triton 3.6).
"""
import os
import runpy
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from triton.runtime.autotuner import Autotuner  # noqa: E402

tuned_run = Autotuner.run


def first_configuration(self, *args, **kwargs):
    self.configs = self.configs[:1]
    return tuned_run(self, *args, **kwargs)


Autotuner.run = first_configuration
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
runpy.run_path(sys.argv[0], run_name="__main__")

"""A random test that fails says how to repeat what it drew, whichever library drew it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAILING = """
import os, random
import torch
from hypothesis import given, settings, strategies

@given(strategies.integers(0, 2**60))
@settings(database=None, phases=["generate"])
def test_by_hypothesis(number):
    print("drew", number)
    assert number % 4

def test_by_torch_and_by_hand():
    print("drew", torch.randn(3).tolist(), random.Random(int(os.environ["HALOCLINE_SEED"])).random())
    raise AssertionError
"""


def draws(folder: Path, command: list[str], **environment: str) -> tuple[str, list[str]]:
    """What a run of pytest prints, and what its failed tests have drawn."""
    known = {name: value for name, value in os.environ.items() if name != "HALOCLINE_SEED"}
    env = known | {"PYTHONPATH": str(ROOT)} | environment
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, *command, *options], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout, re.findall(r"^drew .*", done.stdout, re.M)


def test_a_failure_names_the_command_that_repeats_it(tmp_path: Path) -> None:
    (tmp_path / "test_drawn.py").write_text(FAILING)
    said, first = draws(tmp_path, ["-m", "pytest", "test_drawn.py"])
    commands = re.findall(r"^HALOCLINE_SEED=(\d+) python -m pytest '(\S+)'$", said, re.M)
    seeds, names = zip(*commands, strict=True)
    assert names == ("test_drawn.py::test_by_hypothesis", "test_drawn.py::test_by_torch_and_by_hand")
    again = draws(tmp_path, ["-m", "pytest", *names], HALOCLINE_SEED=seeds[0])[1]
    assert again == first and len(first) > 2 and seeds[0] == seeds[1]

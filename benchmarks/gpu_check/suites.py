"""Tests of the project's on the device: those that need one, and every Triton kernel against its eager twin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_check.table import FAILED, OK, Row

ROOT = Path(__file__).resolve().parents[2]
# Failures that are named one by one; a table is to be read.
MAX_NAMED = 20


def gpu_tests(folder: Path) -> Iterator[Row]:
    """`make test-gpu`."""
    yield from _suite(["-m", "gpu", "tests"], {}, folder / "gpu-tests.xml", "make test-gpu")


def kernels(folder: Path, device: str) -> Iterator[Row]:
    """The tests of kernels with their tensors on the device, where Triton compiles them; on a CPU in its interpreter.

    `kernels.compile`'s test, which needs no device, is left to `make test`.
    """
    environ = {"TRITON_INTERPRET": "0" if device == "cuda" else "1", "HALOCLINE_TEST_DEVICE": device}
    words = ["-p", "benchmarks.gpu_check.on_device", "-m", "not slow", "tests/kernels"]
    words += ["--ignore=tests/kernels/test_compile.py", "--ignore=tests/kernels/test_choice.py"]
    yield from _suite(words, environ, folder / "kernels.xml", "kernels against their eager twins")


def _suite(words: Sequence[str], environ: Mapping[str, str], file: Path, what: str) -> Iterator[Row]:
    """A row of counts, and one for each of the first tests that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", f"--junit-xml={file}", *words]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True)
    if not file.exists():
        raise RuntimeError(f"pytest has not run: {(done.stderr or done.stdout).strip()[-300:]}")
    (suite,) = ElementTree.parse(file).getroot().iter("testsuite")
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped, number = int(suite.get("skipped", 0)), int(suite.get("tests", 0))
    reasons = {str(each.get("message")) for each in suite.iter("skipped")}
    note = f"{skipped} skipped: {'; '.join(sorted(reasons))[:300]}" if skipped else ""
    yield Row(
        f"{what}: tests that passed",
        f"{number - failed - skipped} of {number}",
        verdict=FAILED if failed else OK,
        note=note,
    )
    yield from list(_failures(suite))[:MAX_NAMED]


def _failures(suite: ElementTree.Element) -> Iterator[Row]:
    for case in suite.iter("testcase"):
        for trouble in (*case.iter("failure"), *case.iter("error")):
            first = re.sub(r"\s+", " ", str(trouble.get("message")))[:300]
            yield Row(f"{case.get('classname')}.{case.get('name')}", verdict=FAILED, note=first)

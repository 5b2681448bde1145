"""Every kernel compiles for Hopper, without a GPU, and keeps what it works on in registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernels
from kernels.operation import names

# A thread may spill so many bytes: nothing that a cache would notice.
MAX_SPILLED_BYTES = 64


def test_every_kernel_compiles_and_spills_next_to_nothing() -> None:
    """In a process of its own: this one has Triton's interpreter."""
    environ = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "kernels.compile"], env=environ, capture_output=True, text=True, timeout=600
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row for row in rows if int(row[-2]) > MAX_SPILLED_BYTES] == []
    assert {row[0] for row in rows} == set(_all_names())


def _all_names() -> list[str]:
    for path in Path(kernels.__file__).parent.glob("*.py"):
        __import__(f"kernels.{path.stem}")
    return names()

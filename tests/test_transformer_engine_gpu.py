"""For whoever has a Hopper and the extra `[cuda]`: what its kernels find, against the CPU twin. Not yet run on a GPU.

`make test-gpu`, or `python -m pytest -m gpu`. Expected values are made by a process of its own, in which the same
library's Python runs over the twin.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.te import case
from train.precision.build import choose_engine
from train.precision.config import PrecisionConfig
from train.precision.transformer_engine import missing

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(missing("cuda")), reason=str(missing("cuda")))]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Tensor]]:
    file = tmp_path_factory.mktemp("expected") / "twin.pt"
    subprocess.run([sys.executable, "-m", "tests.te.case", str(file)], cwd=ROOT, check=True)
    return torch.load(file)


def test_auto_takes_it() -> None:
    assert (
        choose_engine(PrecisionConfig("fp8", engine="auto"), "cuda")
        == choose_engine(PrecisionConfig("fp8", engine="transformer_engine"), "cuda")
        == "transformer_engine"
    )


@pytest.mark.parametrize("power_of_two", [True, False])
def test_products(expected: dict[bool, dict[str, Tensor]], power_of_two: bool) -> None:
    """Operands are the same bytes if the twin rounds as the kernels do. Then sums of at most 384 products differ by
    what tensor cores lose between two promotions (2^-13 of the largest, section 3.3.2), results by one bfloat16
    rounding (2^-9), and those behind another quantiser by the few values that fall the other way. A wrong scale, a
    transposed tile or a lost row of padding is off by far more than 1 %."""
    ours = case.run("cuda", power_of_two)
    for name, twin in expected[power_of_two].items():
        distance = (ours[name].double() - twin.double()).norm() / twin.double().norm()
        assert distance < 0.01, (name, float(distance))


def test_the_same_bits_twice() -> None:
    first, second = case.run("cuda", True), case.run("cuda", True)
    assert all(torch.equal(value, second[name]) for name, value in first.items())

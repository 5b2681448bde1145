"""The contract with Transformer Engine's Python, in a process of its own, because it changes torch for good; and what
holds where the library is not installed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from train.precision import build
from train.precision.build import check_widths, choose_engine, fp8_weights
from train.precision.config import PrecisionConfig
from train.precision.reference import QuantisedWeights
from train.settings import group

FP8 = group(PrecisionConfig, "precision", "fp8")
ROOT = Path(__file__).resolve().parent.parent
CONTRACT = ["-m", "pytest", "-p", "tests.te.plugin", "-p", "no:cacheprovider", "-o", "python_files=contract_*.py"]
CONTRACT += ["-o", "addopts=--strict-markers", "-x", "tests/te"]


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="Transformer Engine's Python is not installed: pip install --no-deps transformer-engine==2.20.2",
)
@pytest.mark.parametrize("part", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_contract(part: str) -> None:
    """All of tests/te: nothing fails, nothing is skipped."""
    done = subprocess.run([sys.executable, *CONTRACT, "-m", part], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout


def test_the_rest_of_the_package_does_not_import_it() -> None:
    """Only a run that multiplies by it loads it, and nothing needs it to be there."""
    code = (
        "import sys; sys.modules['transformer_engine'] = None\n"
        "import train.rank, train.assemble, launch.__main__\n"
        "from train.precision.build import choose_engine\n"
        "from train.precision.config import PrecisionConfig\n"
        "print(choose_engine(PrecisionConfig('fp8'), 'cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "reference\n", done.stderr


def test_on_a_cpu_the_reference_multiplies() -> None:
    assert all(choose_engine(replace(FP8, engine=word), "cpu") == "reference" for word in ("auto", "reference"))
    assert isinstance(fp8_weights(FP8, "cpu"), QuantisedWeights)
    with pytest.raises(ValueError, match=r"precision.engine=transformer_engine cannot multiply here: it needs a GPU"):
        choose_engine(replace(FP8, engine="transformer_engine"), "cpu")


def test_on_a_gpu_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match=r"compute capability 9.0 \(Hopper\), not \(8, 0\)"):
        choose_engine(replace(FP8, engine="transformer_engine"), "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    with pytest.raises(ValueError, match=r"not installed \(pip install --no-build-isolation -e '.\[cuda\]'\)"):
        choose_engine(replace(FP8, engine="transformer_engine"), "cuda")
    assert choose_engine(replace(FP8, engine="auto"), "cuda") == "reference"


def test_a_head_in_fp8_is_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "missing", lambda device: None)
    head = replace(FP8, modules={**FP8.modules, "lm_head": "fp8"})
    assert choose_engine(FP8, "cuda") == "transformer_engine" and choose_engine(head, "cuda") == "reference"
    with pytest.raises(ValueError, match=r"precision.modules.lm_head=fp8 needs engine=reference"):
        choose_engine(replace(head, engine="transformer_engine"), "cuda")


def test_widths_that_it_cannot_multiply_by_are_refused_by_name() -> None:
    """Only of matrices that it would multiply by: a head of any width is none of them."""
    model = nn.Module()
    model.lm_head = nn.Linear(64, 9)
    model.o_proj = nn.Linear(48, 64)
    check_widths(model, FP8)
    model.q_b_proj = nn.Linear(24, 64)
    with pytest.raises(ValueError, match=r"multiples of 16, not by q_b_proj.weight of shape \(64, 24\)"):
        check_widths(model, FP8)

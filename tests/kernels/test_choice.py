"""Who chooses kernels: once, in assembly, by the device and by what is installed."""

from __future__ import annotations

import pytest
import torch

from kernels import door
from train.model.kernels import KERNELS, choose_kernels


def test_a_cpu_computes_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernels("auto", "cpu") == "eager"
    assert choose_kernels("triton", "cpu") == "triton"  # in the interpreter, which tests have
    monkeypatch.setattr(door, "interprets", lambda: False)
    with pytest.raises(
        ValueError, match=r"^run\.kernels=triton cannot be: Triton computes on GPUs; .*use run\.kernels=auto$"
    ):
        choose_kernels("triton", "cpu")


def test_a_gpu_takes_triton_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernels("auto", torch.device("cuda", 3)) == choose_kernels("triton", "cuda") == "triton"
    assert choose_kernels("eager", "cuda") == "eager" and choose_kernels("compiled", "cuda") == "compiled"
    monkeypatch.setattr(door, "triton", None)
    assert choose_kernels("auto", "cuda") == "eager"
    with pytest.raises(ValueError, match=r"Triton is not installed: pip install 'halocline\[kernels\]'"):
        choose_kernels("triton", "cuda")


def test_every_word_has_its_kernels() -> None:
    for name, make in KERNELS.items():
        assert choose_kernels(name, "cuda") == name
        assert callable(make("cuda").rms_norm_forward)

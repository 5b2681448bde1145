"""The compiled quantisers: when there are any, what becomes of a compiler that fails or lies, and the cache."""

from __future__ import annotations

import logging
import os
import stat
import sys
from pathlib import Path

import pytest
import torch

from tests.train import model_cases
from tests.train.test_fp8_engine import TINY, backward
from tests.train.test_fp8_tiles import matrix, same_bits
from train.precision import tiles
from train.precision.build import build_engines, fp8_weights, rounding
from train.precision.compiled_tiles import SOURCE, CompiledTiles, compiled_tiles
from train.precision.config import PrecisionConfig
from train.precision.kernel_tiles import KernelTiles
from train.precision.reference import QuantisedWeights
from train.settings import group

FP8 = group(PrecisionConfig, "precision", "fp8")
needs_compiler = pytest.mark.skipif(compiled_tiles() is None, reason="no C++ compiler makes the quantisers here")


def environment(tmp_path: Path, **words: str) -> dict[str, str]:
    """This environment with an empty cache."""
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **words}


def script(path: Path, text: str) -> str:
    """A compiler that is a script of Python's; `real` in it is the real one, `words` its arguments."""
    real = os.environ.get("CXX", "g++")
    head = f"#!{sys.executable}\nimport subprocess, sys\nreal, words = {real.split()!r}, sys.argv[1:]\n"
    path.write_text(head + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_compiler
def test_a_step_has_the_same_bits() -> None:
    """Every gradient of a model with experts and prediction depths, with either, by one thread and by several."""
    tokens, found = model_cases.random_tokens(TINY, 2, 40), []
    threads = torch.get_num_threads()
    try:
        for number, weights in ((1, QuantisedWeights()), (1, fp8_weights(FP8, "cpu")), (3, fp8_weights(FP8, "cpu"))):
            model = model_cases.build(TINY, torch.bfloat16, engines=build_engines(FP8, "cpu", weights))
            torch.set_num_threads(number)
            found.append(backward(model, tokens, 1.0))
            torch.set_num_threads(threads)
    finally:
        torch.set_num_threads(threads)
    for name, grad in found[0].items():
        assert all(same_bits(other[name], grad) for other in found[1:]), name


@needs_compiler
def test_who_rounds() -> None:
    assert isinstance(rounding(FP8, "cpu"), CompiledTiles)
    assert isinstance(rounding(FP8, "cuda"), KernelTiles) and rounding(PrecisionConfig("bf16"), "cuda") is tiles
    assert rounding(PrecisionConfig("bf16"), "cpu") is tiles


@needs_compiler
def test_threads_change_nothing() -> None:
    compiled, x = compiled_tiles(), matrix((700, 400), 1, torch.bfloat16)
    assert compiled is not None
    groups = [slice(0, 300), slice(300, 300), slice(300, 700)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = [compiled.enter_rows(x)[0], compiled.round_blocks(x), *compiled.round_group_columns(x, groups)]
        torch.set_num_threads(4)
        found = [compiled.enter_rows(x)[0], compiled.round_blocks(x), *compiled.round_group_columns(x, groups)]
    finally:
        torch.set_num_threads(threads)
    assert all(map(same_bits, found, want))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", '"', "{fails}"])
def test_without_a_compiler_there_are_none(tmp_path: Path, compiler: str, caplog: pytest.LogCaptureFixture) -> None:
    fails = script(tmp_path / "fails", "sys.exit(0 if words == ['--version'] else 1)\n")
    with caplog.at_level(logging.INFO):
        assert compiled_tiles(environment(tmp_path, CXX=compiler.format(fails=fails))) is None
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "cannot be compiled here" in record.getMessage()


@needs_compiler
def test_a_compiler_that_makes_other_bits_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As one would that fuses a product into a sum, or flushes what is subnormal."""
    wrong = f"{tmp_path}/wrong.cpp"
    lies = script(
        tmp_path / "lies",
        f"text = open({str(SOURCE)!r}).read()\n"
        f"open({wrong!r}, 'w').write(text.replace('0x1p-9f', '0x1p-8f'))\n"
        f"sys.exit(subprocess.call(real + [{wrong!r} if word == {str(SOURCE)!r} else word for word in words]))\n",
    )
    assert compiled_tiles(environment(tmp_path, CXX=lies)) is None
    assert "makes other bits" in caplog.text


@needs_compiler
def test_what_is_compiled_is_kept(tmp_path: Path) -> None:
    """Compiled once for all processes; again where the file is spoilt; for each where there is no cache."""
    counts = script(
        tmp_path / "counts",
        f"open({str(tmp_path / 'log')!r}, 'a').write('x' * (words != ['--version']))\n"
        "sys.exit(subprocess.call(real + words))\n",
    )
    environ, log = environment(tmp_path, CXX=counts), tmp_path / "log"
    assert compiled_tiles(environ) and log.read_text() == "x"
    (kept,) = (tmp_path / "cache" / "halocline").iterdir()
    kept.unlink()  # in use: written into, it would end this process
    kept.write_bytes(b"spoilt")
    assert compiled_tiles(environ) and kept.stat().st_size > 1000 and log.read_text() == "xx"
    assert compiled_tiles(environ) and log.read_text() == "xx"
    (tmp_path / "file").touch()
    assert compiled_tiles(environ | {"XDG_CACHE_HOME": str(tmp_path / "file")}) and log.read_text() == "xxx"

"""Every benchmark runs at its smallest setting. What it measures is never asserted: machines are busy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import recompute, step
from launch import emulate

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_step() -> None:
    sides = "ours,transformers,torchtitan,torchtitan_fp32_experts"
    result = run("step", "size=tiny", "rounds=2", f"sides={sides}", "malloc=tuned")
    assert result.returncode == 0, result.stderr
    assert "MALLOC_MMAP_MAX_=0" in result.stdout  # it has started itself again
    for name in sides.split(","):
        # One line when it is ready or missing, and one in the table if it has run.
        lines = [line for line in result.stdout.splitlines() if line.startswith((f"{name} ", f"{name}:"))]
        assert len(lines) == (1 if "not installed" in lines[0] or "does not run" in lines[0] else 2), result.stdout
    for name in ("ours", "transformers"):
        assert f"{name}: 769664 parameters" in result.stdout


def test_step_profiles_a_side(capsys: pytest.CaptureFixture[str]) -> None:
    step.main(["size=tiny", "profile=ours"])
    assert "aten::mm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("size=L", "size=L is not one of S, M, tiny"),
        ("clock=sun", "clock=sun is not one of cpu, wall"),
        ("sides=ours,theirs", "sides=theirs is not one of ours"),
        ("speed=9", "unknown settings: speed=9"),
        ("S", "unknown settings: S"),
    ],
)
def test_step_refuses(argument: str, sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        step.read([argument])


def test_recompute() -> None:
    result = run("recompute", "model=tiny", "seq_len=16", "rounds=2")
    assert result.returncode == 0, result.stderr
    table = result.stdout.splitlines()[-7:]
    assert table[0].startswith("none ") and "100.0%" in table[0]
    assert all("[" in line and "100.0%" not in line for line in table[1:])


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("model=huge", "model=huge is not one of small, tiny"),
        ("dtype=fp8", "dtype=fp8 is not one of fp32, bf16, fp64"),
        ("size=S", "unknown settings: size=S"),
    ],
)
def test_recompute_refuses(argument: str, sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        recompute.read([argument])


def test_data(tmp_path: Path) -> None:
    for number in range(40):
        words = " ".join(f"word{(i * i + number) % 97} = {i % 13};" for i in range(3000))
        (tmp_path / f"{number}.txt").write_text(words)
    result = run("data", "--source", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "MB/s" in result.stdout
    assert len(result.stdout.splitlines()) == 10  # three lines, the head and six rows of the table


@pytest.mark.slow
def test_dispatch() -> None:
    if reason := emulate.able():
        pytest.skip(f"this machine cannot emulate a cluster: {reason}")
    result = run("dispatch", "nodes=2", "per_node=1", "tokens=16", "hidden=32", "rounds=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "two_hop against flat" in result.stdout

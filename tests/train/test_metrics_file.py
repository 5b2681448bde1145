"""metrics.jsonl: what was written is what is read back, through kills, torn lines and resumes."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.test_metrics import report
from train.track.metrics_file import JsonlSink, begin_with, read_metrics, read_samples


def write_steps(path: Path, first: int, last: int, finished_steps: int = 0, **values: Any) -> list[str]:
    said: list[str] = []
    sink = JsonlSink(path, finished_steps, said.append)
    for step in range(first, last + 1):
        sink.write(report(step, **values))
    sink.close(failed=False)
    return said


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    path, odd = tmp_path / "run" / "metrics.jsonl", {"train/loss": 0.1 + 0.2, "perf/mfu": 1 / 3}
    write_steps(path, 1, 3, **odd)
    assert read_metrics(path) == [report(step, **odd).values for step in (1, 2, 3)]


def test_lines_are_strict_json_even_when_a_loss_is_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step, loss in enumerate((math.nan, math.inf, -math.inf), start=1):
        write_steps(path, step, step, finished_steps=step - 1, **{"train/loss": loss})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    words = [json.loads(line, parse_constant=refuse)["train/loss"] for line in path.read_text().splitlines()]
    assert words == ["NaN", "Infinity", "-Infinity"]
    losses = [values["train/loss"] for values in read_metrics(path)]
    assert math.isnan(losses[0]) and losses[1:] == [math.inf, -math.inf]


@settings(max_examples=60, deadline=None)
@given(written=st.integers(0, 6), finished=st.integers(0, 6), lost_bytes=st.integers(0, 400))
def test_resume_keeps_each_step_once(
    tmp_path_factory: pytest.TempPathFactory, written: int, finished: int, lost_bytes: int
) -> None:
    """Whatever was written, and wherever a kill tore the file: steps up to the checkpoint, then the new ones."""
    path = tmp_path_factory.mktemp("resume") / "metrics.jsonl"
    write_steps(path, 1, written, **{"train/loss": 1.0})
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - lost_bytes)])
    whole = path.read_bytes().count(b"\n")
    said = write_steps(path, finished + 1, finished + 2, finished_steps=finished, **{"train/loss": 2.0})
    steps = [(values["step"], values["train/loss"]) for values in read_metrics(path)]
    kept = min(whole, finished)
    assert steps == [(step, 1.0) for step in range(1, kept + 1)] + [(finished + 1, 2.0), (finished + 2, 2.0)]
    assert bool(said) == (kept < finished)


def test_a_reader_passes_over_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2)
    for tail in (b'{"step": 3, "train/lo', b'{"step": 3}', b"\x00\x00\x00\n", b"3\n"):
        whole = path.read_bytes()
        path.write_bytes(whole + tail)
        assert [values["step"] for values in read_metrics(path)] == [1, 2]
        path.write_bytes(whole)


def test_a_branch_begins_with_its_parents_steps(tmp_path: Path) -> None:
    parent, branch = tmp_path / "parent", tmp_path / "branch"
    branch.mkdir()
    write_steps(parent / "metrics.jsonl", 1, 9)
    write_steps(branch / "metrics.jsonl", 1, 7)  # of a start that was killed before its first checkpoint
    assert begin_with(parent, branch, 5) == []
    lines = (parent / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert (branch / "metrics.jsonl").read_bytes() == b"".join(lines[:5])
    assert not (branch / "samples.jsonl").exists()
    (parent / "samples.jsonl").write_text(
        '{"step": 4, "tokens": 9, "samples": []}\n{"step": 8, "tokens": 9, "samples": []}\n'
    )
    assert begin_with(parent, branch, 5) == []
    assert [each.step for each in read_samples(branch / "samples.jsonl")] == [4]
    (said,) = begin_with(parent, branch, 12)
    assert "has steps up to 9 of 12" in said
    (said,) = begin_with(tmp_path / "gone", branch, 3)
    assert "has steps up to 0 of 3" in said and read_metrics(branch / "metrics.jsonl") == []


def test_every_step_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import itertools, sys\nfrom pathlib import Path\nfrom tests.train.test_metrics import report\n"
        "from train.track.metrics_file import JsonlSink\nsink = JsonlSink(Path(sys.argv[1]))\n"
        "for step in itertools.count(1):\n    sink.write(report(step))\n    print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 50:
            break
    process.send_signal(signal.SIGKILL)
    last_said = max([50, *(int(line) for line in process.stdout.read().split()[:-1])])
    process.wait()
    steps = [values["step"] for values in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= last_said

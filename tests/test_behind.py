"""A run over a device that runs behind its host: what its host waits for by itself is no wait for another rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.watch import Mark
from tests.behind import HostAhead, behind
from tests.runs import SMALL, prepare_text, train_main
from train import rank
from train.checkpoint.writer import FlatWriter
from train.track.metrics_file import read_metrics
from train.track.sinks import Tracker

LIMIT_S = 1.0
RUN = [f"run.hang_timeout_s={LIMIT_S}", "train.max_steps=2", "checkpoint.interval=1", "evaluate.interval=1"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[HostAhead], tuple[int, list[str]]]:
    """Runs over such a device; the exit code, and what the watchdog had to say, which ends nothing here."""
    text, said = prepare_text(tmp_path / "tokens"), list[str]()
    monkeypatch.setattr(rank, "_end_hung", lambda events, sentence: said.append(sentence))
    torch.set_num_threads(1)

    def go(host: HostAhead) -> tuple[int, list[str]]:
        with behind(host):
            return train_main([*SMALL, *text, *RUN, f"run.dir={tmp_path / 'run'}"]), said

    return go


def test_it_has_the_numbers_of_one_that_does_not(tmp_path: Path) -> None:
    """Of the micro-batch before the first step, which warms a device up, nothing is left."""
    text = prepare_text(tmp_path / "tokens")
    torch.set_num_threads(1)
    settings = [*SMALL, *text, "train.max_steps=2", "evaluate.interval=0", "precision=bf16"]
    found = []
    for name in ("behind", "here"):
        with behind(HostAhead(time.monotonic, 0.001)) if name == "behind" else nullcontext():
            assert train_main([*settings, f"run.dir={tmp_path / name}"]) == 0
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        found.append([{key: row[key] for key in row if key.startswith(("train/", "valid/", "moe/"))} for row in rows])
    assert found[0] == found[1] and len(found[0]) == 2


def slowed(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, times: int) -> list[float]:
    """Have the first calls of a method take longer than a rank may wait for another one; how long each took."""
    original, took = getattr(owner, name), list[float]()

    def slow(*args: Any, **kwargs: Any) -> Any:
        if len(took) < times:
            time.sleep(2 * LIMIT_S)
            took.append(2 * LIMIT_S)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)
    return took


def test_a_slow_disk_slow_data_and_slow_reports_are_no_hang(
    run: Callable[[HostAhead], tuple[int, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = [
        slowed(monkeypatch, FlatWriter, "read_back", 1),  # a save, which the next one waits for
        slowed(monkeypatch, Tracker, "write", 1),
    ]
    host = HostAhead(time.monotonic, 0.001)
    code, said = run(host)
    assert (code, said) == (0, []) and all(slow)
    assert host.device.free_s > 0, "it was the run's device"


class Stuck(HostAhead):
    """One whose device comes into the first wait behind the first step, and not out of it."""

    num_late = 0

    def mark(self) -> Mark:
        self.num_late += bool(self.num_reads["step"])
        if self.num_late == 2:
            self.device.wait_until(math.inf)
        return super().mark()


def test_a_wait_that_never_ends_is_found_behind_a_host_that_does_other_things(
    run: Callable[[HostAhead], tuple[int, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(monkeypatch, FlatWriter, "read_back", 1)
    _, said = run(Stuck(time.monotonic, 0.001))
    assert len(said) == 1 and "has waited 1." in said[0], said
    assert "step 1" in said[0]

"""What wandb has of an evaluation before the first step, and of the texts of prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.test_metrics import report
from tests.train.test_wandb import next_second, runs_of
from tests.wandb_case import wandb_history
from train.track.config import TrackConfig
from train.track.metrics import Sample, StepReport
from train.track.metrics_file import JsonlSink, SamplesSink
from train.track.sinks import Tracker
from train.track.wandb import WandbSink


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    yield


def reports(first: int, last: int) -> list[StepReport]:
    """Steps with a sample in every second of them, the evaluation before the first step included."""
    found = []
    for step in range(first, last + 1):
        values = report(step).values if step else {"step": 0, "train/consumed_tokens": 0, "valid/loss": 7.0}
        found.append(StepReport(values, samples=[Sample("go ", f"on {step}")] if step % 2 == 0 else []))
    return found


def texts(folder: Path) -> dict[int, list[list[object]]]:
    """Rows of the tables in all offline folders, by step."""
    found = {}
    for run in runs_of(folder):
        for step, values in wandb_history(run):
            if path := values.get("samples/path"):
                found[step] = json.loads((run / "files" / path).read_text())["data"]
    return found


def test_step_0_and_samples_are_there_once_through_a_start_without_wandb(tmp_path: Path) -> None:
    files = Tracker([JsonlSink(tmp_path / "metrics.jsonl"), SamplesSink(tmp_path / "samples.jsonl")])
    for each in reports(0, 3):
        files.write(each)
    # wandb comes late, and takes what it lacks from the files; what lies behind the checkpoint is of no run any more.
    sink = WandbSink(TrackConfig(wandb="offline"), tmp_path, {}, finished_steps=2)
    for each in reports(3, 4):
        sink.write(each)
    sink.close(failed=False)
    next_second(tmp_path)
    again = WandbSink(TrackConfig(wandb="offline"), tmp_path, {}, finished_steps=4, run_id=sink.run_id)
    for each in reports(5, 6):
        again.write(each)
    again.close(failed=False)
    assert [step for run in runs_of(tmp_path) for step, _ in wandb_history(run)] == [0, 1, 2, 3, 4, 5, 6]
    assert texts(tmp_path) == {step: [[step, "go ", f"on {step}"]] for step in (0, 2, 4, 6)}

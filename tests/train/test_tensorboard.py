"""TensorBoard's files as its own reader sees them: every step once, through kills and resumes."""

from __future__ import annotations

import importlib.util
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from tests.train.test_metrics import report
from train.track.config import TrackConfig
from train.track.metrics import Sample
from train.track.metrics_file import JsonlSink, SamplesSink
from train.track.tensorboard import TensorboardSink

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs TensorBoard, which is not installed"
)


def read(folder: Path) -> Any:
    """All files of a run, by TensorBoard's reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(name)]


def write(folder: Path, first: int, last: int, finished_steps: int = 0, loss: float = 1.0) -> TensorboardSink:
    """Steps of a run, its last one saved. The sink stays open, as that of a run that is killed."""
    sink = TensorboardSink(folder, finished_steps, say=pytest.fail)
    for step in range(first, last + 1):
        sink.write(report(step, **{"train/loss": loss + step}))
    sink.checkpoint()
    return sink


@needs_tensorboard
def test_every_metric_and_sample_is_there(tmp_path: Path) -> None:
    sink = TensorboardSink(tmp_path, say=pytest.fail)
    first = {"train/loss": None, "valid/loss": 5.5, "valid/web/loss": 5.25}
    values = {name: value for name, value in first.items() if value is not None}
    at_start = report(1, **{"train/loss": None}).values | values | {"step": 0}
    sink.write(type(report())(at_start, samples=[Sample("def ", "f():\n\treturn <b>1</b>")]))
    sink.write(report(1, **{"train/loss": math.nan, "perf/mfu": 1 / 3}))
    sink.close(failed=False)
    assert scalars(tmp_path, "valid/web/loss") == [(0, 5.25)]
    assert scalars(tmp_path, "perf/mfu") == [(1, pytest.approx(1 / 3, rel=1e-6))]
    ((step, loss),) = scalars(tmp_path, "train/loss")
    assert step == 1 and math.isnan(loss)
    (sample,) = read(tmp_path).Tensors("samples/1/text_summary")
    # Indented, Markdown takes it for code and shows it as it is.
    assert sample.tensor_proto.string_val[0].decode() == "    def f():\n    \treturn <b>1</b>\n"


@needs_tensorboard
@pytest.mark.parametrize("killed_after", [3, 5])
def test_a_resumed_run_has_each_step_once(tmp_path: Path, killed_after: int) -> None:
    """Killed in the middle: what its process had not been told to write is lost, what lies past the checkpoint goes."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom tests.train.test_tensorboard import report, write\n"
        f"sink = write(Path(sys.argv[1]), 1, 3)\nfor step in range(4, {killed_after + 1}):\n"
        "    sink.write(report(step, **{'train/loss': 1.0 + step}))\n"
        f"if {killed_after} > 4:\n    sink.checkpoint()\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    write(tmp_path, 4, 6, finished_steps=3, loss=2.0).close(failed=False)
    assert scalars(tmp_path, "train/loss") == [(1, 2.0), (2, 3.0), (3, 4.0), (4, 6.0), (5, 7.0), (6, 8.0)]


@needs_tensorboard
def test_a_run_that_starts_again_forgets_what_was_there(tmp_path: Path) -> None:
    """Killed before its first checkpoint."""
    write(tmp_path, 1, 4).close(failed=True)
    write(tmp_path, 1, 2, loss=5.0).close(failed=False)
    assert scalars(tmp_path, "train/loss") == [(1, 6.0), (2, 7.0)]


@needs_tensorboard
def test_a_run_without_it_before_has_all_its_steps_in_it_after(tmp_path: Path) -> None:
    steps, samples = JsonlSink(tmp_path / "metrics.jsonl"), SamplesSink(tmp_path / "samples.jsonl")
    for step in (1, 2, 3):
        said = report(step, **{"train/loss": 1.0 + step})
        steps.write(said)
        samples.write(type(said)(said.values, samples=[Sample("a", str(step))] if step == 2 else []))
    write(tmp_path, 3, 4, finished_steps=2).close(failed=False)
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in read(tmp_path).Tensors("samples/1/text_summary")] == [2]


@needs_tensorboard
def test_what_fails_is_said_once_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    said: list[str] = []
    sink = TensorboardSink(tmp_path, say=said.append)
    sink.write(report(1))
    sink.checkpoint()
    sink.close(failed=False)
    assert len(said) == 1 and said[0].startswith("TensorBoard could not start (")


def test_without_the_library_a_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    TrackConfig().check_installed()
    words = ["track.tensorboard=true", f"run.dir={tmp_path / 'run'}"]
    for start in ([], ["--multirun", "lr_scheduler.lr=0.1,0.2"]):
        assert main(["local", *words, *start]) == 2
        assert (
            "needs TensorBoard, which is not installed: pip install 'halocline[tensorboard]'" in capsys.readouterr().err
        )
    assert not (tmp_path / "run").exists()

"""Disks that refuse: what is not the work itself is dropped with one warning; what is the work is said and retried."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.launched import Launched
from tests.runs import SMALL, last_checkpoint, prepare_text, train_main
from tests.spawn import STOP_S
from tests.train.test_metrics import report
from train import run_folder
from train.checkpoint.writer import FlatWriter
from train.track.metrics_file import JsonlSink, LoadsSink, read_loads, read_metrics
from train.view.sinks import PictureSink, ReportSink

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    tokens = prepare_text(tmp_path_factory.mktemp("data") / "tokens")
    return [*SMALL, *tokens, "lr_scheduler.warmup_steps=1", "evaluate.interval=0"]


@contextmanager
def disk(place: Path, num_kib: int) -> Iterator[Path]:
    """A small file system of its own."""
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_kib}k", "none", place], stderr=-3).returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path) -> Path:
    """Use every byte that a disk has left; the file that does."""
    path = place / "filler"
    with path.open("ab", buffering=0) as file:
        for num_bytes in (4096, 1):
            try:
                while True:
                    file.write(b"\0" * num_bytes)
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return path


class Refusing:
    """Stands for an open file: it takes part of what a refused call writes, as a disk that fills up does."""

    def __init__(self, file: Any, code: int) -> None:
        self.file, self.code, self.refuses = file, code, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> int:
        if not self.refuses:
            return int(self.file.write(data))
        self.file.write(bytes(data[:10]))
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", REFUSALS)
def test_lines_that_a_disk_refuses_are_said_once_and_leave_a_sound_file(code: int, tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    sink = JsonlSink(path, say=said.append)
    file = sink._file = Refusing(sink._file, code)  # type: ignore[assignment]
    for step in range(1, 10):
        file.refuses = 4 <= step <= 6
        sink.write(report(step))
        sink.checkpoint()
    sink.close(failed=False)
    first, second = said
    assert first.startswith(f"{path} cannot be written ({os.strerror(code)}): step 4, and those after it")
    assert second == f"{path} can be written again from step 7 on; steps 4 to 6 are missing in it"
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 7, 8, 9]
    again: list[str] = []
    sink = JsonlSink(path, finished_steps=8, say=again.append)
    sink.write(report(9))
    sink.close(failed=False)
    assert again == [f"{path} was once not writable: steps 4 to 6 are missing in it, and stay so"]
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 7, 8, 9]


@pytest.mark.parametrize("code", REFUSALS)
def test_a_disk_that_stays_full_costs_the_last_lines(code: int, tmp_path: Path) -> None:
    path, said = tmp_path / "loads.jsonl", list[str]()
    sink = LoadsSink(path, say=said.append)
    file = sink._file = Refusing(sink._file, code)  # type: ignore[assignment]
    for step in range(1, 5):
        file.refuses = step > 2
        each = report(step)
        sink.write(type(each)(**{**vars(each), "loads": [[step, 2]]}))
    sink.close(failed=False)
    assert len(said) == 2 and said[1].endswith("could not be written to the end: steps 3 to 4 are missing in it")
    assert [each.step for each in read_loads(path)] == [1, 2]


def test_pictures_and_pages_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    JsonlSink(tmp_path / "metrics.jsonl").write(report(1))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "there")

    monkeypatch.setattr("train.view.curves.draw_loss", refuse)
    monkeypatch.setattr("train.view.report.page.write_report", refuse)
    picture = PictureSink(tmp_path / "metrics.jsonl", tmp_path / "loss.png", say=said.append)
    for _ in range(3):
        picture.checkpoint()
    picture.close(failed=False)
    (tmp_path / "config.yaml").write_text("{}")
    monkeypatch.setattr("train.view.report.runs.read_run", lambda *_: None)
    ReportSink(tmp_path, say=said.append).close(failed=False)
    why = f"({os.strerror(errno.EDQUOT)}, there)"
    assert said == [
        f"{tmp_path / 'loss.png'} could not be drawn {why}; the run goes on without it",
        f"{tmp_path / 'report.html'} could not be written {why}",
    ]


def test_a_log_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("train")
    with disk(tmp_path / "disk", 64) as place:
        with run_folder.opened(place, 0, (ValueError,)):
            fill(place)
            for number in range(100):
                log.info("%s", f"line {number} " + "x" * 200)
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    (line,) = said
    assert line.startswith(f"warning: {place}/logs/rank_0.log cannot be written (No space left on device")
    assert line.endswith("lines are missing in it; the run goes on")


# --- runs ---


def test_a_run_whose_folder_is_full_trains_to_the_end_and_resumes(settings: list[str], tmp_path: Path) -> None:
    """Its checkpoints lie on another disk. Two ranks under the launcher: people read each warning once."""
    words = [*settings, f"checkpoint.dir={tmp_path / 'checkpoints'}", "checkpoint.interval=10"]
    words += ["train.global_batch_size=2", "train.max_steps=40"]
    with disk(tmp_path / "disk", 256) as place:
        run = place / "run"
        job = ["-m", "launch", "local", *words, "parallel.dp=2", f"run.dir={run}"]
        with Launched(job, run) as launched:
            filler = threading.Thread(target=_fill_when, args=(run / "metrics.jsonl", place))
            filler.start()
            code, out, err = launched.finish()
            filler.join()
        assert code == 0, out + err
        steps = [int(row["step"]) for row in read_metrics(run / "metrics.jsonl")]
        assert steps and steps == list(range(1, len(steps) + 1)) and len(steps) < 40
        warnings = re.findall(r"^warning: (\S+) c\S+ ", out + err, flags=re.M)
        assert warnings.count(f"{run}/metrics.jsonl") == 2, "that it begins, and which steps are missing in the end"
        assert warnings.count(f"{run}/loss.png") == warnings.count(f"{run}/report.html") == 1
        assert "No space left on device" in out + err and "Traceback" not in out + err
        assert last_checkpoint(tmp_path).name == "step-00000040"
        (place / "filler").unlink()
        shutil.rmtree(last_checkpoint(tmp_path))
        assert train_main([*words, f"run.dir={run}"], whole=True) == 0
        kept = [step for step in steps if step <= 30]
        assert [int(row["step"]) for row in read_metrics(run / "metrics.jsonl")] == [*kept, *range(31, 41)]
        assert (run / "loss.png").exists() and (run / "report.html").exists()


def _fill_when(path: Path, place: Path) -> None:
    end_s = time.monotonic() + STOP_S
    while not (path.exists() and path.stat().st_size) and time.monotonic() < end_s:
        time.sleep(0.01)
    fill(place)


def test_a_disk_that_is_too_small_for_a_checkpoint(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A periodic one is retried when the next is due; the final one ends with its exit code, in words of the disk."""
    with disk(tmp_path / "disk", 300) as place:
        words = [*settings, f"checkpoint.dir={place}", f"run.dir={tmp_path / 'run'}", "train.max_steps=3"]
        assert train_main([*words, "checkpoint.interval=1"]) == 4
        out, err = capsys.readouterr()
        say = r"checkpoint of step {} could not be written to \S+: No space left on device \(needs about (\S+) (.)B, "
        for step in (1, 2):
            (warned,) = [line for line in out.splitlines() if re.match("warning: " + say.format(step), line)]
            assert warned.endswith(
                "there is no whole one yet; the run goes on, and tries again when the next one is due"
            )
        found = re.fullmatch(say.format(3) + r"(\S+) kB were free\); there is no whole one yet\n", err)
        assert found is not None, err
        needs, unit, free = found.groups()
        assert float(needs) * {"k": 1, "M": 1000}[unit] > float(free) > 200
        assert not list(place.iterdir()), "nothing is left of what did not fit"
        assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
        # With room the same command trains again what was not saved.
        subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
        assert train_main(words) == 0
        assert last_checkpoint_in(place).name == "step-00000003"


def last_checkpoint_in(place: Path) -> Path:
    return sorted(place.glob("step-*"))[-1]


@pytest.mark.parametrize("code", REFUSALS)
def test_a_periodic_checkpoint_that_a_disk_refuses_is_made_up_for(
    code: int, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = FlatWriter.write_data, list[int]()

    def refuse_first(writer: FlatWriter, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(code, os.strerror(code), "there")
        return original(writer, *args, **kwargs)

    monkeypatch.setattr(FlatWriter, "write_data", refuse_first)
    words = [*settings, f"run.dir={tmp_path}", "train.max_steps=4", "checkpoint.interval=2"]
    assert train_main(words) == 0
    out, err = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if line.startswith("warning: checkpoint of step 2 could not be")]
    assert os.strerror(code) in line and err == ""
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-00000004"]


def test_a_timeline_that_cannot_be_written(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "traces").write_text("in the way")
    words = [*settings, f"run.dir={tmp_path}", "train.max_steps=2", "profile.steps=[1]"]
    assert train_main(words) == 0
    out = capsys.readouterr().out
    path = tmp_path / "traces" / "step-00000001.json"
    assert len(re.findall(f"^warning: {path} could not be written: .*; the run goes on without it$", out, re.M)) == 1
    assert last_checkpoint(tmp_path).name == "step-00000002"

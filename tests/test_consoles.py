"""Consoles that go away: a run trains and saves to the end whatever becomes of its standard streams."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launched import ROOT
from tests.runs import SMALL, environment, last_checkpoint, prepare_text
from tests.spawn import STOP_S
from train.cli.console import Console
from train.track.metrics_file import read_metrics

STEPS = 3


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    tokens = prepare_text(tmp_path_factory.mktemp("data") / "tokens")
    return [*SMALL, *tokens, f"train.max_steps={STEPS}", "lr_scheduler.warmup_steps=1", "track.log_interval=1"]


# --- streams ---


class Lost(io.TextIOWrapper):
    """A stream whose first `whole` texts can be written."""

    def __init__(self, code: int, whole: int) -> None:
        super().__init__(io.BytesIO(), "utf-8")
        self.code, self.left = code, whole

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(text)

    def isatty(self) -> bool:
        if self.left < 0:
            raise OSError(self.code, os.strerror(self.code))
        return False


@pytest.mark.parametrize(
    ("code", "level"),
    [
        (errno.EPIPE, logging.INFO),
        (errno.EIO, logging.INFO),
        (errno.ENOSPC, logging.WARNING),
        (errno.EDQUOT, logging.WARNING),
        (errno.ESTALE, logging.WARNING),
    ],
)
def test_a_stream_that_is_lost_is_dropped_and_said_once(
    code: int, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What people lost on purpose is no warning: a warning is for the console, too."""
    stream = Lost(code, whole=2)
    console = Console(stream, "standard output")
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            assert console.write("text\n") == 5
        assert console.isatty() is False
        console.flush()
        print("more", file=console, flush=True)
    ((said, at),) = [(record.getMessage(), record.levelno) for record in caplog.records]
    assert said == f"standard output is gone ({os.strerror(code)}): nothing more is shown there" == console.trouble
    assert at == level


def test_a_closed_stream_a_slow_one_and_a_poor_alphabet_end_nothing() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    console = Console(stream, "standard error")
    console.write("é 数\n")
    console.flush()
    assert stream.buffer.getvalue() == b"\\xe9 \\u6570\n"  # type: ignore[attr-defined]
    slow = Console(Lost(errno.EAGAIN, whole=0), "standard output")
    assert slow.write("late") == 4 and not slow.trouble, "a terminal that does not keep up is not gone"
    stream.close()
    console.write("more")
    assert console.trouble == "standard error is gone (it is closed): nothing more is shown there"


# --- programs ---


@contextmanager
def stream(kind: str) -> Iterator[int]:
    """A file descriptor whose reader or room is gone."""
    if kind == "a full disk":
        ours = os.open("/dev/full", os.O_WRONLY)
    elif kind == "a reader that leaves":
        theirs, ours = os.pipe()
        os.close(theirs)
    else:
        theirs, ours = os.openpty()
        os.close(theirs)
    try:
        yield ours
    finally:
        os.close(ours)


def without(*descriptors: int) -> Callable[[], None]:
    """What a shell does for `>&-`: the streams are closed from the start."""

    def close() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    return close


def call(words: list[str], out: int | None, err: int | None, before: Callable[[], None] | None = None) -> int:
    ended = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=dict(environment()),
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        preexec_fn=before,
        timeout=STOP_S,
    )
    return ended.returncode


def check_whole(folder: Path, *sentences: str) -> None:
    """The run trained and saved all, and its log says once what became of each stream."""
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [*range(1, STEPS + 1)]
    assert last_checkpoint(folder).name == f"step-{STEPS:08d}"
    log = (folder / "logs" / "rank_0.log").read_text()
    for sentence in sentences:
        assert len(re.findall(sentence, log)) == 1, (sentence, log)
    assert "Traceback" not in log


def test_a_rank_trains_on_without_its_console(settings: list[str], tmp_path: Path) -> None:
    """Its terminal was closed, and its standard error goes to a disk that is full."""
    with stream("a closed terminal") as stdout, stream("a full disk") as stderr:
        assert call(["train", *settings, f"run.dir={tmp_path}"], stdout, stderr) == 0
    check_whole(tmp_path, r"standard output is gone \(Input/output error\)")


def test_a_rank_trains_on_with_streams_that_were_closed_from_the_start(settings: list[str], tmp_path: Path) -> None:
    assert call(["train", *settings, f"run.dir={tmp_path}"], None, None, without(0, 1, 2)) == 0
    check_whole(tmp_path, "standard output was closed from the start", "standard error was closed from the start")


def test_a_job_trains_on_when_its_reader_leaves(settings: list[str], tmp_path: Path) -> None:
    """`python -m launch local ... | head -1`, with two ranks that have no standard error."""
    words = [*settings, "parallel.dp=2", f"run.dir={tmp_path}", "train.max_steps=3"]
    with stream("a reader that leaves") as stdout:
        assert call(["launch", "local", *words], stdout, None, without(2)) == 0
    check_whole(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--help"],
        ["launch", "--help"],
        ["launch", "local", "--help"],
        ["launch", "config", "experiment=first_run"],
    ],
)
def test_words_for_a_reader_that_leaves_are_no_error(words: list[str], tmp_path: Path) -> None:
    with stream("a reader that leaves") as stdout, (tmp_path / "err").open("w") as stderr:
        code = call(words, stdout, stderr.fileno())
    assert (code, (tmp_path / "err").read_text()) == (0, "")

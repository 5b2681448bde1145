"""A rank that dies or stands still: every other one says what it did and for whom it waited, and the job ends."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.launched import Forked, last_step, local, torchrun
from tests.runs import SMALL, prepare_text, run_in
from tests.spawn import STOP_S, Ranks

FOUR = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat"]
# The second step has so many micro-batches that whatever happens after the first happens in the pipeline.
LONG = ["train.max_steps=3", "train.global_batch_size=4008", "evaluate.interval=0"]
RAMP = ["train.batch_ramp.start=8", "train.batch_ramp.tokens=1", "train.batch_ramp.quantum=4000"]
# For a rank that was stopped. A machine that is busy may keep one from its work for seconds, too, as the run begins.
TIMEOUT_S = 12
WHERE = r"(\S+ \(micro-batch \d+ on stage \d+[^)]*\)|start of the pipeline)"
WORDS = rf"step 2, {WHERE}: (has waited|waited|was about to wait)\b.* for .* ranks? \d"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


def settings(text: list[str], timeout_s: float = TIMEOUT_S) -> list[str]:
    return [*SMALL, *text, *FOUR, *LONG, *RAMP, f"run.hang_timeout_s={timeout_s}"]


def processor_s(pid: int) -> float:
    """For how long a process has had a processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def settle(ranks: Callable[[], list[int]]) -> None:
    """Wait until all ranks are in the second step's pipeline: the first is in `metrics.jsonl`, so all have come to its
    end, and behind that each has worked on for longer than an end takes, however long it had to wait for a core."""
    pids = ranks()
    assert len(pids) == 4
    begun_s, end_s = [processor_s(pid) for pid in pids], time.monotonic() + STOP_S
    while min(processor_s(pid) - begun for pid, begun in zip(pids, begun_s, strict=True)) < 0.5:
        assert time.monotonic() < end_s, "they stand still"
        time.sleep(0.05)


def last_words(folder: Path, rank: int) -> str:
    lines = (folder / "logs" / f"rank_{rank}.log").read_text().splitlines()
    return next((line for line in reversed(lines) if " ERROR " in line), "")


def assert_others_say_what_they_did(folder: Path, struck: int) -> None:
    for rank in set(range(4)) - {struck}:
        who = rf"ERROR rank {rank} \(pipeline rank {rank // 2}, data rank {rank % 2}\), "
        assert re.search(who + WORDS, last_words(folder, rank)), last_words(folder, rank)
    assert not last_words(folder, struck)


def test_a_stopped_rank_is_found_and_ended(tmp_path: Path, text: list[str]) -> None:
    with local(settings(text), tmp_path) as job:
        job.wait_for_step(1)
        settle(job.ranks)
        ranks = job.ranks()
        job.strike(1, signal.SIGSTOP)
        code, _, error = job.finish()
    assert code == 5
    assert_others_say_what_they_did(tmp_path, 1)
    assert "has waited" in "".join(last_words(tmp_path, rank) for rank in (0, 2, 3))
    why = error.strip().splitlines()[-1]
    log = tmp_path / "logs" / "rank_1.log"
    assert why.startswith(f"rank 1 is stopped, and others wait for it; its log: {log}; rank "), why
    assert re.search(WORDS, why)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_a_killed_rank_is_missed_by_all_others(tmp_path: Path, text: list[str]) -> None:
    job = Forked(settings(text, timeout_s=STOP_S), tmp_path, 4)
    job.wait_for_step(1)
    settle(lambda: [process.pid or 0 for process in job.processes])
    job.processes[2].kill()
    codes = job.codes(patience_s=STOP_S)
    assert codes[2] == -signal.SIGKILL and [codes[rank] for rank in (0, 1, 3)] == [6, 6, 6]
    assert_others_say_what_they_did(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("struck", range(4))
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_any_rank(tmp_path: Path, text: list[str], struck: int, number: signal.Signals) -> None:
    with local([*settings(text), "pipeline.schedule=dualpipe"], tmp_path) as job:
        job.wait_for_step(1)
        settle(job.ranks)
        job.strike(struck, number)
        code, _, error = job.finish()
    assert code == (5 if number == signal.SIGSTOP else 137)
    assert error.strip().splitlines()[-1].startswith(f"rank {struck} "), error
    assert_others_say_what_they_did(tmp_path, struck)


@pytest.mark.slow
def test_under_torchrun_every_rank_says_it_on_standard_error(tmp_path: Path, text: list[str]) -> None:
    with torchrun(settings(text), tmp_path, 4) as job:
        job.wait_for(lambda: last_step(tmp_path) >= 1)
        settle(job.ranks)
        job.strike(3, signal.SIGSTOP)
        code, _, error = job.finish()
    assert code != 0
    for rank in range(3):
        assert re.search(rf"^rank {rank} \(.*\), {WORDS}", error, re.M), error


@contextmanager
def long_forwards(folder: Path) -> Iterator[None]:
    """Both ranks take longer for a forward than the timeout, and are done with it at the same moment."""
    from train.stage import Stage

    original = Stage.forward

    def meet(name: str) -> None:
        (folder / f"{name}-{os.environ['RANK']}").touch()
        while len(list(folder.glob(f"{name}-*"))) < 2:
            time.sleep(0.01)

    def forward(self: Any, micro_batch: int, x: Any) -> Any:
        if self.model.training:
            meet(f"begin {micro_batch}")
            time.sleep(1.5 * TIMEOUT_S)
            meet(f"end {micro_batch}")
        return (yield from original(self, micro_batch, x))

    with mock.patch.object(Stage, "forward", forward):
        yield


@pytest.mark.slow
def test_work_that_takes_longer_than_the_timeout_is_no_hang(ranks: Ranks, tmp_path: Path, text: list[str]) -> None:
    """All ranks compute for longer than the timeout between two exchanges of one step."""
    alone = ["parallel.dp=2", f"run.hang_timeout_s={TIMEOUT_S}", "train.max_steps=1", "train.global_batch_size=2"]
    (tmp_path / "met").mkdir()
    run = run_in(ranks, tmp_path / "run", [*SMALL, *text, *alone], 2, partial(long_forwards, tmp_path / "met"))
    assert len(run.rows) == 1 and run.rows[0]["perf/step_s"] > TIMEOUT_S

"""Signals as requests to stop: what each asks for, when one ends the process, and what is left as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.spawn import STOP_S
from train.stopping import SIGNALS, StopRequest, stop_signals, tell_torchrun, within

INT, TERM, HUP, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1


def wait_for(happened: Callable[[], bool]) -> None:
    end_s = time.monotonic() + STOP_S
    while not happened():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def request(now_s: list[float]) -> tuple[StopRequest, list[tuple[int, str]]]:
    ends: list[tuple[int, str]] = []
    return StopRequest(lambda *end: ends.append(end), clock=lambda: now_s[0]), ends


@pytest.mark.parametrize("number", SIGNALS)
def test_before_there_is_something_to_save_one_ends(number: signal.Signals) -> None:
    stop, ends = request([0.0])
    stop.take(number)
    assert ends == [(128 + number, f"stopped by {number.name} before the first step: there was nothing to save")]


@pytest.mark.parametrize(
    ("numbers", "ends_at"),
    [
        ([INT, INT], 2),
        ([TERM, TERM], 2),
        ([INT, TERM], None),  # torchrun's after its own, or a scheduler's after the user's
        ([TERM, INT, TERM], 3),
        ([HUP, HUP, HUP], None),  # of a terminal that closes
        ([USR1, USR1, TERM], None),
        ([USR1, INT, HUP, INT], 4),
    ],
)
def test_a_second_of_its_kind_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, numbers: list[signal.Signals], ends_at: int | None
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    stop, ends = request([0.0])
    stop.honour()
    for count, number in enumerate(numbers, 1):
        stop.take(number)
        assert stop.asked and bool(ends) == stop.insisted == (ends_at == count)
    assert all(code == 128 + numbers[-1] and "ended at once" in sentence for code, sentence in ends)


def test_what_a_launcher_passes_on_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    now_s = [0.0]
    stop, ends = request(now_s)
    stop.honour()
    for now_s[0] in (0.0, 0.5, 1.9):
        stop.take(TERM)
    assert not ends
    now_s[0] = 2.1
    stop.take(TERM)
    assert len(ends) == 1


def test_a_process_that_leaves_with_words_of_its_own_is_not_disturbed() -> None:
    stop, ends = request([0.0])
    stop.leave()
    for _ in range(3):
        stop.take(TERM)
    assert not ends


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_are_heard_and_handlers_restored(number: signal.Signals) -> None:
    before, ends = {each: signal.getsignal(each) for each in SIGNALS}, list[int]()
    with stop_signals(lambda code, _: ends.append(code)) as stop:
        stop.honour()
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked  # at once, where the main thread runs
        wait_for(lambda: bool(stop._first_s))
    assert {each: signal.getsignal(each) for each in SIGNALS} == before
    assert not ends


BLOCKED = """
import fcntl, sys
from train.stopping import end_now, stop_signals
with stop_signals(end_now) as stop:
    if sys.argv[2] == "honour":
        stop.honour()
    print("ready", flush=True)
    fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX)
"""


@pytest.mark.parametrize(("how", "num_signals"), [("not yet", 1), ("honour", 2)])
def test_a_process_that_waits_in_a_library_ends_all_the_same(tmp_path: Path, how: str, num_signals: int) -> None:
    import fcntl

    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = subprocess.Popen(
            [sys.executable, "-c", BLOCKED, held.name, how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert waiting.stdout is not None and waiting.stdout.readline() == "ready\n"
        for _ in range(num_signals):
            waiting.send_signal(INT)
            time.sleep(0.3 if num_signals > 1 else 0)  # the kernel makes one of two that are not taken between
        _, error = waiting.communicate(timeout=STOP_S)
    assert waiting.returncode == 130
    assert error == (
        "stopped by SIGINT before the first step: there was nothing to save\n"
        if num_signals == 1
        else "asked a second time to stop, by SIGINT: ended at once, without a further checkpoint\n"
    )


def test_a_hang_up_that_is_ignored_stays_so() -> None:
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        with stop_signals(print) as stop:
            os.kill(os.getpid(), HUP)
            assert not stop.asked
        assert signal.getsignal(HUP) == signal.SIG_IGN
    finally:
        signal.signal(HUP, before)


def test_a_limit_ends_a_block_that_lasts() -> None:
    ended: list[str] = []
    with within(0.01, lambda: ended.append("late")):
        wait_for(lambda: bool(ended))
    with within(STOP_S, lambda: ended.append("never")):
        pass
    assert ended == ["late"]


def test_torchrun_shows_our_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    tell_torchrun("rank 3 lost rank 2")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=6, error_file=str(tmp_path / "error.json"))
    assert "traceback : rank 3 lost rank 2\n" in str(ChildFailedError("train", {3: failure}))

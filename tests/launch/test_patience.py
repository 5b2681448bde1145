"""A launcher waits for ranks by what they do: on a busy machine a moment of work takes long."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from launch import patience
from launch.patience import STILL_S, WORK_S, Patience
from tests.launch.events import STOP_S

Looks = Callable[[dict[int, tuple[float, bool]]], None]


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """Sets what each process is seen to have done: seconds of processor time, and whether it is awake."""
    seen: dict[int, tuple[float, bool]] = {}
    monkeypatch.setattr(patience, "_looked_at", seen.__getitem__)
    return seen.update


def test_ranks_that_stand_still_are_soon_given_up(look: Looks) -> None:
    waits = Patience()
    look({1: (5.0, False), 2: (7.0, False)})
    assert not waits.is_over(100.0, [1, 2]) and not waits.is_over(100.0 + STILL_S, [1, 2])
    assert waits.is_over(100.1 + STILL_S, [1, 2])


def test_one_that_gets_a_little_of_a_busy_machine_is_waited_for(look: Looks) -> None:
    waits, now_s, worked_s = Patience(), 0.0, 5.0
    while worked_s - 5.0 < WORK_S - 0.1:  # for most of an hour
        now_s, worked_s = now_s + STILL_S, worked_s + 0.001
        look({1: (worked_s, False), 2: (7.0, False)})
        assert not waits.is_over(now_s, [1, 2])
    assert now_s > 3000


def test_one_that_waits_for_a_processor_is_waited_for(look: Looks) -> None:
    waits = Patience()
    look({1: (5.0, True)})
    assert not any(waits.is_over(float(now_s), [1]) for now_s in range(1000))
    look({1: (5.0, False)})
    assert not waits.is_over(1000.0, [1]) and waits.is_over(1001.1 + STILL_S, [1])


def test_one_that_works_on_is_not_about_to_say_anything(look: Looks) -> None:
    waits, over = Patience(), []
    for tenth in range(100):
        look({1: (tenth / 10, True)})
        over.append(waits.is_over(tenth / 10, [1]))
    assert over.index(True) == pytest.approx((WORK_S + STILL_S) * 10, abs=2)


def test_what_a_real_process_does_is_seen() -> None:
    code = "import sys, time\nsys.stdin.readline()\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        end_s = time.monotonic() + STOP_S
        while patience._looked_at(process.pid)[1]:
            assert time.monotonic() < end_s
        before_s, _ = patience._looked_at(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        assert patience._looked_at(process.pid)[0] - before_s > 0.2
        process.stdin.write(b"\n")
    assert patience._looked_at(process.pid) == (0.0, False)
    assert patience._looked_at(os.getpid())[1]

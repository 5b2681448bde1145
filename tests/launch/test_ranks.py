"""Ranks are started, watched and ended together, and the one that failed is named; here they are plain Python."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import ranks
from launch.ranks import Ended, HeldPort, start_ranks
from tests.launch import events
from tests.launch.events import STOP_S, has_been_seen_to_end

ROOT = Path(__file__).resolve().parents[2]
# Ranks wait for what others have done, and not for a time by which they should have done it.
START = f"""
import os, signal, sys, time
from functools import partial
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.launch import events
rank, logs = int(os.environ["RANK"]), Path(sys.argv[1])
note, has_ended, is_stopped, has_noted = (
    partial(each, logs) for each in (events.note, events.has_been_seen_to_end, events.is_stopped, events.has_noted)
)
wait_for = events.wait_for
note(f"pid_{{rank}}", str(os.getpid()))
def explain(text):
    print(f"2030-01-01 00:00:00,000 ERROR {{text}}", file=sys.stderr, flush=True)
"""


def start(body: str, num_ranks: int, logs: Path) -> Ended:
    """Whatever the body does, the ranks end long before those would that sleep on."""
    start_s = time.monotonic()
    ended = start_ranks([sys.executable, "-c", START + textwrap.dedent(body), str(logs)], num_ranks, logs)
    assert time.monotonic() - start_s < STOP_S
    return ended


@pytest.fixture
def hold_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], bool]], None]:
    """Lets no time pass for the launcher's patience until something has happened."""

    def until(happened: Callable[[], bool]) -> None:
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() if happened() else 0.0, sleep=time.sleep)
        monkeypatch.setattr(ranks, "time", clock)

    return until


def never() -> bool:
    return False


def test_the_environment_of_torchrun(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    print(*[os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")])
    """
    assert start(body, 3, tmp_path) == Ended(0)
    # Rank 0 speaks to the terminal, the others to their logs.
    assert capfd.readouterr().out == "0 0 3 3 127.0.0.1\n"
    assert [(tmp_path / f"rank_{rank}.log").read_text() for rank in range(3)] == [
        "",
        "1 1 3 3 127.0.0.1\n",
        "2 2 3 3 127.0.0.1\n",
    ]


def test_a_killed_rank_is_named_not_its_victims(tmp_path: Path, hold_time: Callable) -> None:
    body = """
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank != 1:
        time.sleep(1200)
    wait_for(lambda: has_ended(2))
    explain("rank 1: connection closed by peer")
    sys.exit(1)
    """
    hold_time(lambda: has_been_seen_to_end(tmp_path, 1))
    ended = start(body, 4, tmp_path)
    assert ended == Ended(137, f"rank 2 was ended by SIGKILL; its log: {tmp_path / 'rank_2.log'}")


def test_the_first_to_fail_is_named_with_its_last_words(tmp_path: Path, hold_time: Callable) -> None:
    hold_time(never)
    (tmp_path / "rank_1.log").write_text("2030-01-01 00:00:00,000 ERROR of an earlier job\n")
    body = """
    if rank == 1:
        print("RuntimeError: out of ideas", file=sys.stderr)
        sys.exit(1)
    wait_for(lambda: has_ended(1))
    explain("a victim's words")
    sys.exit(2)
    """
    ended = start(body, 2, tmp_path)
    why = f"rank 1 failed with exit code 1 (RuntimeError: out of ideas); its log: {tmp_path / 'rank_1.log'}"
    assert ended == Ended(1, why)


def test_what_all_ranks_say_is_said_once(tmp_path: Path, hold_time: Callable) -> None:
    hold_time(never)
    body = """
    explain("train.seq_len=7 is odd")
    print("a library's farewell", file=sys.stderr)
    sys.exit(2)
    """
    assert start(body, 3, tmp_path) == Ended(2, "train.seq_len=7 is odd")


HANG = "rank {0}, step 2, F0.1 (micro-batch 1 on stage 0): has waited 3.0 s for rows from rank {1}"


def test_the_rank_that_all_others_wait_for_is_the_cause(tmp_path: Path, hold_time: Callable) -> None:
    body = f"""
    if rank == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_for(lambda: is_stopped(3))
    explain({HANG!r}.format(rank, [1, 2, 3][rank]))
    sys.exit(5 if rank == 0 else 6)
    """
    hold_time(lambda: all(has_been_seen_to_end(tmp_path, rank) for rank in range(3)))
    ended = start(body, 4, tmp_path)
    log = tmp_path / "rank_3.log"
    assert ended == Ended(5, f"rank 3 is stopped, and others wait for it; its log: {log}; {HANG.format(0, 1)}")


def test_the_wait_in_which_a_library_ends_a_rank_is_told(tmp_path: Path, hold_time: Callable) -> None:
    """NCCL aborts a process from a thread of its own, in words of its own: what the rank had noted says why."""
    body = f"""
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_for(lambda: is_stopped(2))
    print("2030-01-01 00:00:00,000 INFO " + {HANG!r}.format(rank, 2), file=sys.stderr, flush=True)
    if rank == 1:
        print("terminate called after throwing an instance of 'c10::DistBackendError'", file=sys.stderr, flush=True)
        os.abort()
    time.sleep(1200)
    """
    hold_time(lambda: has_been_seen_to_end(tmp_path, 1))
    ended = start(body, 3, tmp_path)
    why = f"rank 2 is stopped, and others wait for it; its log: {tmp_path / 'rank_2.log'}"
    assert ended == Ended(6, f"{why}; rank 1 was ended by SIGABRT; {HANG.format(1, 2)}")


def test_ranks_that_wait_in_a_circle_have_no_culprit(tmp_path: Path, hold_time: Callable) -> None:
    hold_time(never)
    body = f"""
    explain({HANG!r}.format(rank, (rank + 1) % 3))
    sys.exit(5)
    """
    assert start(body, 3, tmp_path) in [Ended(5, HANG.format(rank, (rank + 1) % 3)) for rank in range(3)]


def test_a_failure_comes_before_those_that_miss_the_rank(tmp_path: Path, hold_time: Callable) -> None:
    hold_time(never)
    body = f"""
    if rank == 1:
        wait_for(lambda: has_ended(0) and has_ended(2))
        explain("out of memory")
        sys.exit(1)
    explain({HANG!r}.format(rank, 1))
    sys.exit(6)
    """
    ended = start(body, 3, tmp_path)
    assert ended == Ended(1, f"rank 1 failed with exit code 1 (out of memory); its log: {tmp_path / 'rank_1.log'}")


def _launcher(body: str, logs: Path) -> subprocess.Popen[str]:
    code = f"""
from pathlib import Path
from launch.ranks import start_ranks
import sys
command = [sys.executable, "-c", {START + textwrap.dedent(body)!r}, {str(logs)!r}]
print(start_ranks(command, 2, Path({str(logs)!r})), flush=True)
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


SAVES = """
def save(*_):
    print("saved", rank, flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
note(f"ready_{rank}")
while True:
    time.sleep(0.1)
"""


def _wait_for_ready(logs: Path) -> None:
    events.wait_for(lambda: all(events.has_noted(logs, f"ready_{rank}") for rank in range(2)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on(tmp_path: Path, number: int) -> None:
    launcher = _launcher(SAVES, tmp_path)
    _wait_for_ready(tmp_path)
    launcher.send_signal(number)
    out, _ = launcher.communicate(timeout=STOP_S)
    assert "saved 0" in out and repr(Ended(0, "", True)) in out
    assert "saved 1" in (tmp_path / "rank_1.log").read_text()


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    launcher = _launcher(SAVES, tmp_path)
    _wait_for_ready(tmp_path)
    launcher.kill()
    # The pipe is at its end when rank 0, which shares it, has ended too.
    assert "saved 0" in launcher.communicate(timeout=STOP_S)[0]


def test_a_rank_that_does_not_save_in_time_is_killed(tmp_path: Path, hold_time: Callable) -> None:
    """The grace of a stop begins when rank 0 has saved."""
    body = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN if rank == 1 else lambda *_: sys.exit(0))
    note(f"ready_{rank}")
    if rank == 1:
        wait_for(lambda: has_noted("ready_0"))
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(1200)
    """
    hold_time(partial(has_been_seen_to_end, tmp_path, 0))
    ended = start(body, 2, tmp_path)
    assert ended.was_asked and ended.code == 1
    assert "ranks 1 did not save and end within" in ended.reason
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_held_port_is_nobody_elses_and_a_store_may_listen_there() -> None:
    with HeldPort() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.socket() as store:
            store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            store.bind(("0.0.0.0", port))
            store.listen()
            with socket.create_connection(("127.0.0.1", port)):
                pass

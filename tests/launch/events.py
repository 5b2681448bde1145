"""What plain ranks and their test tell each other: by files and by the process table, never by the time of day."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

STOP_S = 600.0  # what takes longer hangs


def note(folder: Path, name: str, text: str = "") -> None:
    """A file that is there with its text or not at all."""
    (folder / f"{name}.aside").write_text(text)
    (folder / f"{name}.aside").rename(folder / name)


def wait_for(happened: Callable[[], bool]) -> None:
    end_s = time.monotonic() + STOP_S
    while not happened():
        assert time.monotonic() < end_s, "it never happened"
        time.sleep(0.01)


def has_noted(folder: Path, name: str) -> bool:
    return (folder / name).exists()


def has_been_seen_to_end(folder: Path, rank: int) -> bool:
    """Whether a rank, which has noted its "pid_RANK", has ended and its launcher has asked for its exit code."""
    if not has_noted(folder, f"pid_{rank}"):
        return False
    try:
        os.kill(int((folder / f"pid_{rank}").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def is_stopped(folder: Path, rank: int) -> bool:
    """Whether SIGSTOP holds a rank."""
    if not has_noted(folder, f"pid_{rank}"):
        return False
    stat = Path("/proc") / (folder / f"pid_{rank}").read_text() / "stat"
    return stat.read_text().rsplit(")", 1)[1].split()[0] == "T"

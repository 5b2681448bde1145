"""Starts the ranks of one job on this machine, watches them and ends them together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

# A worker saves after the step it is in; past this it is killed, and the launcher says so.
GRACE_S = 60.0
# Ranks whose peer died fail by themselves within moments; a little patience finds the one that failed first.
PATIENCE_S = 2.0
# glibc hands every large block back to the kernel and faults it in again each step: 5 to 10 % of a small step.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "67108864"}


def start_ranks(command: Sequence[str], num_ranks: int, logs: Path) -> int:
    """Run `command` once per rank with torchrun's environment, and wait for all of them.

    Rank 0 keeps this process's standard output; everything else that a rank prints goes to `logs/rank_R.log`.
    SIGTERM and SIGINT are passed on as SIGTERM: the ranks save and end.

    Returns the exit code of the job: 0, or that of the rank that failed first, which a sentence on standard error names.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with _signals() as asked:
        ranks, files = _spawn(command, num_ranks, logs)
        try:
            return _watch(ranks, asked, logs)
        finally:
            _kill(ranks)
            for file in files:
                file.close()


def _spawn(command: Sequence[str], num_ranks: int, logs: Path) -> tuple[list[subprocess.Popen[bytes]], list[IO[bytes]]]:
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    polite = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks)), **MALLOC}
    if num_ranks > 1:
        # Threads that spin at a barrier starve the other ranks of the same cores.
        polite["OMP_WAIT_POLICY"] = "passive"
    ranks, files = [], []
    for rank in range(num_ranks):
        log = (logs / f"rank_{rank}.log").open("ab")
        files.append(log)
        ranks.append(
            subprocess.Popen(
                list(command),
                env={**polite, **os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=None if rank == 0 else log,
                stderr=log,
                # A terminal's Ctrl-C reaches this process alone, which then asks the ranks to save.
                start_new_session=True,
            )
        )
    return ranks, files


def _watch(ranks: list[subprocess.Popen[bytes]], asked: list[int], logs: Path) -> int:
    failed_at_s = asked_at_s = None
    while any(rank.poll() is None for rank in ranks):
        now_s = time.monotonic()
        if asked and asked_at_s is None:
            asked_at_s = now_s
            for rank in ranks:
                if rank.poll() is None:
                    rank.terminate()
        if failed_at_s is None and any(rank.returncode for rank in ranks):
            failed_at_s = now_s
        if failed_at_s is not None and now_s - failed_at_s > PATIENCE_S:
            break
        if asked_at_s is not None and now_s - asked_at_s > GRACE_S:
            print(f"the ranks did not save and end within {GRACE_S:.0f} s and were killed", file=sys.stderr)
            return 1
        time.sleep(0.05)
    return _verdict(ranks, logs)


def _verdict(ranks: list[subprocess.Popen[bytes]], logs: Path) -> int:
    """The job's exit code; says which rank failed. One killed by a signal is the cause, the others its victims."""
    codes = [rank.poll() for rank in ranks]
    failed = [number for number, code in enumerate(codes) if code]
    if not failed:
        return 0
    first = min(failed, key=lambda number: (codes[number] or 0) > 0)
    code = codes[first] or 1
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    log = logs / f"rank_{first}.log"
    print(f"{last_words(log)}\nrank {first} {how}; its log: {log}".strip(), file=sys.stderr)
    return code if code > 0 else 128 - code


def last_words(log: Path) -> str:
    """The last line of a log, where a rank says why it stops; empty if there is none."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].strip() if lines else ""


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    for rank in ranks:
        rank.wait()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them."""
    asked: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])

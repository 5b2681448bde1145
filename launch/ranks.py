"""Starts the ranks of one job on this machine, watches them and ends them together."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launch.patience import Patience
from launch.warm import ForkedRank, follow_into_death, own_path
from parallel.watch import blamed
from train.stopping import StopRequest, end_now, stop_signals

# A worker saves after the step it is in; past this it is killed, and the launcher says so.
GRACE_S = 60.0
POLL_S = 0.05
# What a rank's libraries read as they are loaded, where the environment does not say otherwise.
POLITE = {
    # glibc hands every large block back to the kernel and faults it in again each step: 5 to 10 % of a small step.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
    # Threads that spin at a barrier starve the other ranks of the same cores.
    "OMP_WAIT_POLICY": "passive",
}
# With these codes the ranks end together, and their last words are a sentence for people (see train/rank.py).
EXPLAINED = (2, 3, 4)
# With these a rank ends because of another one, for which it waited too long or which broke off: it says which.
HUNG, LOST = 5, 6


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit code, a sentence that says why unless that is 0, whether it was asked to stop."""

    code: int
    reason: str = ""
    was_asked: bool = False


class Running(Protocol):
    """A job whose ranks have been started."""

    def poll(self) -> Ended | None:
        """How it ended; None while it runs."""

    def stop(self, at_once: bool = False) -> None:
        """Ask it to save and end, or end it at once."""

    def kill(self) -> None:
        """End it at once, unheard."""


class Process(Protocol):
    """A running rank: what is used of `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int | None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


# (environment, its log, file for its standard output or None for this process's) -> the rank, started.
Start = Callable[[Mapping[str, str], Path, Path | None], Process]


def program(command: Sequence[str]) -> Start:
    """Ranks as programs of their own."""

    def start(environment: Mapping[str, str], log: Path, out: Path | None) -> Process:
        with ExitStack() as files:
            return subprocess.Popen(
                list(command),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if out is None else files.enter_context(out.open("ab")),
                stderr=files.enter_context(log.open("ab")),
                # A terminal's Ctrl-C reaches the launcher alone, which then asks the ranks to save.
                start_new_session=True,
                preexec_fn=follow_into_death if sys.platform == "linux" else None,
            )

    return start


def forked(module: str, arguments: Sequence[str]) -> Start:
    """Ranks that call `module.program(arguments)`, forked from the process of `launch.warm.warm_up`."""
    return lambda environment, log, out: ForkedRank(module, arguments, environment, log, out)


@dataclass
class _Rank:
    process: Process
    log: Path
    log_start: int  # bytes that earlier jobs have written


def start_ranks(command: Sequence[str], num_ranks: int, logs: Path) -> Ended:
    """Run `command` once per rank with torchrun's environment, and wait for all of them.

    Rank 0 keeps this process's standard output; everything else that a rank prints goes to `logs/rank_R.log`.
    A signal that asks to stop is passed on as SIGTERM: the ranks save and end. A second SIGINT or SIGTERM ends them at
    once. If this process dies, they save and end, too.

    The job's exit code is 0, or that of the rank that failed first, which the reason names.
    """
    with stop_signals(end_now, insist=noted) as stop, Ranks(program(command), num_ranks, logs) as ranks:
        stop.honour()
        return await_end(ranks, stop)


def noted(_code: int, _sentence: str) -> None:
    """For `stop_signals`: a second request is noted, for `await_end` to see."""


def await_end(job: Running, stop: StopRequest) -> Ended:
    """How a job ends, which is told of requests to stop."""
    while (ended := job.poll()) is None:
        if stop.asked:
            job.stop(at_once=stop.insisted)
        time.sleep(POLL_S)
    return ended


class Ranks:
    """The ranks of one running job; a context manager, whose end kills those that still live.

    Args:
        start: starts one of them.
        num_neighbours: other jobs that run on this machine meanwhile and share its cores.
        console: file for what rank 0 prints; None: this process's standard output.
        variables: more of their environment.
    """

    def __init__(
        self,
        start: Start,
        num_ranks: int,
        logs: Path,
        num_neighbours: int = 0,
        console: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._port = HeldPort()
        self._ranks: list[_Rank] = []
        self._asked_at_s: float | None = None
        self._insisted = False
        self._failed: list[int] = []  # in the order of their ends
        self._patience = Patience()
        environment = {**_shared_environment(num_ranks, self._port.number, num_neighbours), **(variables or {})}
        try:
            for rank in range(num_ranks):
                log = logs / f"rank_{rank}.log"
                log_start = log.stat().st_size if log.exists() else 0
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                self._ranks.append(_Rank(start(own, log, console if rank == 0 else log), log, log_start))
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def stop(self, at_once: bool = False) -> None:
        """Ask all ranks, once, to save and end; or end them at once, and say so."""
        if at_once and not self._insisted:
            self._insisted = any(rank.process.poll() is None for rank in self._ranks)
            for rank in self._ranks:
                rank.process.kill()
        if self._asked_at_s is None:
            self._asked_at_s = time.monotonic()
            for rank in self._ranks:
                rank.process.terminate()

    def poll(self) -> Ended | None:
        """How the job ended; None while it runs.

        It has ended when all ranks have, when one has failed and the others have had time to say what they did, or when
        the grace of a stop is over; what lives on then is killed.
        """
        now_s = time.monotonic()
        living = [rank.process.pid for rank in self._ranks if rank.process.poll() is None]
        self._failed += _newly_failed(self._ranks, self._failed)
        if living and not (self._failed and self._patience.is_over(now_s, living)):
            if self._asked_at_s is None or now_s - self._asked_at_s <= GRACE_S:
                return None
            late = ", ".join(str(number) for number, rank in enumerate(self._ranks) if rank.process.poll() is None)
            ended = Ended(1, f"asked to stop, ranks {late} did not save and end within {GRACE_S:.0f} s: killed", True)
        elif self._insisted:
            ended = Ended(128 + signal.SIGKILL, "asked a second time to stop: the ranks were ended at once", True)
        else:
            ended = _verdict(self._ranks, self._failed, self._asked_at_s is not None)
        self.kill()
        return ended

    def kill(self) -> None:
        """End all ranks at once, and wait until they have."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.wait()
        self._port.close()


def _shared_environment(num_ranks: int, port: int, num_neighbours: int) -> dict[str, str]:
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    num_threads = max(1, (os.cpu_count() or 1) // (num_ranks * (1 + num_neighbours)))
    return {"OMP_NUM_THREADS": str(num_threads), **POLITE, **os.environ, **own_path(), **shared}


def _newly_failed(ranks: list[_Rank], known: list[int]) -> list[int]:
    """Ranks that have failed since the last look: those ended by a signal first, then those that can say why."""
    found = [number for number, rank in enumerate(ranks) if number not in known and rank.process.poll()]

    def order(number: int) -> tuple[bool, bool]:
        code = _code(ranks[number])
        return code > 0, code not in EXPLAINED

    return sorted(found, key=order)


def _code(rank: _Rank) -> int:
    """How a rank that has ended did so: its exit code, or the negative number of a signal."""
    code = rank.process.returncode
    assert code is not None
    return code


def _verdict(ranks: list[_Rank], failed: list[int], was_asked: bool) -> Ended:
    """The job's end. A rank that was killed outright is the cause, else the first to fail of its own, else one that the
    first to complain waits for: the others are victims."""
    if not failed:
        return Ended(0, "", was_asked)
    codes = {number: _code(ranks[number]) for number in failed}
    killed = [number for number, code in codes.items() if code == -signal.SIGKILL]
    own = [number for number, code in codes.items() if code not in (HUNG, LOST)]
    hung = [number for number, code in codes.items() if code == HUNG]
    cause = (killed or own or hung or failed)[0]
    code, log, words = codes[cause], ranks[cause].log, _last_words(ranks[cause])
    if code in EXPLAINED and words:
        return Ended(code, words, was_asked)
    if code in (HUNG, LOST) and words:
        return Ended(code, "; ".join([*_accused(ranks, cause), words]), was_asked)
    if code == -signal.SIGABRT and blamed(words):  # NCCL ends a process whose peer is gone, from a thread of its own
        return Ended(
            LOST, "; ".join([*_accused(ranks, cause), f"rank {cause} was ended by SIGABRT; {words}"]), was_asked
        )
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM) and was_asked:
        return Ended(128 + signal.SIGTERM, "stopped before the first step: there was nothing to save", True)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    why = f" ({words})" if words and code != -signal.SIGKILL else ""
    return Ended(code if code > 0 else 128 - code, f"rank {cause} {how}{why}; its log: {log}", was_asked)


def _accused(ranks: list[_Rank], first: int) -> list[str]:
    """A sentence about each living rank for which `first` waits, directly or through ranks that have said for whom."""
    found, seen, ahead = [], {first}, [first]
    while ahead:
        for number in blamed(_last_words(ranks[ahead.pop(0)])):
            if number in seen or number >= len(ranks):
                continue
            seen.add(number)
            if ranks[number].process.poll() is not None:
                ahead.append(number)
                continue
            how = "is stopped" if _is_stopped(ranks[number].process.pid) else "hangs"
            found.append(f"rank {number} {how}, and others wait for it; its log: {ranks[number].log}")
    return found


def _is_stopped(pid: int) -> bool:
    """Whether a signal (SIGSTOP) has stopped a process; False where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "Tt"
    except OSError:
        return False


def _last_words(rank: _Rank) -> str:
    """Why a rank says it stops: the last error in its log; a wait, where its log ends in one; else the log's last line.

    Empty if it says nothing.
    """
    with rank.log.open("rb") as file:
        file.seek(rank.log_start)
        lines = file.read().decode(errors="replace").strip().splitlines()
    said = [found.groups() for line in lines if (found := re.fullmatch(r"\d{4}-\S+ \S+ ([A-Z]+) (.+)", line))]
    errors = [words for level, words in said if level == "ERROR"]
    waits = [words for _, words in said[-1:] if blamed(words)]
    return (errors or waits or lines or [""])[-1].strip()


class HeldPort:
    """A TCP port for ranks to meet at, held until it is closed. A context manager.

    A port that was only looked up is anybody's again, and the system may hand it to another socket before the ranks
    have started. One that a socket has without listening at it is handed to nobody, and torch's store, which reuses
    addresses, may listen there all the same.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number = int(self._socket.getsockname()[1])

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> int:
        return self.number

    def __exit__(self, *_: object) -> None:
        self.close()

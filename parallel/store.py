"""torch's store, opened where torchrun's environment says, without waiting in silence; and waits in slices."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from parallel.watch import HangError, PeerError, gist

# How often a rank that waits says so, at most.
SAY_EVERY_S = 60.0
_POLL_S = (0.01, 0.25)  # at first, in the end
# Ranks that may ask the store as often as that. More of them ask more seldom, so that it is asked as often by all.
FULL_PACE_RANKS = 2048
# How often a rank that waits looks whom for, at most; and how much of its time it may take to look.
_LOOK_EVERY_S, _LOOK_SHARE = 1.0, 0.05
# Files that rank 0 may open beside the connections of its store.
_SPARE_FILES = 512
_CONNECT = timedelta(seconds=60)


class Wait:
    """A wait in slices: how long it has lasted, when to speak of it, when the other side has been silent too long.

    Only time in which this process ran is counted: one that was stopped and goes on gives the others another chance.
    """

    def __init__(self, limit_s: float, world_size: int = 1) -> None:
        self._limit_s, self._say_every_s = limit_s, min(SAY_EVERY_S, limit_s / 4)
        self._pace = pace(world_size)
        self._look_s, self._look_at_s = min(_LOOK_EVERY_S, limit_s / 20) * self._pace, 0.0
        self.lasted_s = self._silent_s = 0.0
        self._said_s, self._looked_s = 0.0, time.monotonic()
        self._pause_s = _POLL_S[0]
        self.heard = ""

    def looks(self, look: Callable[[], object]) -> bool:
        """Do `look`, which asks for every rank that is missing, if it is time to; whether it was."""
        if self.lasted_s <= self._look_at_s:
            return False
        begun_s = time.monotonic()
        look()
        self._look_at_s = self.lasted_s + max(self._look_s, (time.monotonic() - begun_s) / _LOOK_SHARE)
        return True

    def hear(self, beat: str) -> None:
        """What the other side shows of itself now."""
        if beat != self.heard:
            self.heard, self._silent_s = beat, 0.0

    def is_due(self) -> bool:
        """Whether to say that it lasts; said once."""
        if self.lasted_s - self._said_s < self._say_every_s:
            return False
        self._said_s = self.lasted_s
        return True

    def is_too_long(self) -> bool:
        return self._silent_s >= self._limit_s

    def rest(self) -> None:
        """A moment, longer from time to time."""
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _POLL_S[1] * self._pace)
        now_s = time.monotonic()
        ran_s = min(now_s - self._looked_s, self._limit_s / 10 + self._pause_s)
        self._looked_s = now_s
        self.lasted_s += ran_s
        self._silent_s += ran_s


def pace(world_size: int) -> float:
    """By how much the ranks of a job of this size ask more seldom."""
    return max(1.0, world_size / FULL_PACE_RANKS)


class Place(NamedTuple):
    """Where a process lives: this start of a machine and its space of process ids, the id, and when it was started."""

    machine: str
    pid: int
    started: str


def own_place() -> Place:
    """The place of this process. Where the system does not say, no other one takes it for a neighbour."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return Place(f"{boot} {os.readlink('/proc/self/ns/pid')}", os.getpid(), _stat_of(os.getpid())[19])
    except OSError:
        return Place("", os.getpid(), "")


def has_ended(place: Place) -> bool:
    """Whether a process of this machine has ended; False for one of another machine, of which nothing is known."""
    if not place.machine or place.machine != own_place().machine:
        return False
    try:
        fields = _stat_of(place.pid)
    except OSError:
        return True
    return fields[0] in "ZX" or fields[19] != place.started


def _stat_of(pid: int) -> list[str]:
    """What /proc/PID/stat says from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def by_agent() -> bool:
    """Whether the store is in torchrun's process, and not in rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(rank: int, world_size: int, limit_s: float, say: Callable[[str], object]) -> dist.Store:
    """The store, as torch itself would find it."""
    host, port, keeps_it = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank == 0 and not by_agent()
    if keeps_it:
        _allow_connections(world_size)
    else:
        _await_store(rank, host, port, limit_s, say)
    try:
        store = dist.TCPStore(
            host, port, world_size, is_master=keeps_it, timeout=_CONNECT, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        if keeps_it and "EADDRINUSE" in str(error):
            raise ValueError(f"MASTER_PORT={port} is in use on this machine: choose another port") from None
        raise PeerError(f"rank {rank} cannot use the ranks' meeting point at {address()}: {gist(error)}") from None
    return dist.PrefixStore(f"halocline/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _allow_connections(world_size: int) -> None:
    """Every rank keeps a connection to the store: this process must be allowed so many open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = world_size + _SPARE_FILES
    if resource.RLIM_INFINITY not in (soft, hard) and hard < needed:
        raise ValueError(
            f"WORLD_SIZE={world_size} ranks need {needed} open files in the process of rank 0, and this system allows "
            f"{hard}: raise the limit (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _await_store(rank: int, host: str, port: int, limit_s: float, say: Callable[[str], object]) -> None:
    """Return when somebody listens there: ranks may come in any order."""
    wait = Wait(limit_s)
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as found:
                if found.getsockname() != found.getpeername():  # a free port can be connected with itself
                    return
            why = "nobody listens there"
        except OSError as error:
            why = error.strerror or str(error)
        words = f"rank {rank} has waited {wait.lasted_s:.0f} s for rank 0 to come to {address()} ({why})"
        if wait.is_due():
            say(f"{words}: MASTER_ADDR and MASTER_PORT must be of the machine of rank 0")
        if wait.is_too_long():
            raise HangError(f"{words}, longer than the {limit_s:.0f} s of run.hang_timeout_s")
        wait.rest()


def address() -> str:
    return f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"


def machines_of(ranks: Sequence[int]) -> str:
    """Which machines these ranks are of, where a launcher has started equally many on each of several."""
    world_size, per_machine = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if per_machine in (1, world_size) or world_size % per_machine:
        return ""
    machines = sorted({rank // per_machine for rank in ranks})
    words = f"machine {machines[0]}" if len(machines) == 1 else f"machines {', '.join(map(str, machines[:8]))}"
    return f" (of {words}, counted from 0)"

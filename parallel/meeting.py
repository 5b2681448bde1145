"""Where the ranks of a job come together before there is any process group: at torch's store.

Here rank 0 hands things to all, all compare facts, and what fails on one rank is raised on all. Each takes every rank a
few requests to the store, whatever the number of ranks; how often it asks while it waits goes down with that number, so
that the store is asked as often by all. Nothing here waits in the library's silence: a rank that waits says from
time to time for whom and for what, notices that the store's process is gone at once, and gives up on a rank that has
not been heard for a stated time. Every rank shows that it lives by a counter that a thread of its own moves on, so
work of any length on one rank ends no other one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from parallel.store import Place, Wait, address, by_agent, has_ended, machines_of, open_store, own_place, pace
from parallel.watch import HangError, Need, PeerError, Watch, Watchdog, named

T = TypeVar("T")
# How often a rank shows that it lives.
BEAT_S = 1.0
# How long a rank that leaves with a refusal waits until all others have heard of it.
FAREWELL_S = 10.0
MAX_SENTENCES = 4


class Meeting:
    """One rank's place among all; every rank calls the same methods in the same order. Made by `meet`.

    Methods raise PeerError when another rank is gone, and HangError when one has not been heard for `limit_s`.

    Attributes:
        store: what process groups are made with; None before this rank has come, and where it is alone.
        watch: what this rank waits for where it cannot look up by itself.
        doing: what this rank does, for those who wait for it: "prepares the data".
    """

    def __init__(self, rank: int, world_size: int, limit_s: float, say: Callable[[str], object]) -> None:
        self.rank, self.world_size = rank, world_size
        self.store: dist.Store | None = None
        self.watch = Watch(f"rank {rank}")
        self.doing = ""
        self._limit_s, self._say = limit_s, say
        self._round = 0
        self._places: dict[int, Place] = {}
        self._over = threading.Event()

    def come(self) -> None:
        """Say that this rank is here, and wait until all are.

        Raises ValueError for an environment that no job can have: no address to meet at, a port that is taken, two
        processes that are one rank, ranks that count each other differently.
        """
        if self.world_size == 1:
            return
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ValueError(
                    f"WORLD_SIZE={self.world_size} is set but {name} is not: start the ranks with torchrun"
                )
        self.store = open_store(self.rank, self.world_size, self._limit_s, self._say)
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        if self._ask(lambda store: store.add(f"come/{self.rank}", 1)) > 1:
            raise ValueError(f"RANK={self.rank} is the rank of two processes of this job: give each its own")
        if self.rank != 0:
            self._put(f"here/{self.rank}", (self.world_size, own_place()), "came")
            failure, place = self._take({0: "here/all"})[0]
            self._places = {0: place}
            self._ask(lambda store: store.add("heard", 1))
        else:
            found: dict[int, tuple[int, Place]] = {0: (self.world_size, own_place())}
            failure = self._await_all(found) or _miscounted({rank: size for rank, (size, _) in found.items()})
            self._places = {rank: place for rank, (_, place) in found.items()}
            self._put("here/all", (failure, self._places[0]))
            if failure is not None:
                self._stay("heard", len(found) - 1)
        _raise(failure)

    def from_first(self, doing: str, work: Callable[[], T]) -> T:
        """Rank 0 does `work`; every rank returns its result, which must be plain, or raises what it raised.

        A ValueError is raised as such on all ranks; of anything else the others hear by PeerError.
        """
        if self.store is None:
            return work()
        self._round += 1
        key = f"{self._round}/word"
        if self.rank != 0:
            failure, result = self._take({0: key})[0]
            _raise(failure)
            return result
        self.doing = doing
        try:
            done = work()
        except Exception as error:
            self._put(key, (_failure_of(error, 0), None))
            raise
        self._put(key, (None, done))
        self.doing = ""
        return done

    def on_all(self, doing: str, work: Callable[[], T]) -> T:
        """`work` on every rank, each with its own result; what one raises is raised on all, as by `from_first`."""
        if self.store is None:
            return work()
        self.doing = doing
        raised: Exception | None = None
        done: list[T] = []
        try:
            done = [work()]
        except Exception as error:
            raised = error
        self.doing = ""
        failures = self._gather(None if raised is None else _failure_of(raised, self.rank))
        if raised is not None and not isinstance(raised, ValueError):
            raise raised
        _raise(_together(list(failures.values())))
        return done[0]

    def differing(self, facts: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
        """Facts by name that are not the same on all ranks, each with its value by rank; None is "not there".

        Only what differs from rank 0's travels back.
        """
        if self.store is None:
            return {}
        first = self.from_first("compares", lambda: dict(facts))
        names = {**first, **facts}
        own = {name: facts.get(name) for name in names if facts.get(name) != first.get(name)}
        found: dict[str, dict[int, Any]] = {}
        for rank, others in self._gather(own).items():
            for name, value in others.items():
                found.setdefault(name, {})[rank] = value
        return {
            name: {rank: found[name].get(rank, first.get(name)) for rank in range(self.world_size)}
            for name in [*(name for name in first if name in found), *sorted(found.keys() - first.keys())]
        }

    def part(self) -> None:
        """Call before this process ends with a refusal that it has said: a launcher ends all when the first one ends,
        and some would not have said theirs; and the store ends with rank 0."""
        if self.store is None or self._over.is_set():
            return
        with contextlib.suppress(PeerError):
            self._ask(lambda store: store.add("said", 1))
            self._stay("said", self.world_size)
            self._ask(lambda store: store.add("left", 1))
            if self.rank == 0:
                self._stay("left", self.world_size)

    def close(self) -> None:
        """From here on all ranks wait for each other by other means."""
        self._over.set()

    # --- what travels ---

    def _gather(self, thing: Any) -> dict[int, Any]:
        """What each rank gives, by rank, on all ranks; those that give nothing (None, or empty) are left out."""
        self._round += 1
        keys, count = {rank: f"{self._round}/{rank}" for rank in range(1, self.world_size)}, f"{self._round}/count"
        if self.rank != 0:
            self._put(keys[self.rank], thing, count)
            return self._take({0: f"{self._round}/all"})[0]
        everyone = {rank: each for rank, each in sorted({0: thing, **self._take(keys, count)}.items()) if each}
        self._put(f"{self._round}/all", everyone)
        return everyone

    def _ask(self, call: Callable[[dist.Store], T]) -> T:
        """A word with the store. It may never answer, where its process is stopped: the watchdog looks at that."""
        store = self.store
        assert store is not None
        keeper = "" if by_agent() else " from rank 0"
        return self.watch.wait(Need("numbers", f"an answer at {address()}{keeper}", None), lambda: call(store))

    def _put(self, key: str, thing: Any, count: str = "") -> None:
        """count: where those who put a thing of this kind are counted, if they are."""
        self._ask(lambda store: store.set(key, pickle.dumps(thing)))  # type: ignore[arg-type]
        if count:
            self._ask(lambda store: store.add(count, 1))

    def _are_there(self, keys: Mapping[int, str], count: str) -> bool:
        """Whether all have been put, by one request."""
        if count:
            return self._ask(lambda store: store.add(count, 0)) >= len(keys)
        return self._ask(lambda store: store.check(list(keys.values())))

    def _read(self, keys: Mapping[int, str]) -> dict[int, Any]:
        """Things that have been put."""
        things = self._ask(lambda store: store.multi_get(list(keys.values()))) if keys else []
        return {rank: pickle.loads(thing) for rank, thing in zip(keys, things, strict=True)}

    def _missing(self, keys: Mapping[int, str]) -> list[int]:
        """Whose things have not been put yet: a request for each."""
        return [rank for rank, key in keys.items() if not self._ask(lambda store, key=key: store.check([key]))]  # type: ignore[misc]

    def _take(self, keys: Mapping[int, str], count: str = "") -> dict[int, Any]:
        """The things under these keys, which their ranks put there; waits, and says for whom."""
        missing = list(keys)
        wait = Wait(self._limit_s, self.world_size)

        def look() -> None:
            missing[:] = self._missing(keys)
            if gone := [rank for rank in missing if rank in self._places and has_ended(self._places[rank])]:
                who = f"rank {self.rank} has waited {wait.lasted_s:.0f} s for {named(gone)}"
                raise PeerError(f"{who}, and that failed: the process has ended before the first step")
            if missing:
                wait.hear(self._beat_of(min(missing)))
                self.doing = f"waits for {named(missing)}" if self.rank == 0 else self.doing

        while not self._are_there(keys, count):
            wait.looks(look)
            words = f"rank {self.rank} has waited {wait.lasted_s:.0f} s for {_whom(missing, wait.heard)}"
            if wait.is_due():
                self._say(words)
            if wait.is_too_long():
                raise HangError(f"{words}, and has not heard of it for {self._limit_s:.0f} s (run.hang_timeout_s)")
            wait.rest()
        self.doing = "" if self.rank == 0 else self.doing
        return self._read(keys)

    def _await_all(self, found: dict[int, tuple[int, Place]]) -> tuple[str, str] | None:
        """Rank 0 waits for all, and says while ranks are missing how many have come, and which have not.

        found: is given what each rank that comes takes for the number of ranks, and where it lives. Returns a failure
        where some never come.
        """
        keys = {rank: f"here/{rank}" for rank in range(1, self.world_size)}
        wait = Wait(self._limit_s, self.world_size)
        which = "the others are missing"

        def look() -> None:
            nonlocal which
            absent = self._missing({rank: key for rank, key in keys.items() if rank not in found})
            new = {rank: key for rank, key in keys.items() if rank not in found and rank not in set(absent)}
            found.update(self._read(new))
            if absent:
                which = f"{named(absent)}{machines_of(absent)} {'is' if len(absent) == 1 else 'are'} missing"
                self.doing = f"waits for all ranks to come: {which}"

        while not self._are_there(keys, "came"):
            wait.looks(look)
            wait.hear(str(len(found)))
            words = f"{len(found)} of {self.world_size} ranks have come to {address()} within {wait.lasted_s:.0f} s"
            if wait.is_due():
                self._say(f"{words}; {which}")
            if wait.is_too_long():
                return "hang", f"{words}; {which}, and no other has come for {self._limit_s:.0f} s (run.hang_timeout_s)"
            wait.rest()
        found.update(self._read({rank: key for rank, key in keys.items() if rank not in found}))
        return None

    def _stay(self, name: str, count: int) -> None:
        """Until so many ranks have added to this count, but not for long."""
        end_s = time.monotonic() + FAREWELL_S
        while self._ask(lambda store: store.add(name, 0)) < count and time.monotonic() < end_s:
            time.sleep(0.02 * pace(self.world_size))

    def _beat_of(self, rank: int) -> str:
        """What a rank has last shown of itself: a counter and what it does; empty before it came."""
        key = f"beat/{rank}"
        return self._ask(lambda store: store.get(key)).decode() if self._ask(lambda store: store.check([key])) else ""

    def _beat(self) -> None:
        assert self.store is not None
        for count in itertools.count():
            try:
                self.store.set(f"beat/{self.rank}", f"{count} {self.doing}")
            except RuntimeError:
                return  # whoever waits meets the same
            if self._over.wait(BEAT_S * pace(self.world_size)):
                return


@contextmanager
def meet(
    rank: int, world_size: int, limit_s: float, say: Callable[[str], object], end_hung: Callable[[str], object]
) -> Iterator[Meeting]:
    """Where all ranks of a job come together, at the address that torchrun's environment names; just this process where
    it is alone.

    Args:
        limit_s: after which a rank that has not come, or has not been heard, is given up.
        say: is given sentences while this rank waits for long.
        end_hung: called from another thread, with a sentence, when nothing else could end a wait of `limit_s`.
    """
    meeting = Meeting(rank, world_size, limit_s, say)
    try:
        with Watchdog(meeting.watch, limit_s, end_hung):
            yield meeting
    finally:
        meeting.close()


def _whom(missing: Sequence[int], beat: str) -> str:
    """Those that a rank waits for; of a single one also what it does, as its last beat says."""
    _, _, does = beat.partition(" ")
    return f"{named(missing)}, which {does}" if does and len(missing) == 1 else named(missing)


# A failure travels as (whose it is, sentence): "user", "peer", or "hang" for one that never came.
def _miscounted(sizes: Mapping[int, int]) -> tuple[str, str] | None:
    """A failure where ranks do not agree on how many they are."""
    for rank, size in sizes.items():
        if size != sizes[0]:
            words = f"WORLD_SIZE={sizes[0]} on rank 0 and WORLD_SIZE={size} on rank {rank}"
            return "user", f"{words} must be the same on all ranks"
    return None


def _failure_of(error: Exception, rank: int) -> tuple[str, str]:
    if isinstance(error, ValueError):
        return "user", str(error)
    return "peer", f"rank {rank} broke off before the first step: {type(error).__name__}: {error}"


def _together(failures: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """One failure of many, each sentence once; the user's where all are."""
    if not failures:
        return None
    sentences = list(dict.fromkeys(sentence for _, sentence in failures))
    more = f"; and {len(sentences) - MAX_SENTENCES} more" if len(sentences) > MAX_SENTENCES else ""
    kind = "user" if all(kind == "user" for kind, _ in failures) else "peer"
    return kind, "; ".join(sentences[:MAX_SENTENCES]) + more


def _raise(failure: tuple[str, str] | None) -> None:
    if failure is not None:
        kind, sentence = failure
        raise {"user": ValueError, "peer": PeerError, "hang": HangError}[kind](sentence)

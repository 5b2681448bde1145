"""What this rank does now and what it waits for: told by those who wait, read by the recorder and by the watchdog.

Every place where a rank waits for others goes through one `Watch`. So what ends badly can be said: a wait that fails
names what was awaited and from whom (`PeerError`), and one that never ends is found by the `Watchdog`, a thread that
looks from time to time and costs the rank's work nothing.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
MAX_NAMED = 8


class PeerError(RuntimeError):
    """Another rank could not be reached, or broke off. Says what this rank did and what it waited for, from whom."""


class HangError(RuntimeError):
    """Another rank did not come, or was not heard, for longer than this one waits. Says for whom and where."""


class Doing(Protocol):
    """A piece of work that can name itself."""

    @property
    def words(self) -> str: ...


class Need(NamedTuple):
    """Something that this rank waits for.

    kind: what the time counts as: "input" (activations and gradients of neighbours), "experts", "optimizer", "numbers".
    text: names it; {what} and {peers} are filled in when it is spoken, and the peers come last.
    group: the ranks that give it. source: one of the group, where only one does.
    """

    kind: str
    text: str
    group: dist.ProcessGroup | None
    what: object = None
    source: int | None = None

    def words(self, peer: int | None) -> str:
        """For a sentence. peer: the rank of the group that is known to be late, if one is."""
        return self.text.format(what=self.what, peers=self._peers(self.source if peer is None else peer))

    def _peers(self, peer: int | None) -> str:
        import torch.distributed as dist  # not above: the launcher reads sentences and needs no torch

        if self.group is None:
            return "no rank"
        ranks = dist.get_process_group_ranks(self.group)
        late = [rank for rank in ranks if rank != dist.get_rank()] if peer is None else [ranks[peer]]
        return named(late)


class Waiting(NamedTuple):
    """A wait that has not ended."""

    need: Need
    since_s: float
    peer: Callable[[], int | None] | None


class Pending(Protocol[T_co]):
    """A communication under way, such as `collectives.Handle`."""

    def wait(self) -> T_co: ...

    def waits_for(self) -> int | None:
        """The rank of its group that `wait` waits for now, if that is known."""
        ...


class Watch:
    """The state of one rank. Cheap: two readings of a clock for each wait, no locks.

    during: the part of the run, such as "step 12". doing: the action or phase in it, set by `do`.
    listener: told of every wait that has ended: its kind, start and stop on `clock`.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, name: str = "this rank", behind: bool = False) -> None:
        """name: of the rank, for sentences.

        behind: the device runs behind the host (CUDA), so that `call` returns at once and it is later that the host
        stands still: a wait then lasts until the next one, or until the rank does something else. Not yet run on a GPU.
        """
        self.name, self._behind = name, behind
        self.during = ""
        self.doing: str | Doing = ""
        self.waiting: Waiting | None = None
        self.listener: Callable[[str, float, float], None] | None = None

    def do(self, doing: str | Doing) -> None:
        """The rank turns to this."""
        self.doing = doing
        self.waiting = None

    def wait(self, need: Need, call: Callable[[], T], peer: Callable[[], int | None] | None = None) -> T:
        """Do `call`, which waits for other ranks. PeerError where it raises RuntimeError."""
        start_s = self.clock()
        self.waiting = Waiting(need, start_s, peer)
        try:
            result = call()
        except PeerError:
            raise
        except RuntimeError as error:
            waited = f"waited {self.clock() - start_s:.1f} s for {_words(self.waiting)}, and that failed"
            self.waiting = None
            raise PeerError(f"{self.place()}: {waited}: {gist(error)}") from error
        if not self._behind:
            self.waiting = None
        if self.listener is not None:
            self.listener(need.kind, start_s, self.clock())
        return result

    def reach(self, need: Need, call: Callable[[], T]) -> T:
        """Do `call`, which starts what `need` will be waited for with. PeerError where it raises RuntimeError."""
        try:
            return call()
        except PeerError:
            raise
        except RuntimeError as error:
            began = f"was about to wait for {need.words(None)}, and that failed"
            raise PeerError(f"{self.place()}: {began}: {gist(error)}") from error

    def launch(self, need: Need, start: Callable[[], Pending[T]]) -> Watched[T]:
        """Start a communication; the handle's `wait` is watched."""
        return Watched(self, need, self.reach(need, start))

    @contextmanager
    def losses(self) -> Iterator[None]:
        """Inside, an error of the library's about a connection is a PeerError also where no wait has been named."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, (PeerError, HangError)) or not _is_about_a_connection(error):
                raise
            raise PeerError(f"{self.place()}: lost another rank: {gist(error)}") from error

    def place(self) -> str:
        """Which rank this is, and where in its work."""
        doing = self.doing if isinstance(self.doing, str) else self.doing.words
        return ", ".join(part for part in (self.name, self.during, doing) if part)

    def hang(self, waiting: Waiting) -> str:
        """The sentence about a wait that does not end; `blamed` reads it."""
        return f"{self.place()}: has waited {self.clock() - waiting.since_s:.1f} s for {_words(waiting)}"


@dataclass(frozen=True)
class Watched(Generic[T]):
    """A handle whose `wait` goes through the watch."""

    watch: Watch
    need: Need
    pending: Pending[T]

    def wait(self) -> T:
        """The communication's result. Raises PeerError."""
        return self.watch.wait(self.need, self.pending.wait, self.pending.waits_for)


class Watchdog:
    """Looks whether one and the same wait has lasted `timeout_s`, and then calls `end` with a sentence, once.

    Only time in which this process ran is counted: one that was stopped and goes on gives its peers another chance.
    A context manager.
    """

    def __init__(self, watch: Watch, timeout_s: float, end: Callable[[str], object]) -> None:
        self._watch, self._timeout_s, self._end = watch, timeout_s, end
        self.tick_s = min(1.0, timeout_s / 10)
        self._seen: Waiting | None = None
        self._lasted_s, self._looked_s = 0.0, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    def look(self, now_s: float) -> str | None:
        """One look at this time of `time.monotonic`: what to say if the wait has lasted too long."""
        waiting = self._watch.waiting
        ran_s = min(now_s - self._looked_s, 2 * self.tick_s)
        self._lasted_s = self._lasted_s + ran_s if waiting is self._seen else 0.0
        self._seen, self._looked_s = waiting, now_s
        if waiting is None or self._lasted_s < self._timeout_s:
            return None
        return self._watch.hang(waiting)

    def _run(self) -> None:
        while not self._over.wait(self.tick_s):
            sentence = self.look(time.monotonic())
            if sentence is not None:
                self._end(sentence)
                return


def named(ranks: Sequence[int]) -> str:
    """Ranks in a sentence: "rank 3", "ranks 0, 2, 5", the first few of many."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - MAX_NAMED} more" if len(ranks) > MAX_NAMED else ""
    return f"ranks {', '.join(map(str, ranks[:MAX_NAMED]))}{more}"


def blamed(sentence: str) -> list[int]:
    """The ranks for which the rank waits that said this: the last that the sentence names before it goes on."""
    found = re.search(
        r"\bwait(?:ed)?\b.*? for .*?\branks? (\d+(?:, \d+)*)(?=$| and \d+ more|, and that failed)", sentence
    )
    return [int(rank) for rank in found[1].split(", ")] if found else []


def _is_about_a_connection(error: RuntimeError) -> bool:
    """gloo's errors have no type of their own: they begin with the file of its that raised them."""
    import torch.distributed as dist  # not above: the launcher reads sentences and needs no torch

    return isinstance(error, dist.DistError) or re.match(r"\[[^]]*gloo[^]]*\]", str(error)) is not None


def _words(waiting: Waiting) -> str:
    return waiting.need.words(waiting.peer() if waiting.peer is not None else None)


def gist(error: BaseException) -> str:
    """What the library says, without its place in the source and its advice."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^]]*\.\w+:\d+\] ", "", first_line).split(". ")[0]

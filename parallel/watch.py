"""What this rank does now and what it waits for: told by those who wait, read by the recorder and by the watchdog.

Every place where a rank waits for others goes through one `Watch`. So what ends badly can be said: a wait that fails
names what was awaited and from whom (`PeerError`), and one that never ends is found by the `Watchdog`, a thread that
looks from time to time and costs the rank's work nothing.

Where the device runs behind the host (CUDA), the host does not stand still in a wait: it makes the device's stream
wait and goes on. Each such wait is bracketed by two marks in the stream (`host.Host.mark`). The device waits from when
it has passed the first until it passes the second; what the host does meanwhile, or when the device has nothing left to
do (a save, a slow disk), is no wait for anybody. Marks have not yet run on a GPU.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
MAX_NAMED = 8
# A wait as long as this is worth a line in the log. NCCL leaves a minute between an error and its abort.
NOTICE_S = 20.0


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
    group: the ranks that give it. source: one of the group or some, where only they do.
    """

    kind: str
    text: str
    group: dist.ProcessGroup | None
    what: object = None
    source: int | tuple[int, ...] | None = None

    def words(self, peer: int | None) -> str:
        """For a sentence. peer: the rank of the group that is known to be late, if one is."""
        return self.text.format(what=self.what, peers=self._peers(self.source if peer is None else peer))

    def _peers(self, peer: int | tuple[int, ...] | None) -> str:
        import torch.distributed as dist  # not above: the launcher reads sentences and needs no torch

        if self.group is None:
            return "no rank"
        ranks = dist.get_process_group_ranks(self.group)
        if peer is None:
            return named([rank for rank in ranks if rank != dist.get_rank()])
        return named([ranks[each] for each in ((peer,) if isinstance(peer, int) else peer)])


class Mark(Protocol):
    """A place in what a device has been given to do, as `host.Host.mark` sets it."""

    def passed(self) -> bool:
        """Whether the device has come so far. May be asked from any thread, and may raise what the device failed of."""
        ...


@dataclass(eq=False)
class Waiting:
    """A wait: where in the rank's work, for what, since when on the watch's clock.

    peer: of the group's ranks, the one that is waited for now, if that is known; asked while the host waits.
    reached, over: the marks around it where the device waits; None where the host does. Since when the device waits is
    seen by whoever looks, so that it is known to one look.
    """

    place: str | Callable[[], str]
    need: Need
    since_s: float
    peer: Callable[[], int | None] | None = None
    reached: Mark | None = None
    over: Mark | None = None

    def is_on_device(self) -> bool:
        """Whether a device is in this wait. One that has failed will pass nothing more, and is where it was."""
        assert self.reached is not None and self.over is not None
        return _passed(self.reached) and not _passed(self.over)

    def words(self, now_s: float, how: str) -> str:
        """For a sentence; `blamed` reads it. how: "has waited", or "waited" of one that is over."""
        peer = self.peer() if self.peer is not None else None
        place = self.place if isinstance(self.place, str) else self.place()
        return f"{place}: {how} {now_s - self.since_s:.1f} s for {self.need.words(peer)}"


class Pending(Protocol[T_co]):
    """A communication under way, such as `collectives.Handle`."""

    def wait(self) -> T_co: ...

    def waits_for(self) -> int | None:
        """The rank of its group that `wait` waits for now, if that is known."""
        ...


class Watch:
    """The state of one rank. Cheap: two readings of a clock and, where a device runs behind, two marks for each wait.

    The rank's own thread writes, any other one may read; nothing is locked.

    during: the part of the run, such as "step 12". doing: the action or phase in it, set by `do`.
    listener: told of every wait of the host that has ended: its kind, start and stop on `clock`.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, name: str = "this rank", mark: Callable[[], Mark] | None = None) -> None:
        """name: of the rank, for sentences. mark: marks a place in what the device is to do, where it runs behind."""
        self.name, self._mark = name, mark
        self.during = ""
        self.doing: str | Doing = ""
        self.listener: Callable[[str, float, float], None] | None = None
        self._here: Waiting | None = None
        self._ahead: deque[Waiting] = deque()  # what the device has been made to wait for, and has not seen the end of

    @property
    def waiting(self) -> Waiting | None:
        """The wait that this rank is in: the device's, which what the host waits for may be behind, or the host's."""
        for each in tuple(self._ahead):
            if each.is_on_device():
                if math.isnan(each.since_s):
                    each.since_s = self.clock()
                return each
        return self._here

    def do(self, doing: str | Doing) -> None:
        """The rank turns to this."""
        self.doing = doing

    def wait(self, need: Need, call: Callable[[], T], peer: Callable[[], int | None] | None = None) -> T:
        """Do `call`, which waits for other ranks, or makes the device wait. PeerError where it raises RuntimeError."""
        reached = self._mark() if self._mark is not None else None
        start_s = self.clock()
        self._here = own = Waiting(self.place, need, start_s, peer)
        try:
            result = call()
        except PeerError:
            raise
        except RuntimeError as error:
            failed = (self.waiting or own).words(self.clock(), "waited")
            raise PeerError(f"{failed}, and that failed: {gist(error)}") from error
        finally:
            self._here = None
        if self._mark is not None:
            self._follow(need, reached, self._mark())
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
        """Inside, an error of the library's about a connection is a PeerError also where no wait has been named.

        NCCL's errors come when they are noticed, in whatever call asks the device next: the wait that the device is in
        is then the one that failed.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, (PeerError, HangError)) or not _is_about_a_connection(error):
                raise
            waiting, failed = self.waiting, f"{self.place()}: lost another rank"
            if waiting is not None:
                failed = f"{waiting.words(self.clock(), 'waited')}, and that failed"
            raise PeerError(f"{failed}: {gist(error)}") from error

    def place(self) -> str:
        """Which rank this is, and where in its work."""
        return self._place(self.during, self.doing)

    def hang(self, waiting: Waiting) -> str:
        """The sentence about a wait that does not end; `blamed` reads it."""
        return waiting.words(self.clock(), "has waited")

    def _place(self, during: str, doing: str | Doing) -> str:
        doing = doing if isinstance(doing, str) else doing.words
        return ", ".join(part for part in (self.name, during, doing) if part)

    def _follow(self, need: Need, reached: Mark | None, over: Mark) -> None:
        """A wait of the device. It is kept without the communication, whose tensors are free from here on."""
        while self._ahead and _passed(self._ahead[0].over):
            self._ahead.popleft()
        place = partial(self._place, self.during, self.doing)
        self._ahead.append(Waiting(place, need, math.nan, None, reached, over))


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

    note: is given the sentence of a wait that has lasted `notice_s`, and None when that wait is over. A library may end
    the process before `end` does: NCCL aborts it some time after it has noticed that a peer is gone, from a thread of
    its own that nothing of Python's can catch. Then these are the last words.
    """

    def __init__(
        self,
        watch: Watch,
        timeout_s: float,
        end: Callable[[str], object],
        note: Callable[[str | None], object] = lambda _: None,
    ) -> None:
        self._watch, self._timeout_s, self._end, self._note = watch, timeout_s, end, note
        self.tick_s = min(1.0, timeout_s / 10)
        self.notice_s = min(NOTICE_S, timeout_s / 2)
        self._seen: Waiting | None = None
        self._has_noted = False
        self._lasted_s, self._looked_s = 0.0, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        self._take_back()

    def look(self, now_s: float) -> str | None:
        """One look at this time of `time.monotonic`: what to say if the wait has lasted too long."""
        waiting = self._watch.waiting
        ran_s = min(now_s - self._looked_s, 2 * self.tick_s)
        self._lasted_s = self._lasted_s + ran_s if waiting is self._seen else 0.0
        if waiting is not self._seen:
            self._take_back()
        self._seen, self._looked_s = waiting, now_s
        if waiting is None or self._lasted_s < self.notice_s:
            return None
        if not self._has_noted:
            self._note(self._watch.hang(waiting))
            self._has_noted = True
        return self._watch.hang(waiting) if self._lasted_s >= self._timeout_s else None

    def _take_back(self) -> None:
        """The wait that was noted is over."""
        if self._has_noted:
            self._note(None)
            self._has_noted = False

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
    """gloo's errors have no type of their own: they begin with the file of its that raised them. Nor have NCCL's where
    torch sends and receives by its older interface; they name the library."""
    import torch.distributed as dist  # not above: the launcher reads sentences and needs no torch

    text = str(error)
    return isinstance(error, dist.DistError) or re.match(r"\[[^]]*gloo[^]]*\]|NCCL [Ee]rror\b", text) is not None


def _passed(mark: Mark | None) -> bool:
    """A device that has failed (and says so to its own thread, at the next call) passes nothing more."""
    try:
        return mark is not None and mark.passed()
    except RuntimeError:
        return False


def gist(error: BaseException) -> str:
    """What the library says, without its place in the source and its advice."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^]]*\.\w+:\d+\] ", "", first_line).split(". ")[0]

"""Work that several ranks do together and that succeeds on all of them, or is raised as one failure on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from train.files import in_words

T = TypeVar("T")
# Ranks, and their sentences, that a failure of many names.
MAX_NAMED = 8


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The same on every rank; older checkpoints are untouched."""


class DiskError(CheckpointError):
    """A checkpoint could not be written because a disk refused; a later one may find it in better health."""


class Ranks(Protocol):
    """All ranks of a run, as what they save and load together needs them: `parallel.everyone.Everyone`."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def to_first(self, thing: Any) -> list[Any]:
        """On rank 0 every rank's thing, in rank order; elsewhere of no use."""
        ...

    def from_first(self, thing: T) -> T:
        """Rank 0's thing, on all ranks."""
        ...

    def deal(self, things: list[T]) -> T:
        """Each rank's own of the things that rank 0 has, one for every rank."""
        ...


class Alone:
    """A process that is the only rank."""

    rank, world_size = 0, 1

    def to_first(self, thing: Any) -> list[Any]:
        return [thing]

    def from_first(self, thing: T) -> T:
        return thing

    def deal(self, things: list[T]) -> T:
        return things[0]


class Agreement:
    """The ranks of a run, all of which call the same methods in the same order.

    What each has done goes to rank 0, which tells all what has come of it: a rank hears one word, however many they
    are.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.rank, self.world_size = ranks.rank, ranks.world_size

    def on_all(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; each returns its own result, or each raises the same failure.

        A failure names its ranks in one sentence: a ValueError when every rank that failed raised one, as that is what
        the user asked or gave; DiskError when all met an OSError; CheckpointError otherwise.
        """
        return self._done(work)[0]

    def to_first(self, work: Callable[[], T]) -> list[T]:
        """As `on_all`; rank 0 returns all results in rank order, the others nothing."""
        return self._done(work)[1]

    def on_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone; every rank returns its result, or raises its failure."""
        own = self.on_all(lambda: work() if self.rank == 0 else None)
        return self._ranks.from_first(own)  # type: ignore[return-value]

    def _done(self, work: Callable[[], T]) -> tuple[T, list[T]]:
        """This rank's result, and on rank 0 those of all."""
        failure: tuple[type[Exception], str] | None = None
        result: list[T] = []
        try:
            result = [work()]
        except Exception as error:
            if self.world_size == 1:
                raise
            failure = kind_of(error), reason_of(error)
        everyone = self._ranks.to_first((failure, result))
        failures = {rank: found for rank, (found, _) in enumerate(everyone) if found is not None}
        verdict = self._ranks.from_first(_as_one(failures) if failures else None)
        if verdict is not None:
            kind, text = verdict
            raise kind(text)
        return result[0], [results[0] for _, results in everyone] if self.rank == 0 else []


def _as_one(failures: dict[int, tuple[type[Exception], str]]) -> tuple[type[Exception], str]:
    """Failures by rank as one: its kind, and a sentence."""
    kinds = {kind for kind, _ in failures.values()}
    text = "; ".join(list(dict.fromkeys(reason for _, reason in failures.values()))[:MAX_NAMED])
    return kinds.pop() if len(kinds) == 1 else CheckpointError, f"{text} (on rank {ranks_in_words(list(failures))})"


def ranks_in_words(ranks: Sequence[int | str]) -> str:
    """The first few of many."""
    more = f" and {len(ranks) - MAX_NAMED} more" if len(ranks) > MAX_NAMED else ""
    return f"{', '.join(map(str, ranks[:MAX_NAMED]))}{more}"


def kind_of(error: BaseException) -> type[Exception]:
    """As which error a failure is raised on all ranks."""
    if isinstance(error, ValueError):
        return ValueError
    return DiskError if isinstance(error, (OSError, DiskError)) else CheckpointError


def reason_of(error: BaseException) -> str:
    """What to say of an error: its own words, behind its type where those were not written for users."""
    if isinstance(error, OSError):
        return in_words(error)
    text = str(error) or "no further words"
    known = isinstance(error, (ValueError, CheckpointError))
    return text if known else f"{type(error).__name__}: {text}"

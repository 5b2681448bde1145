"""Work that several ranks do together and that succeeds on all of them, or is raised as one failure on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from train.files import in_words

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The same on every rank; older checkpoints are untouched."""


class DiskError(CheckpointError):
    """A checkpoint could not be written because a disk refused; a later one may find it in better health."""


class Agreement:
    """The ranks of `group`, all of which call the same methods in the same order. Without a group a rank is alone."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)

    def on_all(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank; each returns all results in rank order, or each raises the same failure.

        A failure names its ranks in one sentence: a ValueError when every rank that failed raised one, as that is what
        the user asked or gave; DiskError when all met an OSError; CheckpointError otherwise.
        """
        failure: tuple[type[Exception], str] | None = None
        result: list[T] = []
        try:
            result = [work()]
        except Exception as error:
            if self.world_size == 1:
                raise
            failure = kind_of(error), reason_of(error)
        if self._group is None:
            return result
        mine = (failure, result)
        everyone = [mine] * self.world_size
        dist.all_gather_object(everyone, mine, group=self._group)
        failures = {rank: found for rank, (found, _) in enumerate(everyone) if found is not None}
        if not failures:
            return [results[0] for _, results in everyone]
        text = "; ".join(dict.fromkeys(reason for _, reason in failures.values()))
        ranks = ", ".join(map(str, failures))
        kinds = {kind for kind, _ in failures.values()}
        raise (kinds.pop() if len(kinds) == 1 else CheckpointError)(f"{text} (on rank {ranks})")

    def on_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone; every rank returns its result, or raises its failure."""

        def only_there() -> list[T]:
            return [work()] if self.rank == 0 else []

        return self.on_all(only_there)[0][0]


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

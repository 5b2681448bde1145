"""Rows of the micro-batches to come, read by a thread of its own while a step runs.

Which rows a micro-batch has is a function of (seed, position), whoever reads it and when: what is read ahead has the
numbers of what is read on the spot, also after a kill. What cannot be read is raised where it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

Place = tuple[int, int]  # position of the first row, number of rows


class Reader(Protocol):
    """Where a run gets its rows from."""

    def want(self, places: Sequence[Place]) -> None: ...

    def rows(self, first: int, count: int) -> Tensor: ...

    def close(self) -> None: ...


class AtOnce:
    """A reader that reads when it is asked, in the thread that asks: where rows have no values, or take no time."""

    def __init__(self, read: Callable[[int, int], Tensor], pin: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        self._read = read

    def want(self, places: Sequence[Place]) -> None:
        """They will be asked for."""

    def rows(self, first: int, count: int) -> Tensor:
        """Rows at positions [first, first + count)."""
        return self._read(first, count)

    def close(self) -> None:
        """There is nothing to end."""


class Ahead:
    """A reader of rows that is told in time which ones will be needed. Its thread begins with the first of them."""

    def __init__(self, read: Callable[[int, int], Tensor], pin: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        """read: rows at positions [first, first + count), int64 [count, seq_len + 1]. pin: brings them to where a copy
        to the device starts."""
        self._read, self._pin = read, pin
        self._thread: ThreadPoolExecutor | None = None
        self._known: list[dict[Place, Future[Tensor]]] = []  # of this step and of the next one

    def want(self, places: Sequence[Place]) -> None:
        """These will be asked for, as often as anybody likes, until those of two more steps are wanted."""
        step = {place: self._find(place) or self._begin(place) for place in places}
        if step.keys() not in [known.keys() for known in self._known]:
            self._known = [*self._known[-1:], step]

    def rows(self, first: int, count: int) -> Tensor:
        """Rows that are there, or will be in a moment. Raises what reading them has raised."""
        return (self._find((first, count)) or self._begin((first, count))).result()

    def close(self) -> None:
        """End the thread; what nobody has asked for is forgotten."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread, self._known = None, []

    def _find(self, place: Place) -> Future[Tensor] | None:
        return next((known[place] for known in self._known if place in known), None)

    def _begin(self, place: Place) -> Future[Tensor]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        return self._thread.submit(lambda: self._pin(self._read(*place)))

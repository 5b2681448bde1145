"""The pieces of a stage's passes by their names, told to whoever listens as they begin: a trace, or a stopwatch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from parallel.pipeline.segments import Name, Segments
from train.assemble import Tapes
from train.stage import WeightGradients


class Piece(NamedTuple):
    """Where an event is from.

    name: layer and node. kind: F, B or W. turn: how many turns the pass had given when the piece began; of a weight
    gradient, those of its backward when it was left. visit: counts the pieces of a recording.
    """

    name: Name
    kind: str
    turn: int
    visit: int


class Listener(Protocol):
    """What is told of the pieces of a stage's passes."""

    @property
    def piece(self) -> Piece:
        """The piece that has begun last."""

    @property
    def num_turns(self) -> int:
        """Turns that the pass has given."""

    def begins(self, name: Name, kind: str, turn: int | None = None) -> None:
        """A piece begins. turn: of a weight gradient, how many turns its backward had given."""


def tapes(listener: Listener) -> Tapes:
    """What a stage is to write its passes on, so that a listener hears the names of their pieces."""
    return Tapes(lambda: _NamedSegments(listener), lambda: _NamedGradients(listener))


class _NamedSegments(Segments):
    """A record that tells which piece begins."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener

    def begins(self, name: Name, kind: str) -> None:
        self._listener.begins(name, kind)


class _NamedGradients(WeightGradients):
    """A sink that keeps the name of the piece whose backward left a weight gradient."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener

    def __call__(self, work: Callable[[], None]) -> None:
        name, turn = self._listener.piece.name, self._listener.num_turns
        super().__call__(partial(self._run, name, turn, work))

    def _run(self, name: Name, turn: int, work: Callable[[], None]) -> None:
        self._listener.begins(name, "W", turn)
        work()

"""Writes one rank's list: counts micro-batches per stage and keeps weight gradients that were put off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from parallel.pipeline.actions import Action, Chunk, Pair


class RankList:
    """Micro-batches pass a stage in order, so a generator only says what comes next and at which stage.

    first: each stage's first micro-batch (0 where not named).
    """

    def __init__(self, first: Mapping[int, int] | None = None) -> None:
        self.actions: list[Action] = []
        self._forwards: Counter[int] = Counter(first or {})
        self._backwards: Counter[int] = Counter(first or {})
        self._waiting: list[Chunk] = []

    @property
    def num_waiting(self) -> int:
        """Number of weight gradients that were put off."""
        return len(self._waiting)

    def forward(self, stage: int) -> None:
        self.actions.append(self._next("F", stage, self._forwards))

    def backward(self, stage: int) -> None:
        """B and W at once."""
        self.actions.append(self._next("D", stage, self._backwards))

    def pair(self, forward_stage: int, backward_stage: int) -> None:
        forward = self._next("F", forward_stage, self._forwards)
        self.actions.append(Pair(forward, self._next("D", backward_stage, self._backwards)))

    def input_gradient(self, stage: int) -> None:
        """B alone: its W waits."""
        chunk = self._next("B", stage, self._backwards)
        self.actions.append(chunk)
        self._waiting.append(Chunk("W", stage, chunk.micro_batch))

    def weight_gradient(self, stage: int | None = None) -> None:
        """The W that has waited longest, of this stage or of any."""
        chunk = next(chunk for chunk in self._waiting if stage in (None, chunk.stage))
        self._waiting.remove(chunk)
        self.actions.append(chunk)

    @staticmethod
    def _next(kind: str, stage: int, counts: Counter[int]) -> Chunk:
        counts[stage] += 1
        return Chunk(kind, stage, counts[stage] - 1)

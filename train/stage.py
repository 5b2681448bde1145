"""A slice of the model at work on the micro-batches of one step, as a pipeline drives it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from train.model.loss import LossTerms
from train.model.tape import Inline, Steps, Tape
from train.model.transformer import Findings, Transformer


class Record(Tape, Protocol):
    """A tape that can be played backwards."""

    def enter(self, x: Tensor) -> Tensor: ...

    def leave(self, y: Tensor) -> Tensor: ...

    def backward(self, dy: Tensor | None) -> Steps[Tensor | None]: ...


class WeightGradients:
    """Where a slice's matrices leave the computation of their gradients: kept by micro-batch until they are taken.

    One slice runs one backward at a time, though it may be suspended in the middle of it.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[Callable[[], None]]] = {}
        self._micro_batch: int | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        assert self._micro_batch is not None, "a weight gradient outside of a backward"
        self._waiting[self._micro_batch].append(work)

    def begin(self, micro_batch: int) -> None:
        """From here on, work is that of this micro-batch."""
        self._micro_batch = micro_batch
        self._waiting[micro_batch] = []

    @torch.no_grad()
    def take(self, micro_batch: int, share: float = 1.0) -> int:
        """Do what has been left for a micro-batch so far, which may be nothing, or the first ones of it: this share,
        rounded up. Returns how many still wait."""
        waiting = self._waiting.get(micro_batch, [])
        for _ in range(math.ceil(share * len(waiting))):
            waiting.pop(0)()
        return len(waiting)


class Reader:
    """One slice that reads texts, forward only, without losses and prediction depths."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def begin(self, texts: Callable[[int], Tensor], found: dict[int, Tensor]) -> None:
        """Make ready for texts. texts: number of a text to its tokens [1, S]. found: takes the states behind the last
        norm, [1, S, hidden], where that is."""
        self._texts, self._found = texts, found

    def forward(self, micro_batch: int, x: Tensor | None) -> Steps[Tensor | None]:
        """x [1, S, hidden] from the slice before -> what the next one needs, of the same shape."""
        tokens = self._texts(micro_batch) if self.model.reads_tokens else None
        y = yield from self.model.read(tokens, x)
        if not self.model.parts.head:
            return y
        self._found[micro_batch] = y
        return None

    def backward(self, micro_batch: int, dy: Tensor | None) -> Steps[Tensor | None]:
        """There is none."""
        raise NotImplementedError("texts are only read")

    def weight_gradients(self, micro_batch: int, share: float = 1.0) -> int:
        """There are none."""
        return 0


class Stage:
    """One slice: keeps each micro-batch's record from its forward to its backward, and its findings."""

    def __init__(self, model: Transformer, weight_gradients: WeightGradients, record: Callable[[], Record]) -> None:
        """weight_gradients: the sink that the model was built with. record: makes the tape of one micro-batch."""
        self.model, self._weight_gradients, self._new_record = model, weight_gradients, record
        self._records: dict[int, Record] = {}
        self.findings: dict[int, Findings] = {}

    def begin(self, tokens: Callable[[int], Tensor], terms: LossTerms) -> None:
        """Make ready for a step. tokens: micro-batch to its rows [B, S + 1], which stages ask for that read them."""
        self._tokens, self._terms = tokens, terms
        self.findings = {}

    def forward(self, micro_batch: int, x: Tensor | None) -> Steps[Tensor | None]:
        """x [B, S, hidden] from the stage before -> what the next one needs, of the same shape.

        In evaluation mode nothing is kept but the findings.
        """
        tokens = self._tokens(micro_batch) if self.model.reads_tokens else None
        if not self.model.training:
            y, self.findings[micro_batch] = yield from self.model.steps(tokens, x, self._terms, Inline())
            return y
        record = self._new_record()
        x = None if x is None else record.enter(x)
        y, self.findings[micro_batch] = yield from self.model.steps(tokens, x, self._terms, record)
        self._records[micro_batch] = record
        return None if y is None else record.leave(y)

    def backward(self, micro_batch: int, dy: Tensor | None) -> Steps[Tensor | None]:
        """dy and the result [B, S, hidden]. Weight gradients wait for `weight_gradients`."""
        self._weight_gradients.begin(micro_batch)
        return (yield from self._records.pop(micro_batch).backward(dy))

    def weight_gradients(self, micro_batch: int, share: float = 1.0) -> int:
        """Add the weight gradients that this micro-batch's backward has left so far to `main_grad`, or the first ones.

        share: of those that wait, rounded up to whole ones. Returns how many still wait.
        """
        return self._weight_gradients.take(micro_batch, share)

"""A slice of the model at work on the micro-batches of one step, as a pipeline drives it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Protocol

import torch
from torch import Tensor

from train.model.loss import LossTerms
from train.model.tape import Inline, Steps, Tape
from train.model.transformer import Report, Transformer


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

    def take(self, micro_batch: int) -> None:
        """Do all that has been left for a micro-batch so far."""
        waiting = self._waiting[micro_batch]
        while waiting:
            waiting.pop(0)()

    def done(self) -> bool:
        """Whether nothing waits."""
        return not any(self._waiting.values())


class Stage:
    """One slice: keeps each micro-batch's record from its forward to its backward, and adds up what they report."""

    def __init__(self, model: Transformer, weight_gradients: WeightGradients, record: Callable[[], Record]) -> None:
        """record: makes the tape of one micro-batch."""
        self.model, self._weight_gradients, self._new_record = model, weight_gradients, record
        self._records: dict[int, Record] = {}
        self._peak_records = 0

    def begin(self, tokens: Callable[[int], Tensor], terms: LossTerms, training: bool = True) -> None:
        """Make ready for a step, or for an evaluation.

        tokens: micro-batch to its rows [B, S + 1].
        """
        self._tokens, self._terms, self._training = tokens, terms, training
        self.model.train(training)
        self.report = self.model.empty_report(next(self._devices()))
        self.reports: dict[int, Tensor] = {}

    def forward(self, micro_batch: int, x: Tensor | None) -> Generator[None, None, Tensor | None]:
        """x [B, S, hidden] from the stage before -> what the next one needs, of the same shape."""
        tokens = self._tokens(micro_batch)
        if not self._training:
            with torch.no_grad():
                y, report = yield from self.model.steps(tokens, x, self._terms, Inline())
        else:
            record = self._new_record()
            y, report = yield from self.model.steps(
                tokens, None if x is None else record.enter(x), self._terms, record
            )
            if y is not None:
                record.leave(y)
            self._records[micro_batch] = record
        self._add(micro_batch, report)
        return y

    def backward(self, micro_batch: int, dy: Tensor | None) -> Generator[None, None, Tensor | None]:
        """dy and the result [B, S, hidden]. Weight gradients wait for `weight_gradients`."""
        self._weight_gradients.begin(micro_batch)
        return (yield from self._records.pop(micro_batch).backward(dy))

    def weight_gradients(self, micro_batch: int) -> None:
        """Add the weight gradients that this micro-batch's backward has left to `main_grad`."""
        self._weight_gradients.take(micro_batch)

    def _add(self, micro_batch: int, report: Report) -> None:
        self.report.sums.add_(report.sums)
        self.report.load.add_(report.load)
        self.reports[micro_batch] = report.sums

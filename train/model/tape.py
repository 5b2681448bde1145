"""How a forward pass is written once and run in two ways: by autograd alone, or suspended at every communication.

A layer describes its forward pass as steps on a `Tape`: `compute` runs a piece that autograd differentiates,
`communicate` moves rows between ranks, `loss` names a term of the loss. With the `Inline` tape below the whole is one
autograd graph. A pipeline hands in a tape of its own, which keeps the pieces apart, so that the backward pass too can
stop at each communication and let another micro-batch compute meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
# Yields while a communication that it has launched is on its way, and yields a name of the slot in which it stands.
# `parallel.collectives` has this type and `drive` as well: the model's floor knows no ranks, and theirs no model, so
# each states what both speak.
Steps = Generator[str, None, Result]


class Trip(Protocol):
    """One communication and its reverse. Plain tensors, no autograd; each is run once, the reverse after.

    What a layer makes and any tape takes; `parallel.pipeline.segments` states for itself what it is handed.
    """

    def there(self, *inputs: Any, **_: Any) -> Steps[tuple[Tensor, ...]]:
        """Launch, yield the slot's name, and return what arrives."""
        ...

    def back(self, *d_outputs: Any, **_: Any) -> Steps[tuple[Tensor, ...]]:
        """Launch the way back, yield the slot's name, and return the gradients of the inputs; takes those of the
        outputs."""
        ...


class Tape(Protocol):
    """What a forward pass is written on."""

    def layer(self, kind: str) -> None:
        """What follows is of the next layer.

        kind: `embedding`, `dense`, `moe`, `head`, `mtp`, or `stage` for what all layers of a stage share.
        """
        ...

    def compute(self, piece: Callable[..., Any], *inputs: Tensor, node: str = "") -> Any:
        """`piece(*inputs)`: a tensor or a flat tuple of tensors. All tensors that need a gradient are inputs.

        node: what the piece is of its layer, for people.
        """
        ...

    def communicate(self, trip: Trip, *inputs: Tensor, node: str = "") -> Steps[tuple[Tensor, ...]]:
        """What `trip.there(*inputs)` returns.

        node: which trip of its layer it is; with the slots of the trip, it is what tables of overlap go by.
        """
        ...

    def loss(self, value: Tensor, factor: float) -> None:
        """Add factor * value (a scalar) to the loss."""
        ...


def drive(steps: Steps[Result]) -> Result:
    """Run steps to their end, waiting at every communication."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class _TripFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        return drive(trip.there(*inputs))

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> Any:
        return None, *drive(ctx.trip.back(*d_outputs))


class Inline:
    """The plain way: one autograd graph; `total` is the loss to differentiate."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0

    def layer(self, kind: str) -> None:
        pass

    def compute(self, piece: Callable[..., Any], *inputs: Tensor, node: str = "") -> Any:
        return piece(*inputs)

    def communicate(self, trip: Trip, *inputs: Tensor, node: str = "") -> Steps[tuple[Tensor, ...]]:
        yield from ()
        return _TripFunction.apply(trip, *inputs)

    def loss(self, value: Tensor, factor: float) -> None:
        self.total = self.total + value * factor

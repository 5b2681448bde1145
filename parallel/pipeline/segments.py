"""One stage's forward and backward of one micro-batch, both suspended at every communication.

The stage writes its forward pass on `Segments` as steps (pieces that autograd differentiates, trips between ranks, loss
terms). Every piece is an autograd graph of its own, so that the backward pass is a walk over the steps in reverse,
which also stops after each communication it has launched. What it yields there names the slot that it stands in, by the
trip's node and the trip's own word for the leg; `overlap.interleave` goes by these names, and lets one pass compute
while another one's rows are on their way.

The record holds no activation. What a piece's backward reads, autograd has saved; of inputs and outputs only the places
of their gradients are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from parallel.collectives import Steps

T = TypeVar("T")


class Trip(Protocol):
    """One communication and its reverse, as generators over plain tensors.

    What a record takes; layers make such trips and state the protocol for themselves (`train.model.tape`), as neither
    floor imports the other.
    """

    def there(self, *inputs: Any, **_: Any) -> Steps[tuple[Tensor, ...]]: ...

    def back(self, *d_outputs: Any, **_: Any) -> Steps[tuple[Tensor, ...]]: ...


class Name(NamedTuple):
    """Which part of the stage a step is, in the words of who wrote it on the record.

    layer: kind of the layer. number: how many layers had begun before it. node: of the layer.
    """

    layer: str
    number: int
    node: str


class _Entrance(torch.autograd.Function):
    """Inputs of a piece as the ends of its graph: their gradients are left in `arrived`, and nothing keeps the inputs.

    A leaf would be kept by the node that accumulates its gradient. `anchor` is there to ask for a gradient.
    """

    @staticmethod
    def forward(ctx: Any, arrived: list[Tensor | None], anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.arrived = arrived
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *d_inputs: Tensor | None) -> Any:
        ctx.arrived[:] = d_inputs
        return None, None, *(None for _ in d_inputs)


@dataclass
class _Piece:
    """A differentiable step: where the gradients of its inputs arrive, and where those of its outputs set out."""

    name: Name
    sources: list[int]
    d_inputs: list[Tensor | None]
    roots: list[tuple[int, GradientEdge]]

    def backward(self, gradients: dict[int, Tensor]) -> Steps[Sequence[Tensor | None]]:
        yield from ()
        reached = [(root, gradients.pop(number)) for number, root in self.roots if number in gradients]
        if reached:
            torch.autograd.backward([root for root, _ in reached], [gradient for _, gradient in reached])
        # Taken out: a weight gradient that still waits may hold the graph, and with it the list.
        d_inputs = self.d_inputs.copy()
        self.d_inputs.clear()
        return d_inputs


@dataclass
class _Passage:
    """A communicating step."""

    name: Name
    sources: list[int]
    trip: Trip
    arrivals: list[tuple[int, Tensor]]  # number, and a meta tensor in the shape of what arrived

    def backward(self, gradients: dict[int, Tensor]) -> Steps[Sequence[Tensor | None]]:
        missing = next(iter(gradients.values()))
        d_outputs = [
            gradients.pop(number) if number in gradients else missing.new_zeros(like.shape, dtype=like.dtype)
            for number, like in self.arrivals
        ]
        yield f"{self.name.node} departure"
        return (yield from _slots(self.name.node, self.trip.back(*d_outputs)))


class Segments:
    """The record of one forward pass; used up by its backward."""

    def __init__(self) -> None:
        self._steps: list[_Piece | _Passage] = []
        self._num_tensors = 0
        self._losses: list[tuple[int, Tensor]] = []
        self._input: int | None = None
        self._output: int | None = None
        self._layer, self._num_layers = "", 0

    def enter(self, x: Tensor) -> Tensor:
        """Declare what the stage received: `backward` returns its gradient."""
        x = self._number(x.detach())
        self._input = _number_of(x)
        return x

    def leave(self, y: Tensor) -> Tensor:
        """Declare what the stage sends on: `backward` is handed its gradient."""
        self._output = _number_of(y)
        return y

    def begins(self, name: Name, kind: str) -> None:
        """A step begins, forward (kind "F") or backward ("B"). For those who write down what a pass does."""

    def layer(self, kind: str) -> None:
        """What follows is of the next layer."""
        self._layer, self._num_layers = kind, self._num_layers + 1
        self.begins(self._name(""), "F")

    def compute(self, piece: Callable[..., Any], *inputs: Tensor, node: str = "") -> Any:
        """Run a differentiable piece: tensors in, a tensor or a flat tuple of tensors out."""
        name = self._name(node)
        self.begins(name, "F")
        d_inputs: list[Tensor | None] = [None] * len(inputs)
        with torch.enable_grad():
            anchor = torch.empty((), requires_grad=True)  # of which nobody reads a value
            results = piece(*_Entrance.apply(d_inputs, anchor, *(x.detach() for x in inputs)))
        outputs = results if isinstance(results, tuple) else (results,)
        handed_on = tuple(self._number(output.detach()) for output in outputs)
        roots = [
            (_number_of(y), get_gradient_edge(output))
            for y, output in zip(handed_on, outputs, strict=True)
            if output.requires_grad
        ]
        self._steps.append(_Piece(name, [_number_of(x) for x in inputs], d_inputs, roots))
        return handed_on if isinstance(results, tuple) else handed_on[0]

    def communicate(self, trip: Trip, *inputs: Tensor, node: str = "") -> Steps[tuple[Tensor, ...]]:
        """Run a trip; what arrives is handed on."""
        name = self._name(node)
        self.begins(name, "F")
        arrived = yield from _slots(node, trip.there(*inputs))
        handed_on = tuple(self._number(y.detach()) for y in arrived)
        likes = [(_number_of(y), torch.empty_like(y, device="meta")) for y in handed_on]
        self._steps.append(_Passage(name, [_number_of(x) for x in inputs], trip, likes))
        return handed_on

    def loss(self, value: Tensor, factor: float) -> None:
        """Add factor * value to what `backward` differentiates."""
        self._losses.append((_number_of(value), torch.full_like(value, factor)))

    def backward(self, dy: Tensor | None) -> Steps[Tensor | None]:
        """From the gradient of the output (None: only the losses) to that of the input (None: no input).

        Each step is released as soon as it is done. Weight gradients go where the pieces send them.
        """
        # Taken over: each is free when its step is done.
        gradients = dict(self._losses)
        self._losses.clear()
        if dy is not None:
            assert self._output is not None
            gradients[self._output] = dy
        while self._steps:
            step = self._steps.pop()
            self.begins(step.name, "B")
            d_inputs = yield from step.backward(gradients)
            for number, gradient in zip(step.sources, d_inputs, strict=True):
                if gradient is not None:
                    known = gradients.get(number)
                    gradients[number] = gradient if known is None else known + gradient
        return None if self._input is None else gradients[self._input]

    def _name(self, node: str) -> Name:
        return Name(self._layer, self._num_layers, node)

    def _number(self, tensor: Tensor) -> Tensor:
        tensor._segment_number = self._num_tensors  # type: ignore[attr-defined]
        self._num_tensors += 1
        return tensor


def _number_of(tensor: Tensor) -> int:
    return tensor._segment_number  # type: ignore[attr-defined]


def _slots(node: str, trip: Steps[T]) -> Steps[T]:
    """A trip's steps, whose slots are named with the node of the layer that they belong to."""
    while True:
        try:
            slot = next(trip)
        except StopIteration as end:
            return end.value
        yield f"{node} {slot}"

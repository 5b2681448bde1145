"""Who multiplies: the `Engine` that a layer asks, and `Products`, an engine given by its three plain products.

Shapes: T tokens (rows), k inputs, n outputs, E groups (experts). Weights are [n, k], or stacked [E, n, k].
docs/precision.md shows the room in a picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from train.precision.grads import Sink, main_grad


class Engine(Protocol):
    """An arithmetic for a layer's matrix products and for their gradients.

    Gradients of weights leave for the sink as work that adds to `main_grad`.
    """

    def project(self, x: Tensor, sink: Sink, *weights: Tensor) -> tuple[Tensor, ...]:
        """x [..., k] times each weight [n, k], transposed: [..., n] each. x is quantised and kept at most once."""
        ...

    def mlp(self, mlp: Mlp, x: Tensor, row_weights: Tensor | None) -> Tensor:
        """What `mlp`, whose first map is this engine's, makes of x [R, d] and row_weights [R] or None: [R, d]."""
        ...

    def grouped(self, splits: list[int]) -> Engine:
        """This engine for stacked weights [E, n, k]: rows come sorted by group, `splits[e]` of them for group e."""
        ...


class Activation(Protocol):
    """What an MLP computes between its two maps, for h [R, 2f] and row_weights [R] or None."""

    @property
    def swiglu_forward(self) -> Callable[[Tensor, Tensor | None], Tensor]:
        """(h, row_weights) -> a [R, f]."""
        ...

    @property
    def swiglu_backward(self) -> Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]:
        """(da, h, row_weights) -> a, made again, and the gradients of h and of row_weights."""
        ...


@dataclass(frozen=True)
class Mlp:
    """Two maps and the activation between them as one autograd node: activation(x gate_upᵀ, row_weights) downᵀ.

    A forward pass keeps x and the activation's input, each as its engine keeps inputs; the backward pass computes the
    activation again (technical report, section 3.3.3).

    Attributes:
        gate_up, down: weights [2f, d] and [d, f], or stacked [E, 2f, d] and [E, d, f] for engines that are grouped.
        up_engine, down_engine: who multiplies by either; both of one class.
        sink: takes the gradients of both weights.
    """

    gate_up: Tensor
    down: Tensor
    up_engine: Engine
    down_engine: Engine
    activation: Activation
    sink: Sink

    def __call__(self, x: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """x [R, d], row_weights [R] or None -> [R, d]."""
        return self.up_engine.mlp(self, x, row_weights)


class Products(ABC):
    """An engine by its three products, which autograd nodes here put together.

    An input has two forms: what the forward product multiplies (`operand`), and what is kept of it until the weight
    gradient (`keep`, `restore`). Both are the input itself where an arithmetic does not say otherwise.
    """

    def operand(self, x: Tensor) -> Tensor:
        """x [..., k] as `fprop` takes it."""
        return x

    def keep(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is kept of x [..., k] for the backward pass."""
        return (x,)

    def enter(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [..., k] as `fprop` takes it, and what is kept of it for the backward pass."""
        return self.operand(x), self.keep(x)

    def restore(self, kept: tuple[Tensor, ...]) -> Tensor:
        """x [..., k], as far as it was kept, in its own or a wider type."""
        return kept[0]

    @abstractmethod
    def fprop(self, operand: Tensor, weight: Tensor) -> Tensor:
        """The operand of x [T, k], weight [n, k] -> x weightᵀ [T, n]."""

    @abstractmethod
    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy [T, n], weight [n, k] -> dy weight [T, k]."""

    @abstractmethod
    def wgrad_(self, accumulator: Tensor, dy: Tensor, x: Tensor) -> None:
        """accumulator [n, k] += dyᵀ x, without rounding the product to the type of its operands; x as restored."""

    @abstractmethod
    def grouped(self, splits: list[int]) -> Products:
        """The products for stacked weights [E, n, k], whose rows come sorted by group (`Engine.grouped`)."""

    def project(self, x: Tensor, sink: Sink, *weights: Tensor) -> tuple[Tensor, ...]:
        """`Engine.project`, by these products."""
        return _ProjectNode.apply(x, self, sink, *weights)

    def mlp(self, mlp: Mlp, x: Tensor, row_weights: Tensor | None) -> Tensor:
        """`Engine.mlp`, by these products and those of its second map."""
        return _MlpNode.apply(mlp, x, row_weights, mlp.gate_up, mlp.down)


def products_of(engine: Engine) -> Products:
    """The plain products of an engine, for what differentiates by itself. TypeError for an engine without any."""
    if not isinstance(engine, Products):
        raise TypeError(f"{type(engine).__name__} has no plain products")
    return engine


def spans(splits: list[int]) -> list[tuple[int, slice]]:
    """(group, its rows) of every group that has any."""
    ends = list(accumulate(splits))
    return [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(splits, ends, strict=True)) if n]


def _weight_gradient(products: Products, weight: Tensor, dy: Tensor, kept: tuple[Tensor, ...]) -> None:
    """Add a weight's gradient to its `main_grad`: dy [T, n] and what was kept of x [..., k]."""
    x = products.restore(kept)
    products.wgrad_(main_grad(weight), dy, x.reshape(-1, x.shape[-1]))


class _ProjectNode(torch.autograd.Function):
    """One input times several weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, products: Products, sink: Sink, *weights: Tensor) -> tuple[Tensor, ...]:
        operand, kept = products.enter(x)
        ctx.save_for_backward(*kept)
        # Parameters themselves: what comes back from saved tensors need not be the object that has the `main_grad`.
        ctx.weights, ctx.products, ctx.sink, ctx.shape = weights, products, sink, x.shape
        operand = operand.reshape(-1, x.shape[-1])
        return tuple(products.fprop(operand, weight).view(*x.shape[:-1], weight.shape[-2]) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> Any:
        # Detached: what waits for its turn must not hold the graph.
        kept = tuple(x.detach() for x in ctx.saved_tensors)
        dx: Tensor | None = None
        for dy, weight in zip(d_outputs, ctx.weights, strict=True):
            dy = dy.reshape(-1, dy.shape[-1])
            part = ctx.products.dgrad(dy, weight)
            dx = part if dx is None else dx.add_(part)
            main_grad(weight)  # missing, it is missed here and not when the sink gets to it
            ctx.sink(partial(_weight_gradient, ctx.products, weight, dy, kept))
        assert dx is not None
        return dx.view(ctx.shape), None, None, *(None for _ in ctx.weights)


class _MlpNode(torch.autograd.Function):
    """Two maps and what is between them; the weights are inputs, so that they alone make autograd record it."""

    @staticmethod
    def forward(ctx: Any, mlp: Mlp, x: Tensor, row_weights: Tensor | None, gate_up: Tensor, down: Tensor) -> Tensor:
        first, second = products_of(mlp.up_engine), products_of(mlp.down_engine)
        operand, kept_x = first.enter(x)
        h = first.fprop(operand, gate_up)
        del operand
        a = mlp.activation.swiglu_forward(h, row_weights)
        ctx.save_for_backward(row_weights, *kept_x, *second.keep(h))
        ctx.mlp, ctx.num_kept = mlp, len(kept_x)
        return second.fprop(second.operand(a), down)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        mlp, (row_weights, *kept), dy = ctx.mlp, ctx.saved_tensors, dy.contiguous()
        first, second = products_of(mlp.up_engine), products_of(mlp.down_engine)
        # Detached: what waits for its turn must not hold the graph.
        kept_x, kept_h = tuple(x.detach() for x in kept[: ctx.num_kept]), tuple(kept[ctx.num_kept :])
        h = second.restore(kept_h).to(dy.dtype)
        a, dh, d_row_weights = mlp.activation.swiglu_backward(second.dgrad(dy, mlp.down), h, row_weights)
        dx = first.dgrad(dh, mlp.gate_up)
        mlp.sink(partial(second.wgrad_, main_grad(mlp.down), dy, a))
        mlp.sink(partial(_weight_gradient, first, mlp.gate_up, dh, kept_x))
        return None, dx, d_row_weights, None, None

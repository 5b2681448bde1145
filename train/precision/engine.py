"""Who multiplies: the `Engine` that a layer asks, and `Products`, an engine given by its three plain products.

Shapes: T tokens (rows), k inputs, n outputs, E groups (experts). Weights are [n, k], or stacked [E, n, k].
docs/precision.md shows the room in a picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from train.precision.coded import parts_of
from train.precision.grads import Sink, main_grad

# (rebuild, outputs, inputs): `outputs` were computed as `rebuild(*inputs)`, and can be again. Whoever is told may have
# them made again in the backward pass instead of keeping them (`train.model.recompute` states the same).
Offer = Callable[[Callable[..., tuple[Tensor, ...]], Sequence[Tensor], Sequence[Tensor]], None]


def keep_all(rebuild: Callable[..., tuple[Tensor, ...]], outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """The offer that nobody takes."""


class Engine(Protocol):
    """An arithmetic for a layer's matrix products and for their gradients.

    Gradients of weights leave for the sink as work that adds to `main_grad`.
    """

    def project(self, x: Tensor, sink: Sink, *weights: Tensor, offer: Offer = keep_all) -> tuple[Tensor, ...]:
        """x [..., k] times each weight [n, k], transposed: [..., n] each. x is quantised and kept at most once.

        offer: told of what is kept of x where that is another tensor.
        """
        ...

    def mlp(self, mlp: Mlp, x: Tensor, row_weights: Tensor | None) -> Tensor:
        """What `mlp`, whose first map is this engine's, makes of x [R, d] and row_weights [R] or None: [R, d]."""
        ...

    def grouped(self, splits: list[int]) -> Engine:
        """This engine for stacked weights [E, n, k]: rows come sorted by group, `splits[e]` of them for group e."""
        ...

    def codec(self, width: int) -> RowCodec | None:
        """What rows [R, width] are on their way to this engine's groups; None for themselves."""
        ...


class RowCodec(Protocol):
    """Rows on their way to an engine that multiplies groups of them. `parallel.expert.dispatch` states the same.

    Attributes:
        row_multiple: rows of each group come in multiples of it, of which the last ones may be empty.
    """

    row_multiple: int

    def encode(self, rows: Tensor) -> Tensor:
        """rows [N, width] -> what is sent of them [N, ...]."""
        ...

    def arrive(self, payload: Tensor, source: Tensor, splits: list[int], dtype: torch.dtype) -> Tensor:
        """What was received [N, ...] -> rows [R, width], `splits` of each group: row r is payload[source[r]], and empty
        where source[r] is N. They are of `dtype`, as far as they are asked."""
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

    A forward pass keeps x and the activation's input h, each as its engine keeps inputs; the backward pass computes the
    activation again (technical report, section 3.3.3), and h too if whoever `offer_hidden` tells chooses so.

    Attributes:
        gate_up, down: weights [2f, d] and [d, f], or stacked [E, 2f, d] and [E, d, f] for engines that are grouped.
        up_engine, down_engine: who multiplies by either; both of one class.
        sink: takes the gradients of both weights.
        offer: as `Engine.project` takes it.
        offer_hidden: told how what is kept of h is made again of what is kept of x, by one product.
    """

    gate_up: Tensor
    down: Tensor
    up_engine: Engine
    down_engine: Engine
    activation: Activation
    sink: Sink
    offer: Offer = keep_all
    offer_hidden: Offer = keep_all

    def __call__(self, x: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """x [R, d], row_weights [R] or None -> [R, d]."""
        return self.up_engine.mlp(self, x, row_weights)


class Products(ABC):
    """An engine by its three products, which autograd nodes here put together.

    An input has two forms: what the forward product multiplies (`operand`), and what is kept of it until the weight
    gradient (`keep`, `restore`). So has a gradient (`enter_gradient`). All are the tensor itself where an arithmetic
    does not say otherwise; what an arithmetic's own methods give out, its own methods take, whatever it is. Operands
    may have more rows than the tensors that they were made of: results are cut.
    """

    def operand(self, x: Tensor) -> Any:
        """x [..., k] as `fprop` takes it."""
        return x

    def keep(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is kept of x [..., k] for the backward pass."""
        return (x,)

    def enter(self, x: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        """x [T, k] as `fprop` takes it, and what is kept of it for the backward pass."""
        return self.operand(x), self.keep(x)

    def operand_of_kept(self, kept: tuple[Tensor, ...]) -> Any:
        """x [T, k], as far as it was kept, as `fprop` takes it: to the bit what `enter` gave, so that a product can be
        made again."""
        return self.operand(kept[0])

    def restore(self, kept: tuple[Tensor, ...]) -> Any:
        """x [T, k], as far as it was kept, as `wgrad_` takes it: in its own or a wider type."""
        return kept[0]

    def enter_gradient(self, dy: Tensor) -> tuple[Any, Any]:
        """dy [T, n] as `dgrad` takes it, and as `wgrad_` does."""
        return dy, dy

    @abstractmethod
    def fprop(self, operand: Any, weight: Tensor) -> Tensor:
        """The operand of x [T, k], weight [n, k] -> x weightᵀ [T, n]."""

    @abstractmethod
    def dgrad(self, dy: Any, weight: Tensor) -> Tensor:
        """dy [T, n], weight [n, k] -> dy weight [T, k]."""

    @abstractmethod
    def wgrad_(self, accumulator: Tensor, dy: Any, x: Any) -> None:
        """accumulator [n, k] += dyᵀ x, without rounding the product to the type of its operands; x as restored."""

    def activate(self, activation: Activation, h: Tensor, row_weights: Tensor | None) -> tuple[Any, tuple[Tensor, ...]]:
        """The activation of h [R, 2f] as this engine's `fprop` takes it, and what is kept of h."""
        a = activation.swiglu_forward(h, row_weights)
        return self.operand(a), self.keep(h)

    def keep_hidden(self, activation: Activation, h: Tensor) -> tuple[Tensor, ...]:
        """What `activate` keeps of h [R, 2f]."""
        return self.keep(h)

    def activate_backward(
        self, up: Products, activation: Activation, da: Tensor, kept: tuple[Tensor, ...], row_weights: Tensor | None
    ) -> tuple[Any, tuple[Any, Any], Tensor | None]:
        """da [R, f] and what was kept of h -> the activation a as this engine's `wgrad_` takes it, the gradient of h as
        `up.enter_gradient` gives it, and that of row_weights."""
        h = self.restore(kept).to(da.dtype)
        a, dh, d_row_weights = activation.swiglu_backward(da, h, row_weights)
        return a, up.enter_gradient(dh), d_row_weights

    @abstractmethod
    def grouped(self, splits: list[int]) -> Products:
        """The products for stacked weights [E, n, k], whose rows come sorted by group (`Engine.grouped`)."""

    def codec(self, width: int) -> RowCodec | None:
        """`Engine.codec`: rows travel as themselves."""
        return None

    def project(self, x: Tensor, sink: Sink, *weights: Tensor, offer: Offer = keep_all) -> tuple[Tensor, ...]:
        """`Engine.project`, by these products."""
        return _ProjectNode.apply(x, self, sink, _asked(offer), *weights)

    def mlp(self, mlp: Mlp, x: Tensor, row_weights: Tensor | None) -> Tensor:
        """`Engine.mlp`, by these products and those of its second map."""
        asked = replace(mlp, offer=_asked(mlp.offer), offer_hidden=_asked(mlp.offer_hidden))
        return _MlpNode.apply(asked, x, row_weights, mlp.gate_up, mlp.down)


def products_of(engine: Engine) -> Products:
    """The plain products of an engine, for what differentiates by itself. TypeError for an engine without any."""
    if not isinstance(engine, Products):
        raise TypeError(f"{type(engine).__name__} has no plain products")
    return engine


def spans(splits: list[int]) -> list[tuple[int, slice]]:
    """(group, its rows) of every group that has any."""
    ends = list(accumulate(splits))
    return [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(splits, ends, strict=True)) if n]


def _asked(offer: Offer) -> Offer:
    """An offer for what autograd keeps; to be asked for where it is known whether it keeps anything."""
    return offer if torch.is_grad_enabled() else keep_all


def _enter(products: Products, x: Tensor, offer: Offer) -> tuple[Any, tuple[Tensor, ...]]:
    """`Products.enter`, and whoever asks is told how to make again what is kept of x."""
    operand, kept = products.enter(x)
    # Rows that lie in memory as they were quantised are kept as they are.
    if parts_of(x) is None and not any(each is x for each in kept):
        offer(lambda x: products.enter(x)[1], kept, (x,))
    return operand, kept


def _weight_gradient(products: Products, weight: Tensor, dy: Any, kept: tuple[Tensor, ...]) -> None:
    """Add a weight's gradient to its `main_grad`: dy as `wgrad_` takes it, and what was kept of x."""
    products.wgrad_(main_grad(weight), dy, products.restore(kept))


class _ProjectNode(torch.autograd.Function):
    """One input times several weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, products: Products, sink: Sink, offer: Offer, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        operand, kept = _enter(products, rows, offer)
        ctx.save_for_backward(*kept)
        # Parameters themselves: what comes back from saved tensors need not be the object that has the `main_grad`.
        ctx.weights, ctx.products, ctx.sink, ctx.shape = weights, products, sink, x.shape
        outputs = (products.fprop(operand, weight)[: len(rows)] for weight in weights)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> Any:
        # Detached: what waits for its turn must not hold the graph.
        kept = tuple(x.detach() for x in ctx.saved_tensors)
        dx: Tensor | None = None
        for dy, weight in zip(d_outputs, ctx.weights, strict=True):
            operand, waiting = ctx.products.enter_gradient(dy.reshape(-1, dy.shape[-1]))
            part = ctx.products.dgrad(operand, weight)
            dx = part if dx is None else dx.add_(part)
            main_grad(weight)  # missing, it is missed here and not when the sink gets to it
            ctx.sink(partial(_weight_gradient, ctx.products, weight, waiting, kept))
        assert dx is not None
        return dx[: ctx.shape[:-1].numel()].view(ctx.shape), None, None, None, *(None for _ in ctx.weights)


def _hidden_again(mlp: Mlp, *kept_x: Tensor) -> tuple[Tensor, ...]:
    """What is kept of the activation's input, of what is kept of x."""
    first, second = products_of(mlp.up_engine), products_of(mlp.down_engine)
    return second.keep_hidden(mlp.activation, first.fprop(first.operand_of_kept(kept_x), mlp.gate_up))


class _MlpNode(torch.autograd.Function):
    """Two maps and what is between them; the weights are inputs, so that they alone make autograd record it."""

    @staticmethod
    def forward(ctx: Any, mlp: Mlp, x: Tensor, row_weights: Tensor | None, gate_up: Tensor, down: Tensor) -> Tensor:
        first, second = products_of(mlp.up_engine), products_of(mlp.down_engine)
        operand, kept_x = _enter(first, x, mlp.offer)
        h = first.fprop(operand, gate_up)
        del operand
        operand, kept_h = second.activate(mlp.activation, h, row_weights)
        del h
        mlp.offer_hidden(partial(_hidden_again, mlp), kept_h, kept_x)
        ctx.save_for_backward(row_weights, *kept_x, *kept_h)
        ctx.mlp, ctx.num_kept, ctx.num_rows = mlp, len(kept_x), x.shape[0]
        return second.fprop(operand, down)[: x.shape[0]]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        mlp, (row_weights, *kept), dy = ctx.mlp, ctx.saved_tensors, dy.contiguous()
        first, second = products_of(mlp.up_engine), products_of(mlp.down_engine)
        # Detached: what waits for its turn must not hold the graph.
        kept_x, kept_h = tuple(x.detach() for x in kept[: ctx.num_kept]), tuple(kept[ctx.num_kept :])
        operand, waiting_dy = second.enter_gradient(dy)
        da = second.dgrad(operand, mlp.down)
        del operand
        a, (dh, waiting_dh), d_row_weights = second.activate_backward(first, mlp.activation, da, kept_h, row_weights)
        del da
        dx = first.dgrad(dh, mlp.gate_up)
        mlp.sink(partial(second.wgrad_, main_grad(mlp.down), waiting_dy, a))
        mlp.sink(partial(_weight_gradient, first, mlp.gate_up, waiting_dh, kept_x))
        return None, dx[: ctx.num_rows], d_row_weights, None, None

"""Matrix products: the `Engine` that takes them and the `Linear` layer that asks for them.

Shapes: T tokens (rows), k inputs, n outputs, E groups (experts). Weights are [n, k], or stacked [E, n, k].

A layer asks for maps (`Maps`): what autograd differentiates. Most engines have plain products (`Gemm`) and leave the
differentiating to `Nodes`; an engine with nodes of its own has maps alone.

Every product of a layer has three forms, and its input two: what the forward product multiplies (`operand`) and what
is kept of it until the weight gradient (`keep`, `restore`). For most engines both are the input itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from train.precision.grads import Sink, main_grad


class Gemm(Protocol):
    """The three products of one linear map."""

    def operand(self, x: Tensor) -> Tensor:
        """x [..., k] as `fprop` takes it."""
        ...

    def keep(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is kept of x [..., k] for the backward pass."""
        ...

    def restore(self, kept: tuple[Tensor, ...]) -> Tensor:
        """x [..., k], as far as it was kept, in its own or a wider type."""
        ...

    def fprop(self, operand: Tensor, weight: Tensor) -> Tensor:
        """The operand of x [T, k], weight [n, k] -> x weightᵀ [T, n]."""
        ...

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy [T, n], weight [n, k] -> dy weight [T, k]."""
        ...

    def wgrad_(self, accumulator: Tensor, dy: Tensor, x: Tensor) -> None:
        """accumulator [n, k] += dyᵀ x, without rounding the product to the type of its operands; x as restored."""
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


class Maps(Protocol):
    """Linear maps as autograd sees them. Gradients of weights leave for the sink as work that adds to `main_grad`."""

    def project(self, x: Tensor, sink: Sink, *weights: Tensor) -> tuple[Tensor, ...]:
        """x [..., k] times each weight [n, k], transposed: [..., n] each. x is quantised and kept at most once."""
        ...

    def mlp(
        self,
        down_maps: Any,
        x: Tensor,
        row_weights: Tensor | None,
        gate_up: Tensor,
        down: Tensor,
        activation: Activation,
        sink: Sink,
    ) -> Tensor:
        """activation(x gate_upᵀ, row_weights) downᵀ, of which x and the activation's input are kept.

        x [R, d], row_weights [R] or None, gate_up [(E,) 2f, d], down [(E,) d, f] -> [R, d]. down_maps: maps of the same
        class, which take the second product.
        """
        ...


class Engine(Maps, Protocol):
    """An arithmetic for dense products, and for products grouped by expert."""

    @property
    def name(self) -> str:
        """What a run reports of it."""
        ...

    def grouped(self, splits: list[int]) -> Maps:
        """The same for stacked weights [E, n, k]: rows come sorted by group, `splits[e]` of them for e."""
        ...


class Engines(Protocol):
    """Which engine multiplies for which module of a model."""

    def of(self, module: str) -> Engine:
        """module: the last part of its name, as "o_proj"; an expert's with "experts." before it."""
        ...

    def gemm(self, module: str) -> Gemm:
        """The plain products of a module that differentiates by itself, as the head does."""
        ...


class Nodes:
    """Maps of whatever has plain products: autograd nodes over a `Gemm`."""

    def project(self: Gemm, x: Tensor, sink: Sink, *weights: Tensor) -> tuple[Tensor, ...]:
        return _Project.apply(x, self, sink, *weights)

    def mlp(
        self: Gemm,
        down_maps: Any,
        x: Tensor,
        row_weights: Tensor | None,
        gate_up: Tensor,
        down: Tensor,
        activation: Activation,
        sink: Sink,
    ) -> Tensor:
        return _Mlp.apply(x, row_weights, gate_up, down, self, down_maps, activation, sink)


class _AsItIs(Nodes):
    """Inputs that are multiplied and kept as they are."""

    def operand(self, x: Tensor) -> Tensor:
        return x

    def keep(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def restore(self, kept: tuple[Tensor, ...]) -> Tensor:
        return kept[0]


class TorchEngine(_AsItIs):
    """Products by torch, in the type of their operands; of every module, where it is handed in for all.

    bfloat16 on a CPU without bfloat16 instructions is multiplied in float32 and rounded once: the same numbers as
    hardware with a float32 accumulator, several times faster than torch's emulation.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._widen = not self._cuda and not torch.cpu._is_avx512_bf16_supported()
        self.name = "torch"

    def of(self, module: str) -> Engine:
        return self

    def gemm(self, module: str) -> Gemm:
        return self

    def _mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if self._widen and a.dtype == torch.bfloat16:
            product = torch.mm(a.float(), b.float())
            return product.to(a.dtype) if out is None else out.copy_(product)
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)

    def fprop(self, operand: Tensor, weight: Tensor) -> Tensor:
        return self._mm(operand, weight.t())

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        return self._mm(dy, weight)

    def wgrad_(self, accumulator: Tensor, dy: Tensor, x: Tensor) -> None:
        if dy.dtype == accumulator.dtype:
            accumulator.addmm_(dy.t(), x)
        elif self._cuda:
            accumulator.add_(torch.mm(dy.t(), x, out_dtype=accumulator.dtype))
        else:
            accumulator.addmm_(dy.t().to(accumulator.dtype), x.to(accumulator.dtype))

    def grouped(self, splits: list[int]) -> Maps:
        return _FusedGroups(self, splits) if self._cuda else _LoopedGroups(self, splits)


def spans(splits: list[int]) -> list[tuple[int, slice]]:
    """(group, its rows) of every group that has any."""
    ends = list(accumulate(splits))
    return [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(splits, ends, strict=True)) if n]


class _LoopedGroups(_AsItIs):
    """Group by group into slices of one output: on CPU faster than torch's grouped product, which loops as well."""

    def __init__(self, engine: TorchEngine, splits: list[int]) -> None:
        self._engine = engine
        self._spans = spans(splits)

    def fprop(self, operand: Tensor, weight: Tensor) -> Tensor:
        return self.dgrad(operand, weight.transpose(1, 2))

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        out = dy.new_empty(dy.shape[0], weight.shape[2])
        for e, rows in self._spans:
            self._engine._mm(dy[rows], weight[e], out=out[rows])
        return out

    def wgrad_(self, accumulator: Tensor, dy: Tensor, x: Tensor) -> None:
        for e, rows in self._spans:
            self._engine.wgrad_(accumulator[e], dy[rows], x[rows])


class _FusedGroups(_LoopedGroups):
    """One kernel for all groups, but for weight gradients: torch's kernel would round those. Not yet run on a GPU."""

    def __init__(self, engine: TorchEngine, splits: list[int]) -> None:
        super().__init__(engine, splits)
        self._ends = torch.tensor(list(accumulate(splits)), dtype=torch.int32)

    def _ends_on(self, device: torch.device) -> Tensor:
        if self._ends.device != device:
            # From pinned memory: any other copy would make the host wait for the device.
            self._ends = self._ends.pin_memory().to(device, non_blocking=True)
        return self._ends

    def fprop(self, operand: Tensor, weight: Tensor) -> Tensor:
        return torch._grouped_mm(operand, weight.transpose(1, 2), offs=self._ends_on(operand.device))

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        return torch._grouped_mm(dy, weight, offs=self._ends_on(dy.device))


def weight_gradient(gemm: Gemm, weight: Tensor, dy: Tensor, kept: tuple[Tensor, ...]) -> None:
    """Add a weight's gradient to its `main_grad`: dy [T, n] and what was kept of x [..., k]."""
    x = gemm.restore(kept)
    gemm.wgrad_(main_grad(weight), dy, x.reshape(-1, x.shape[-1]))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, engine: Gemm, sink: Sink, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*engine.keep(x))
        # Parameters themselves: what comes back from saved tensors need not be the object that has the `main_grad`.
        ctx.weights, ctx.engine, ctx.sink, ctx.shape = weights, engine, sink, x.shape
        operand = engine.operand(x.reshape(-1, x.shape[-1]))
        return tuple(engine.fprop(operand, weight).view(*x.shape[:-1], weight.shape[-2]) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> Any:
        # Detached: what waits for its turn must not hold the graph.
        kept = tuple(x.detach() for x in ctx.saved_tensors)
        dx: Tensor | None = None
        for dy, weight in zip(d_outputs, ctx.weights, strict=True):
            dy = dy.reshape(-1, dy.shape[-1])
            part = ctx.engine.dgrad(dy, weight)
            dx = part if dx is None else dx.add_(part)
            main_grad(weight)  # missing, it is missed here and not when the sink gets to it
            ctx.sink(partial(weight_gradient, ctx.engine, weight, dy, kept))
        assert dx is not None
        return dx.view(ctx.shape), None, None, *(None for _ in ctx.weights)


class _Mlp(torch.autograd.Function):
    """Two maps and what is between them as one node, which computes the activation again (technical report, 3.3.3)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row_weights: Tensor | None,
        gate_up: Tensor,
        down: Tensor,
        up_gemm: Gemm,
        down_gemm: Gemm,
        activation: Activation,
        sink: Sink,
    ) -> Tensor:
        kept_x = up_gemm.keep(x)
        h = up_gemm.fprop(up_gemm.operand(x), gate_up)
        a = activation.swiglu_forward(h, row_weights)
        ctx.save_for_backward(row_weights, *kept_x, *down_gemm.keep(h))
        ctx.gate_up, ctx.down, ctx.num_kept = gate_up, down, len(kept_x)
        ctx.up_gemm, ctx.down_gemm, ctx.activation, ctx.sink = up_gemm, down_gemm, activation, sink
        return down_gemm.fprop(down_gemm.operand(a), down)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        row_weights, *kept = ctx.saved_tensors
        # Detached: what waits for its turn must not hold the graph.
        kept_x, kept_h = tuple(x.detach() for x in kept[: ctx.num_kept]), tuple(kept[ctx.num_kept :])
        gate_up, down, up_gemm, down_gemm, dy = ctx.gate_up, ctx.down, ctx.up_gemm, ctx.down_gemm, dy.contiguous()
        h = down_gemm.restore(kept_h).to(dy.dtype)
        a, dh, d_row_weights = ctx.activation.swiglu_backward(down_gemm.dgrad(dy, down), h, row_weights)
        dx = up_gemm.dgrad(dh, gate_up)
        ctx.sink(partial(down_gemm.wgrad_, main_grad(down), dy, a))
        ctx.sink(partial(weight_gradient, up_gemm, gate_up, dh, kept_x))
        return dx, d_row_weights, None, None, None, None, None, None


class Linear(nn.Module):
    """x [..., k] -> x weightᵀ [..., n], no bias. The weight's gradient goes to its `main_grad` through `sink`."""

    def __init__(self, num_inputs: int, num_outputs: int, engine: Engine, sink: Sink) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))
        self.engine, self.sink = engine, sink

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self)[0]


def project(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """What each of the layers makes of x [..., k], which is quantised and kept once. They share engine and sink."""
    first = layers[0]
    assert all(layer.engine is first.engine and layer.sink is first.sink for layer in layers)
    return first.engine.project(x, first.sink, *(layer.weight for layer in layers))

"""Matrix products: the `Engine` that takes them and the `Linear` layer that asks for them.

Shapes: T tokens (rows), k inputs, n outputs, E groups (experts). Weights are [n, k], or stacked [E, n, k].
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from train.precision.grads import Sink, main_grad


class Gemm(Protocol):
    """The three products of one linear map."""

    def fprop(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, k], weight [n, k] -> x weightᵀ [T, n]."""
        ...

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy [T, n], weight [n, k] -> dy weight [T, k]."""
        ...

    def wgrad_(self, accumulator: Tensor, dy: Tensor, x: Tensor) -> None:
        """accumulator [n, k] += dyᵀ x, without rounding the product to the type of its operands."""
        ...


class Engine(Gemm, Protocol):
    """An arithmetic for dense products, and for products grouped by expert."""

    def grouped(self, splits: list[int]) -> Gemm:
        """The same products with stacked weights [E, n, k]: rows come sorted by group, `splits[e]` of them for e."""
        ...


class TorchEngine:
    """Products by torch, in the type of their operands.

    bfloat16 on a CPU without bfloat16 instructions is multiplied in float32 and rounded once: the same numbers as
    hardware with a float32 accumulator, several times faster than torch's emulation.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._widen = not self._cuda and not torch.cpu._is_avx512_bf16_supported()

    def _mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if self._widen and a.dtype == torch.bfloat16:
            product = torch.mm(a.float(), b.float())
            return product.to(a.dtype) if out is None else out.copy_(product)
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)

    def fprop(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._mm(x, weight.t())

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        return self._mm(dy, weight)

    def wgrad_(self, accumulator: Tensor, dy: Tensor, x: Tensor) -> None:
        if dy.dtype == accumulator.dtype:
            accumulator.addmm_(dy.t(), x)
        elif self._cuda:
            accumulator.add_(torch.mm(dy.t(), x, out_dtype=accumulator.dtype))
        else:
            accumulator.addmm_(dy.t().to(accumulator.dtype), x.to(accumulator.dtype))

    def grouped(self, splits: list[int]) -> Gemm:
        return _FusedGroups(self, splits) if self._cuda else _LoopedGroups(self, splits)


class _LoopedGroups:
    """Group by group into slices of one output: on CPU faster than torch's grouped product, which loops as well."""

    def __init__(self, engine: TorchEngine, splits: list[int]) -> None:
        self._engine = engine
        ends = list(accumulate(splits))
        self._spans = [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(splits, ends, strict=True)) if n]

    def fprop(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.dgrad(x, weight.transpose(1, 2))

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

    def fprop(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch._grouped_mm(x, weight.transpose(1, 2), offs=self._ends_on(x.device))

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        return torch._grouped_mm(dy, weight, offs=self._ends_on(dy.device))


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, engine: Engine, sink: Sink) -> Tensor:
        ctx.save_for_backward(x)
        # The parameter itself: what comes back from saved tensors need not be the object that has the `main_grad`.
        ctx.weight, ctx.engine, ctx.sink = weight, engine, sink
        return engine.fprop(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        dy = dy.reshape(-1, dy.shape[-1])
        dx = ctx.engine.dgrad(dy, weight).view_as(x)
        # Detached: what waits for its turn must not hold the graph.
        ctx.sink(partial(ctx.engine.wgrad_, main_grad(weight), dy, x.detach().reshape(-1, x.shape[-1])))
        return dx, None, None, None


class Linear(nn.Module):
    """x [..., k] -> x weightᵀ [..., n], no bias. The weight's gradient goes to its `main_grad` through `sink`."""

    def __init__(self, num_inputs: int, num_outputs: int, engine: Engine, sink: Sink) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))
        self.engine, self.sink = engine, sink

    def forward(self, x: Tensor) -> Tensor:
        return _LinearFunction.apply(x, self.weight, self.engine, self.sink)

"""The engine of fp64, fp32 and bf16: torch's own products, one by one or grouped by expert."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from train.precision.engine import Products, spans


class TorchEngine(Products):
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

    def grouped(self, splits: list[int]) -> Products:
        return _FusedGroups(self, splits) if self._cuda else _LoopedGroups(self, splits)


class _LoopedGroups(Products):
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

    def grouped(self, splits: list[int]) -> Products:
        return self._engine.grouped(splits)


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

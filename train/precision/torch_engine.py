"""The engine of fp64, fp32 and bf16: torch's own products, one by one or grouped by expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from train.precision.engine import Products, spans

# Rows of a group come in multiples of it and a rest, where kernels are generated for every shape.
ROW_QUANTUM = 64


class TorchEngine(Products):
    """Products by torch, in the type of their operands."""

    def __init__(
        self, device: torch.device | str = "cpu", generates_kernels: bool = False, fuses_groups: bool = True
    ) -> None:
        """generates_kernels: on a CPU, torch's library makes a kernel for every shape, as it does for bfloat16.

        fuses_groups: on a GPU, all groups go through one kernel, which torch has for bfloat16 alone.
        """
        self._cuda = torch.device(device).type == "cuda"
        self._fuses_groups = self._cuda and fuses_groups
        self._generates_kernels = generates_kernels

    def _mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)

    def fprop(self, operand: Tensor, weight: Tensor) -> Tensor:
        return self._mm(operand, weight.t())

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        return self._mm(dy, weight)

    def wgrad_(self, accumulator: Tensor, dy: Tensor, x: Tensor) -> None:
        if dy.dtype == accumulator.dtype:
            accumulator.addmm_(dy.t(), x)
        elif self._cuda:
            # In place: the head's product alone would be a temporary of gigabytes.
            torch.addmm(accumulator, dy.t(), x, out_dtype=accumulator.dtype, out=accumulator)
        else:
            accumulator.addmm_(dy.t().to(accumulator.dtype), x.to(accumulator.dtype))

    def grouped(self, splits: list[int]) -> Products:
        if self._fuses_groups:
            return _FusedGroups(self, splits)
        groups = spans(splits)
        return _LoopedGroups(self, groups, list(of_few_sizes(groups)) if self._generates_kernels else groups)


class WideningEngine(TorchEngine):
    """Products of bfloat16 in float32, rounded once: the numbers of hardware with a float32 accumulator.

    For CPUs whose bfloat16 products are slower than that.
    """

    def _mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        product = torch.mm(a.float(), b.float())
        return product.to(a.dtype) if out is None else out.copy_(product)


def of_few_sizes(groups: Iterable[tuple[int, slice]]) -> Iterator[tuple[int, slice]]:
    """(group, rows) with the rows of each group as a multiple of `ROW_QUANTUM` and a rest, as far as there are any.

    How many rows an expert has changes with every micro-batch. Where a kernel is generated for each shape, that takes
    longer than the product; of the shapes that come of this there are few, and their kernels are kept.
    """
    for group, rows in groups:
        whole = rows.stop - (rows.stop - rows.start) % ROW_QUANTUM
        parts = slice(rows.start, whole), slice(whole, rows.stop)
        yield from ((group, part) for part in parts if part.stop > part.start)


class _LoopedGroups(Products):
    """Group by group into slices of one output: on CPU faster than torch's grouped product, which loops as well."""

    def __init__(self, engine: TorchEngine, groups: list[tuple[int, slice]], products: list[tuple[int, slice]]) -> None:
        """groups: (group, its rows); products: (group, some of its rows), whose rows are multiplied at a time."""
        self._engine, self._groups, self._products = engine, groups, products

    def fprop(self, operand: Tensor, weight: Tensor) -> Tensor:
        return self.dgrad(operand, weight.transpose(1, 2))

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        out = dy.new_empty(dy.shape[0], weight.shape[2])
        for e, rows in self._products:
            self._engine._mm(dy[rows], weight[e], out=out[rows])
        return out

    def wgrad_(self, accumulator: Tensor, dy: Tensor, x: Tensor) -> None:
        for e, rows in self._groups:
            self._engine.wgrad_(accumulator[e], dy[rows], x[rows])

    def grouped(self, splits: list[int]) -> Products:
        return self._engine.grouped(splits)


class _FusedGroups(_LoopedGroups):
    """One kernel for all groups, but for weight gradients: torch's kernel would round those. Not yet run on a GPU."""

    def __init__(self, engine: TorchEngine, splits: list[int]) -> None:
        groups = spans(splits)
        super().__init__(engine, groups, groups)
        self._ends = torch.tensor(list(accumulate(splits)), dtype=torch.int32)

    def _ends_on(self, device: torch.device) -> Tensor:
        if self._ends.device != device:
            # From pinned memory: any other copy would make the host wait for the device.
            self._ends = self._ends.pin_memory().to(device, non_blocking=True)
        return self._ends

    def fprop(self, operand: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(operand, weight.transpose(1, 2), offs=self._ends_on(operand.device))

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(dy, weight, offs=self._ends_on(dy.device))

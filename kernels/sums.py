"""Sums over rows in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.door import jit, tl
from kernels.operation import Launch, operation

_ROWS, _COLUMNS = 64, 32


@jit
def _sum_rows(X, Y, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), X.dtype.element_ty)
    X += tl.program_id(1).to(tl.int64) * num_rows * width
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
        total += tl.load(X + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)
    tl.store(Y + tl.program_id(1) * width + columns, tl.sum(total, 0).to(Y.dtype.element_ty), mask=columns < width)


@operation("sum_rows(Tensor x, ScalarType dtype) -> Tensor")
def sum_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Launch]:
    """x [rows, d] or [b, rows, d], dense, float32 or wider -> sums of rows [d] or [b, d], rounded once to `dtype`."""
    *batch, num_rows, width = x.shape
    y = x.new_empty(*batch, width, dtype=dtype)
    tile = {"ROWS": _ROWS, "COLUMNS": _COLUMNS}
    return y, Launch(_sum_rows, (-(-width // _COLUMNS), *batch), (x, y, num_rows, width), tile)

"""Rows copied to several places, and the copies of each row summed: the kernels of `parallel.expert.copies.Copies`.

Legend: M rows go in, C copies come out, d elements each. Sums are in the order of a table's columns, in float32 or
wider, without atomics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.door import jit, tl
from kernels.operation import Launch, operation, power_of_two

# Elements that a program works on at a time, and columns of them at most.
_TILE, _COLUMNS = 2048, 1024


@jit
def _spread(
    Rows, Table, Out, row_stride, num_rows, width, num_each, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    row = tl.load(Rows + rows[:, None] * row_stride + columns[None, :], mask=inside)
    for each in range(num_each):
        copies = tl.load(Table + rows * num_each + each, mask=rows < num_rows, other=-1).to(tl.int64)
        there = inside & (copies >= 0)[:, None]
        tl.store(Out + copies[:, None] * width + columns[None, :], row, mask=there)


@jit
def _fold(
    Copies, Table, Out, copy_stride, num_rows, width, num_each,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    wide = tl.float64 if DOUBLE else tl.float32
    total = tl.zeros((ROWS, BLOCK), wide)
    for each in range(num_each):
        copies = tl.load(Table + rows * num_each + each, mask=rows < num_rows, other=-1).to(tl.int64)
        there = inside & (copies >= 0)[:, None]
        total += tl.load(Copies + copies[:, None] * copy_stride + columns[None, :], mask=there, other=0.0).to(wide)
    tl.store(Out + rows[:, None] * width + columns[None, :], total.to(Out.dtype.element_ty), mask=inside)


@jit
def _pick(Values, Table, Out, num_copies, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(Table + places, mask=places < num_copies, other=-1).to(tl.int64)
    tl.store(Out + places, tl.load(Values + index, mask=index >= 0, other=0.0), mask=places < num_copies)


def _tile(num_rows: int, width: int) -> tuple[dict[str, Any], tuple[int, int]]:
    """Rows and columns of a program's tile, and how many programs there are."""
    block = min(_COLUMNS, power_of_two(max(1, width)))
    rows = _TILE // block
    return {"ROWS": rows, "BLOCK": block}, (-(-num_rows // rows), -(-width // block))


@operation("spread_rows(Tensor rows, Tensor table, int num_copies) -> Tensor")
def _plan_spread(rows: Tensor, table: Tensor, num_copies: int) -> tuple[Tensor, Launch]:
    (num_rows, num_each), width = table.shape, rows.shape[1]
    out = rows.new_empty(num_copies, width)
    tile, grid = _tile(num_rows, width)
    return out, Launch(_spread, grid, (rows, table, out, rows.stride(0), num_rows, width, num_each), tile)


@operation("fold_rows(Tensor copies, Tensor table) -> Tensor")
def _plan_fold(copies: Tensor, table: Tensor) -> tuple[Tensor, Launch]:
    (num_rows, num_each), width = table.shape, copies.shape[1]
    out = copies.new_empty(num_rows, width)
    tile, grid = _tile(num_rows, width)
    arguments = copies, table, out, copies.stride(0), num_rows, width, num_each
    return out, Launch(_fold, grid, arguments, {**tile, "DOUBLE": copies.dtype == torch.float64})


@operation("pick_values(Tensor values, Tensor table) -> Tensor")
def pick_values(values: Tensor, table: Tensor) -> tuple[Tensor, Launch]:
    """values [C], table of places in them, integers of any shape -> what lies there, 0 for a place below 0."""
    out = values.new_empty(table.shape)
    return out, Launch(
        _pick, (-(-table.numel() // _COLUMNS),), (values, table, out, table.numel()), {"BLOCK": _COLUMNS}
    )


def _rows(x: Tensor) -> Tensor:
    """x [n, ...] as [n, elements of a row]."""
    rows = x.reshape(x.shape[0], x[:1].numel() or 1) if x.dim() != 2 else x
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _words(rows: Tensor) -> Tensor:
    """Rows of bytes as rows of eight bytes each, where they are made of such: a thread then moves all eight at once,
    which Triton does with bytes only where it knows of 16 that lie together."""
    numbers = rows.shape[1], rows.stride(0), rows.storage_offset()
    return rows.view(torch.int64) if rows.element_size() == 1 and not any(each % 8 for each in numbers) else rows


def spread_rows(rows: Tensor, table: Tensor, num_copies: int) -> Tensor:
    """rows [M, ...], table [M, n] -> [num_copies, ...]: row m at each place that row m of the table names.

    The table names every place once; a number below 0 names none.
    """
    copies = _plan_spread(_words(_rows(rows)), table, num_copies)
    return copies.view(rows.dtype).view(num_copies, *rows.shape[1:])


def fold_rows(copies: Tensor, table: Tensor) -> Tensor:
    """copies [C, ...] of floats, table [M, n] -> [M, ...]: the sum of the copies that a row of the table names.

    A number below 0 names none.
    """
    return _plan_fold(_rows(copies), table).view(table.shape[0], *copies.shape[1:])

"""SwiGLU: the kernels of `train.model.kernels.swiglu_forward` and `swiglu_backward`, one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.door import jit, tl
from kernels.operation import Launch, as_rows, operation, power_of_two

# Columns that a program works on at a time.
_BLOCK = 2048


@jit
def _forward(
    H, RowWeights, A, h_stride, num_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr
):
    wide = tl.float64 if DOUBLE else tl.float32
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    places = H + rows[:, None] * h_stride + columns[None, :]
    gate = tl.load(places, mask=inside, other=0.0).to(wide)
    up = tl.load(places + width, mask=inside, other=0.0).to(wide)
    a = gate * tl.sigmoid(gate) * up
    if RowWeights is not None:
        a *= tl.load(RowWeights + rows, mask=rows < num_rows, other=0.0).to(wide)[:, None]
    tl.store(A + rows[:, None] * width + columns[None, :], a.to(A.dtype.element_ty), mask=inside)


@jit
def _backward(
    DA, H, RowWeights, A, DH, DRowWeights, da_stride, h_stride, num_rows, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    wide = tl.float64 if DOUBLE else tl.float32
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_weights = tl.full((ROWS,), 1.0, wide)
    if RowWeights is not None:
        row_weights = tl.load(RowWeights + rows, mask=rows < num_rows, other=0.0).to(wide)
    total = tl.zeros((ROWS,), wide)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
        places = rows[:, None] * h_stride + columns[None, :]
        gate = tl.load(H + places, mask=inside, other=0.0).to(wide)
        up = tl.load(H + places + width, mask=inside, other=0.0).to(wide)
        da = tl.load(DA + rows[:, None] * da_stride + columns[None, :], mask=inside, other=0.0).to(wide)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        a = silu * up
        total += tl.sum(da * a, 1)
        a *= row_weights[:, None]
        da *= row_weights[:, None]
        d_gate = da * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(A + rows[:, None] * width + columns[None, :], a.to(A.dtype.element_ty), mask=inside)
        places = DH + rows[:, None] * (2 * width) + columns[None, :]
        tl.store(places, d_gate.to(DH.dtype.element_ty), mask=inside)
        tl.store(places + width, (da * silu).to(DH.dtype.element_ty), mask=inside)
    if RowWeights is not None:
        tl.store(DRowWeights + rows, total.to(DRowWeights.dtype.element_ty), mask=rows < num_rows)


def _tile(h: Tensor) -> tuple[dict[str, Any], int]:
    """Rows and columns of a program's tile, and its warps: 8 elements a thread."""
    block = min(_BLOCK, power_of_two(h.shape[1] // 2))
    rows = _BLOCK // block
    return {"ROWS": rows, "BLOCK": block, "DOUBLE": h.dtype == torch.float64}, 8


@operation("swiglu_forward(Tensor h, Tensor? row_weights) -> Tensor")
def _plan_forward(h: Tensor, row_weights: Tensor | None) -> tuple[Tensor, Launch]:
    num_rows, width = h.shape[0], h.shape[1] // 2
    a, (tile, num_warps) = h.new_empty(num_rows, width), _tile(h)
    grid = -(-num_rows // tile["ROWS"]), -(-width // tile["BLOCK"])
    return a, Launch(_forward, grid, (h, row_weights, a, h.stride(0), num_rows, width), tile, num_warps)


@operation("swiglu_backward(Tensor da, Tensor h, Tensor? row_weights) -> (Tensor, Tensor, Tensor)")
def _plan_backward(da: Tensor, h: Tensor, row_weights: Tensor | None) -> tuple[tuple[Tensor, Tensor, Tensor], Launch]:
    num_rows, width = da.shape
    a, dh, (tile, num_warps) = h.new_empty(num_rows, width), h.new_empty(h.shape), _tile(h)
    d_row_weights = h.new_empty(0) if row_weights is None else row_weights.new_empty(num_rows)
    arguments = da, h, row_weights, a, dh, d_row_weights, da.stride(0), h.stride(0), num_rows, width
    return (a, dh, d_row_weights), Launch(_backward, (-(-num_rows // tile["ROWS"]),), arguments, tile, num_warps)


def swiglu_forward(h: Tensor, row_weights: Tensor | None) -> Tensor:
    """h = [gate | up] [R, 2f] -> silu(gate) up [R, f], each row times its weight [R] if there are weights."""
    return _plan_forward(as_rows(h), None if row_weights is None else row_weights.contiguous())


def swiglu_backward(da: Tensor, h: Tensor, row_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(forward's output a, dh [R, 2f], d_row_weights [R] or None) from da [R, f]; a is recomputed, not stored."""
    dense = None if row_weights is None else row_weights.contiguous()
    a, dh, d_row_weights = _plan_backward(as_rows(da), as_rows(h), dense)
    return a, dh, None if row_weights is None else d_row_weights

"""RMSNorm: the kernels of `train.model.kernels.rms_norm_forward` and `rms_norm_backward`.

The gradient of the weight is a sum over all rows. Each of a fixed number of programs sums the rows that it comes by, in
order, and a second launch adds up those sums: the same bits in every run, without atomics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.door import jit, tl
from kernels.operation import Launch, as_rows, operation, power_of_two
from kernels.sums import sum_rows

# Elements that a program works on at a time, at least; and programs of a backward, at most: two on every processor.
_TILE, _MAX_SUMS = 2048, 256


@jit
def _forward(
    X, Weight, Y, Scale, x_stride, num_rows, width, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    wide = Scale.dtype.element_ty
    x = tl.load(X + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(wide)
    weight = tl.load(Weight + columns, mask=columns < width, other=0.0).to(wide)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + EPS)
    y = x * scale[:, None] * weight[None, :]
    tl.store(Y + rows[:, None] * width + columns[None, :], y.to(Y.dtype.element_ty), mask=inside)
    tl.store(Scale + rows, scale, mask=rows < num_rows)


@jit
def _backward(
    DY,
    X,
    Weight,
    Scale,
    Beside,
    DX,
    Sums,
    dy_stride,
    x_stride,
    beside_stride,
    num_rows,
    width,
    num_tiles,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    wide = Scale.dtype.element_ty
    weight = tl.load(Weight + columns, mask=columns < width, other=0.0).to(wide)
    total = tl.zeros((BLOCK,), wide)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
        x = tl.load(X + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(wide)
        dy = tl.load(DY + rows[:, None] * dy_stride + columns[None, :], mask=inside, other=0.0).to(wide)
        scale = tl.load(Scale + rows, mask=rows < num_rows, other=0.0)
        normed = x * scale[:, None]
        slope = dy * weight[None, :]
        mean = tl.sum(slope * normed, 1) / width
        dx = (slope - normed * mean[:, None]) * scale[:, None]
        if Beside is not None:
            beside = Beside + rows[:, None] * beside_stride + columns[None, :]
            dx += tl.load(beside, mask=inside, other=0.0).to(wide)
        tl.store(DX + rows[:, None] * width + columns[None, :], dx.to(DX.dtype.element_ty), mask=inside)
        total += tl.sum(dy * normed, 0)
    tl.store(Sums + tl.program_id(0) * width + columns, total, mask=columns < width)


def _tile(width: int) -> tuple[dict[str, Any], int]:
    """Rows and columns of a program's tile, and its warps: 8 to 16 elements a thread."""
    block = power_of_two(width)
    rows = max(1, _TILE // block)
    return {"ROWS": rows, "BLOCK": block}, min(16, max(4, rows * block // 512))


@operation("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
def _plan_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[tuple[Tensor, Tensor], Launch]:
    num_rows, width = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y, scale = x.new_empty(x.shape), x.new_empty(num_rows, dtype=wide)
    tile, num_warps = _tile(width)
    grid = (-(-num_rows // tile["ROWS"]),)
    arguments = x, weight, y, scale, x.stride(0), num_rows, width
    return (y, scale), Launch(_forward, grid, arguments, {"EPS": eps, **tile}, num_warps)


@operation("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor scale, Tensor? beside) -> (Tensor, Tensor)")
def _plan_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, beside: Tensor | None
) -> tuple[tuple[Tensor, Tensor], Launch]:
    num_rows, width = x.shape
    tile, num_warps = _tile(width)
    num_tiles = -(-num_rows // tile["ROWS"])
    num_sums = min(num_tiles, _MAX_SUMS)
    dx, sums = x.new_empty(x.shape), scale.new_empty(num_sums, width)
    strides = dy.stride(0), x.stride(0), 0 if beside is None else beside.stride(0)
    arguments = dy, x, weight, scale, beside, dx, sums, *strides, num_rows, width, num_tiles
    return (dx, sums), Launch(_backward, (num_sums,), arguments, tile, num_warps)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., d] -> (x r weight, r [..., 1]) with r = 1 / sqrt(mean(x²) + eps)."""
    y, scale = _plan_forward(as_rows(x), weight, eps)
    return y.view(x.shape), scale.view(*x.shape[:-1], 1)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dx [..., d], dweight [d]) from dy, the forward's inputs and its `scale` r [..., 1]. Added to dx is `beside`, the
    gradient of x as it goes on beside its norm."""
    beside = None if beside is None else as_rows(beside)
    dx, sums = _plan_backward(as_rows(dy), as_rows(x), weight, scale.view(-1), beside)
    return dx.view(x.shape), sum_rows(sums, weight.dtype)

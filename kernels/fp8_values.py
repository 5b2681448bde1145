"""Values rounded to E4M3 in float32: what `train.precision.tiles` says, in one launch each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.door import jit, tl
from kernels.fp8_tiles import U8, coded, constants, decoded, magnitude, num_tiles, place, scale_of, tiles_of, widened
from kernels.operation import Launch, operation

_WARPS = 8


@jit
def _restore(Codes, Scales, Y, row_stride, tile_stride, num_rows, width):
    rows = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    column = tl.program_id(1)
    columns = column * 128 + tl.arange(0, 128)
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    code = tl.load(Codes + rows[:, None] * width + columns[None, :], mask=mask, other=0)
    scale = tl.load(Scales + rows * row_stride + column * tile_stride, mask=rows < num_rows, other=0.0)
    tl.store(Y + rows[:, None] * width + columns[None, :], decoded(code) * scale[:, None], mask=mask)


@operation("fp8_restore(Tensor codes, Tensor scales) -> Tensor")
def _plan_restore(codes: Tensor, scales: Tensor) -> tuple[Tensor, Launch]:
    num_rows, width = codes.shape
    y = codes.new_empty((num_rows, width), dtype=torch.float32)
    grid = (-(-num_rows // 128), tiles_of(width))
    arguments = codes, scales, y, *scales.stride(), num_rows, width
    return y, Launch(_restore, grid, arguments, {}, _WARPS)


@jit
def _round(
    X,
    Starts,
    Y,
    x_stride,
    num_rows,
    width,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    EMULATES: tl.constexpr,
):
    start, length, before, _ = place(Starts, num_rows, tl.program_id(0), GROUPS, BLOCK)
    inner = before + tl.arange(0, 128)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    rows = tl.cast(start + inner, tl.int64)
    mask = (inner < length)[:, None] & (columns < width)[None, :]
    x = widened(tl.load(X + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0))
    bits = magnitude(x, 0)
    if BLOCKS:
        bits = bits * 0 + tl.max(bits, 0)
    scale, inverse = scale_of(bits, POWER)
    y = decoded(coded(x, inverse[None, :], POWER, EMULATES)) * scale[None, :]
    tl.store(Y + rows[:, None] * width + columns[None, :], y, mask=mask)


@operation("fp8_round(Tensor x, Tensor? starts, int[] splits, bool blocks, bool power) -> Tensor")
def _plan_round(
    x: Tensor, starts: Tensor | None, splits: Sequence[int], blocks: bool, power: bool
) -> tuple[Tensor, Launch]:
    num_rows, width = x.shape
    y = x.new_empty((num_rows, width), dtype=torch.float32)
    grid = (num_tiles(splits), tiles_of(width))
    arguments = x, starts, y, x.stride(0), num_rows, width
    return y, Launch(_round, grid, arguments, {"BLOCKS": blocks, **constants(splits, power)}, _WARPS)


def restore(codes: Tensor, scales: Tensor) -> Tensor:
    """codes [P, k] in E4M3, scales [P, ceil(k / 128)] -> float32 [P, k]."""
    return _plan_restore(codes.contiguous().view(U8), scales)


def round_tiles(x: Tensor, starts: Tensor | None, splits: Sequence[int], blocks: bool, power: bool) -> Tensor:
    """x [P, k], dense in its last dim, rows of each group -> float32 [P, k], rounded in tiles of 128 x 1 or, with
    `blocks`, of 128 x 128, which begin at each group's first row. starts: as `fp8_rows.take` has them."""
    return _plan_round(x, starts, splits, blocks, power)

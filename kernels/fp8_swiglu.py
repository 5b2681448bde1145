"""SwiGLU beside FP8 products: `train.precision.eager_passes` says what is computed, here in one launch each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.door import jit, tl
from kernels.fp8_rows import E4M3, load_rows
from kernels.fp8_tiles import (
    FP32,
    TILE,
    U8,
    constants,
    new_columns,
    new_rows,
    num_tiles,
    place,
    rounded,
    store_columns,
    store_rows,
    tiles_of,
    widened,
)
from kernels.operation import Launch, operation

_WARPS = 16


@jit
def _forward(
    H,
    RowWeights,
    Starts,
    KeptCodes,
    KeptScales,
    Codes,
    Scales,
    num_rows,
    width,
    WEIGHTED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    EMULATES: tl.constexpr,
):
    start, length, before, _ = place(Starts, num_rows, tl.program_id(0), GROUPS, BLOCK)
    # No columns are made: half a tile of rows does, and fits into registers.
    column = tl.program_id(1)
    inner = before + tl.program_id(2) * 64 + tl.arange(0, 64)
    columns = column * 128 + tl.arange(0, 128)
    rows = tl.cast(start + inner, tl.int64)
    mask = (inner < length)[:, None]
    at = H + rows[:, None] * (2 * width) + columns[None, :]
    gate = widened(tl.load(at, mask=mask, other=0.0))
    store_rows(gate, KeptCodes, KeptScales, start, length, inner, column, 2 * width, POWER, EMULATES)
    up = widened(tl.load(at + width, mask=mask, other=0.0))
    up_column = column + width // 128
    store_rows(up, KeptCodes, KeptScales, start, length, inner, up_column, 2 * width, POWER, EMULATES)
    a = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        a *= tl.load(RowWeights + rows, mask=inner < length, other=0.0).to(tl.float32)[:, None]
    a = rounded(a, H.dtype.element_ty, EMULATES)
    store_rows(a, Codes, Scales, start, length, inner, column, width, POWER, EMULATES)


@operation(
    "fp8_swiglu_forward(Tensor h, Tensor? row_weights, Tensor? starts, int[] splits, bool power)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _plan_forward(
    h: Tensor, row_weights: Tensor | None, starts: Tensor | None, splits: Sequence[int], power: bool
) -> tuple[tuple[Tensor, ...], Launch]:
    num_rows, width = h.shape[0], h.shape[1] // 2
    made = *new_rows(h, num_rows, 2 * width), *new_rows(h, num_rows, width)
    grid = (num_tiles(splits), tiles_of(width), 2)
    arguments = h, row_weights, starts, *made, num_rows, width
    chosen = {"WEIGHTED": row_weights is not None, **constants(splits, power)}
    return made, Launch(_forward, grid, arguments, chosen, _WARPS // 2)


@jit
def _backward(
    DA,
    KeptCodes,
    KeptScales,
    RowWeights,
    Starts,
    ACodes,
    AScales,
    RowCodes,
    RowScales,
    ColumnCodes,
    ColumnScales,
    Sums,
    num_rows,
    width,
    WEIGHTED: tl.constexpr,
    GRADIENT_POWER: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    EMULATES: tl.constexpr,
):
    # Three programs for a tile: what one has read, the others find in the cache. One would not fit into registers.
    what, column, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length, before, tile = place(Starts, num_rows, number, GROUPS, BLOCK)
    inner = before + tl.arange(0, 128)
    columns = column * 128 + tl.arange(0, 128)
    rows = tl.cast(start + inner, tl.int64)
    narrow: tl.constexpr = DA.dtype.element_ty
    up_column = column + width // 128
    gate = rounded(load_rows(KeptCodes, KeptScales, start, length, inner, column, 2 * width), narrow, EMULATES)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    if WEIGHTED:
        weight = tl.load(RowWeights + rows, mask=inner < length, other=0.0).to(tl.float32)
    if what == 0:
        up = rounded(load_rows(KeptCodes, KeptScales, start, length, inner, up_column, 2 * width), narrow, EMULATES)
        a = gate * sigmoid * up
        if WEIGHTED:
            da = widened(
                tl.load(DA + rows[:, None] * width + columns[None, :], mask=(inner < length)[:, None], other=0.0)
            )
            tl.store(Sums + tl.cast(column, tl.int64) * num_rows + rows, tl.sum(da * a, 1), mask=inner < length)
            a *= weight[:, None]
        a = rounded(a, narrow, EMULATES)
        store_columns(a, ACodes, AScales, start, length, inner, tile, column, width, POWER, EMULATES)
    else:
        dh = widened(tl.load(DA + rows[:, None] * width + columns[None, :], mask=(inner < length)[:, None], other=0.0))
        if WEIGHTED:
            dh *= weight[:, None]
        if what == 1:
            dh *= gate * sigmoid
            column = up_column
        else:
            up = rounded(load_rows(KeptCodes, KeptScales, start, length, inner, up_column, 2 * width), narrow, EMULATES)
            dh *= up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
        dh = rounded(dh, narrow, EMULATES)
        store_rows(dh, RowCodes, RowScales, start, length, inner, column, 2 * width, GRADIENT_POWER, EMULATES)
        store_columns(
            dh, ColumnCodes, ColumnScales, start, length, inner, tile, column, 2 * width, GRADIENT_POWER, EMULATES
        )


@operation(
    "fp8_swiglu_backward(Tensor da, Tensor codes, Tensor scales, Tensor? row_weights, Tensor? starts, int[] splits,"
    " bool power, bool gradient_power) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _plan_backward(
    da: Tensor,
    codes: Tensor,
    scales: Tensor,
    row_weights: Tensor | None,
    starts: Tensor | None,
    splits: Sequence[int],
    power: bool,
    gradient_power: bool,
) -> tuple[tuple[Tensor, ...], Launch]:
    num_rows, width = da.shape
    made = (
        *new_columns(da, splits, width),
        *new_rows(da, num_rows, 2 * width),
        *new_columns(da, splits, 2 * width),
        da.new_empty((0 if row_weights is None else tiles_of(width), num_rows), dtype=FP32),
    )
    grid = (3, tiles_of(width), num_tiles(splits))
    arguments = da, codes, scales, row_weights, starts, *made, num_rows, width
    chosen = {"WEIGHTED": row_weights is not None, "GRADIENT_POWER": gradient_power, **constants(splits, power)}
    return made, Launch(_backward, grid, arguments, chosen, _WARPS)


def swiglu_forward(
    h: Tensor, row_weights: Tensor | None, starts: Tensor | None, splits: Sequence[int], power: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h [P, 2f], f a multiple of 128, row_weights [P] -> (codes, scales) of the rows of h, and those of its activation
    [P, f], scales by group. splits, starts: as `fp8_rows.take` has them."""
    kept, kept_scales, codes, scales = _plan_forward(h, row_weights, starts, splits, power)
    return kept.view(E4M3), kept_scales, codes.view(E4M3), scales


def swiglu_backward(
    da: Tensor,
    codes: Tensor,
    scales: Tensor,
    row_weights: Tensor | None,
    starts: Tensor | None,
    splits: Sequence[int],
    power: bool,
    gradient_power: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """da [P, f], the kept rows of h -> (codes, scales) of the activation's columns, of the rows of the gradient of h
    and of its columns; the gradient of row_weights [P]."""
    a, a_scales, rows, row_scales, of_columns, column_scales, sums = _plan_backward(
        da, codes.view(U8), scales, row_weights, starts, splits, power, gradient_power
    )
    d_row_weights = None if row_weights is None else sums.sum(0).to(row_weights.dtype)
    return a.view(E4M3), a_scales, rows.view(E4M3), row_scales, of_columns.view(E4M3), column_scales, d_row_weights


def takes(width: int) -> bool:
    """Whether the tiles of a gate and its factor lie side by side, for an activation of this width."""
    return width % TILE == 0

"""Rows to E4M3 and back to columns: what `train.precision.eager_passes` says, in one launch each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.door import jit, tl
from kernels.fp8_tiles import (
    TILE,
    U8,
    coded,
    constants,
    decoded,
    magnitude,
    new_columns,
    new_rows,
    num_tiles,
    place,
    scale_of,
    store_columns,
    store_rows,
    tiles_of,
    widened,
)
from kernels.operation import Launch, operation

E4M3 = torch.float8_e4m3fn
_WARPS = 8


@jit
def _encode(X, Payload, x_stride, num_rows, width, num_bytes, POWER: tl.constexpr, EMULATES: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    column = tl.program_id(1)
    columns = column * 128 + tl.arange(0, 128)
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    x = widened(tl.load(X + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0))
    scale, inverse = scale_of(magnitude(x, 1), POWER)
    code = coded(x, inverse[:, None], POWER, EMULATES)
    tl.store(Payload + rows[:, None] * num_bytes + columns[None, :], code, mask=mask)
    exponent = (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
    tl.store(Payload + rows * num_bytes + width + column, exponent, mask=rows < num_rows)


@operation("fp8_encode(Tensor x) -> Tensor")
def encode(x: Tensor) -> tuple[Tensor, Launch]:
    """x [N, d], dense in its last dim -> bytes [N, d + tiles]: E4M3, and the exponents of scales that are powers of
    two."""
    num_rows, width = x.shape
    payload = x.new_empty((num_rows, width + tiles_of(width)), dtype=U8)
    grid = (-(-num_rows // TILE), tiles_of(width))
    arguments = x, payload, x.stride(0), num_rows, width, payload.shape[1]
    chosen = {key: constants([num_rows], True)[key] for key in ("POWER", "EMULATES")}
    return payload, Launch(_encode, grid, arguments, chosen, _WARPS)


@jit
def _take(
    Payload,
    Source,
    Starts,
    Codes,
    Scales,
    num_sent,
    num_rows,
    width,
    num_bytes,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, length, before, _ = place(Starts, num_rows, tl.program_id(0), GROUPS, BLOCK)
    column = tl.program_id(1)
    inner = before + tl.arange(0, 128)
    columns = column * 128 + tl.arange(0, 128)
    rows = tl.cast(start + inner, tl.int64)
    source = tl.load(Source + rows, mask=inner < length, other=num_sent)
    has = source < num_sent
    inside = (columns < width)[None, :]
    code = tl.load(Payload + source[:, None] * num_bytes + columns[None, :], mask=has[:, None] & inside, other=0)
    tl.store(Codes + rows[:, None] * width + columns[None, :], code, mask=(inner < length)[:, None] & inside)
    exponent = tl.load(Payload + source * num_bytes + width + column, mask=has, other=127).to(tl.int32)
    # All bits of an exponent are an infinity; here they say that the tile is not a number.
    bits = tl.where(exponent == 255, 0x7FC00000, exponent << 23)
    first = tl.cast(start, tl.int64) * ((width + 127) // 128)
    tl.store(Scales + first + column * length + inner, bits.to(tl.float32, bitcast=True), mask=inner < length)


@operation("fp8_take(Tensor payload, Tensor source, Tensor? starts, int[] splits, int width) -> (Tensor, Tensor)")
def _plan_take(
    payload: Tensor, source: Tensor, starts: Tensor | None, splits: Sequence[int], width: int
) -> tuple[tuple[Tensor, Tensor], Launch]:
    num_rows, num_bytes = sum(splits), payload.shape[1]
    codes, scales = new_rows(payload, num_rows, width)
    grid = (num_tiles(splits), tiles_of(width))
    arguments = payload, source, starts, codes, scales, payload.shape[0], num_rows, width, num_bytes
    chosen = {key: constants(splits, True)[key] for key in ("GROUPS", "BLOCK")}
    read = num_rows * (num_bytes + source.element_size())
    return (codes, scales), Launch(_take, grid, arguments, chosen, _WARPS, read_bytes=read)


@jit
def _quantise(
    X,
    RowCodes,
    RowScales,
    ColumnCodes,
    ColumnScales,
    x_stride,
    num_given,
    num_rows,
    width,
    COLUMNS: tl.constexpr,
    POWER: tl.constexpr,
    EMULATES: tl.constexpr,
):
    tile, column = tl.program_id(0), tl.program_id(1)
    inner = tile * 128 + tl.arange(0, 128)
    columns = column * 128 + tl.arange(0, 128)
    mask = (inner < num_given)[:, None] & (columns < width)[None, :]
    x = widened(tl.load(X + inner.to(tl.int64)[:, None] * x_stride + columns[None, :], mask=mask, other=0.0))
    store_rows(x, RowCodes, RowScales, 0, num_rows, inner, column, width, POWER, EMULATES)
    if COLUMNS:
        store_columns(x, ColumnCodes, ColumnScales, 0, num_rows, inner, tile, column, width, POWER, EMULATES)


@operation("fp8_quantise(Tensor x, int num_rows, bool columns, bool power) -> Tensor[]")
def _plan_quantise(x: Tensor, num_rows: int, columns: bool, power: bool) -> tuple[list[Tensor], Launch]:
    width = x.shape[1]
    made = [*new_rows(x, num_rows, width)]
    if columns:
        made += new_columns(x, [num_rows], width)
    grid = (-(-num_rows // TILE), tiles_of(width))
    arguments = x, *made, *([None] * (4 - len(made))), x.stride(0), x.shape[0], num_rows, width
    chosen = {key: constants([num_rows], power)[key] for key in ("POWER", "EMULATES")}
    return made, Launch(_quantise, grid, arguments, {"COLUMNS": columns, **chosen}, _WARPS)


@jit
def _columns(
    Codes,
    Scales,
    Starts,
    ColumnCodes,
    ColumnScales,
    num_rows,
    width,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    EMULATES: tl.constexpr,
):
    start, length, before, tile = place(Starts, num_rows, tl.program_id(0), GROUPS, BLOCK)
    column = tl.program_id(1)
    inner = before + tl.arange(0, 128)
    x = load_rows(Codes, Scales, start, length, inner, column, width)
    store_columns(x, ColumnCodes, ColumnScales, start, length, inner, tile, column, width, POWER, EMULATES)


@jit
def load_rows(Codes, Scales, start, length, inner, column, width):
    """What the rows of a program's tile stand for, float32 [128, 128]; zero where there are none."""
    columns = column * 128 + tl.arange(0, 128)
    mask = (inner < length)[:, None] & (columns < width)[None, :]
    rows = tl.cast(start + inner, tl.int64)
    code = tl.load(Codes + rows[:, None] * width + columns[None, :], mask=mask, other=0)
    first = tl.cast(start, tl.int64) * ((width + 127) // 128)
    scale = tl.load(Scales + first + column * length + inner, mask=inner < length, other=0.0)
    return decoded(code) * scale[:, None]


@operation("fp8_columns(Tensor codes, Tensor scales, Tensor? starts, int[] splits, bool power) -> (Tensor, Tensor)")
def _plan_columns(
    codes: Tensor, scales: Tensor, starts: Tensor | None, splits: Sequence[int], power: bool
) -> tuple[tuple[Tensor, Tensor], Launch]:
    num_rows, width = codes.shape
    made = new_columns(codes, splits, width)
    grid = (num_tiles(splits), tiles_of(width))
    arguments = codes, scales, starts, *made, num_rows, width
    return made, Launch(_columns, grid, arguments, constants(splits, power), _WARPS)


def take(
    payload: Tensor, source: Tensor, starts: Tensor | None, splits: Sequence[int], width: int
) -> tuple[Tensor, Tensor]:
    """Bytes [N, ...] as `encode` makes them, source [P] -> (codes [P, width], scales [tiles P] by group) of those rows,
    and zeros where source is N. starts: int32 [E + 1], the first row of each group and the end; None for one group."""
    codes, scales = _plan_take(payload, source, starts, splits, width)
    return codes.view(E4M3), scales


def quantise_rows(x: Tensor, num_rows: int, power: bool) -> tuple[Tensor, Tensor]:
    """x [T, k] -> (codes [num_rows, k], scales [tiles num_rows]) in tiles of 1 x 128; rows behind T are zeros."""
    codes, scales = _plan_quantise(_dense(x), num_rows, False, power)
    return codes.view(E4M3), scales


def quantise(x: Tensor, num_rows: int, power: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantise_rows`, and in tiles of 128 x 1 (codes [k num_rows], scales [tiles of rows, k])."""
    codes, scales, column_codes, column_scales = _plan_quantise(_dense(x), num_rows, True, power)
    return codes.view(E4M3), scales, column_codes.view(E4M3), column_scales


def columns(
    codes: Tensor, scales: Tensor, starts: Tensor | None, splits: Sequence[int], power: bool
) -> tuple[Tensor, Tensor]:
    """codes [P, k], scales by group -> (codes [k P] by group, scales [tiles of rows, k]) in tiles of 128 x 1."""
    found, of_columns = _plan_columns(codes.view(U8), scales, starts, splits, power)
    return found.view(E4M3), of_columns


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()

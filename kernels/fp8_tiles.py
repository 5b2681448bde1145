"""What kernels of FP8 share: a program's tile, its scales, and E4M3 itself, by the bits of `train.precision.blockwise`.

A program has up to 128 rows of one group, from a multiple of 128 behind its first row on, and 128 columns: so that it
can quantise both ways, in tiles of 1 x 128 and of 128 x 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.door import interprets, jit, tl
from kernels.operation import power_of_two

TILE = 128
U8, FP32 = torch.uint8, torch.float32


@jit
def place(Starts, num_rows, tile, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Where a tile of rows lies, by its number among those of all groups: (first row of its group, rows of the group,
    rows of the group before the tile, the number)."""
    if GROUPS == 1:
        start, length, before = tile * 0, tile * 0 + num_rows, tile * 128
    else:
        numbers = tl.arange(0, BLOCK)
        starts = tl.load(Starts + numbers, mask=numbers < GROUPS, other=0)
        stops = tl.load(Starts + numbers + 1, mask=numbers < GROUPS, other=0)
        tiles = (stops - starts + 127) // 128
        group = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
        start = tl.sum(tl.where(numbers == group, starts, 0), 0)
        length = tl.sum(tl.where(numbers == group, stops - starts, 0), 0)
        before = (tile - tl.sum(tl.where(numbers < group, tiles, 0), 0)) * 128
    return start, length, before, tile


@jit
def widened(x):
    """x in float32. bfloat16 by its bits: Triton's interpreter has none of its values that are subnormal."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@jit
def rounded(x, narrow: tl.constexpr, EMULATES: tl.constexpr):
    """float32 x as `narrow` has it, in float32. Triton's interpreter cuts bits off where bfloat16 is rounded."""
    if EMULATES and narrow == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        return tl.where(x == x, near, x)
    return widened(x.to(narrow))


@jit
def magnitude(x, axis: tl.constexpr):
    """The largest magnitude, as bits of float32: so that what is not a number is larger than any."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis)


@jit
def scale_of(bits, POWER: tl.constexpr):
    """Scale of tiles whose largest magnitudes have these bits, and what to multiply by instead of dividing, where that
    is the same."""
    if POWER:
        # 448 is 1.75 2^8: a larger mantissa carries into the exponent.
        exponent = tl.maximum(((bits + 0x1FFFFF) >> 23) - 8, 1)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    else:
        amax = bits.to(tl.float32, bitcast=True)
        scale = tl.maximum(tl.div_rn(amax, 448.0), 1.1754943508222875e-38)
        inverse = scale
    nan = (bits * 0 + 0x7FC00000).to(tl.float32, bitcast=True)
    scale = tl.where(bits == 0, 1.0, scale)
    inverse = tl.where(bits == 0, 1.0, inverse)
    return tl.where(bits >= 0x7F800000, nan, scale), tl.where(bits >= 0x7F800000, nan, inverse)


@jit
def coded(x, inverse, POWER: tl.constexpr, EMULATES: tl.constexpr):
    """x over its scale in E4M3, as bytes. Triton's interpreter casts without carrying into the exponent: there values
    are rounded to the format's before."""
    if POWER:
        x = x * inverse
    else:
        x = tl.div_rn(x, inverse + x * 0)
    if EMULATES:
        bits = x.to(tl.int32, bitcast=True)
        whole = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, whole)
        code = rounded.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        sign = ((bits >> 24) & 0x80).to(tl.uint8)
        return tl.where(x == x, code | sign, tl.full(code.shape, 0x7F, tl.uint8))
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@jit
def decoded(code):
    """Bytes of E4M3 -> float32."""
    return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@jit
def store_rows(x, Codes, Scales, start, length, inner, column, width, POWER: tl.constexpr, EMULATES: tl.constexpr):
    """Quantise x [128, 128] in tiles of 1 x 128: codes [P, width], scales of each group [tiles, its rows].

    inner: numbers of the rows in their group; column: of the tile of columns.
    """
    num_tiles = (width + 127) // 128
    scale, inverse = scale_of(magnitude(x, 1), POWER)
    code = coded(x, inverse[:, None], POWER, EMULATES)
    columns = column * 128 + tl.arange(0, 128)
    rows = tl.cast(start + inner, tl.int64)
    mask = (inner < length)[:, None] & (columns < width)[None, :]
    tl.store(Codes + rows[:, None] * width + columns[None, :], code, mask=mask)
    first = tl.cast(start, tl.int64) * num_tiles
    tl.store(Scales + first + column * length + inner, scale, mask=inner < length)


@jit
def store_columns(
    x, Codes, Scales, start, length, inner, tile, column, width, POWER: tl.constexpr, EMULATES: tl.constexpr
):
    """Quantise x [128, 128], zero where there are no rows, in tiles of 128 x 1: codes of each group [width, its rows],
    scales [tiles of all groups, width]."""
    scale, inverse = scale_of(magnitude(x, 0), POWER)
    code = tl.trans(coded(x, inverse[None, :], POWER, EMULATES))
    columns = column * 128 + tl.arange(0, 128)
    mask = (columns < width)[:, None] & (inner < length)[None, :]
    first = tl.cast(start, tl.int64) * width
    tl.store(Codes + first + columns.to(tl.int64)[:, None] * length + inner[None, :], code, mask=mask)
    tl.store(Scales + tl.cast(tile, tl.int64) * width + columns, scale, mask=columns < width)


def num_tiles(splits: Sequence[int]) -> int:
    """Tiles of up to 128 rows, none of which reaches from one group into the next."""
    return sum(-(-length // TILE) for length in splits)


def constants(splits: Sequence[int], power: bool) -> dict[str, Any]:
    """What every kernel here is compiled with."""
    groups = len(splits)
    return {"GROUPS": groups, "BLOCK": power_of_two(groups), "POWER": power, "EMULATES": interprets()}


def tiles_of(width: int) -> int:
    """Tiles of 128 columns, of which the last one may be narrower."""
    return -(-width // TILE)


def new_rows(like: Tensor, num_rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Memory for codes [P, width] as bytes, and their scales."""
    return like.new_empty((num_rows, width), dtype=U8), like.new_empty(tiles_of(width) * num_rows, dtype=FP32)


def new_columns(like: Tensor, splits: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    """Memory for codes of columns [width P] as bytes, and their scales."""
    return like.new_empty(sum(splits) * width, dtype=U8), like.new_empty((num_tiles(splits), width), dtype=FP32)

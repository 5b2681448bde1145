"""Routing weights and ids of rows that travel as one message of bytes: packed and unpacked in one launch each.

A row's bytes are its K weights and then its K ids, each as it lies in memory; they are moved as numbers of 16 bits,
because a row need not begin where wider ones may. Legend: C copies of M rows, P places that hold `num_each` ids each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.counts import Census
from kernels.door import jit, tl
from kernels.operation import Launch, operation, power_of_two

_TILE = 1024


@jit
def _pack(
    Weights, Ids, Source, Leaving, Out, num_copies, num_ids, num_each, num_places,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
    WEIGHT: tl.constexpr, ID: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    copies = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = copies < num_copies
    places, columns = tl.arange(0, PLACES), tl.arange(0, BLOCK)
    ends = tl.cumsum(tl.load(Leaving + places, mask=places < num_places, other=0).to(tl.int32), 0)
    place = tl.sum((copies[:, None] >= ends[None, :]).to(tl.int32), 1)
    source = tl.load(Source + copies, mask=there, other=0).to(tl.int64)
    inside = there[:, None] & (columns < num_ids)[None, :]
    ids = tl.load(Ids + source[:, None] * num_ids + columns[None, :], mask=inside, other=-1).to(tl.int32)
    local = ids - (place * num_each)[:, None]
    local = tl.where((ids >= 0) & (local >= 0) & (local < num_each), local, -1)
    weights = tl.load(Weights + source[:, None] * num_ids + columns[None, :], mask=inside, other=0.0)
    bits = weights.to(WIDE, bitcast=True)
    out = Out + copies.to(tl.int64)[:, None] * (num_ids * (WEIGHT + ID))
    for part in tl.static_range(WEIGHT):
        tl.store(out + columns[None, :] * WEIGHT + part, (bits >> (16 * part)).to(tl.int16), mask=inside)
    out += num_ids * WEIGHT
    for part in tl.static_range(ID):
        tl.store(out + columns[None, :] * ID + part, (local >> (16 * part)).to(tl.int16), mask=inside)


@jit
def _unpack(
    Packed, Weights, Ids, num_copies, num_ids,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WEIGHT: tl.constexpr, ID: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    copies = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = (copies < num_copies)[:, None] & (columns < num_ids)[None, :]
    row = Packed + copies[:, None] * (num_ids * (WEIGHT + ID))
    bits = tl.zeros((ROWS, BLOCK), WIDE)
    for part in tl.static_range(WEIGHT):
        half = tl.load(row + columns[None, :] * WEIGHT + part, mask=inside, other=0).to(WIDE)
        bits |= (half if WEIGHT == 1 else half & 0xFFFF) << (16 * part)
    row += num_ids * WEIGHT
    ids = tl.zeros((ROWS, BLOCK), tl.int32)
    for part in tl.static_range(ID):
        half = tl.load(row + columns[None, :] * ID + part, mask=inside, other=0).to(tl.int32)
        ids |= (half if part == ID - 1 else half & 0xFFFF) << (16 * part)
    out = copies[:, None] * num_ids + columns[None, :]
    tl.store(Weights + out, bits.to(Weights.dtype.element_ty, bitcast=True), mask=inside)
    tl.store(Ids + out, ids, mask=inside)


def _tile(num_ids: int, weights: torch.dtype, ids: torch.dtype) -> dict[str, object]:
    block = power_of_two(max(1, num_ids))
    wide = {2: tl.int16, 4: tl.int32, 8: tl.int64}[weights.itemsize] if tl is not None else None
    sizes = {"WEIGHT": weights.itemsize // 2, "ID": ids.itemsize // 2}
    return {"ROWS": max(1, _TILE // block), "BLOCK": block, **sizes, "WIDE": wide}


@operation(
    "pack_routes(Tensor weights, Tensor ids, Tensor source, Tensor leaving, int num_each, ScalarType id_dtype)"
    " -> Tensor"
)
def _plan_pack(
    weights: Tensor, ids: Tensor, source: Tensor, leaving: Tensor, num_each: int, id_dtype: torch.dtype
) -> tuple[Tensor, Launch]:
    num_copies, num_ids = source.shape[0], ids.shape[1]
    num_bytes = num_ids * (weights.dtype.itemsize + id_dtype.itemsize)
    out = ids.new_empty(num_copies, num_bytes // 2, dtype=torch.int16)
    tile = _tile(num_ids, weights.dtype, id_dtype) | {"PLACES": power_of_two(leaving.shape[0])}
    arguments = weights, ids, source, leaving, out, num_copies, num_ids, num_each, leaving.shape[0]
    read = num_copies * num_ids * (weights.dtype.itemsize + ids.dtype.itemsize) + source.nbytes + leaving.nbytes
    grid = (-(-num_copies // int(str(tile["ROWS"]))),)
    return out, Launch(_pack, grid, arguments, tile, read_bytes=read)


@operation("unpack_routes(Tensor packed, ScalarType dtype, ScalarType id_dtype) -> (Tensor, Tensor)")
def _plan_unpack(packed: Tensor, dtype: torch.dtype, id_dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], Launch]:
    num_copies, num_halves = packed.shape
    num_ids = 2 * num_halves // (dtype.itemsize + id_dtype.itemsize)
    weights = packed.new_empty(num_copies, num_ids, dtype=dtype)
    ids = packed.new_empty(num_copies, num_ids, dtype=torch.int32)
    tile = _tile(num_ids, dtype, id_dtype)
    grid = (-(-num_copies // int(str(tile["ROWS"]))),)
    return (weights, ids), Launch(_unpack, grid, (packed, weights, ids, num_copies, num_ids), tile)


def pack_routes(weights: Tensor, source: Tensor, census: Census, id_dtype: torch.dtype) -> Tensor:
    """What travels with each copy: the weights [M, K] of its row, and the row's ids as the copy's place counts them.

    source: [C], the row of each copy, by place as `census` has them. An id of another place is -1. Returns bytes,
    uint8 [C, K * (bytes of a weight + bytes of an id)].
    """
    weights = weights.contiguous()
    return _plan_pack(weights, census.ids, source, census.leaving, census.num_each, id_dtype).view(torch.uint8)


def unpack_routes(packed: Tensor, dtype: torch.dtype, id_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_routes`: weights [C, K] of `dtype`, ids int32 [C, K]."""
    return _plan_unpack(packed.view(torch.int16), dtype, id_dtype)

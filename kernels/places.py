"""Copies numbered: the second half of the kernels that plan a dispatch; `counts.py` is the first, with the legend."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.counts import Census, id_of, moved_to, natural_rows, reached_places, runs, sizes_of, tile_of
from kernels.door import jit, tl
from kernels.operation import Launch, operation, power_of_two


@jit
def _fill(Source, Slots, totals, starts, num_rows, MULTIPLE: tl.constexpr):
    """Copies of no row, behind each place's [PLACES] until it has a multiple."""
    counted = tl.arange(0, MULTIPLE)[None, :]
    behind = (totals + MULTIPLE - 1) // MULTIPLE * MULTIPLE - totals
    places = (starts + totals)[:, None] + counted
    empty = counted < behind[:, None]
    tl.store(Source + places, tl.zeros_like(places) + num_rows, mask=empty)
    tl.store(Slots + places, tl.zeros_like(places) - 1, mask=empty)


@jit
def _totals(Totals, num_places, before, MULTIPLE: tl.constexpr, PLACES: tl.constexpr):
    """Copies of each place [PLACES], and where they begin: each place's are made up to a multiple."""
    places = tl.arange(0, PLACES)
    totals = tl.load(Totals + before + places, mask=places < num_places, other=0).to(tl.int32)
    spaced = (totals + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    return totals, tl.cumsum(spaced, 0) - spaced


@jit
def _first(Starts, begin, reached, num_places, num_columns, PLACES: tl.constexpr):
    """The number of each copy [ROWS, PLACES], of places whose copies begin at `begin`."""
    places = tl.arange(0, PLACES)
    start = tl.program_id(0).to(tl.int64) * num_columns + num_columns - num_places
    starts = tl.load(Starts + start + places, mask=places < num_places, other=0)
    return (begin + starts)[None, :] + tl.cumsum(reached, 0) - reached


@jit
def _number(
    Ids, Starts, Totals, Source, Table, num_rows, num_ids, num_each, num_places, num_columns, table_width,
    ROWS: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < num_rows
    reached = reached_places(Ids, rows, there, num_ids, num_each, num_places, ROWS, PLACES)
    _, begin = _totals(Totals, num_places, num_columns - num_places, 1, PLACES)
    copies = _first(Starts, begin, reached, num_places, num_columns, PLACES)
    has = reached > 0
    tl.store(Source + copies, tl.broadcast_to(rows[:, None], (ROWS, PLACES)), mask=has)
    out = Table + rows.to(tl.int64)[:, None] * table_width
    tl.store(out + tl.cumsum(reached, 1) - reached, copies, mask=has)
    columns = tl.arange(0, WIDTH)[None, :]
    rest = there[:, None] & (columns >= tl.sum(reached, 1)[:, None]) & (columns < table_width)
    tl.store(out + columns, tl.full((ROWS, WIDTH), -1, tl.int32), mask=rest)


@jit
def _number_ids(
    Ids, Counts, Starts, Totals, Source, Slots, Table,
    counts_stride, num_rows, num_ids, num_places, num_ranks, num_nodes, num_blocks,
    ROWS: tl.constexpr, PLACES: tl.constexpr, RANKS: tl.constexpr, NODES: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    totals, begin = _totals(Totals, num_places, 0, MULTIPLE, PLACES)
    if tl.program_id(0) == num_blocks:
        _fill(Source, Slots, totals, begin, num_rows, MULTIPLE)
    else:
        positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        there = positions < num_rows
        rows = positions
        if Counts is not None:
            rows = natural_rows(positions, Counts, counts_stride, num_ranks, num_nodes, RANKS, NODES)
        reached = reached_places(Ids, rows, there, num_ids, 1, num_places, ROWS, PLACES)
        copies = _first(Starts, begin, reached, num_places, num_places, PLACES)
        places = tl.arange(0, PLACES)
        for each in range(num_ids):
            ids = id_of(Ids, rows, there, num_ids, each)
            mine = (ids[:, None] == places[None, :]) & (places < num_places)[None, :]
            has = tl.sum(mine.to(tl.int32), 1) > 0
            copy = tl.sum(tl.where(mine, copies, 0), 1)
            slot = rows * num_ids + each
            tl.store(Source + copy, rows, mask=has)
            tl.store(Slots + copy, slot, mask=has)
            tl.store(Table + slot, tl.where(has, copy, -1), mask=there)


@jit
def _regroup(
    Counts, Source, Slots, Table, counts_stride, num_rows, num_ranks, num_nodes, num_blocks,
    ROWS: tl.constexpr, RANKS: tl.constexpr, NODES: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    lengths, natural, moved = runs(Counts, counts_stride, num_ranks, num_nodes, MULTIPLE, RANKS, NODES)
    if tl.program_id(0) == num_blocks:
        totals = tl.sum(tl.reshape(lengths, (RANKS, NODES)), 0)
        starts = tl.min(tl.reshape(moved, (RANKS, NODES)), 0)
        _fill(Source, Slots, totals, starts, num_rows, MULTIPLE)
    else:
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        there = rows < num_rows
        place = moved_to(rows, lengths, natural, moved)
        tl.store(Source + place, rows, mask=there)
        tl.store(Slots + place, rows, mask=there)
        tl.store(Table + rows, place, mask=there)


@operation(
    "number_copies(Tensor ids, Tensor starts, Tensor totals, int num_each, int num_places, int num_copies)"
    " -> (Tensor, Tensor)"
)
def _plan_number(
    ids: Tensor, starts: Tensor, totals: Tensor, num_each: int, num_places: int, num_copies: int
) -> tuple[tuple[Tensor, Tensor], Launch]:
    (num_rows, num_ids), num_blocks = ids.shape, starts.shape[0]
    width = min(num_ids, num_places)
    source, table = (ids.new_empty(shape, dtype=torch.int32) for shape in ((num_copies,), (num_rows, width)))
    numbers = num_rows, num_ids, num_each, num_places, starts.shape[1], width
    # Blocks are those that were counted.
    rows = power_of_two(-(-num_rows // max(1, num_blocks)))
    constants = {"ROWS": rows, "PLACES": power_of_two(num_places), "WIDTH": power_of_two(width)}
    return (source, table), Launch(_number, (num_blocks,), (ids, starts, totals, source, table, *numbers), constants)


@operation(
    "number_ids(Tensor ids, Tensor? counts, Tensor starts, Tensor totals, int num_copies, int multiple)"
    " -> (Tensor, Tensor, Tensor)"
)
def _plan_number_ids(
    ids: Tensor, counts: Tensor | None, starts: Tensor, totals: Tensor, num_copies: int, multiple: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Launch]:
    (num_rows, num_ids), (num_blocks, num_places) = ids.shape, starts.shape
    stride, num_ranks, num_nodes = sizes_of(counts)
    source, slots = (ids.new_empty(num_copies, dtype=torch.int32) for _ in range(2))
    table = ids.new_empty(ids.shape, dtype=torch.int32)
    tensors = ids, counts, starts, totals, source, slots, table
    numbers = stride, num_rows, num_ids, num_places, num_ranks, num_nodes, num_blocks
    tile = tile_of(num_places, num_ranks, num_nodes)
    constants = {name: tile[name] for name in ("ROWS", "PLACES", "RANKS", "NODES")} | {"MULTIPLE": multiple}
    return (source, slots, table), Launch(_number_ids, (num_blocks + 1,), (*tensors, *numbers), constants)


@operation("regroup_rows(Tensor counts, int num_rows, int num_copies, int multiple) -> (Tensor, Tensor, Tensor)")
def regroup_rows(
    counts: Tensor, num_rows: int, num_copies: int, multiple: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Launch]:
    """Rows in blocks (a, b) of counts[a, b] rows [A, B], a slowest, ordered with b slowest; each b's rows are made up
    to a multiple, a power of two, by empty ones.

    Returns, int32, which row lies at each place [num_copies], `num_rows` at empty ones; the same with -1 at empty ones;
    and where each row lies [num_rows, 1].
    """
    source, slots = (counts.new_empty(num_copies, dtype=torch.int32) for _ in range(2))
    table = counts.new_empty(num_rows, 1, dtype=torch.int32)
    stride, num_ranks, num_nodes = sizes_of(counts)
    tile = tile_of(1, num_ranks, num_nodes)
    num_blocks = -(-num_rows // tile["ROWS"])
    constants = {name: tile[name] for name in ("ROWS", "RANKS", "NODES")} | {"MULTIPLE": multiple}
    arguments = counts, source, slots, table, stride, num_rows, num_ranks, num_nodes, num_blocks
    return (source, slots, table), Launch(_regroup, (num_blocks + 1,), arguments, constants)


def number_copies(census: Census, num_copies: int) -> tuple[Tensor, Tensor]:
    """One copy of each row for each place that it reaches, by place, then by row.

    num_copies: C, the sum of `census.leaving`. Returns, int32, the row of each copy [C], and the copies of each row
    [M, min(K, P)], by place, -1 behind them.
    """
    places = census.num_each, census.num_places
    return _plan_number(census.ids, census.starts, census.totals, *places, num_copies)


def number_ids(census: Census, num_copies: int, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """One copy of a row for each of its ids 0..P-1, ordered by id, then by row; each id's copies are made up to a
    multiple, a power of two, by empty ones.

    census: of places that hold an id each. num_copies: C, empty ones among them. Returns, int32, the row of each copy
    [C], M for an empty one; the place of its id in the flattened ids [C], -1 for an empty one; and the copy of each id
    [M, K], -1 where there is none.
    """
    return _plan_number_ids(census.ids, census.counts, census.starts, census.totals, num_copies, multiple)

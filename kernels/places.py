"""Where rows go: the kernels of `parallel.expert.copies.Copier`, which plan a dispatch.

Every list of copies is made in three launches. Blocks of rows count what goes to which place; a sum over the blocks
says where each block's copies begin; then every block numbers its own. So the order of copies is that of rows, whatever
runs when.

Legend: M rows with K ids each (-1 is none), P places that hold runs of `num_each` ids, C copies, N machines and R ranks
that rows come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.door import jit, tl
from kernels.operation import Launch, operation, power_of_two

# Elements of a block's largest tile, and rows of a block at most.
_TILE, _MAX_ROWS = 4096, 64
_SUM_ROWS, _SUM_COLUMNS = 64, 32


@jit
def _natural(positions, Counts, stride, num_ranks, num_nodes, RANKS: tl.constexpr, NODES: tl.constexpr):
    """The row that lies at each position [ROWS] once rows in blocks (rank, node) are ordered by (node, rank)."""
    ranks, nodes = tl.arange(0, RANKS)[:, None], tl.arange(0, NODES)[None, :]
    inside = (ranks < num_ranks) & (nodes < num_nodes)
    lengths = tl.load(Counts + ranks * stride + nodes, mask=inside, other=0).to(tl.int32)
    by_rank, by_node = tl.sum(lengths, 1), tl.sum(lengths, 0)
    natural = (tl.cumsum(by_rank, 0) - by_rank)[:, None] + tl.cumsum(lengths, 1) - lengths
    moved = (tl.cumsum(by_node, 0) - by_node)[None, :] + tl.cumsum(lengths, 0) - lengths
    lengths = tl.reshape(lengths, (1, RANKS * NODES))
    shifts = tl.reshape(natural - moved, (1, RANKS * NODES))
    moved = tl.reshape(moved, (1, RANKS * NODES))
    here = (positions[:, None] >= moved) & (positions[:, None] < moved + lengths)
    return positions + tl.sum(tl.where(here, shifts, 0), 1)


@jit
def _id(Ids, rows, there, num_ids, each):
    """Id number `each` of every row [ROWS]; -1 where there is none."""
    return tl.load(Ids + rows.to(tl.int64) * num_ids + each, mask=there, other=-1).to(tl.int32)


@jit
def _reached(Ids, rows, there, num_ids, num_each, num_places, ROWS: tl.constexpr, PLACES: tl.constexpr):
    """Whether each row has each place among those of its ids: 0 or 1 [ROWS, PLACES]."""
    places = tl.arange(0, PLACES)[None, :]
    reached = tl.zeros((ROWS, PLACES), tl.int32)
    for each in range(num_ids):
        ids = _id(Ids, rows, there, num_ids, each)
        place = tl.where(ids >= 0, ids // num_each, -1)[:, None]
        reached |= ((place == places) & (places < num_places)).to(tl.int32)
    return reached


@jit
def _count(
    Ids, Sources, Counts, Blocks, counts_stride, num_rows, num_ids, num_each, num_places, num_ranks, num_nodes, num_columns,
    ROWS: tl.constexpr, PLACES: tl.constexpr, RANKS: tl.constexpr, NODES: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = positions < num_rows
    rows = positions
    if Counts is not None:
        rows = _natural(positions, Counts, counts_stride, num_ranks, num_nodes, RANKS, NODES)
    reached = _reached(Ids, rows, there, num_ids, num_each, num_places, ROWS, PLACES)
    places = tl.arange(0, PLACES)
    out = Blocks + tl.program_id(0).to(tl.int64) * num_columns
    if Sources is not None:
        nodes = tl.arange(0, NODES)
        ends = tl.cumsum(tl.load(Sources + nodes, mask=nodes < num_nodes, other=0).to(tl.int32), 0)
        source = tl.sum((positions[:, None] >= ends[None, :]).to(tl.int32), 1)
        columns = num_nodes + num_each
        for node in range(num_nodes):
            from_node = tl.sum(tl.where((source == node)[:, None], reached, 0), 0)
            tl.store(out + places * columns + node, from_node, mask=places < num_places)
        ids = tl.arange(0, IDS)
        found = tl.zeros((ROWS, IDS), tl.int32)
        for each in range(num_ids):
            found += (_id(Ids, rows, there, num_ids, each)[:, None] == ids[None, :]).to(tl.int32)
        place = ids // num_each
        out_ids = out + place * columns + num_nodes + (ids - place * num_each)
        tl.store(out_ids, tl.sum(found, 0), mask=ids < num_places * num_each)
        out += num_places * columns
    tl.store(out + places, tl.sum(reached, 0), mask=places < num_places)


@jit
def _sum(Blocks, Starts, Totals, num_blocks, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, num_blocks, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < num_blocks)[:, None] & (columns < num_columns)[None, :]
        places = rows[:, None] * num_columns + columns[None, :]
        counts = tl.load(Blocks + places, mask=inside, other=0)
        tl.store(Starts + places, total[None, :] + tl.cumsum(counts, 0) - counts, mask=inside)
        total += tl.sum(counts, 0)
    tl.store(Totals + columns, total.to(tl.int64), mask=columns < num_columns)


@jit
def _first(Starts, Totals, reached, num_places, num_columns, PLACES: tl.constexpr):
    """The number of each copy [ROWS, PLACES]: those of a place are behind those of the places before it."""
    places = tl.arange(0, PLACES)
    before = num_columns - num_places
    totals = tl.load(Totals + before + places, mask=places < num_places, other=0).to(tl.int32)
    start = tl.program_id(0).to(tl.int64) * num_columns + before
    starts = tl.load(Starts + start + places, mask=places < num_places, other=0)
    return (tl.cumsum(totals, 0) - totals + starts)[None, :] + tl.cumsum(reached, 0) - reached


@jit
def _number(
    Ids, Starts, Totals, Source, Table, num_rows, num_ids, num_each, num_places, num_columns, table_width,
    ROWS: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < num_rows
    reached = _reached(Ids, rows, there, num_ids, num_each, num_places, ROWS, PLACES)
    copies = _first(Starts, Totals, reached, num_places, num_columns, PLACES)
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
    counts_stride, num_rows, num_ids, num_places, num_ranks, num_nodes,
    ROWS: tl.constexpr, PLACES: tl.constexpr, RANKS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = positions < num_rows
    rows = positions
    if Counts is not None:
        rows = _natural(positions, Counts, counts_stride, num_ranks, num_nodes, RANKS, NODES)
    reached = _reached(Ids, rows, there, num_ids, 1, num_places, ROWS, PLACES)
    copies = _first(Starts, Totals, reached, num_places, num_places, PLACES)
    places = tl.arange(0, PLACES)
    for each in range(num_ids):
        ids = _id(Ids, rows, there, num_ids, each)
        mine = (ids[:, None] == places[None, :]) & (places < num_places)[None, :]
        has = tl.sum(mine.to(tl.int32), 1) > 0
        copy = tl.sum(tl.where(mine, copies, 0), 1)
        slot = rows * num_ids + each
        tl.store(Source + copy, rows, mask=has)
        tl.store(Slots + copy, slot, mask=has)
        tl.store(Table + slot, tl.where(has, copy, -1), mask=there)


@jit
def _regroup(
    Counts, Source, Table, counts_stride, num_rows, num_ranks, num_nodes,
    ROWS: tl.constexpr, RANKS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = _natural(positions, Counts, counts_stride, num_ranks, num_nodes, RANKS, NODES)
    tl.store(Source + positions, rows, mask=positions < num_rows)
    tl.store(Table + rows, positions, mask=positions < num_rows)


def _tile(num_places: int, num_ranks: int = 1, num_nodes: int = 1, num_ids: int = 1) -> dict[str, int]:
    """Powers of two that hold these numbers, and so many rows for a block that its tiles are small."""
    places, ranks, nodes, ids = (power_of_two(max(1, each)) for each in (num_places, num_ranks, num_nodes, num_ids))
    rows = max(1, min(_MAX_ROWS, _TILE // max(places, ranks * nodes, ids)))
    return {"ROWS": rows, "PLACES": places, "RANKS": ranks, "NODES": nodes, "IDS": ids}


@operation(
    "count_places(Tensor ids, Tensor? sources, Tensor? counts, int num_each, int num_places, int num_nodes, int[] tile)"
    " -> Tensor"
)
def _plan_count(
    ids: Tensor, sources: Tensor | None, counts: Tensor | None, num_each: int, num_places: int, num_nodes: int,
    tile: list[int],
) -> tuple[Tensor, Launch]:  # fmt: skip
    num_rows, num_ids = ids.shape
    num_columns = num_places if sources is None else num_places * (num_nodes + num_each + 1)
    constants = dict(zip(_TILE_NAMES, tile, strict=True))
    blocks = ids.new_empty(-(-num_rows // constants["ROWS"]), num_columns, dtype=torch.int32)
    stride, num_ranks = (1, 1) if counts is None else (counts.stride(0), counts.shape[0])
    numbers = stride, num_rows, num_ids, num_each, num_places, num_ranks, num_nodes, num_columns
    return blocks, Launch(_count, (blocks.shape[0],), (ids, sources, counts, blocks, *numbers), constants)


@operation("sum_blocks(Tensor blocks) -> (Tensor, Tensor)")
def _plan_sum(blocks: Tensor) -> tuple[tuple[Tensor, Tensor], Launch]:
    num_blocks, num_columns = blocks.shape
    starts, totals = blocks.new_empty(blocks.shape), blocks.new_empty(num_columns, dtype=torch.int64)
    tile = {"ROWS": _SUM_ROWS, "COLUMNS": _SUM_COLUMNS}
    grid = (-(-num_columns // _SUM_COLUMNS),)
    return (starts, totals), Launch(_sum, grid, (blocks, starts, totals, num_blocks, num_columns), tile)


@operation(
    "number_copies(Tensor ids, Tensor starts, Tensor totals, int num_each, int num_places, int num_copies, int[] tile)"
    " -> (Tensor, Tensor)"
)
def _plan_number(
    ids: Tensor, starts: Tensor, totals: Tensor, num_each: int, num_places: int, num_copies: int, tile: list[int]
) -> tuple[tuple[Tensor, Tensor], Launch]:
    num_rows, num_ids = ids.shape
    width = min(num_ids, num_places)
    source, table = (ids.new_empty(shape, dtype=torch.int32) for shape in ((num_copies,), (num_rows, width)))
    numbers = num_rows, num_ids, num_each, num_places, starts.shape[1], width
    constants = {"ROWS": tile[0], "PLACES": tile[1], "WIDTH": power_of_two(width)}
    arguments = ids, starts, totals, source, table, *numbers
    return (source, table), Launch(_number, (starts.shape[0],), arguments, constants)


@operation(
    "number_ids(Tensor ids, Tensor? counts, Tensor starts, Tensor totals, int num_places, int num_copies, int[] tile)"
    " -> (Tensor, Tensor, Tensor)"
)
def _plan_number_ids(
    ids: Tensor, counts: Tensor | None, starts: Tensor, totals: Tensor, num_places: int, num_copies: int,
    tile: list[int],
) -> tuple[tuple[Tensor, Tensor, Tensor], Launch]:  # fmt: skip
    num_rows, num_ids = ids.shape
    out = tuple(ids.new_empty(shape, dtype=torch.int32) for shape in (num_copies, num_copies, ids.shape))
    numbers = (1, 1, 1) if counts is None else (counts.stride(0), *counts.shape)
    stride, num_ranks, num_nodes = numbers
    arguments = ids, counts, starts, totals, *out, stride, num_rows, num_ids, num_places, num_ranks, num_nodes
    constants = dict(zip(_TILE_NAMES, tile, strict=True))
    del constants["IDS"]
    return out, Launch(_number_ids, (starts.shape[0],), arguments, constants)  # type: ignore[return-value]


@operation("regroup_rows(Tensor counts, int num_rows) -> (Tensor, Tensor)")
def regroup_rows(counts: Tensor, num_rows: int) -> tuple[tuple[Tensor, Tensor], Launch]:
    """Rows in blocks (a, b) of counts[a, b] rows [A, B], a slowest, ordered with b slowest.

    Returns, int32, which row lies at each place [num_rows], and where each row lies [num_rows, 1].
    """
    source = counts.new_empty(num_rows, dtype=torch.int32)
    table = counts.new_empty(num_rows, 1, dtype=torch.int32)
    tile = _tile(1, *counts.shape)
    arguments = counts, source, table, counts.stride(0), num_rows, *counts.shape
    constants = {name: tile[name] for name in ("ROWS", "RANKS", "NODES")}
    return (source, table), Launch(_regroup, (-(-num_rows // tile["ROWS"]),), arguments, constants)


_TILE_NAMES = ("ROWS", "PLACES", "RANKS", "NODES", "IDS")


@dataclass(frozen=True)
class Census:
    """How many copies of rows go to each of `num_places` places, counted by blocks of rows.

    Attributes:
        ids: [M, K], integers, of which places hold runs of `num_each`.
        totals: int64; the last `num_places` of them are the copies of each place.
        starts: int32, in the columns of `totals`: what blocks before each block have.
        tile: what blocks are made of.
    """

    ids: Tensor
    num_each: int
    num_places: int
    starts: Tensor
    totals: Tensor
    tile: list[int]

    @property
    def leaving(self) -> Tensor:
        """Copies of each place, int64 [P]."""
        return self.totals[-self.num_places :]


def count_places(ids: Tensor, num_each: int, num_places: int, sources: Tensor | None = None) -> Census:
    """Count the rows that have each place among those of their ids.

    sources: int64 [N], how many rows come from each of N machines, in order. Then `totals` begins with [P, N + num_each]
    numbers: by place, the rows from each machine, and how often each of its ids occurs.
    """
    num_nodes = 0 if sources is None else sources.shape[0]
    num_ids = 1 if sources is None else num_places * num_each
    tile = list(_tile(num_places, 1, num_nodes, num_ids).values())
    blocks = _plan_count(ids, sources, None, num_each, num_places, num_nodes, tile)
    return Census(ids, num_each, num_places, *_plan_sum(blocks), tile)


def number_copies(census: Census, num_copies: int) -> tuple[Tensor, Tensor]:
    """One copy of each row for each place that it reaches, by place, then by row.

    num_copies: C, the sum of `census.leaving`. Returns, int32, the row of each copy [C], and the copies of each row
    [M, min(K, P)], by place, -1 behind them.
    """
    return _plan_number(
        census.ids, census.starts, census.totals, census.num_each, census.num_places, num_copies, census.tile
    )


def number_ids(
    ids: Tensor, num_places: int, num_copies: int, counts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One copy of row m for each of its ids 0..P-1, ordered by id, then by row.

    num_copies: C, how many ids there are. counts: int64 [R, N], lengths of the blocks of rows by rank and machine, rank
    slowest; rows then count as ordered by (machine, rank). Returns, int32, the row of each copy [C], the place of its id
    in the flattened ids [C], and the copy of each id [M, K], -1 where there is none.
    """
    tile = list(_tile(num_places, *((1, 1) if counts is None else counts.shape)).values())
    blocks = _plan_count(ids, None, counts, 1, num_places, 1 if counts is None else counts.shape[1], tile)
    return _plan_number_ids(ids, counts, *_plan_sum(blocks), num_places, num_copies, tile)

"""What goes where, counted: the first half of the kernels of `parallel.expert.fused_copier`, which plan a dispatch.

Every list of copies is made in three launches. Blocks of rows count what goes to which place; a sum over the blocks
says where each block's copies begin; then every block numbers its own (`places.py`). So the order of copies is that of
rows, whatever runs when.

Legend: M rows with K ids each (-1 is none), P places that hold runs of `num_each` ids, C copies, N machines and R ranks
that rows come from, L ids of a rank.
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
def runs(Counts, stride, num_ranks, num_nodes, MULTIPLE: tl.constexpr, RANKS: tl.constexpr, NODES: tl.constexpr):
    """Blocks (rank, node) of rows: the length of each block [RANKS * NODES], where it begins, and where it begins
    once blocks are ordered by (node, rank) and each node's rows are made up to a multiple."""
    ranks, nodes = tl.arange(0, RANKS)[:, None], tl.arange(0, NODES)[None, :]
    inside = (ranks < num_ranks) & (nodes < num_nodes)
    lengths = tl.load(Counts + ranks * stride + nodes, mask=inside, other=0).to(tl.int32)
    by_rank, by_node = tl.sum(lengths, 1), tl.sum(lengths, 0)
    natural = (tl.cumsum(by_rank, 0) - by_rank)[:, None] + tl.cumsum(lengths, 1) - lengths
    by_node = (by_node + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    moved = (tl.cumsum(by_node, 0) - by_node)[None, :] + tl.cumsum(lengths, 0) - lengths
    natural, moved = tl.reshape(natural, (1, RANKS * NODES)), tl.reshape(moved, (1, RANKS * NODES))
    return tl.reshape(lengths, (1, RANKS * NODES)), natural, moved


@jit
def moved_to(numbers, lengths, before, after):
    """Numbers [ROWS] that lie in blocks [1, n] which begin at `before`, once the blocks begin at `after`."""
    here = (numbers[:, None] >= before) & (numbers[:, None] < before + lengths)
    return numbers + tl.sum(tl.where(here, after - before, 0), 1)


@jit
def natural_rows(positions, Counts, stride, num_ranks, num_nodes, RANKS: tl.constexpr, NODES: tl.constexpr):
    """The row that lies at each position [ROWS] once rows in blocks (rank, node) are ordered by (node, rank)."""
    lengths, natural, moved = runs(Counts, stride, num_ranks, num_nodes, 1, RANKS, NODES)
    return moved_to(positions, lengths, moved, natural)


@jit
def id_of(Ids, rows, there, num_ids, each):
    """Id number `each` of every row [ROWS]; -1 where there is none."""
    return tl.load(Ids + rows.to(tl.int64) * num_ids + each, mask=there, other=-1).to(tl.int32)


@jit
def reached_places(Ids, rows, there, num_ids, num_each, num_places, ROWS: tl.constexpr, PLACES: tl.constexpr):
    """Whether each row has each place among those of its ids: 0 or 1 [ROWS, PLACES]."""
    places = tl.arange(0, PLACES)[None, :]
    reached = tl.zeros((ROWS, PLACES), tl.int32)
    for each in range(num_ids):
        ids = id_of(Ids, rows, there, num_ids, each)
        place = tl.where(ids >= 0, ids // num_each, -1)[:, None]
        reached |= ((place == places) & (places < num_places)).to(tl.int32)
    return reached


@jit
def _count(
    Ids, Counts, Blocks, counts_stride, num_rows, num_ids, num_each, num_places, num_ranks, num_nodes,
    ROWS: tl.constexpr, PLACES: tl.constexpr, RANKS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = positions < num_rows
    rows = positions
    if Counts is not None:
        rows = natural_rows(positions, Counts, counts_stride, num_ranks, num_nodes, RANKS, NODES)
    reached = reached_places(Ids, rows, there, num_ids, num_each, num_places, ROWS, PLACES)
    places = tl.arange(0, PLACES)
    out = Blocks + tl.program_id(0).to(tl.int64) * num_places
    tl.store(out + places, tl.sum(reached, 0), mask=places < num_places)


@jit
def _count_tree(
    Ids, Blocks, num_rows, num_ids, num_nodes, num_ranks, num_local,
    ROWS: tl.constexpr, NODES: tl.constexpr, RANKS: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < num_rows
    num_each = num_ranks * num_local
    width = 1 + num_ranks + num_each
    nodes, ranks, ids = tl.arange(0, NODES), tl.arange(0, RANKS), tl.arange(0, IDS)
    out = Blocks + tl.program_id(0).to(tl.int64) * (num_nodes * (width + 1))
    reached = tl.sum(reached_places(Ids, rows, there, num_ids, num_each, num_nodes, ROWS, NODES), 0)
    tl.store(out + nodes * width, reached, mask=nodes < num_nodes)
    tl.store(out + num_nodes * width + nodes, reached, mask=nodes < num_nodes)
    reached = tl.sum(reached_places(Ids, rows, there, num_ids, num_local, num_nodes * num_ranks, ROWS, RANKS), 0)
    place = ranks // num_ranks * width + 1 + ranks % num_ranks
    tl.store(out + place, reached, mask=ranks < num_nodes * num_ranks)
    reached = tl.sum(reached_places(Ids, rows, there, num_ids, 1, num_nodes * num_each, ROWS, IDS), 0)
    place = ids // num_each * width + 1 + num_ranks + ids % num_each
    tl.store(out + place, reached, mask=ids < num_nodes * num_each)


@jit
def _pass_on(Arrived, Out, num_nodes, num_ranks, num_local, LOCAL: tl.constexpr):
    rank, local = tl.program_id(0), tl.arange(0, LOCAL)
    width = 1 + num_ranks + num_ranks * num_local
    total = tl.zeros((LOCAL,), tl.int64)
    out = Out + rank * (num_nodes + num_local)
    for node in range(num_nodes):
        row = Arrived + node * width + 1
        tl.store(out + node, tl.load(row + rank))
        total += tl.load(row + num_ranks + rank * num_local + local, mask=local < num_local, other=0)
    tl.store(out + num_nodes + local, total, mask=local < num_local)


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


def tile_of(num_places: int, num_ranks: int = 1, num_nodes: int = 1, num_ids: int = 1) -> dict[str, int]:
    """Powers of two that hold these numbers, and so many rows for a block that its tiles are small."""
    places, ranks, nodes, ids = (power_of_two(max(1, each)) for each in (num_places, num_ranks, num_nodes, num_ids))
    rows = max(1, min(_MAX_ROWS, _TILE // max(places, ranks * nodes, ids)))
    return {"ROWS": rows, "PLACES": places, "RANKS": ranks, "NODES": nodes, "IDS": ids}


def sizes_of(counts: Tensor | None) -> tuple[int, int, int]:
    """How far apart the rows of counts [R, N] are, R and N."""
    return (1, 1, 1) if counts is None else (counts.stride(0), counts.shape[0], counts.shape[1])


@operation("count_places(Tensor ids, Tensor? counts, int num_each, int num_places) -> Tensor")
def _plan_count(ids: Tensor, counts: Tensor | None, num_each: int, num_places: int) -> tuple[Tensor, Launch]:
    (num_rows, num_ids), (stride, num_ranks, num_nodes) = ids.shape, sizes_of(counts)
    tile = tile_of(num_places, num_ranks, num_nodes)
    blocks = ids.new_empty(-(-num_rows // tile["ROWS"]), num_places, dtype=torch.int32)
    numbers = stride, num_rows, num_ids, num_each, num_places, num_ranks, num_nodes
    constants = {name: tile[name] for name in ("ROWS", "PLACES", "RANKS", "NODES")}
    return blocks, Launch(_count, (blocks.shape[0],), (ids, counts, blocks, *numbers), constants)


@operation("count_tree(Tensor ids, int num_nodes, int num_ranks, int num_local) -> Tensor")
def _plan_count_tree(ids: Tensor, num_nodes: int, num_ranks: int, num_local: int) -> tuple[Tensor, Launch]:
    num_rows, num_ids = ids.shape
    all_ranks, all_ids = num_nodes * num_ranks, num_nodes * num_ranks * num_local
    tile = tile_of(num_nodes, all_ranks, 1, all_ids)
    blocks = ids.new_empty(
        -(-num_rows // tile["ROWS"]), num_nodes * (2 + num_ranks + num_ranks * num_local), dtype=torch.int32
    )
    constants = {"ROWS": tile["ROWS"], "NODES": tile["PLACES"], "RANKS": tile["RANKS"], "IDS": tile["IDS"]}
    arguments = ids, blocks, num_rows, num_ids, num_nodes, num_ranks, num_local
    return blocks, Launch(_count_tree, (blocks.shape[0],), arguments, constants)


@operation("sum_blocks(Tensor blocks) -> (Tensor, Tensor)")
def _plan_sum(blocks: Tensor) -> tuple[tuple[Tensor, Tensor], Launch]:
    num_blocks, num_columns = blocks.shape
    starts, totals = blocks.new_empty(blocks.shape), blocks.new_empty(num_columns, dtype=torch.int64)
    tile = {"ROWS": _SUM_ROWS, "COLUMNS": _SUM_COLUMNS}
    grid = (-(-num_columns // _SUM_COLUMNS),)
    return (starts, totals), Launch(_sum, grid, (blocks, starts, totals, num_blocks, num_columns), tile)


@operation("pass_on(Tensor arrived, int num_ranks, int num_local) -> Tensor")
def pass_on(arrived: Tensor, num_ranks: int, num_local: int) -> tuple[Tensor, Launch]:
    """arrived [N, 1 + R + R * L], what N machines have for one: rows, by rank, by id -> [R, N + L]: for each rank, its
    rows from each machine, and all for each of its ids."""
    num_nodes = arrived.shape[0]
    out = arrived.new_empty(num_ranks, num_nodes + num_local)
    arguments = arrived, out, num_nodes, num_ranks, num_local
    return out, Launch(_pass_on, (num_ranks,), arguments, {"LOCAL": power_of_two(num_local)})


@dataclass(frozen=True)
class Census:
    """How many copies of rows go to each of `num_places` places, counted by blocks of rows.

    Attributes:
        ids: [M, K], integers, of which places hold runs of `num_each`.
        counts: int64 [R, N], lengths of the blocks of rows by rank and machine, rank slowest, where rows count as
            ordered by (machine, rank); else None.
        starts: int32, in the columns of `totals`: what blocks before each block have.
        totals: int64; the last `num_places` of them are the copies of each place.
    """

    ids: Tensor
    counts: Tensor | None
    num_each: int
    num_places: int
    starts: Tensor
    totals: Tensor

    @property
    def leaving(self) -> Tensor:
        """Copies of each place, int64 [P]."""
        return self.totals[-self.num_places :]


def count_places(ids: Tensor, num_each: int, num_places: int, counts: Tensor | None = None) -> Census:
    """Count the rows that have each place among those of their ids; `counts` as `Census` has them."""
    starts, totals = _plan_sum(_plan_count(ids, counts, num_each, num_places))
    return Census(ids, counts, num_each, num_places, starts, totals)


def count_tree(ids: Tensor, num_nodes: int, num_ranks: int, num_local: int) -> tuple[Census, Tensor]:
    """Count rows by machine, by rank of a machine and by id; ranks hold runs of `num_local` ids.

    Returns those of the machines, and all numbers, int64 [N, 1 + R + R * L]: of a machine, of its ranks, of their ids.
    """
    starts, totals = _plan_sum(_plan_count_tree(ids, num_nodes, num_ranks, num_local))
    census = Census(ids, None, num_ranks * num_local, num_nodes, starts, totals)
    return census, totals[:-num_nodes].view(num_nodes, -1)

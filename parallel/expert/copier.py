"""How copies are planned and made: by torch's operations, here, or by kernels, in `fused_copier.py`.

A dispatch is handed one of the two. Legend as in `copies.py`, and P places (machines, ranks or experts) that hold runs
of `num_each` ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from parallel.expert.copies import Copies, arrange, inverse, one_per_place, reach, regroup, tally


class Spread(Protocol):
    """Copies made of rows, as `Copies` tells."""

    @property
    def source(self) -> Tensor:
        """[C], the row that each copy is made of; M of an empty one."""
        ...

    def spread(self, rows: Tensor) -> Tensor: ...
    def fold(self, copies: Tensor) -> Tensor: ...
    def spread_weights(self, weights: Tensor) -> Tensor: ...
    def fold_weights(self, d_weights: Tensor) -> Tensor: ...


class Copier(Protocol):
    """Plans copies. What `count` and `count_tree` return is known to the copier alone, but for `leaving`."""

    def count(self, ids: Tensor, num_each: int, num_places: int, counts: Tensor | None = None) -> Any:
        """Count rows [M] by place: ids, integers [M, K], distinct in a row, -1 for none.

        counts: int64 [R, N], lengths of the blocks in which rows lie, rank slowest; rows then count as ordered by
        (machine, rank). None: as they lie. Its `leaving`, int64 [P], is how many rows reach each place.
        """
        ...

    def count_tree(self, ids: Tensor, num_nodes: int, num_ranks: int, num_local: int) -> tuple[Any, Tensor]:
        """Count rows by machine, and how many reach each machine, each of its ranks and each id of these, in one table:
        int64 [N, 1 + ranks + ids of a machine]. Ranks hold runs of `num_local` ids."""
        ...

    def pass_on(self, arrived: Tensor, num_ranks: int, num_local: int) -> Tensor:
        """Such a table of what N machines have for this one -> [ranks, N + ids of a rank]: for each rank its rows from
        each machine, and how often each of its ids occurs."""
        ...

    def one_per_place(self, census: Any, num_copies: int) -> Spread:
        """One copy of a row for each place that it reaches, by place, then by row."""
        ...

    def one_per_id(self, census: Any, lengths: list[int], multiple: int) -> tuple[Spread, list[int]]:
        """One copy of a row for each of its ids, which takes that id's weight along, by id, then by row.

        census: of places that hold an id each. lengths: copies of each id, which are made up to a multiple, a power of
        two, by empty ones. Returns how many there are of each then, too.
        """
        ...

    def regroup(self, counts: Tensor, lengths: list[int], multiple: int) -> tuple[Spread, list[int]]:
        """Rows in blocks of counts[a, b], a slowest, ordered with b slowest; else as `one_per_id`."""
        ...

    def pack(self, weights: Tensor, copies: Spread, census: Any, id_dtype: torch.dtype) -> Tensor:
        """What travels beside each copy: weights [M, K] of its row, and the ids that its place holds, counted from the
        first of these, -1 for others. Bytes, uint8 [C, K * (bytes of a weight + bytes of an id)]."""
        ...

    def unpack(self, packed: Tensor, dtype: torch.dtype, id_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The inverse of `pack`: weights [C, K] of `dtype`, ids [C, K]."""
        ...


@dataclass(frozen=True)
class Census:
    """What `TorchCopier.count` keeps: its arguments, and what is asked of them."""

    ids: Tensor
    num_each: int
    num_places: int
    counts: Tensor | None = None

    @cached_property
    def reached(self) -> Tensor:
        """Whether each row reaches each place, bool [M, P]."""
        return reach(owners(self.ids, self.num_each), self.num_places)

    @cached_property
    def leaving(self) -> Tensor:
        """int64 [P]."""
        return tally(self.ids, self.num_places) if self.num_each == 1 else self.reached.sum(0)


class TorchCopier:
    """A `Copier` by torch's operations, on any device."""

    def count(self, ids: Tensor, num_each: int, num_places: int, counts: Tensor | None = None) -> Census:
        return Census(ids, num_each, num_places, counts)

    def count_tree(self, ids: Tensor, num_nodes: int, num_ranks: int, num_local: int) -> tuple[Census, Tensor]:
        census = self.count(ids, num_ranks * num_local, num_nodes)
        by_rank = reach(owners(ids, num_local), num_nodes * num_ranks).sum(0).view(num_nodes, num_ranks)
        by_id = tally(ids, num_nodes * num_ranks * num_local).view(num_nodes, -1)
        return census, torch.cat([census.leaving.unsqueeze(1), by_rank, by_id], 1)

    def pass_on(self, arrived: Tensor, num_ranks: int, num_local: int) -> Tensor:
        _, by_rank, by_id = arrived.split([1, num_ranks, num_ranks * num_local], 1)
        return torch.cat([by_rank.t(), by_id.sum(0).view(num_ranks, num_local)], 1)

    def one_per_place(self, census: Census, num_copies: int) -> Copies:
        return one_per_place(census.reached, num_copies)

    def one_per_id(self, census: Census, lengths: list[int], multiple: int) -> tuple[Copies, list[int]]:
        ids, keys = census.ids, census.ids
        if census.counts is not None:
            position = inverse(regroup(census.counts, ids.shape[0])).unsqueeze(1)
            keys = ids * max(1, ids.shape[0]) + position
        return arrange(ids >= 0, keys, sum(lengths), weighted=True).spaced(lengths, multiple)

    def regroup(self, counts: Tensor, lengths: list[int], multiple: int) -> tuple[Copies, list[int]]:
        order = regroup(counts, sum(lengths))
        return Copies(order, inverse(order), offsets=None).spaced(lengths, multiple)

    def pack(self, weights: Tensor, copies: Spread, census: Census, id_dtype: torch.dtype) -> Tensor:
        ids = _within(copies.spread(census.ids), census.leaving, census.num_each)
        parts = copies.spread_weights(weights), ids.to(id_dtype)
        return torch.cat([_dense(part).view(torch.uint8) for part in parts], 1)

    def unpack(self, packed: Tensor, dtype: torch.dtype, id_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        num_ids = packed.shape[1] // (dtype.itemsize + id_dtype.itemsize)
        weights, ids = packed.split([num_ids * dtype.itemsize, num_ids * id_dtype.itemsize], 1)
        return _dense(weights).view(dtype), _dense(ids).view(id_dtype).long()


def owners(ids: Tensor, num_each: int) -> Tensor:
    """Place of each id when places hold runs of `num_each` ids; -1 stays negative."""
    return ids.div(num_each, rounding_mode="floor")


def _within(ids: Tensor, counts: Tensor, num_each: int) -> Tensor:
    """Renumber the ids [C, K] of copies for place p (counts[p] of them, in order): 0..num_each-1, others -1."""
    first = torch.arange(counts.numel(), device=ids.device) * num_each
    first = first.repeat_interleave(counts, output_size=ids.shape[0]).unsqueeze(1)
    local = ids - first
    return torch.where((ids >= first) & (local < num_each), local, -1)


def _dense(x: Tensor) -> Tensor:
    # Not `contiguous`: that keeps any stride of an axis of length one, and `view(dtype)` then refuses it.
    return x.clone(memory_format=torch.contiguous_format)

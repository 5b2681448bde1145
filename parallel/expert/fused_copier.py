"""Copies planned and made by kernels: a launch or a few for what torch does in a hundred operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kernels.counts import Census, count_places, count_tree, pass_on
from kernels.places import number_copies, number_ids, regroup_rows
from kernels.routes import pack_routes, unpack_routes
from kernels.rows import fold_rows, pick_values, spread_rows
from parallel.expert.copier import Spread


@dataclass(frozen=True)
class TabledCopies:
    """Copies made of M rows (`copies.Copies`), with the copies of every row in a table.

    source: int32 [C], the row that each copy is made of, M of an empty one.
    table: int32 [M, n], the copies of each row in the order in which they are summed, -1 for none.
    slots: int32 [C], where a copy's routing weight lies in the flattened weights, -1 of an empty one; then column k of
        the table is the copy that takes weight k along. None when a copy takes along all that its row has.
    is_single: whether a row has one weight, so that weights are [M].
    """

    source: Tensor
    table: Tensor
    slots: Tensor | None = None
    is_single: bool = False

    def spread(self, rows: Tensor) -> Tensor:
        """rows [M, ...] -> copies [C, ...]; of copies without empty ones."""
        return spread_rows(rows, self.table, self.source.shape[0])

    def fold(self, copies: Tensor) -> Tensor:
        """copies [C, ...] -> the sum of each row's copies [M, ...], in float32 or wider and rounded once."""
        return fold_rows(copies, self.table)

    def spread_weights(self, weights: Tensor) -> Tensor:
        """weights [M, K] -> [C] where each copy takes one of them, zero for an empty one, else [C, K]."""
        if self.slots is None:
            return self.spread(weights)
        return pick_values(weights.reshape(-1), self.slots)

    def fold_weights(self, d_weights: Tensor) -> Tensor:
        """The transpose of `spread_weights`."""
        if self.slots is None:
            return self.fold(d_weights)
        folded = pick_values(d_weights, self.table)
        return folded.view(-1) if self.is_single else folded


class FusedCopier:
    """A `copier.Copier` by kernels."""

    def count(self, ids: Tensor, num_each: int, num_places: int, counts: Tensor | None = None) -> Census:
        return count_places(ids.contiguous(), num_each, num_places, counts)

    def count_tree(self, ids: Tensor, num_nodes: int, num_ranks: int, num_local: int) -> tuple[Census, Tensor]:
        return count_tree(ids.contiguous(), num_nodes, num_ranks, num_local)

    def pass_on(self, arrived: Tensor, num_ranks: int, num_local: int) -> Tensor:
        return pass_on(arrived.contiguous(), num_ranks, num_local)

    def one_per_place(self, census: Census, num_copies: int) -> TabledCopies:
        return TabledCopies(*number_copies(census, num_copies))

    def one_per_id(self, census: Census, lengths: list[int], multiple: int) -> tuple[TabledCopies, list[int]]:
        spaced = _spaced(lengths, multiple)
        source, slots, table = number_ids(census, sum(spaced), multiple)
        return TabledCopies(source, table, slots), spaced

    def regroup(self, counts: Tensor, lengths: list[int], multiple: int) -> tuple[TabledCopies, list[int]]:
        spaced = _spaced(lengths, multiple)
        source, slots, table = regroup_rows(counts, sum(lengths), sum(spaced), multiple)
        return TabledCopies(source, table, slots, is_single=True), spaced

    def pack(self, weights: Tensor, copies: Spread, census: Census, id_dtype: torch.dtype) -> Tensor:
        return pack_routes(weights, cast(TabledCopies, copies).source, census, id_dtype)

    def unpack(self, packed: Tensor, dtype: torch.dtype, id_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return unpack_routes(packed, dtype, id_dtype)


def _spaced(lengths: list[int], multiple: int) -> list[int]:
    return [-(-length // multiple) * multiple for length in lengths]

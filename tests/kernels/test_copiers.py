"""Copies planned by kernels in Triton's interpreter against those by torch's operations."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.expert.copier import Spread, TorchCopier
from parallel.expert.fused_copier import FusedCopier
from tests.kernels.peers import agree

OURS, TWIN = FusedCopier(), TorchCopier()


def ids_of(num_rows: int, num_ids: int, num_places: int, generator: torch.Generator) -> Tensor:
    """Distinct ids of every row, a fifth of them none."""
    ids = torch.rand(num_rows, num_places, generator=generator).argsort(1)[:, :num_ids]
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.2, -1, ids)


def same_copies(ours: Spread, twin: Spread, num_rows: int, weights: Tensor, dtype: torch.dtype) -> None:
    """The rows that copies are made of, what they take along, and what comes back."""
    assert torch.equal(ours.source.long(), twin.source)
    assert torch.equal(ours.spread_weights(weights), twin.spread_weights(weights))
    there = ours.source < num_rows
    if there.all():
        # The last two travel in words of eight bytes and byte by byte.
        bytes_of_rows = (torch.randint(256, (num_rows, width), dtype=torch.uint8) for width in (40, 26))
        for rows in (torch.randn(num_rows, 5, 3, dtype=dtype), *bytes_of_rows):
            assert torch.equal(ours.spread(rows), twin.spread(rows))
    copies = torch.randn(len(ours.source), 33).to(dtype)
    agree(ours.fold(copies), twin.fold(copies), dtype)
    d_weights = torch.randn(twin.spread_weights(weights).shape, dtype=weights.dtype)
    agree(ours.fold_weights(d_weights), twin.fold_weights(d_weights), weights.dtype)


SIZES = st.sampled_from([(0, 2, 2, 2, 2), (5, 2, 2, 1, 3), (70, 4, 3, 2, 4), (130, 3, 1, 5, 2), (40, 5, 4, 3, 1)])


@settings(max_examples=10)
@given(
    sizes=SIZES,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    id_dtype=st.sampled_from([torch.int16, torch.int32]),
    seed=st.integers(0, 99),
)
def test_two_hops(sizes: tuple[int, int, int, int, int], dtype: torch.dtype, id_dtype: torch.dtype, seed: int) -> None:
    """Places of a machine, of its ranks, and what travels beside rows."""
    num_rows, num_ids, num_nodes, num_ranks, num_local = sizes
    generator = torch.Generator().manual_seed(seed)
    ids = ids_of(num_rows, num_ids, num_nodes * num_ranks * num_local, generator)
    census, leaving = OURS.count_tree(ids, num_nodes, num_ranks, num_local)
    twin_census, expected = TWIN.count_tree(ids, num_nodes, num_ranks, num_local)
    assert torch.equal(leaving, expected) and torch.equal(census.leaving, twin_census.leaving)
    assert torch.equal(OURS.pass_on(leaving, num_ranks, num_local), TWIN.pass_on(leaving, num_ranks, num_local))
    num_copies, weights = int(leaving[:, 0].sum()), torch.rand(num_rows, num_ids, dtype=dtype)
    copies, twin = OURS.one_per_place(census, num_copies), TWIN.one_per_place(twin_census, num_copies)
    same_copies(copies, twin, num_rows, weights, dtype)
    packed = OURS.pack(weights, copies, census, id_dtype)
    assert torch.equal(packed, TWIN.pack(weights, twin, twin_census, id_dtype))
    got, wanted = (each.unpack(packed, dtype, id_dtype) for each in (OURS, TWIN))
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1].long(), wanted[1])


@settings(max_examples=10)
@given(
    num_rows=st.integers(0, 90),
    num_places=st.integers(1, 9),
    multiple=st.sampled_from([1, 4, 16]),
    blocks=st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 5))),
    seed=st.integers(0, 99),
)
def test_one_copy_for_each_id(
    num_rows: int, num_places: int, multiple: int, blocks: tuple[int, int] | None, seed: int
) -> None:
    """Also of rows that count in another order than they lie in, and made up to multiples."""
    generator = torch.Generator().manual_seed(seed)
    ids, counts = ids_of(num_rows, 3, num_places, generator), None
    if blocks:
        cells = torch.randint(0, blocks[0] * blocks[1], (num_rows,), generator=generator)
        counts = torch.bincount(cells, minlength=blocks[0] * blocks[1]).view(blocks)
    census, twin_census = (each.count(ids, 1, num_places, counts) for each in (OURS, TWIN))
    lengths = census.leaving.tolist()
    assert lengths == twin_census.leaving.tolist()
    (ours, spaced), (twin, expected) = (
        OURS.one_per_id(census, lengths, multiple), TWIN.one_per_id(twin_census, lengths, multiple)
    )  # fmt: skip
    assert spaced == expected
    same_copies(ours, twin, num_rows, torch.rand(ids.shape), torch.float32)


@settings(max_examples=10)
@given(
    counts=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=4),
    multiple=st.sampled_from([1, 8]),
)
def test_regrouped_rows(counts: list[list[int]], multiple: int) -> None:
    table = torch.tensor(counts)
    (ours, spaced), (twin, expected) = (
        each.regroup(table, table.sum(0).tolist(), multiple) for each in (OURS, TWIN)
    )  # fmt: skip
    assert spaced == expected
    same_copies(ours, twin, int(table.sum()), torch.rand(int(table.sum())), torch.float32)

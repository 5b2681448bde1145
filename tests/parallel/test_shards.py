"""Shards: every element of every global tensor belongs to exactly one rank, wherever the cuts fall."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.shards import ParamInfo as Info
from parallel.shards import Piece, lay_out, segments, shard_pieces, stacked_experts

SIZES = [(dp, ep) for dp in (1, 2, 3, 4, 6, 8) for ep in range(1, dp + 1) if dp % ep == 0]
shapes = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6)


def place(shape: tuple[int, ...], index: int, ep: int, ep_rank: int, num_local: int, expert: bool) -> tuple[Info, int]:
    """Place and local size of parameter number `index` on a rank."""
    if expert:
        local = (num_local, *shape)
        return stacked_experts(f"experts.{index}", local, num_local * ep, ep_rank * num_local), math.prod(local)
    return Info(f"dense.{index}", shape), math.prod(shape)


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.sampled_from(SIZES),
    dense=shapes,
    experts=shapes,
    num_local=st.integers(1, 3),
    align=st.sampled_from([1, 2, 32]),
    align_shard=st.sampled_from([1, 2, 32]),
)
def test_pieces_of_all_ranks_tile_every_global_tensor_once(
    sizes: tuple[int, int],
    dense: list[tuple[int, ...]],
    experts: list[tuple[int, ...]],
    num_local: int,
    align: int,
    align_shard: int,
) -> None:
    dp, ep = sizes
    counts: dict[str, torch.Tensor] = {}
    for rank in range(dp):
        for expert, members, num_shards, shard in (
            (False, dense, dp, rank),
            (True, experts, dp // ep, rank // ep),
        ):
            placed = [place(shape, i, ep, rank % ep, num_local, expert) for i, shape in enumerate(members)]
            infos = [info for info, _ in placed]
            layout = lay_out([numel for _, numel in placed], num_shards, align, align_shard)
            values = torch.ones(layout.shard_numels[shard])
            for name, pieces in shard_pieces(infos, layout, shard, values).items():
                total = next(info.global_numel for info in infos if info.name == name)
                for piece in pieces:
                    assert piece.tensor.numel() > 0
                    count = counts.setdefault(name, torch.zeros(total))
                    count[piece.offset : piece.offset + piece.tensor.numel()] += piece.tensor
    assert len(counts) == len(dense) + len(experts)
    assert all(bool((count == 1).all()) for count in counts.values())


@settings(deadline=None, max_examples=100)
@given(
    numels=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    num_shards=st.integers(1, 9),
    align=st.sampled_from([1, 8]),
    align_shard=st.sampled_from([1, 8]),
)
def test_layout_keeps_order_alignment_and_bounds(
    numels: list[int], num_shards: int, align: int, align_shard: int
) -> None:
    layout = lay_out(numels, num_shards, align, align_shard)
    ends = [start + numel for start, numel in zip(layout.starts, numels, strict=True)]
    assert all(start % align == 0 for start in layout.starts)
    assert all(end <= start < end + align for end, start in zip([0, *ends[:-1]], layout.starts, strict=True))
    assert set(layout.shard_numels) == {layout.numel // num_shards} and layout.shard_numels[0] % align_shard == 0
    assert ends[-1] <= layout.numel < ends[-1] + num_shards * align_shard


def test_segments_by_hand() -> None:
    """Sizes 3, 5, 1 in three shards: |aaa|bbb|bbc|."""
    layout = lay_out([3, 5, 1], num_shards=3)
    found = [[(s.index, s.in_tensor, s.in_shard, s.numel) for s in segments(layout, shard)] for shard in range(3)]
    assert found == [[(0, 0, 0, 3)], [(1, 0, 0, 3)], [(1, 3, 0, 2), (2, 0, 2, 1)]]


def test_pieces_are_views_at_the_offset_of_the_global_expert() -> None:
    info = stacked_experts("up", (2, 3, 5), num_experts=8, first_expert=6)
    assert info.global_shape == (8, 3, 5) and info.local_offset == 6 * 15
    layout = lay_out([30], num_shards=2)
    values = torch.zeros(15)
    pieces = shard_pieces([info], layout, 1, values)
    assert pieces.keys() == {"up"}
    [piece] = pieces["up"]
    assert isinstance(piece, Piece) and piece.offset == 7 * 15
    piece.tensor.fill_(2.0)
    assert bool((values == 2).all())


@pytest.mark.parametrize("first_expert", [-1, 7])
def test_experts_outside_are_refused(first_expert: int) -> None:
    with pytest.raises(ValueError, match=r"up: experts -?\d+ to \d+ are not among 8"):
        stacked_experts("up", (2, 3), num_experts=8, first_expert=first_expert)

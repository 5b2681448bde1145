"""All ranks in one exchange through a tree of small groups, against one group of all, at every shape of tree."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.everyone import WIDTH, Everyone, tree
from parallel.watch import Watch
from tests.spawn import Ranks


@pytest.mark.parametrize("world_size", [1, 2, 15, 16, 17, 64, 255, 257, 2048, 2050, 16_384])
def test_a_tree_joins_all_ranks_through_few_groups(world_size: int) -> None:
    levels = tree(world_size)
    assert len(levels) == max(1, math.ceil(math.log(world_size, WIDTH) - 1e-9))
    for level, groups in enumerate(levels):
        members = [rank for ranks in groups for rank in ranks]
        assert members == list(range(0, world_size, WIDTH**level)), "every level has all first ranks of the one below"
        assert all(len(ranks) <= WIDTH for ranks in groups)
    assert len(levels[-1]) == 1


def exchanges(width: int) -> list[Any]:
    """What a rank gets of each kind of exchange in a tree of this width."""
    rank, size = dist.get_rank(), dist.get_world_size()
    everyone, watch = Everyone.make(rank, size, width, lambda ranks: dist.new_group(list(ranks))), Watch()
    numbers = torch.tensor([rank + 0.1, -rank], dtype=torch.float64)
    found = [
        everyone.all_gather(numbers, watch, "numbers", "numbers from {peers}").tolist(),
        everyone.sum(torch.tensor([1 << rank, 1]), watch, "numbers", "counts from {peers}").tolist(),
        everyone.to_first({"rank": rank, "long": "x" * (100 * rank)}),
        everyone.from_first(f"rank {rank} says so"),
        everyone.deal([f"for {each}" for each in range(size)] if rank == 0 else []),
    ]
    everyone.barrier(watch, "the end of {peers}")
    return found


@pytest.mark.parametrize(("world_size", "width"), [(5, 2), (4, 3), (3, 16)])
def test_every_rank_gets_what_one_group_would_give(ranks: Ranks, world_size: int, width: int) -> None:
    for rank, found in enumerate(ranks.run(exchanges, width, world_size=world_size)):
        gathered, summed, collected, told, dealt = found
        assert gathered == [[each + 0.1, -each] for each in range(world_size)]
        assert summed == [(1 << world_size) - 1, world_size]
        if rank == 0:
            assert [(each["rank"], len(each["long"])) for each in collected] == [
                (r, 100 * r) for r in range(world_size)
            ]
        assert (told, dealt) == ("rank 0 says so", f"for {rank}")


def late(width: int) -> int:
    """A barrier which the last rank comes to last: how many had come before anyone left, as all see it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    everyone = Everyone.make(rank, size, width, lambda ranks: dist.new_group(list(ranks)))
    store = dist.distributed_c10d._get_default_store()
    store.add("come", 1)
    everyone.barrier(Watch(), "{peers}")
    return int(store.add("come", 0))


def test_a_barrier_holds_all(ranks: Ranks) -> None:
    assert ranks.run(late, 2, world_size=5) == [5] * 5


def test_a_single_rank_is_everyone() -> None:
    everyone, watch = Everyone(), Watch()
    assert everyone.all_gather(torch.ones(2), watch, "numbers", "").tolist() == [[1, 1]]
    assert everyone.to_first(3) == [3] and everyone.from_first(3) == everyone.deal([3]) == 3
    assert operator.index(everyone.sum(torch.tensor([3]), watch, "numbers", "")) == 3

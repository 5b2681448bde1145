"""All ranks of a job in one exchange, through groups of few ranks each.

A group over the whole world whose members are connected pairwise (gloo) has as many connections on every rank as the
world has ranks, and asks the store for as many addresses. So the ranks stand in a tree: runs of `WIDTH` neighbours make
a group, the first ranks of such runs make groups of the next level, until one group is left. What all have goes up the
tree to the top and comes down again. A rank is in one group, one in sixteen is in two, and so on: its connections and
requests grow with the logarithm of the world. NCCL connects ranks as its own algorithms need it: there the world is one
group, which is a tree of one level.

Every rank calls the same methods in the same order. A rank waits for members of its own groups alone; what one fails of
reaches all others as the failure of those through which it passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from parallel.collectives import all_gather
from parallel.watch import Need, Watch

T = TypeVar("T")
# Ranks of a group. A level more costs a message there and back; a wider group costs connections on every rank.
WIDTH = 16


def tree(world_size: int, width: int = WIDTH) -> list[list[tuple[int, ...]]]:
    """The groups of each level, from neighbours upwards, each led by its first rank; a single rank is a group."""
    levels: list[list[tuple[int, ...]]] = []
    members = range(world_size)
    while len(members) > 1 or not levels:
        levels.append([tuple(members[first : first + width]) for first in range(0, len(members), width)])
        members = members[::width]
    return levels


@dataclass(frozen=True)
class Everyone:
    """One rank's place among all.

    groups: those that this rank is in, from its neighbours upwards. width: of the tree. depth: its levels.
    """

    rank: int = 0
    world_size: int = 1
    groups: tuple[dist.ProcessGroup, ...] = ()
    width: int = WIDTH
    depth: int = 0

    @staticmethod
    def of(group: dist.ProcessGroup | None) -> Everyone:
        """The ranks of one group, all of which are connected; None for this rank alone."""
        if group is None:
            return Everyone()
        size = dist.get_world_size(group)
        return Everyone(dist.get_rank(group), size, (group,), width=size, depth=1)

    @staticmethod
    def make(rank: int, world_size: int, width: int, new_group: Callable[[Sequence[int]], Any]) -> Everyone:
        """All ranks of a job. new_group: makes a group of these ranks; called alike on all, as torch asks."""
        levels, own = tree(world_size, width), []
        for level in levels:
            made = [(ranks, new_group(ranks)) for ranks in level]
            own += [group for ranks, group in made if rank in ranks]
        return Everyone(rank, world_size, tuple(own), width, len(levels))

    def all_gather(self, numbers: Tensor, watch: Watch, kind: str, text: str) -> Tensor:
        """numbers [n] of every rank, in rank order: [ranks, n]. kind, text: as in `Need`."""
        rows = numbers.reshape(1, -1)
        for level, group in enumerate(self.groups):
            rows = self._gather(rows, group, self._counts(level), watch, Need(kind, text, group))
        for group in self._downwards():
            own = rows if dist.get_rank(group) == 0 else rows[:0]
            counts = [self.world_size] + [0] * (dist.get_world_size(group) - 1)
            rows = self._gather(own, group, counts, watch, Need(kind, text, group, source=0))
        return rows

    def sum(self, counts: Tensor, watch: Watch, kind: str, text: str) -> Tensor:
        """Integers summed over all ranks, in place; exact in any order."""
        for group in self.groups:
            watch.wait(Need(kind, text, group), partial(dist.all_reduce, counts, group=group))
        for group in self._downwards():
            watch.wait(Need(kind, text, group, source=0), partial(dist.broadcast, counts, group=group, group_src=0))
        return counts

    def barrier(self, watch: Watch, text: str) -> None:
        """Return when all ranks have called it."""
        for group in (*self.groups, *self._downwards()):
            watch.wait(Need("numbers", text, group), partial(dist.barrier, group))

    def to_first(self, thing: Any, watch: Watch | None = None, text: str = "words from {peers}") -> list[Any]:
        """On rank 0 one small object of every rank, in rank order; elsewhere nothing. Not for the hot path."""
        things = [thing]
        for group in self.groups:
            leads = dist.get_rank(group) == 0
            found: list[Any] | None = [None] * dist.get_world_size(group) if leads else None
            collect = partial(dist.gather_object, things, found, group=group, group_dst=0)
            _wait(watch, Need("numbers", text, group), collect)
            things = [thing for part in found or () for thing in part]
        return things

    def from_first(self, thing: T, watch: Watch | None = None, text: str = "words from {peers}") -> T:
        """Rank 0's object, on all ranks."""
        told = [thing]
        for group in reversed(self.groups):
            hear = partial(dist.broadcast_object_list, told, group=group, group_src=0)
            _wait(watch, Need("numbers", text, group, source=0), hear)
        return told[0]

    def deal(self, things: list[T]) -> T:
        """Each rank's own of the objects that rank 0 has, one for every rank; elsewhere `things` is not read."""
        for level in reversed(range(len(self.groups))):
            group = self.groups[level]
            own: list[Any] = [None]
            if dist.get_rank(group) == 0:
                rest = iter(things)
                parts = [[next(rest) for _ in range(count)] for count in self._counts(level)]
                dist.scatter_object_list(own, parts, group=group, group_src=0)
            else:
                dist.scatter_object_list(own, group=group, group_src=0)
            things = own[0]
        return things[0]

    def _counts(self, level: int) -> list[int]:
        """How many ranks stand behind each member of this rank's group of a level."""
        span = self.width**level
        first = self.rank // (span * self.width) * span * self.width
        starts = range(first, min(first + span * self.width, self.world_size), span)
        return [min(span, self.world_size - start) for start in starts]

    def _downwards(self) -> Iterator[dist.ProcessGroup]:
        """The groups in which a first rank knows what the others do not, when all has come to the top of the tree."""
        return reversed(self.groups[: self.depth - 1])

    @staticmethod
    def _gather(rows: Tensor, group: dist.ProcessGroup, counts: list[int], watch: Watch, need: Need) -> Tensor:
        return watch.launch(need, lambda: all_gather(rows, group, numels=counts)).wait()


def _wait(watch: Watch | None, need: Need, call: Callable[[], object]) -> None:
    if watch is None:
        call()
    else:
        watch.wait(need, call)

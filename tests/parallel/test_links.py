"""Links between stages: what a rank has sent it keeps no longer than the lists make it."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from parallel import process
from parallel.collectives import Steps
from parallel.mesh import ParallelConfig
from parallel.pipeline.links import Links, connect
from parallel.pipeline.record import Recorder
from parallel.pipeline.registry import build
from parallel.pipeline.runtime import Runtime
from tests.spawn import Ranks

SHAPE = (3,)


class Doubling:
    """y = 2 x forward and dx = 2 dy backward, on new tensors; knows how many of its results are still alive."""

    def __init__(self, results: weakref.WeakSet[Tensor], most_alive: list[int]) -> None:
        self.results, self.most_alive = results, most_alive

    def _hand_on(self, x: Tensor | None, start: float) -> Tensor:
        y = torch.full(SHAPE, start) if x is None else x * 2
        self.results.add(y)
        self.most_alive[0] = max(self.most_alive[0], len(self.results))
        return y

    def forward(self, micro_batch: int, x: Tensor | None) -> Steps[Tensor]:
        yield from ()
        return self._hand_on(x, float(micro_batch))

    def backward(self, micro_batch: int, dy: Tensor | None) -> Steps[Tensor]:
        yield from ()
        return self._hand_on(dy, 1000.0 + micro_batch)

    def weight_gradients(self, micro_batch: int) -> None:
        pass


def most_alive(name: str, num_ranks: int, num_micro_batches: int) -> int:
    """On this rank, the most results at once that wait to be gone."""
    groups = process.start(ParallelConfig(pp=num_ranks), "cpu", mirrored=name == "dualpipe")
    schedule = build(name, num_ranks, num_micro_batches)
    rank, most = groups.mesh.pp_rank, [0]
    links = Links(rank, connect(schedule.placement, groups.mesh, groups.device), torch.float32, groups.device)
    results: weakref.WeakSet[Tensor] = weakref.WeakSet()
    stages = {stage: Doubling(results, most) for stage in schedule.placement.stages_on(rank)}
    Runtime(rank, stages, links, Recorder(rank, groups.watch)).run(schedule, SHAPE)
    assert not results
    process.stop(groups)
    return most[0]


@pytest.mark.parametrize("name", ["1f1b", "interleaved_1f1b", "zbv", "dualpipe", "dualpipev"])
def test_what_was_sent_is_let_go(ranks: Ranks, name: str) -> None:
    few, many = (ranks.run(most_alive, name, 2, num, world_size=2, with_group=False) for num in (8, 24))
    # A step three times as long holds no more. (Every result is of its own: kept to the end, they would be 16 and 48.)
    assert few == many
    assert max(many) < 12

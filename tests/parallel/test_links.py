"""Links between stages: what a rank has sent it keeps no longer than the lists make it."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from parallel import process
from parallel.collectives import Steps
from parallel.mesh import ParallelConfig
from parallel.pipeline.grouped_links import NUM_UNDER_WAY, GroupedLinks, connect_column
from parallel.pipeline.links import Links, connect
from parallel.pipeline.record import Recorder
from parallel.pipeline.registry import build, build_forward
from parallel.pipeline.runtime import Runtime
from tests.spawn import Ranks

SHAPE = (3,)


class Doubling:
    """y = 2 x forward and dx = 2 dy backward, on new tensors; knows how many of its results are still alive."""

    def __init__(self, results: weakref.WeakSet[Tensor], most_alive: list[int]) -> None:
        self.results, self.most_alive = results, most_alive
        self.made: dict[str, dict[int, float]] = {"F": {}, "B": {}}

    def _hand_on(self, kind: str, micro_batch: int, x: Tensor | None, start: float) -> Tensor:
        y = torch.full(SHAPE, start + micro_batch) if x is None else x * 2
        self.made[kind][micro_batch] = y[0].item()
        self.results.add(y)
        self.most_alive[0] = max(self.most_alive[0], len(self.results))
        return y

    def forward(self, micro_batch: int, x: Tensor | None) -> Steps[Tensor]:
        yield from ()
        return self._hand_on("F", micro_batch, x, 0.0)

    def backward(self, micro_batch: int, dy: Tensor | None) -> Steps[Tensor]:
        yield from ()
        return self._hand_on("B", micro_batch, dy, 1000.0)

    def weight_gradients(self, micro_batch: int, share: float = 1.0) -> int:
        return 0


def most_alive(name: str, num_ranks: int, num_micro_batches: int, grouped: bool) -> int:
    """On this rank, the most results at once that wait to be gone."""
    groups = process.start(ParallelConfig(pp=num_ranks), "cpu", mirrored=name == "dualpipe")
    schedule = build(name, num_ranks, num_micro_batches)
    rank, most = groups.mesh.pp_rank, [0]
    links: Links | GroupedLinks
    if grouped:
        column = connect_column(schedule.placement, groups.mesh, groups.device)
        links = GroupedLinks(rank, column, torch.float32, groups.device)
    else:
        links = Links(rank, connect(schedule.placement, groups.mesh, groups.device), torch.float32, groups.device)
    results: weakref.WeakSet[Tensor] = weakref.WeakSet()
    stages = {stage: Doubling(results, most) for stage in schedule.placement.stages_on(rank)}
    runtime = Runtime(rank, stages, links, Recorder(rank, groups.watch))
    for _ in range(2):
        runtime.run(schedule, SHAPE)
        assert not results
    process.stop(groups)
    # Each micro-batch came from its own end, doubled once a stage.
    last = 2.0 ** (schedule.placement.num_slices - 1)
    for stage, work in stages.items():
        position = schedule.placement.position(stage)
        numbers = schedule.micro_batches(schedule.placement.route_of(stage))
        assert work.made["F"] == {number: number * 2.0**position for number in numbers}
        assert work.made["B"] == {number: (1000.0 + number) * last / 2.0**position for number in numbers}
    return most[0]


@pytest.mark.parametrize("name", ["1f1b", "interleaved_1f1b", "zbv", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("grouped", [False, True], ids=["ahead", "in rounds"])
def test_what_was_sent_is_let_go(ranks: Ranks, name: str, grouped: bool) -> None:
    few, many = (ranks.run(most_alive, name, 2, num, grouped, world_size=2, with_group=False) for num in (8, 24))
    # A step three times as long holds no more. (Every result is of its own: kept to the end, they would be 16 and 48.)
    assert few == many
    assert max(many) < 12


def most_alive_of_an_evaluation(num_micro_batches: int) -> int:
    """On this rank, which only sends or only receives."""
    groups = process.start(ParallelConfig(pp=2), "cpu")
    schedule = build_forward("1f1b", 2, num_micro_batches)
    rank, most = groups.mesh.pp_rank, [0]
    column = connect_column(schedule.placement, groups.mesh, groups.device)
    links = GroupedLinks(rank, column, torch.float32, groups.device)
    stage = Doubling(weakref.WeakSet(), most)
    Runtime(rank, {rank: stage}, links, Recorder(rank, groups.watch)).run(schedule, SHAPE)
    assert stage.made["F"] == {number: number * 2.0**rank for number in range(num_micro_batches)}
    process.stop(groups)
    return most[0]


def test_a_rank_that_only_sends_lets_go_too(ranks: Ranks) -> None:
    most = ranks.run(most_alive_of_an_evaluation, 5 * NUM_UNDER_WAY, world_size=2, with_group=False)
    assert max(most) <= NUM_UNDER_WAY + 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1f1b", "interleaved_1f1b", "zb_h1", "zbv", "dualpipe", "dualpipev"])
def test_rounds_of_four_ranks(ranks: Ranks, name: str) -> None:
    assert max(ranks.run(most_alive, name, 4, 12, True, world_size=4, with_group=False)) < 16

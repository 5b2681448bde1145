"""Names and sizes: what is refused, and in which words."""

from __future__ import annotations

import pytest

from parallel.pipeline.actions import Pair
from parallel.pipeline.registry import NAMES, build, build_forward, place
from parallel.pipeline.simulate import Costs, simulate
from tests.parallel.pipeline_cases import legal_cases, make


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dualpipe", 3, 12), ("parallel.pp=3", "pipeline.schedule=dualpipe", "even", "2 and 4", "dualpipev")),
        (("dualpipe", 4, 6), ("pipeline.num_micro_batches=6", "pipeline.schedule=dualpipe", "at least", "= 8")),
        (("dualpipe", 4, 9), ("pipeline.num_micro_batches=9", "even", "such as 10")),
        (("dualpipe", 4, 5), ("pipeline.num_micro_batches=5", "even", "such as 8")),
        (("dualpipev", 4, 7), ("pipeline.num_micro_batches=7", "pipeline.schedule=dualpipev", "at least", "= 8")),
        (("interleaved_1f1b", 4, 10), ("pipeline.num_micro_batches=10", "multiple of parallel.pp=4", "8 or 12")),
        (("interleaved_1f1b", 4, 3), ("pipeline.num_micro_batches=3", "multiple of parallel.pp=4", "such as 4")),
        (("dualpip", 4, 8), ("pipeline.schedule=dualpip is", "1f1b", "zb_h1", "did you mean dualpipe?")),
        (("gpipe", 4, 8), ("pipeline.schedule=gpipe is not one of",)),
        (("zbv", 4, 8, True), ("pipeline.pairs=true", "pipeline.schedule=zbv", "1f1b", "dualpipev")),
        (("zb_h1", 4, 8, True), ("pipeline.pairs=true", "pipeline.schedule=zb_h1")),
        (("dualpipev", 4, 8, None, 2), ("pipeline.stages_per_rank=2", "interleaved_1f1b")),
        (("interleaved_1f1b", 4, 8, None, 1), ("pipeline.stages_per_rank=1", "at least 2", "1f1b")),
        (("interleaved_1f1b", 4, 8, None, 0), ("pipeline.stages_per_rank=0", "1 or more")),
        (("1f1b", 0, 8), ("parallel.pp=0", "1 or more")),
        (("1f1b", True, 8), ("parallel.pp=True", "whole number")),
        (("1f1b", 2, 0), ("pipeline.num_micro_batches=0", "1 or more")),
        (("1f1b", 2, 2.0), ("pipeline.num_micro_batches=2.0", "whole number")),
    ],
)
def test_the_refusal_names_field_value_and_what_is_legal(arguments: tuple, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="=") as refused:
        build(*arguments)
    assert all(word in str(refused.value) for word in words), str(refused.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num", [1, 2, 5])
def test_one_rank_holds_one_stage_under_every_name(name: str, num: int) -> None:
    schedule = build(name, 1, num, pairs=False)
    assert schedule.placement.num_stages == 1
    assert [str(action) for action in schedule.ranks[0]] == [f"{kind}0.{i}" for i in range(num) for kind in "FD"]
    assert len(build_forward(name, 1, num).ranks[0]) == num


@pytest.mark.parametrize("case", legal_cases((2, 4, 6), (2,)), ids=str)
def test_pairs_are_there_when_asked_for(case: tuple) -> None:
    name, num_ranks, num, pairs, _ = case
    schedule = make(case)
    assert schedule.has_pairs == (name.startswith("dualpipe") if pairs is None else pairs)
    apart = schedule.apart()
    assert not any(isinstance(action, Pair) for actions in apart.ranks for action in actions)
    assert [[p for a in own for p in a.parts] for own in apart.ranks] == [
        [p for a in own for p in a.parts] for own in schedule.ranks
    ]
    assert sum(schedule.num_micro_batches) == num and schedule.placement.num_ranks == num_ranks


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_ranks", [2, 4, 6])
@pytest.mark.parametrize("num", [1, 3, 8])
def test_evaluation_keeps_ranks_busy(name: str, num_ranks: int, num: int) -> None:
    """Once filled a rank idles only where its number of stages does not divide the way of a micro-batch."""
    schedule = build_forward(name, num_ranks, num)
    assert schedule.placement == place(name, num_ranks)
    assert sum(schedule.num_micro_batches) == num
    step = simulate(schedule, Costs(1, 0, 0)).step
    assert step <= num + (num_ranks - 1) + 1e-9 if num >= num_ranks else True
    assert step >= max(num, num_ranks)

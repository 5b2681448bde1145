"""When a slice's gradients are complete: after its last weight gradient everywhere, in one order, never in a circle."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from parallel.pipeline.completion import completions
from parallel.pipeline.registry import build
from parallel.pipeline.rounds import rounds
from parallel.pipeline.schedule import Schedule
from tests.parallel.test_rounds import Call, all_schedules, call_of, stuck

COLUMNS = range(2)


def holders(schedule: Schedule, position: int) -> list[int]:
    placement = schedule.placement
    return sorted({placement.rank_of[route[position]] for route in placement.routes})


def with_sums(schedule: Schedule) -> list[list[Call]]:
    """The calls of pipelines side by side, whose ranks sum each slice's gradients with all others that have it, and
    exchange rows of experts inside every F and B."""
    lists, told, calls = rounds(schedule), completions(schedule), []
    for column, rank in product(COLUMNS, range(len(schedule.ranks))):
        placed: list[tuple[Any, Call]] = [((r.place, r.moment, 0, 0), call_of(r, column)) for r in lists[rank]]
        for at, action in enumerate(schedule.ranks[rank]):
            for turn in range(sum(part.kind != "W" for part in action.parts)):
                everyone = [("rows", rank, at, turn, other) for other in COLUMNS]
                placed.append(((2 * at + 0.5, 0, turn, 0), ({everyone[column]}, set(everyone))))
        for at, found in told[rank].items():
            for moment, position in found:
                if rank in (those := holders(schedule, position)):
                    mine, all_of_it = ("sum", position, rank, column), list(product(those, COLUMNS))
                    met = {("sum", position, *each) for each in all_of_it}
                    placed.append(((2 * at, moment, 1, position), ({mine}, met)))
        calls.append([call for _, call in sorted(placed, key=lambda entry: entry[0])])
    return calls


def check(schedule: Schedule) -> int:
    """How many sums of the schedule begin before the end of some rank's list."""
    told, num_early = completions(schedule), 0
    for rank, actions in enumerate(schedule.ranks):
        assert sorted(position for found in told[rank].values() for _, position in found) == list(
            range(schedule.placement.num_slices)
        )
        for at, found in told[rank].items():
            num_early += at < len(actions)
            to_come = [part for each in actions[at:] for part in each.parts if part.kind == "W"]
            rest = {schedule.placement.position(part.stage) for part in to_come}
            assert rest.isdisjoint(position for _, position in found), "it has no gradient to come"
    for one, other in product(range(len(schedule.ranks)), repeat=2):
        shared = [p for p in range(schedule.placement.num_slices) if {one, other} <= {*holders(schedule, p)}]
        orders = [
            [p for _, found in sorted(told[rank].items()) for _, p in found if p in shared] for rank in (one, other)
        ]
        assert orders[0] == orders[1]
    assert stuck(with_sums(schedule)) == []
    return num_early


def test_every_schedule_sums_without_a_circle() -> None:
    schedules = [schedule for schedule in all_schedules(4) if not schedule.forward_only]
    assert sum(check(schedule) > 0 for schedule in schedules) > 50


@pytest.mark.parametrize("name", ["1f1b", "zbv", "dualpipe"])
def test_many_ranks(name: str) -> None:
    schedule = build(name, 16, 64)
    num_early = check(schedule)
    # Ranks with two slices are done with one of them before the other.
    assert num_early >= (0 if name == "1f1b" else 8), num_early

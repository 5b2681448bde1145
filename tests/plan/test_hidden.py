"""What hides of an optimizer's exchanges: never more than there is room for, by a twin that asks nothing else."""

from __future__ import annotations

import random

import pytest

from launch.plan.events import Event, Kernel, Launch
from launch.plan.hidden import Room, exposed, rooms
from parallel.pipeline.registry import build
from parallel.pipeline.simulate import Costs, simulate

GROUPS = ("dense", "expert")
KERNEL = Kernel("copy_", "move", "float32", (), 0, 8, 8, False, 0)


def launch(number: int, name: str, group: str) -> Launch:
    return Launch(number, name, group, 4, 100, 100)


def update(seconds: list[tuple[str, float, float]]) -> list[tuple[Event, float]]:
    """The update of sets, of each (group, seconds of its sum, seconds of its gather)."""
    sums = [(launch(n, "reduce_scatter", group), s) for n, (group, s, _) in enumerate(seconds)]
    gathers = [(launch(n + 100, "all_gather", group), s) for n, (group, _, s) in enumerate(seconds)]
    norm: list[tuple[Event, float]] = [(launch(50, "all_gather", "world"), 1.0), (KERNEL, 2.0)]
    return [*sums, *norm, *gathers]


def draw(seed: int) -> tuple[list[tuple[str, float, float]], list[tuple[int, ...]], Room]:
    dice = random.Random(seed)
    positions = range(3)
    sets = [tuple(sorted(dice.sample(positions, dice.randint(0, 2)))) for _ in range(dice.randint(1, 6))]
    seconds = [(dice.choice(GROUPS), dice.uniform(0, 4), dice.uniform(0, 4)) for _ in sets]
    return seconds, sets, Room({p: dice.uniform(0, 6) for p in positions}, {p: dice.uniform(0, 6) for p in positions})


def of(found: list[tuple[Event, float]], name: str, group: str | None = None) -> float:
    return sum(
        s
        for event, s in found
        if isinstance(event, Launch) and event.name == name and event.group == (group or event.group) != "world"
    )


@pytest.mark.parametrize("seed", range(200))
def test_what_is_left_is_what_a_twin_finds(seed: int) -> None:
    seconds, sets, room = draw(seed)
    found = exposed(update(seconds), sets, room)
    assert [event for event, _ in found] == [event for event, _ in update(seconds)]
    for group in GROUPS:
        # A stream that is given its sums one by one, and works on each until it is over.
        own = [
            (min((room.leads_s[p] for p in each), default=0.0), s)
            for each, (g, s, _) in zip(sets, seconds, strict=True)
            if g == group
        ]
        free_s = -1e9
        for lead_s, s in sorted(own, key=lambda entry: -entry[0]):
            free_s = max(free_s, -lead_s) + s
        assert of(found, "reduce_scatter", group) == pytest.approx(max(0.0, free_s), abs=1e-9)
    # A step that stands still before each first forward until its weights are there.
    ends_s, free = [], dict.fromkeys(GROUPS, 0.0)
    for each, (group, _, s) in zip(sets, seconds, strict=True):
        free[group] += s
        ends_s.append((free[group], min((room.needed_s[p] for p in each), default=0.0)))
    late_s = 0.0
    for end_s, needed_s in sorted(ends_s, key=lambda entry: entry[1]):
        late_s = max(late_s, end_s - needed_s)
    assert of(found, "all_gather") == pytest.approx(late_s, abs=1e-9)
    beside = [s for event, s in found if isinstance(event, Kernel) or event.group == "world"]  # type: ignore[union-attr]
    assert beside == [1.0, 2.0]


def test_without_room_all_of_it_is_left() -> None:
    seconds, sets, _ = draw(5)
    found = exposed(update(seconds), sets, Room({}, {}))
    assert [s for _, s in found[: len(sets)]] == pytest.approx([s for _, s, _ in seconds])
    assert of(found, "all_gather") == pytest.approx(max(sum(s for g, _, s in seconds if g == each) for each in GROUPS))


@pytest.mark.parametrize("name", ["1f1b", "dualpipe"])
def test_the_room_of_a_pipeline(name: str) -> None:
    simulation = simulate(build(name, 4, 16), Costs(f=1.0, b=1.0, w=1.0))
    found = rooms(simulation)
    first, last = found[0].leads_s[0], found[0].leads_s[3]
    if name == "1f1b":
        # The first stage's gradients are the last to come; the last stage is done three backwards before.
        assert first == 0 and last == 6
        assert [each.needed_s for each in found] == [{rank: float(rank)} for rank in range(4)]
    else:
        # Both ends of the model lie on the outer ranks, and all four slices are done within a few actions.
        assert found[0] == found[3] and {*found[0].needed_s} == {0, 3}
        assert min(found[0].leads_s.values()) == 0 and found[0].needed_s[0] == 0 < found[0].needed_s[3]

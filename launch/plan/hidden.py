"""What of an optimizer's exchanges hides beside the pipeline: sums of gradients behind actions that still run, new
weights before those that need them. By the simulated step, on each group's own stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.plan.events import Event, Launch
from parallel.pipeline.completion import completions
from parallel.pipeline.simulate import Simulation


@dataclass(frozen=True)
class Room:
    """Where a rank of a pipeline has room beside its step, by position of a slice of the model.

    leads_s: from its gradients' being complete everywhere until the whole pipeline is done. needed_s: from the start of
    a step until its first forward.
    """

    leads_s: Mapping[int, float]
    needed_s: Mapping[int, float]


def rooms(simulation: Simulation) -> list[Room]:
    """The room of every rank of a pipeline."""
    schedule, told = simulation.schedule, completions(simulation.schedule)
    placement = schedule.placement
    own = [[event for event in simulation.events if event.rank == rank] for rank in range(placement.num_ranks)]
    done_s: dict[int, float] = defaultdict(float)
    for rank, found in enumerate(told):
        for at, complete in found.items():
            for _, position in complete:
                if any(placement.position(stage) == position for stage in placement.stages_on(rank)):
                    stop_s = own[rank][at - 1].stop_s if at else 0.0
                    done_s[position] = max(done_s[position], stop_s)
    leads_s = {position: simulation.step - stop_s for position, stop_s in done_s.items()}
    rooms = []
    for events in own:
        needed_s: dict[int, float] = {}
        for event in events:
            for part in event.action.parts:
                if part.kind == "F":
                    needed_s.setdefault(placement.position(part.stage), event.start_s)
        rooms.append(Room(leads_s, needed_s))
    return rooms


def exposed(
    priced: Sequence[tuple[Event, float]], sets: Sequence[tuple[int, ...]], room: Room
) -> list[tuple[Event, float]]:
    """An optimizer's priced events with what is left of its exchanges once what hides has gone.

    sets: the slices of the model that each set belongs to which the rank sums and gathers, in the order of its events;
    none for those of any slice, whose exchanges hide nowhere.
    """
    left: dict[int, float] = {}  # number of an event -> seconds
    for name, hide in (("reduce_scatter", _sums), ("all_gather", _gathers)):
        found = [
            (number, event.group, seconds)
            for number, (event, seconds) in enumerate(priced)
            if isinstance(event, Launch) and event.name == name and event.group != "world"
        ]
        assert len(found) == len(sets), f"{len(found)} of {name} for {len(sets)} sets"
        left |= hide(found, sets, room)
    return [(event, left.get(number, seconds)) for number, (event, seconds) in enumerate(priced)]


_Found = Sequence[tuple[int, str, float]]  # number, group, seconds


def _sums(found: _Found, sets: Sequence[tuple[int, ...]], room: Room) -> dict[int, float]:
    """What of each sum lies behind the pipeline's end. Those that are complete first are first on their stream."""
    leads_s = [min((room.leads_s.get(position, 0.0) for position in each), default=0.0) for each in sets]
    free_s: dict[str, float] = defaultdict(lambda: -max(leads_s, default=0.0))
    left = {}
    for lead_s, (number, group, seconds) in sorted(zip(leads_s, found, strict=True), key=lambda entry: -entry[0]):
        start_s = max(-lead_s, free_s[group])
        free_s[group] = start_s + seconds
        left[number] = max(0.0, free_s[group]) - max(0.0, start_s)
    return left


def _gathers(found: _Found, sets: Sequence[tuple[int, ...]], room: Room) -> dict[int, float]:
    """How long the next step stands still: until the gather is over that is the latest for those who need it. That one
    has all of it, as it may not seem to run beside another one's share."""
    free_s: dict[str, float] = defaultdict(float)
    left, most_s, latest = {number: 0.0 for number, _, _ in found}, 0.0, -1
    for each, (number, group, seconds) in zip(sets, found, strict=True):
        free_s[group] += seconds
        late_s = free_s[group] - min((room.needed_s.get(position, 0.0) for position in each), default=0.0)
        if late_s > most_s:
            most_s, latest = late_s, number
    return left | ({latest: most_s} if most_s else {})

"""What a recorded step says: how long its actions took, as costs to simulate with, and how long its ranks idled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from parallel.pipeline.events import Event
from parallel.pipeline.record import Times
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.simulate import Costs


def check_recorded(schedule: Schedule, events: Sequence[Event]) -> None:
    """ValueError, naming the first difference, unless these are the schedule's actions in the schedule's order."""
    for rank, planned in enumerate(schedule.ranks):
        own = sorted((event for event in events if event.rank == rank), key=lambda event: event.start_s)
        if len(own) != len(planned):
            raise ValueError(f"rank {rank} recorded {len(own)} actions, {schedule.name} here has {len(planned)}")
        for event, action in zip(own, planned, strict=True):
            if event.action != action:
                raise ValueError(f"rank {rank} recorded {event.action} where {schedule.name} has {action}")


def idle_s(events: Sequence[Event], num_ranks: int) -> tuple[float, list[float]]:
    """Length of a recorded step, and how much of it each rank stood still for lack of work: before its first action,
    after its last, and for results of its neighbours. Waiting for an exchange with experts is no idling here."""
    step = max(event.stop_s for event in events) - min(event.start_s for event in events)
    busy = [0.0] * num_ranks
    for event in events:
        busy[event.rank] += event.busy_s
    return step, [step - time for time in busy]


def exposed_s(events: Sequence[Event], num_ranks: int) -> list[float]:
    """How long each rank waited for exchanges with experts in a recorded step."""
    waited = [0.0] * num_ranks
    for event in events:
        waited[event.rank] += event.exposed_s
    return waited


def bubble_s(steps: Sequence[Times], num_pipelines: int) -> float:
    """Idle time (as `idle_s` has it), mean over all ranks of all pipelines.

    steps: of all ranks of the job, of which the ranks i, i + num_pipelines, ... make up pipeline i.
    """
    idle = 0.0
    for pipeline in range(num_pipelines):
        own = steps[pipeline::num_pipelines]
        length = max(each.stop_s for each in own) - min(each.start_s for each in own)
        idle += sum(length - each.busy_s for each in own)
    return idle / len(steps)


def measured_costs(schedule: Schedule, events: Sequence[Event]) -> Costs:
    """Costs per stage (medians, in seconds) with which a simulated step resembles the recorded one.

    A kind that a stage never runs alone is half of its D, or else has the median over all stages. Links cost nothing:
    what they cost is then the difference between the two steps.
    """
    placement = schedule.placement
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for event in events:
        if event.action.kind != "pair":
            chunk = event.action.parts[0]
            times[event.action.kind, placement.position(chunk.stage)].append(event.busy_s)
    for position in range(placement.num_slices):
        for kind in "BW":
            if (kind, position) not in times:
                times[kind, position] = [time / 2 for time in times.get(("D", position), [])]
    by_kind: dict[str, Any] = {}
    for kind in "FBW":
        known = {at: median(own) for (of, at), own in times.items() if of == kind and own}
        everywhere = median(known.values()) if known else 0.0
        by_kind[kind.lower()] = [known.get(position, everywhere) for position in range(placement.num_slices)]
    apart = Costs(**by_kind)
    duration = apart.durations(placement)
    gains = [
        event.busy_s / sum(duration(part) for part in event.action.parts)
        for event in events
        if event.action.kind == "pair"
    ]
    if not gains:
        return apart
    per_rank = sum(map(sum, by_kind.values())) / placement.num_ranks
    return Costs(**by_kind, pair=median(gains) * per_rank)

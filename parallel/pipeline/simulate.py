"""How long a schedule takes, how long its ranks idle and what they hold, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.pipeline.actions import Action, Chunk, Pair
from parallel.pipeline.events import Event
from parallel.pipeline.order import Channel, messages, needs, peak_chunks, walk
from parallel.pipeline.placement import Placement
from parallel.pipeline.schedule import Schedule

Cost = float | Sequence[float]


@dataclass(frozen=True)
class Costs:
    """Durations, in any one unit.

    f, b, w: either of 1 / num_ranks of the model, of which a smaller stage takes its share; or one cost per stage of a
        route, by position, for stages of unequal work.
    pair: of a forward and a full backward of 1 / num_ranks of the model run together. None: f + b + w, no gain. Stages
        of unequal work gain in proportion.
    latency: from the end of a chunk until another rank has its result.
    early: the results of a D or a pair leave this long before its end (for 1 / num_ranks of the model): only W is left.

    ValueError for a cost that is negative or not finite, or where nothing costs anything.
    """

    f: Cost = 1.0
    b: Cost = 1.0
    w: Cost = 1.0
    pair: float | None = None
    latency: float = 0.0
    early: float = 0.0

    def __post_init__(self) -> None:
        for name in ("f", "b", "w", "pair", "latency", "early"):
            value = getattr(self, name)
            for cost in value if isinstance(value, Sequence) else [0.0 if value is None else value]:
                if not (math.isfinite(cost) and cost >= 0):
                    raise ValueError(f"cost.{name}={cost} must be a finite number, 0 or more")
        if not any(any(cost) if isinstance(cost, Sequence) else cost for cost in (self.f, self.b, self.w)):
            raise ValueError("cost.f=0, cost.b=0 and cost.w=0: at least one of them must be above 0")

    def check(self, placement: Placement) -> None:
        """ValueError unless costs per stage are as many as a route has stages."""
        for name in ("f", "b", "w"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and len(value) != placement.num_slices:
                raise ValueError(f"cost.{name} has {len(value)} costs for {placement.num_slices} stages")

    def of(self, placement: Placement, action: Action) -> float:
        """What an action costs on this placement."""
        serial = sum(self._part(placement, part.kind, part.stage) for part in action.parts)
        if self.pair is None or not isinstance(action, Pair):
            return serial
        apart = sum(
            self._part(placement, kind, stage) for kind in ("f", "b", "w") for stage in placement.routes[0]
        )  # of a whole model
        return serial * self.pair * placement.num_ranks / apart

    def _part(self, placement: Placement, kind: str, stage: int) -> float:
        value: Cost = getattr(self, kind.lower())
        return value[placement.position(stage)] if isinstance(value, Sequence) else value * placement.stage_size


@dataclass(frozen=True)
class Simulation:
    """One step. Times in the costs' unit; lists have one entry per rank of the pipeline.

    step: from the first action's start to the last one's end, over all ranks.
    bubble: idle time within the step.
    peak_activations: most activations alive at once; 1 = those of one micro-batch through 1 / num_ranks of the model.
    receive_slots: per channel, the most results that lie ready at the receiver before it takes them: with as many
        receive buffers no result waits at its sender.
    """

    schedule: Schedule
    events: tuple[Event, ...]
    step: float
    bubble: tuple[float, ...]
    peak_activations: tuple[float, ...]
    receive_slots: dict[Channel, int]


def simulate(schedule: Schedule, costs: Costs | None = None) -> Simulation:
    """Runs the lists: an action starts once its rank is free and all that it needs is there.

    Raises ScheduleError for a deadlock, ValueError for costs that do not fit. Sends cost a rank nothing.
    """
    costs = costs or Costs()
    placement = schedule.placement
    costs.check(placement)
    results: dict[Chunk, tuple[int, float]] = {}  # rank, and when the result exists there
    free = [0.0] * placement.num_ranks
    busy = [0.0] * placement.num_ranks
    events = []
    for rank, _, action in walk(schedule):
        made = (results[chunk] for chunk in needs(placement, action))
        there = (at + (costs.latency if owner != rank else 0.0) for owner, at in made)
        start = max(free[rank], *there, 0.0)
        cost = costs.of(placement, action)
        stop = start + cost
        early = min(costs.early * placement.stage_size, cost) if action.kind in ("D", "pair") else 0.0
        for part in action.parts:
            results[part] = (rank, stop if part.kind == "W" else stop - early)
        free[rank] = stop
        busy[rank] += cost
        events.append(Event(rank, start, stop, action))
    step = max(free)
    return Simulation(
        schedule,
        tuple(events),
        step,
        tuple(step - time for time in busy),
        tuple(chunks * placement.stage_size for chunks in peak_chunks(schedule)),
        _receive_slots(schedule, events, results, costs.latency),
    )


def _receive_slots(
    schedule: Schedule, events: Sequence[Event], results: dict[Chunk, tuple[int, float]], latency: float
) -> dict[Channel, int]:
    starts = {part: event.start_s for event in events for part in event.action.parts}
    slots = {}
    for channel, sent in messages(schedule).items():
        arrivals = [(results[message.producer][1] + latency, 1) for message in sent]
        takings = [(starts[message.consumer], -1) for message in sent]
        waiting, most = 0, 1
        # At one and the same time what is taken makes room before the next arrives.
        for _, change in sorted(arrivals + takings):
            waiting += change
            most = max(most, waiting)
        slots[channel] = most
    return slots

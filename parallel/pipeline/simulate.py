"""How long a schedule takes, how long its ranks idle and what they hold, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from parallel.pipeline.actions import Action, Chunk
from parallel.pipeline.events import Event
from parallel.pipeline.order import Channel, messages, peak_chunks, walk
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

    def durations(self, placement: Placement) -> Callable[[Action], float]:
        """What each action costs on a placement. ValueError unless costs per stage are as many as its stages."""
        prices = {
            (kind, stage): self._price(placement, kind, stage)
            for kind in "FBW"
            for stage in range(placement.num_stages)
        }
        gain = 1.0
        if self.pair is not None:
            whole_model = sum(prices[kind, stage] for kind in "FBW" for stage in placement.routes[0])
            gain = self.pair * placement.num_ranks / whole_model

        def duration(action: Action) -> float:
            apart = sum(prices[part.kind, part.stage] for part in action.parts)
            return apart * gain if action.kind == "pair" else apart

        return duration

    def lead(self, placement: Placement, event: Event, part: Chunk) -> float:
        """How long before the event's end the result of one of its parts leaves."""
        if event.action.kind not in ("D", "pair"):
            return 0.0
        return min(self.early * placement.stage_size, event.stop_s - event.start_s)

    def _price(self, placement: Placement, kind: str, stage: int) -> float:
        value: Cost = getattr(self, kind.lower())
        if not isinstance(value, Sequence):
            return value * placement.stage_size
        if len(value) != placement.num_slices:
            raise ValueError(f"cost.{kind.lower()} has {len(value)} costs for {placement.num_slices} stages")
        return value[placement.position(stage)]


class Prices(Protocol):
    """What a schedule costs: `Costs`, or what has been found out about every action by itself."""

    @property
    def latency(self) -> float:
        """From the end of a chunk until another rank has its result."""
        ...

    def durations(self, placement: Placement) -> Callable[[Action], float]:
        """What each action costs."""
        ...

    def lead(self, placement: Placement, event: Event, part: Chunk) -> float:
        """How long before the event's end the result of one of its parts, an F or a B, leaves."""
        ...


@dataclass(frozen=True)
class Simulation:
    """One step. Times in the costs' unit; lists have one entry per rank of the pipeline.

    costs: those that it was simulated with.
    step: from the first action's start to the last one's end, over all ranks.
    bubble: idle time within the step.
    peak_activations: most activations alive at once; 1 = those of one micro-batch through 1 / num_ranks of the model.
    """

    schedule: Schedule
    costs: Prices
    events: tuple[Event, ...]
    step: float
    bubble: tuple[float, ...]
    peak_activations: tuple[float, ...]

    def receive_slots(self) -> dict[Channel, int]:
        """Per channel, the most results that lie at the receiver before it takes them: with as many receive buffers
        none waits at its sender."""
        starts: dict[Chunk, float] = {}
        arrives: dict[Chunk, float] = {}
        for event in self.events:
            starts |= dict.fromkeys(event.action.parts, event.start_s)
            for part in event.action.parts:
                left = event.stop_s - self.costs.lead(self.schedule.placement, event, part)
                arrives[part] = left + self.costs.latency
        slots = {}
        for channel, sent in messages(self.schedule).items():
            # At one and the same time what is taken makes room before the next arrives.
            changes = [(starts[message.consumer], -1) for message in sent]
            changes += [(arrives[message.producer], 1) for message in sent]
            slots[channel] = max(1, *accumulate(change for _, change in sorted(changes)))
        return slots


def simulate(schedule: Schedule, costs: Prices | None = None) -> Simulation:
    """Runs the lists: an action starts once its rank is free and all that it needs is there.

    Raises ScheduleError for a deadlock, ValueError for costs that do not fit. Sends cost a rank nothing.
    """
    costs = costs or Costs()
    placement = schedule.placement
    duration = costs.durations(placement)
    results: dict[Chunk, tuple[int, float]] = {}  # rank, and when the result exists there
    free = [0.0] * placement.num_ranks
    busy = [0.0] * placement.num_ranks
    events = []
    for rank, action, needed in walk(schedule):
        made = (results[chunk] for chunk in needed)
        there = (at + (costs.latency if owner != rank else 0.0) for owner, at in made)
        start = max(free[rank], *there, 0.0)
        event = Event(rank, start, start + duration(action), action)
        for part in action.parts:
            lead = 0.0 if part.kind == "W" else costs.lead(placement, event, part)
            results[part] = (rank, event.stop_s - lead)
        free[rank] = event.stop_s
        busy[rank] += duration(action)
        events.append(event)
    step = max(free)
    return Simulation(
        schedule,
        costs,
        tuple(events),
        step,
        tuple(step - time for time in busy),
        tuple(chunks * placement.stage_size for chunks in peak_chunks(schedule)),
    )

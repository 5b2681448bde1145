"""Traced layers at work in the run's own pipeline: the runtime drives replayed passes as it drives the model's.

`Runtime` and `interleave` are those of a run, so turns are taken, weight gradients fall into gaps and results leave as
they do there. A stage here plays the events of its layers to a clock, or books their memory, where a stage of a run
computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from launch.plan.events import Enter, Event, LayerPasses, Turn
from parallel.collectives import Steps
from parallel.pipeline.actions import Action, Chunk
from parallel.pipeline.overlap import Overlap
from parallel.pipeline.placement import Placement
from parallel.pipeline.runtime import Runtime
from parallel.pipeline.schedule import Schedule

Played = TypeVar("Played")
Heard = TypeVar("Heard", contravariant=True)


@dataclass(frozen=True)
class Passes(Generic[Played]):
    """One layer's forward, backward and weight gradients as what is played of them between two turns.

    forward, backward: a stretch for each turn and one for the rest. weights: the weight gradients that have been left
    at each turn of the backward and at its end, one by one. forward_slots, backward_slots: in which the pass stands at
    each turn.
    """

    forward: tuple[Played, ...]
    backward: tuple[Played, ...]
    weights: tuple[tuple[Played, ...], ...]
    forward_slots: tuple[str, ...]
    backward_slots: tuple[str, ...]


def stretches(events: Iterable[Event]) -> list[tuple[Event, ...]]:
    """The events between turns."""
    found: list[list[Event]] = [[]]
    for event in events:
        if isinstance(event, Turn):
            found.append([])
        else:
            found[-1].append(event)
    return [tuple(each) for each in found]


def weight_gradients(events: Iterable[Event]) -> list[tuple[Event, ...]]:
    """The events of each weight gradient, which begins with its name."""
    found: list[list[Event]] = []
    for event in events:
        if isinstance(event, Enter) or not found:
            found.append([])
        found[-1].append(event)
    return [tuple(each) for each in found]


def slots(events: Iterable[Event]) -> tuple[str, ...]:
    """The slots of the turns."""
    return tuple(event.slot for event in events if isinstance(event, Turn))


def passes_of(layer: LayerPasses, played: Callable[[tuple[Event, ...]], Played]) -> Passes[Played]:
    """A traced layer as what `played` makes of each stretch."""
    forward, backward = (tuple(map(played, stretches(events))) for events in (layer.forward, layer.backward))
    assert len(layer.weights) == len(backward), (len(layer.weights), len(backward))
    weights = tuple(tuple(map(played, weight_gradients(events))) for events in layer.weights)
    return Passes(forward, backward, weights, slots(layer.forward), slots(layer.backward))


class Player(Protocol[Heard]):
    """What stretches are played to."""

    def play(self, stretch: Heard, scope: tuple[int, int, int]) -> None:
        """scope: (stage, micro-batch, place of the layer in the stage)."""
        ...


class ReplayedStage(Generic[Played]):
    """A slice of the model whose layers are played; as `runtime.StageWork` has it."""

    def __init__(self, number: int, layers: Sequence[Passes[Played]], player: Player[Played]) -> None:
        self._number, self._layers, self._player = number, layers, player
        self._waiting: dict[int, list[tuple[Played, tuple[int, int, int]]]] = {}

    def forward(self, micro_batch: int, x: Any) -> Steps[Any]:
        for place, layer in enumerate(self._layers):
            for turn, stretch in enumerate(layer.forward):
                if turn:
                    yield layer.forward_slots[turn - 1]
                self._player.play(stretch, (self._number, micro_batch, place))
        return x

    def backward(self, micro_batch: int, dy: Any) -> Steps[Any]:
        waiting = self._waiting.setdefault(micro_batch, [])
        for place in reversed(range(len(self._layers))):
            layer, scope = self._layers[place], (self._number, micro_batch, place)
            for turn, stretch in enumerate(layer.backward):
                if turn:
                    yield layer.backward_slots[turn - 1]
                self._player.play(stretch, scope)
                waiting += [(each, scope) for each in layer.weights[turn]]
        return dy

    def weight_gradients(self, micro_batch: int, share: float = 1.0) -> int:
        waiting = self._waiting.get(micro_batch, [])
        for _ in range(math.ceil(share * len(waiting))):
            self._player.play(*waiting.pop(0))
        return len(waiting)


class Ends:
    """The links of a rank that stands alone: whatever it takes is there, and what it sends is only noted."""

    def __init__(self, sent: Callable[[Chunk], None]) -> None:
        self._sent = sent

    def open(self, schedule: Schedule, shape: tuple[int, ...]) -> None: ...

    def close(self) -> None: ...

    def turn_to(self, at: int) -> None: ...

    def reach(self, at: int, moment: float) -> None: ...

    def take(self, part: Chunk) -> Any:
        return None

    def send(self, part: Chunk, tensor: Any) -> None:
        self._sent(part)


class Progress:
    """Told of the actions, as `record.Recorder` is in a run."""

    def __init__(self, ended: Callable[[Action], None]) -> None:
        self._ended = ended
        self._action: Action | None = None

    def begin(self, action: Action) -> None:
        self._action = action

    def started(self) -> None: ...

    def end(self) -> None:
        assert self._action is not None
        self._ended(self._action)


def run_alone(
    placement: Placement,
    rank: int,
    actions: Sequence[Action],
    stages: dict[int, ReplayedStage[Played]],
    overlap: Overlap,
    sent: Callable[[Chunk], None] = lambda _: None,
    ended: Callable[[Action], None] = lambda _: None,
) -> None:
    """Carry out some actions of one rank, one after the other, without its neighbours."""
    lists = tuple(tuple(actions) if each == rank else () for each in range(placement.num_ranks))
    schedule = Schedule("alone", placement, (0,) * len(placement.routes), lists)
    Runtime(rank, stages, Ends(sent), Progress(ended), overlap).run(schedule, ())

"""What a run's own layers took, over what the figures of the machine say of them: piece by piece."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from launch.plan.events import Calls, Enter, Event, Kernel, Launch, LayerPasses
from launch.plan.own_layers import OwnTimes

# What a stretch of a step is told by where pieces do not matter: the kind of layer, and the pass.
Stretch = tuple[str, str]


@dataclass(frozen=True)
class OwnScales:
    """By how much to multiply what the figures say, so that every piece takes what it took.

    Attributes:
        work: by piece, of operations and of the host's calls.
        waits: by kind of layer and pass, of communication.
    """

    work: Mapping[Enter, float] = field(default_factory=dict)
    waits: Mapping[Stretch, float] = field(default_factory=dict)

    def of_work(self, enter: Enter) -> float:
        """The factor of a piece's own work; 1 where it was not timed."""
        return self.work.get(enter, 1.0)

    def of_waits(self, enter: Enter) -> float:
        """The factor of the communication in a piece; 1 where none was timed."""
        return self.waits.get((enter.layer, enter.kind), 1.0)


Priced = Iterable[tuple[Event, float]]


def scales_of(times: OwnTimes, modelled: Iterable[Priced]) -> OwnScales:
    """modelled: of each kind of layer and of the optimizer of the timed run, its events with their seconds.

    A piece that was timed and has no operation in the trace (names that a layer begins with) counts for the others of
    its layer and pass, in proportion.
    """
    work, launched = defaultdict[Enter, float](float), defaultdict[Stretch, float](float)
    for events in modelled:
        enter = Enter("", "", "")
        for event, seconds in events:
            if isinstance(event, Enter):
                enter = event
            elif isinstance(event, Kernel | Calls):
                work[enter] += seconds
            elif isinstance(event, Launch):
                launched[enter.layer, enter.kind] += seconds
    known = {enter for enter, seconds in work.items() if seconds and times.work_s.get(enter)}
    timed, matched = defaultdict[Stretch, float](float), defaultdict[Stretch, float](float)
    for enter, seconds in times.work_s.items():
        timed[enter.layer, enter.kind] += seconds
        matched[enter.layer, enter.kind] += seconds if enter in known else 0.0
    waited = defaultdict[Stretch, float](float)
    for enter, seconds in times.waits_s.items():
        waited[enter.layer, enter.kind] += seconds
    return OwnScales(
        {
            enter: times.work_s[enter] / work[enter] * timed[enter.layer, enter.kind] / matched[enter.layer, enter.kind]
            for enter in known
        },
        {stretch: waited[stretch] / seconds for stretch, seconds in launched.items() if seconds},
    )


def all_of(passes: LayerPasses) -> Sequence[Event]:
    """All that a layer does with a micro-batch."""
    return [*passes.forward, *passes.backward, *(event for each in passes.weights for event in each)]

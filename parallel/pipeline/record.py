"""What one rank of a pipeline does in a step and how long it waits meanwhile, written down as it happens."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from parallel.pipeline.actions import Action
from parallel.pipeline.events import Event, Wait
from parallel.watch import Watch


@dataclass(frozen=True)
class Times:
    """One rank's step in seconds.

    start_s, stop_s: of its first and last action, on the recorder's clock. busy_s: in between, in its actions, without
    the waits for activations and gradients.
    """

    start_s: float
    stop_s: float
    busy_s: float


class Recorder:
    """Told by the runtime of each action and by the watch of each wait. Sums cost next to nothing and are always kept;
    events only for steps that are opened so.

    An action starts once the input of its first chunk is there. The wait for the second input of a pair lies inside.
    """

    def __init__(self, rank: int, watch: Watch) -> None:
        """rank: in the pipeline. watch: whose waits are recorded; it is told of the actions."""
        self._rank, self._watch, self._clock = rank, watch, watch.clock
        watch.listener = self._waited
        self._origin_s = 0.0
        self._start_s: float | None = None
        self._action: Action | None = None
        self.open()

    def open(self, events: bool = False) -> None:
        """Start a step. events: keep them too."""
        self._first_s: float | None = None
        self._last_s = self._busy_s = 0.0
        self._waited_s: dict[str, float] = defaultdict(float)
        self._waits: list[Wait] = []
        self._keeps_events = events
        self.events: list[Event] = []

    def meet(self) -> None:
        """From here on times count from now: all ranks of the job, whose clocks may differ, are at one point."""
        self._origin_s = self._clock()

    def begin(self, action: Action) -> None:
        """The rank turns to an action; its input may not be there yet."""
        self._watch.do(action)
        self._action, self._start_s = action, None
        self._waits = []

    def started(self) -> None:
        """An input of the action is there. The first one starts it."""
        if self._start_s is None:
            self._start_s = self._clock()

    def end(self) -> None:
        """The action is over."""
        assert self._action is not None and self._start_s is not None
        stop_s = self._clock()
        if self._first_s is None:
            self._first_s = self._start_s
        self._last_s = stop_s
        self._busy_s += stop_s - self._start_s
        if self._keeps_events:
            waits = tuple(self._moved(wait) for wait in self._waits)
            times = self._start_s - self._origin_s, stop_s - self._origin_s
            self.events.append(Event(self._rank, *times, self._action, waits))
        self._action = self._start_s = None

    def times(self) -> Times:
        """When the step so far began and ended on this rank, and for how long the rank was busy."""
        first_s = self._last_s if self._first_s is None else self._first_s
        return Times(first_s - self._origin_s, self._last_s - self._origin_s, self._busy_s)

    def waited_s(self, kind: str) -> float:
        """How long the rank has waited in the step so far, for what `kind` of a `Need` names."""
        return self._waited_s[kind]

    def _waited(self, kind: str, start_s: float, stop_s: float) -> None:
        self._waited_s[kind] += stop_s - start_s
        if self._action is None:
            return
        if kind == "input" and self._start_s is not None:
            self._busy_s -= stop_s - start_s
        if self._keeps_events:
            self._waits.append(Wait(kind, start_s, stop_s))

    def _moved(self, wait: Wait) -> Wait:
        return Wait(wait.kind, wait.start_s - self._origin_s, wait.stop_s - self._origin_s)

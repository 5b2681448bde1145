"""What happened when: the one form for simulated steps and recorded runs, and its file, which Perfetto opens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from parallel.pipeline.actions import Action, parse_action
from parallel.pipeline.schedule import Schedule, parse


class Wait(NamedTuple):
    """A time in which a rank stood still. kind: "input", for a neighbour's result, "experts", for an exchange, or
    "optimizer", for new weights."""

    kind: str
    start_s: float
    stop_s: float


# What a wait is called in a trace.
_WAITS = {"input": "wait for a neighbour", "experts": "wait for experts", "optimizer": "wait for new weights"}


@dataclass(frozen=True)
class Event:
    """One action of a rank of the pipeline. Times in seconds from the step's start (simulated: in the costs' unit).

    It starts when its input is there. waits: known of a recorded one; the wait for the input lies before the start, or,
    for the second input of a pair, inside.
    """

    rank: int
    start_s: float
    stop_s: float
    action: Action
    waits: tuple[Wait, ...] = ()

    @property
    def busy_s(self) -> float:
        """Its length without the waits for neighbours that lie inside."""
        inside = (wait.stop_s - max(wait.start_s, self.start_s) for wait in self.waits if wait.kind == "input")
        return self.stop_s - self.start_s - sum(max(0.0, time) for time in inside)

    @property
    def exposed_s(self) -> float:
        """How long it waited for exchanges with experts."""
        return sum(wait.stop_s - wait.start_s for wait in self.waits if wait.kind == "experts")

    def moved(self, by_s: float) -> Event:
        """This event and its waits, moved by `by_s` seconds."""
        waits = tuple(Wait(wait.kind, wait.start_s + by_s, wait.stop_s + by_s) for wait in self.waits)
        return Event(self.rank, self.start_s + by_s, self.stop_s + by_s, self.action, waits)


@dataclass(frozen=True)
class Timeline:
    """One step of one or several pipelines, by name, that carry out the same schedule side by side."""

    title: str
    schedule: Schedule
    pipelines: Mapping[str, Sequence[Event]]


def write_trace(timeline: Timeline, out: Path) -> None:
    """Writes a Chrome trace (JSON): a process per pipeline, a track per rank, a counter of live chunks, waits as slices
    of their own. `read_trace` reads it; ui.perfetto.dev and chrome://tracing open it.
    """
    entries: list[dict[str, Any]] = []
    for number, (name, events) in enumerate(timeline.pipelines.items()):
        title = f"{timeline.title}, {name}" if len(timeline.pipelines) > 1 else timeline.title
        entries.append({"name": "process_name", "ph": "M", "pid": number, "args": {"name": title}})
        in_order = sorted(events, key=lambda event: (event.rank, event.start_s, event.stop_s))
        for rank in sorted({event.rank for event in in_order}):
            own = [event for event in in_order if event.rank == rank]
            for key, args in (("thread_name", {"name": f"rank {rank}"}), ("thread_sort_index", {"sort_index": rank})):
                entries.append({"name": key, "ph": "M", "pid": number, "tid": rank, "args": args})
            entries += [slice for event in own for slice in _slices(number, event)]
            entries += _live_chunks(number, rank, own)
    known = {"title": timeline.title, "schedule": timeline.schedule.text(), "pipelines": list(timeline.pipelines)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"displayTimeUnit": "ms", "otherData": known, "traceEvents": entries}))


def read_trace(path: Path) -> Timeline:
    """What `write_trace` wrote. ValueError for any other file."""
    try:
        file = json.loads(path.read_text())
        known = file["otherData"]
        pipelines: dict[str, list[Event]] = {name: [] for name in known["pipelines"]}
        names = list(pipelines)
        for entry in file["traceEvents"]:
            if entry["ph"] == "X" and "action" in entry["args"]:
                args = entry["args"]
                waits = tuple(Wait(*wait) for wait in args["waits"])
                start_s, stop_s = args["span_s"]
                event = Event(entry["tid"], start_s, stop_s, parse_action(args["action"]), waits)
                pipelines[names[entry["pid"]]].append(event)
        return Timeline(known["title"], parse(known["schedule"]), pipelines)
    except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a timeline that this program wrote: {error}") from None


def _slices(process: int, event: Event) -> list[dict[str, Any]]:
    action = str(event.action)
    # The exact times: microseconds would not read back to the same seconds.
    exact = {"action": action, "span_s": [event.start_s, event.stop_s], "waits": [list(wait) for wait in event.waits]}
    entries = [_slice(process, event.rank, action, event.action.kind, event.start_s, event.stop_s, exact)]
    for kind, start_s, stop_s in event.waits:
        entries.append(_slice(process, event.rank, _WAITS[kind], "wait", start_s, stop_s, {"for": action}))
    return entries


def _slice(
    process: int, rank: int, name: str, category: str, start_s: float, stop_s: float, args: dict[str, Any]
) -> dict[str, Any]:
    times = {"ts": start_s * 1e6, "dur": (stop_s - start_s) * 1e6}
    return {"name": name, "cat": category, "ph": "X", "pid": process, "tid": rank, **times, "args": args}


def _live_chunks(process: int, rank: int, events: Sequence[Event]) -> list[dict[str, Any]]:
    """Counter entries: chunks whose activations the rank keeps, from the start of F to the end of W."""
    changes: list[tuple[float, int]] = []
    for event in events:
        kinds = [part.kind for part in event.action.parts]
        changes += [(event.start_s, kinds.count("F")), (event.stop_s, -kinds.count("W"))]
    alive, entries = 0, []
    for at_s, change in sorted((change for change in changes if change[1]), key=lambda change: change[0]):
        alive += change
        name = f"live chunks, rank {rank}"
        entries.append({"name": name, "ph": "C", "pid": process, "ts": at_s * 1e6, "args": {"chunks": alive}})
    return entries

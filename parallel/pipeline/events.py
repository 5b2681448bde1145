"""What happened when: the one form for simulated steps and recorded runs, and its file, which Perfetto opens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.pipeline.actions import Action, parse_action


@dataclass(frozen=True)
class Event:
    """One action of a rank of the pipeline. Times in seconds from the step's start (simulated: in the costs' unit)."""

    rank: int
    start_s: float
    stop_s: float
    action: Action


def write_trace(events: Iterable[Event], out: Path, title: str) -> None:
    """Writes events as a Chrome trace (JSON), one track per rank, with a counter of live chunks; `read_trace` reads it.

    ui.perfetto.dev and chrome://tracing open it.
    """
    in_order = sorted(events, key=lambda event: (event.rank, event.start_s, event.stop_s))
    entries: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": title}}]
    for rank in sorted({event.rank for event in in_order}):
        own = [event for event in in_order if event.rank == rank]
        for name, args in (("thread_name", {"name": f"rank {rank}"}), ("thread_sort_index", {"sort_index": rank})):
            entries.append({"name": name, "ph": "M", "pid": 0, "tid": rank, "args": args})
        entries += [_slice(event) for event in own]
        entries += _live_chunks(rank, own)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": entries}))


def read_trace(path: Path) -> list[Event]:
    """The events of a file that `write_trace` wrote. ValueError for any other file."""
    try:
        entries = json.loads(path.read_text())["traceEvents"]
        return [
            Event(entry["tid"], start_s, stop_s, parse_action(entry["args"]["action"]))
            for entry in entries
            if entry["ph"] == "X"
            for start_s, stop_s in [entry["args"]["span_s"]]
        ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a timeline that this program wrote: {error}") from None


def _slice(event: Event) -> dict[str, Any]:
    action = str(event.action)
    span_s = [event.start_s, event.stop_s]
    return {
        "name": action,
        "cat": event.action.kind,
        "ph": "X",
        "pid": 0,
        "tid": event.rank,
        "ts": event.start_s * 1e6,
        "dur": (event.stop_s - event.start_s) * 1e6,
        # The exact times: microseconds would not read back to the same seconds.
        "args": {"action": action, "span_s": span_s},
    }


def _live_chunks(rank: int, events: Sequence[Event]) -> list[dict[str, Any]]:
    """Counter entries: chunks whose activations the rank keeps, from the start of F to the end of W."""
    changes: list[tuple[float, int]] = []
    for event in events:
        kinds = [part.kind for part in event.action.parts]
        changes += [(event.start_s, kinds.count("F")), (event.stop_s, -kinds.count("W"))]
    alive, entries = 0, []
    for at_s, change in sorted((change for change in changes if change[1]), key=lambda change: change[0]):
        alive += change
        name = f"live chunks, rank {rank}"
        entries.append({"name": name, "ph": "C", "pid": 0, "ts": at_s * 1e6, "args": {"chunks": alive}})
    return entries

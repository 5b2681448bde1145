"""`events.jsonl`: what happened to a run as a job, one line of strict JSON per event, in the order of happening.

Unlike the files with a line per step it is never cut back: that a run was lost and started again is an event itself.
Rank 0 and the launcher both append to it, each line in one write under a lock. A line that a kill has torn is passed
over by readers, and the next line begins anew behind it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from train.files import in_words, sync_handle
from train.track.alert import tell
from train.track.last_step import METRICS, last_step

EVENTS = "events.jsonl"
# Letters of a sentence in a command's environment, of which a system takes only so much.
MAX_SAID = 4000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A kind of event.

    Attributes:
        fields: what each of its fields holds; every event of the kind has all of them, beside `time` and `kind`.
        sentence: what people read of it, with fields in braces.
        is_bad: whether something was lost by it.
    """

    fields: Mapping[str, str]
    sentence: str
    is_bad: bool = False


# Every kind of event that there is. A field that ends in _s is in seconds, one that ends in _bytes in bytes.
KINDS: dict[str, Kind] = {
    "start": Kind(
        {
            "step": "last finished step of earlier starts, 0 without any",
            "num_ranks": "ranks that have met",
            "num_nodes": "machines (parallel.nodes)",
            "topology": "how the ranks are arranged",
        },
        "{num_ranks} ranks start: {topology}",
    ),
    "allocated": Kind(
        {
            "step": "last step that was reported",
            "job_id": "of Slurm",
            "num_requeues": "how often Slurm has put this job back into its queue",
            "attempt": "how often the ranks were started within this job before",
            "nodes": "machines that it has, as Slurm names them",
        },
        "job {job_id} of Slurm on {nodes}, requeued {num_requeues} times, attempt {attempt}",
    ),
    "resume": Kind(
        {
            "step": "finished steps of the checkpoint",
            "checkpoint": "its folder",
            "num_lost_steps": "steps that an earlier start had finished after it, which are trained once more",
        },
        "goes on from {checkpoint} after step {step}; {num_lost_steps} steps are trained once more",
    ),
    "save": Kind(
        {
            "step": "finished steps that the checkpoint holds",
            "num_bytes": "of all its files",
            "stalled_s": "training stood still for it: until an earlier save had ended, and the state was copied",
            "duration_s": "from the moment at which it was due until it was whole on the disk",
        },
        "checkpoint of step {step} saved: {num_bytes} bytes in {duration_s} s, of which training stood {stalled_s} s",
    ),
    "save_failed": Kind(
        {
            "step": "finished steps that the checkpoint would have held",
            "duration_s": "from the moment at which it was due until it was given up",
            "reason": "why",
        },
        "{reason}",
        is_bad=True,
    ),
    "end": Kind(
        {
            "step": "last step that was reported",
            "outcome": "done, stopped, refused, not_finite, not_saved, hung, lost or failed",
            "code": "exit code of the rank that says so",
            "reason": "why, as it was said to people",
        },
        "{reason}",
    ),
    "lost": Kind(
        {
            "step": "last step that was reported",
            "code": "exit code of the job",
            "reason": "which rank was lost, and how",
        },
        "{reason}",
        is_bad=True,
    ),
    "restart": Kind(
        {
            "step": "finished steps of the checkpoint to go on from, 0 without any",
            "number": "how many restarts there were since the newest checkpoint, this one included",
            "limit": "how many are allowed (restarts)",
            "wait_s": "wait before it",
            "topology": "how the ranks will be arranged",
        },
        "restart {number} of {limit}, in {wait_s} s, from step {step}: {topology}",
    ),
    "requeue": Kind(
        {"step": "last step that was reported", "job_id": "of Slurm", "reason": "why"},
        "job {job_id} leaves its machines: {reason}",
    ),
    "give_up": Kind(
        {
            "step": "last step that was reported",
            "code": "exit code of the job",
            "reason": "why it is not started again",
        },
        "{reason}",
        is_bad=True,
    ),
}
# How an end is told apart whose reason is a sentence: by the exit code of the rank (see `train.rank`).
OUTCOMES = {2: "refused", 3: "not_finite", 4: "not_saved", 5: "hung", 6: "lost"}
# Ends with nothing lost.
GOOD = ("done", "stopped")


@dataclass(frozen=True)
class Event:
    """One line of the file.

    Attributes:
        time: when it happened, as ISO 8601 in UTC, by the clock of the machine that wrote it.
        values: the kind's own fields.
    """

    time: str
    kind: str
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """After how many finished steps it happened."""
        return int(self.values["step"])

    @property
    def time_s(self) -> float:
        """When it happened, in seconds since 1970."""
        return datetime.fromisoformat(self.time).timestamp()

    @property
    def is_bad(self) -> bool:
        """Whether something was lost by it."""
        return KINDS[self.kind].is_bad or (self.kind == "end" and self.values["outcome"] not in GOOD)

    @property
    def sentence(self) -> str:
        """For people."""
        return KINDS[self.kind].sentence.format(**self.values)


class Events:
    """Appends events to the file in a run's folder; nothing is opened, and no folder made, before the first one.

    A line that the disk refuses is lost and said to be: no event ends a run. The disk has a line when `add` returns.
    """

    def __init__(
        self,
        folder: Path,
        writes: bool = True,
        say: Callable[[str], None] = log.warning,
        alert: str | None = None,
    ) -> None:
        """Args:
        writes: whether this process writes at all; of a run's ranks only rank 0 does.
        alert: the command that is told of events by which something was lost (`track.alert`).
        """
        self._folder, self._writes, self._say, self._alert = folder, writes, say, alert

    def add(self, kind: str, **values: Any) -> None:
        """Something has happened just now. Where `step` is left out it is the last step in `metrics.jsonl`."""
        if not self._writes:
            return
        if "step" not in values:
            values["step"] = last_step(self._folder / METRICS)
        assert values.keys() == KINDS[kind].fields.keys(), (kind, sorted(values))
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        ordered = {name: values[name] for name in KINDS[kind].fields}
        line = json.dumps({"time": time, "kind": kind, **ordered}, allow_nan=False).encode() + b"\n"
        try:
            _append(self._folder / EVENTS, line)
        except OSError as error:
            self._say(
                f"{self._folder / EVENTS} cannot be written ({in_words(error)}): it lacks {line.decode().strip()}"
            )
        event = Event(time, kind, ordered)
        if self._alert is not None and event.is_bad:
            variables = {"HALOCLINE_EVENT": kind, "HALOCLINE_SENTENCE": event.sentence[:MAX_SAID]}
            tell(self._alert, self._folder, line, variables, self._say)


def _append(path: Path, line: bytes) -> None:
    """One line at the end of a file that others append to, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):  # of a file system without locks, where lines in one write must do
            fcntl.flock(handle, fcntl.LOCK_EX)
        end = os.fstat(handle).st_size
        if end and os.pread(handle, 1, end - 1) != b"\n":
            line = b"\n" + line
        left = memoryview(line)
        while left:
            left = left[os.write(handle, left) :]
        sync_handle(handle)
    finally:
        os.close(handle)


def read_events(path: Path) -> list[Event]:
    """The events of a run, without lines that a kill has torn or whose kind is not known; none where there is no file.

    Raises OSError for a file that cannot be read.
    """
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            values = json.loads(line)
            event = Event(values.pop("time"), values.pop("kind"), values)
            if event.values.keys() >= KINDS[event.kind].fields.keys() and event.time_s and event.step >= 0:
                found.append(event)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return found

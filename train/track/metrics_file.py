"""`metrics.jsonl` and its like: a line of strict JSON per step, safe to kill at any moment, exact to read back."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.files import in_words, replacing, sync_handle
from train.track.last_step import METRICS
from train.track.metrics import Sample, StepReport
from train.track.sinks import say as say_to_people

LOADS, SAMPLES = "loads.jsonl", "samples.jsonl"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _encode(report: StepReport) -> bytes:
    """One line of strict JSON, which has no word for NaN and infinities: they become strings, as in protobuf's JSON."""
    values: dict[str, Any] = dict(report.values)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[name] = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def _decode(line: bytes) -> dict[str, float] | None:
    """The numbers of one line, or None for one that was torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or "step" not in values:
        return None
    return {name: _NON_FINITE[value] if isinstance(value, str) else value for name, value in values.items()}


def _steps(lines: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    """(step, end of the line in bytes) up to the first torn line."""
    end = 0
    for line in lines:
        try:
            step = json.loads(line)["step"] if line.endswith(b"\n") else None
        except (ValueError, TypeError, KeyError):
            return
        if step is None:
            return
        end += len(line)
        yield int(step), end


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The steps of a `metrics.jsonl`, name -> value, up to a line that a killed run may have torn.

    Raises FileNotFoundError when there is no such file.
    """
    with path.open("rb") as file:
        return list(itertools.takewhile(lambda values: values is not None, map(_decode, file)))  # type: ignore[arg-type]


class _StepLines:
    """A file of one line per step, each written whole or not at all; a kill tears at most the last one.

    What it holds past `finished_steps`, the step of the checkpoint that the run goes on from, is cut off first. A run
    that starts anew leaves nothing, not even step 0, which it may evaluate once more. A line that the disk refuses is
    lost and said to be; the next one is tried, as the disk may have room again.
    """

    def __init__(self, path: Path, finished_steps: int = 0, say: Callable[[str], None] = say_to_people) -> None:
        """OSError when the file cannot be opened."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._say = path, say
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        self._end = self.last_step = 0
        # Ranges of steps between two lines: in `metrics.jsonl` they are lines that were lost.
        self.gaps: list[tuple[int, int]] = []
        for step, line_end in _steps(self._file):
            if step > finished_steps or not finished_steps:
                break
            if self._end and step > self.last_step + 1:
                self.gaps.append((self.last_step + 1, step - 1))
            self._end, self.last_step = line_end, step
        self._file.truncate(self._end)
        self._lost: tuple[int, int] | None = None  # the first and last step of the lines lost since one was written

    def _append(self, step: int, line: bytes) -> None:
        try:
            if self._lost is not None:
                self._file.truncate(self._end)  # of the part of a line that may be there
            left = memoryview(line)
            while left:
                # Of a disk that is nearly full, a call takes what fits and only the next one fails.
                left = left[self._file.write(left) :]
        except OSError as error:
            self._lose(step, error)
            return
        self._end += len(line)
        if self._lost is not None:
            self._say(f"{self.path} can be written again from step {step} on; {_range(*self._lost)} missing in it")
            self._lost = None

    def _lose(self, step: int, error: OSError) -> None:
        if self._lost is None:
            self._say(
                f"{self.path} cannot be written ({error.strerror}): step {step}, and those after it until it can be "
                "written, are missing in it; the run goes on"
            )
        self._lost = (step if self._lost is None else self._lost[0], step)
        with contextlib.suppress(OSError):
            self._file.truncate(self._end)

    def checkpoint(self) -> None:
        """On the disk before the checkpoint is: a resumed run must find every step that its checkpoint holds."""
        if self._lost is not None:
            return
        try:
            sync_handle(self._file.fileno())
        except OSError as error:
            self._say(f"{self.path}: the disk does not say that it has the last steps ({in_words(error)})")

    def close(self, failed: bool) -> None:
        """Closes the file."""
        if self._lost is not None:
            self._say(f"{self.path} could not be written to the end: {_range(*self._lost)} missing in it")
        with contextlib.suppress(OSError):  # of lines that are said to be lost
            self._file.close()


def _range(first: int, last: int) -> str:
    return f"step {first} is" if first == last else f"steps {first} to {last} are"


def begin_with(parent: Path, run_dir: Path, finished_steps: int) -> list[str]:
    """Let the files of a branch's folder begin with the lines of the run that it branches off, up to its last step.

    Returns a sentence for people where there is none of these lines, or not all.
    """
    said = []
    for name in (METRICS, LOADS, SAMPLES):
        if name == SAMPLES and not (parent / name).exists():
            continue
        end = last = 0
        content = (parent / name).read_bytes() if (parent / name).exists() else b""
        for step, line_end in _steps(content.splitlines(keepends=True)):
            if step > finished_steps:
                break
            end, last = line_end, step
        if name == METRICS and last < finished_steps:
            said.append(f"{parent / name} has steps up to {last} of {finished_steps}: curves show no others before it")
        with replacing(run_dir / name) as aside:
            aside.write_bytes(content[:end])
    return said


class JsonlSink(_StepLines):
    """One object per step in `metrics.jsonl`, from the step of the checkpoint on that the run goes on from."""

    def __init__(self, path: Path, finished_steps: int = 0, say: Callable[[str], None] = say_to_people) -> None:
        super().__init__(path, finished_steps, say)
        for gap in self.gaps:
            say(f"{path} was once not writable: {_range(*gap)} missing in it, and stay so")
        last = self.last_step
        if last < finished_steps:
            say(f"{path} holds steps up to {last}, the checkpoint {finished_steps}: the steps between are lost")

    def write(self, report: StepReport) -> None:
        """Appends the step."""
        self._append(report.step, _encode(report))


class LoadsSink(_StepLines):
    """`loads.jsonl`: in some steps, how many tokens of the batch chose each expert of each router."""

    def write(self, report: StepReport) -> None:
        """Appends the step's loads, if it has any."""
        if report.loads is not None:
            line = {"step": report.step, "tokens": report.consumed_tokens, "loads": report.loads}
            self._append(report.step, json.dumps(line, separators=(",", ":")).encode() + b"\n")


class SamplesSink(_StepLines):
    """`samples.jsonl`: in some evaluations, how the model went on with each of the prompts."""

    def write(self, report: StepReport) -> None:
        """Appends the step's samples, if it has any."""
        if report.samples:
            samples = [asdict(sample) for sample in report.samples]
            line = {"step": report.step, "tokens": report.consumed_tokens, "samples": samples}
            self._append(report.step, json.dumps(line).encode() + b"\n")


@dataclass(frozen=True)
class Samples:
    """How the model went on with the prompts, after a step that ended at `tokens` tokens."""

    step: int
    tokens: int
    samples: list[Sample]


def read_samples(path: Path) -> list[Samples]:
    """The lines of a `samples.jsonl`, up to one that a kill has torn; none where there is no such file."""
    found = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            plain = json.loads(line)
            found.append(Samples(plain["step"], plain["tokens"], [Sample(**each) for each in plain["samples"]]))
        except (ValueError, TypeError, KeyError):
            break
    return found


@dataclass(frozen=True)
class Loads:
    """Tokens that chose each expert, [routers][experts], in the batch of a step that ended at `tokens` tokens."""

    step: int
    tokens: int
    loads: list[list[int]]


def read_loads(path: Path) -> list[Loads]:
    """The lines of a `loads.jsonl`, up to one that a kill has torn; none where there is no such file."""
    found = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            found.append(Loads(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return found

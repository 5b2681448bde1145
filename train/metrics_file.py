"""`metrics.jsonl`: one line of strict JSON per finished step, safe to kill at any moment, exact to read back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from train.metrics import StepReport

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _encode(report: StepReport) -> bytes:
    """One line of strict JSON, which has no word for NaN and infinities: they become strings, as in protobuf's JSON."""
    values: dict[str, Any] = dict(report.values())
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


def _rows(lines: Iterable[bytes]) -> Iterator[tuple[dict[str, float], int]]:
    """(numbers, end of the line in bytes) up to the first torn line."""
    end = 0
    for line in lines:
        values = _decode(line)
        if values is None:
            return
        end += len(line)
        yield values, end


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The steps of a `metrics.jsonl`, name -> value, up to a line that a killed run may have torn.

    Raises FileNotFoundError when there is no such file.
    """
    with path.open("rb") as file:
        return [values for values, _ in _rows(file)]


class JsonlSink:
    """One object per step in `metrics.jsonl`, each written with one call, so that a kill tears at most the last line.

    An existing file is first cut back to `finished_steps`, the step of the checkpoint that the run goes on from.
    """

    def __init__(self, path: Path, finished_steps: int = 0, say: Callable[[str], None] = print) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        end, last_step = 0, 0
        for values, line_end in _rows(self._file):
            if values["step"] > finished_steps:
                break
            end, last_step = line_end, int(values["step"])
        self._file.truncate(end)
        if last_step < finished_steps:
            say(f"{path} holds steps up to {last_step}, the checkpoint {finished_steps}: the steps between are lost")

    def write(self, report: StepReport) -> None:
        """Appends the step."""
        self._file.write(_encode(report))

    def checkpoint(self) -> None:
        """On the disk before the checkpoint is: a resumed run must find every step that its checkpoint holds."""
        os.fsync(self._file.fileno())

    def close(self, failed: bool) -> None:
        """Closes the file."""
        self._file.close()

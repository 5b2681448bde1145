"""How far a run has come by its `metrics.jsonl`, for whoever asks without torch: a launcher, or an event."""

from __future__ import annotations

import json
from pathlib import Path

METRICS = "metrics.jsonl"
# More than any line of a step has.
_TAIL_BYTES = 1 << 18


def last_step(path: Path) -> int:
    """The last whole step in a `metrics.jsonl`, read from its end; 0 where there is none, or no such file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            values = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            continue
        if isinstance(values, dict) and "step" in values:
            return int(values["step"])
    return 0

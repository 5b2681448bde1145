"""What a launcher has planned of a run, and what became of it: read at the run's end, told to people.

The plan is a file of the launcher's (`environment.plan_file`), made beside the run. Its figures are metrics of the last
step, so that every sink has them and a report can be drawn from the run's files alone.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

STEP_S, PEAK_BYTES = "plan/step_s", "plan/peak_bytes"
# Metrics of the file's figures.
FIGURES = {"step_s": STEP_S, "peak_bytes": PEAK_BYTES}
# A run that is over before its plan waits for it so long.
PATIENCE_S = 1.0
# Steps that find memory and make kernels: they are left out where there are more.
NUM_FIRST = 3
# Batches whose sizes, a rate times a time, differ by less are of one size.
SAME_SIZE = 0.999


def planned(path: Path | None, patience_s: float = PATIENCE_S) -> tuple[dict[str, float], str]:
    """The metrics of a plan, and why one is missing, or nothing. path: None where nobody plans."""
    if path is None:
        return {}, ""
    end_s = time.monotonic() + patience_s
    while not path.exists():
        if time.monotonic() > end_s:
            return {}, "the plan was not ready when the run was"
        time.sleep(0.02)
    try:
        found = json.loads(path.read_text())
        return {name: found[key] for key, name in FIGURES.items() if key in found}, found["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}, f"{path} holds no plan"


def sentence(rows: Sequence[Mapping[str, float]]) -> str:
    """What was planned and what happened, of the steps of a run; empty where nothing was planned."""
    plan = next((row for row in reversed(rows) if STEP_S in row or PEAK_BYTES in row), {})
    said = []
    if STEP_S in plan and (took_s := typical_step_s(rows)):
        said.append(
            f"planned a step of {_seconds(plan[STEP_S])}, took {_seconds(took_s)} ({_off(plan[STEP_S], took_s)})"
        )
    held = max((row.get("memory/peak_bytes", 0.0) for row in rows), default=0.0)
    if PEAK_BYTES in plan and held:
        need = plan[PEAK_BYTES]
        said.append(f"planned {need / 1e9:.2f} GB on the fullest rank, held {held / 1e9:.2f} ({_off(need, held)})")
    return "; ".join(said)


def typical_step_s(rows: Sequence[Mapping[str, float]]) -> float | None:
    """The middle one of the steps of the largest batch; the first of all are left out where there are others."""
    steps = [row for row in rows if "perf/step_s" in row and "perf/tokens_per_s" in row]
    later = steps[NUM_FIRST:] or steps
    sizes = [row["perf/tokens_per_s"] * row["perf/step_s"] for row in later]
    full = [row["perf/step_s"] for row, size in zip(later, sizes, strict=True) if size > SAME_SIZE * max(sizes)]
    return statistics.median(full) if full else None


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _off(planned: float, happened: float) -> str:
    return f"off by {planned / happened - 1:+.0%}"

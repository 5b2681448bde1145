"""What closes a sweep: `results.csv`, the same as a table on the terminal, and a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from launch.sweep.config import SweepConfig
from launch.sweep.jobs import STATUSES, Outcome
from train.files import replacing

MAX_REASON_LENGTH = 100  # on the terminal; the file has all of it
LOSSES = ("train/loss", "valid/loss")


def ranked(outcomes: Sequence[Outcome], config: SweepConfig) -> list[Outcome]:
    """Best first: finished jobs by the metric, then the others by what became of them."""
    sign = 1 if config.direction == "minimize" else -1

    def order(each: Outcome) -> tuple[int, bool, float, int]:
        value = math.inf if math.isnan(each.value) else sign * each.value
        return STATUSES.index(each.status), math.isnan(each.value), value, each.proposal.number

    return sorted(outcomes, key=order)


def write(outcomes: Sequence[Outcome], varied: Sequence[str], config: SweepConfig, path: Path) -> list[list[str]]:
    """Write the CSV, aside and then in place; its rows, the header first. The last column is the job's folder."""
    extra = [] if config.metric in LOSSES else [config.metric]
    header = [*(key.lstrip("+") for key in varied), "status", "step", *LOSSES, *extra, "reason", "folder"]
    rows = [
        [
            *(outcome.proposal.values[key] for key in varied),
            outcome.status,
            str(outcome.step),
            f"{outcome.train_loss:.4f}",
            f"{outcome.valid_loss:.4f}",
            *([f"{outcome.value:.6g}"] if extra else []),
            outcome.reason,
            outcome.folder.name,
        ]
        for outcome in ranked(outcomes, config)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside, aside.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return [header, *rows]


def show(rows: Sequence[Sequence[str]]) -> str:
    """The table for a terminal, without the folders; long cells are cut."""
    shown = [[_short(cell) for cell in row[:-1]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
    )


def _short(cell: str) -> str:
    return cell if len(cell) <= MAX_REASON_LENGTH else f"{cell[: MAX_REASON_LENGTH - 3]}..."

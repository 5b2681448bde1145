"""What closes a sweep: `results.csv`, the same as a table on the terminal, and over several seeds their mean."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.sweep.config import SweepConfig
from launch.sweep.jobs import STATUSES, Outcome
from launch.sweep.seeds import SEED, Spread, grouped, is_seed
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


def write_means(outcomes: Sequence[Outcome], varied: Sequence[str], config: SweepConfig, path: Path) -> list[list[str]]:
    """Write `seeds.csv`: a row for all jobs that differ in their seed alone, best mean first; as a table for people.

    In the file mean, deviation and number stand apart; in the table each such row is followed by its jobs'.
    """
    keys = [key for key in varied if not is_seed(key)]
    names, groups = [key.lstrip("+") for key in keys], grouped(ranked(outcomes, config), config)
    columns = _means_of(config)
    header = [*names, "status", *(f"{name} {what}" for name in columns for what in ("mean", "deviation")), "n"]
    rows, shown = [header], [[*names, SEED, "status", "step", *columns, "n", "reason"]]
    for group in groups:
        values = [group.values[key] for key in keys]
        spreads = [Spread.of([value(each) for each in group.counted]) for value in columns.values()]
        numbers = [f"{number:.6g}" for spread in spreads for number in (spread.mean, spread.deviation)]
        count = str(len(group.counted))
        rows.append([*values, group.status, *numbers, count])
        shown.append([*values, "all", group.status, "", *map(str, spreads), count, ""])
        for each in group.outcomes:
            seed = next(word for key, word in each.proposal.values.items() if is_seed(key))
            single = [f"{value(each):.4f}" for value in columns.values()]
            shown.append([*("" for _ in keys), seed, each.status, str(each.step), *single, "", each.reason])
    with replacing(path) as aside, aside.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return shown


def _means_of(config: SweepConfig) -> dict[str, Callable[[Outcome], float]]:
    """The columns that have a mean: the losses, and the metric if it is another one."""
    found: dict[str, Callable[[Outcome], float]] = {
        "train/loss": lambda outcome: outcome.train_loss,
        "valid/loss": lambda outcome: outcome.valid_loss,
    }
    return found if config.metric in LOSSES else {**found, config.metric: lambda outcome: outcome.value}


def show(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal; long cells are cut."""
    shown = [[_short(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
    )


def _short(cell: str) -> str:
    return cell if len(cell) <= MAX_REASON_LENGTH else f"{cell[: MAX_REASON_LENGTH - 3]}..."

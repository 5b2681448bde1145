"""A grid of jobs, one after the other: a job that fails does not lose the others, and a table closes it."""

from __future__ import annotations

import csv
import hashlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.ranks import Ended
from train import compose, step_folders
from train.config import RunConfig
from train.track import read_metrics

MAX_NAME_LENGTH = 120
MAX_REASON_LENGTH = 100  # on the terminal; the file has all of it


@dataclass
class Outcome:
    """What became of one job of a sweep."""

    settings: dict[str, str]
    folder: Path
    status: str = "not run"
    step: int = 0
    train_loss: float = math.nan
    valid_loss: float = math.nan
    reason: str = ""


def sweep(settings: Sequence[str], run: Callable[[RunConfig], Ended]) -> int:
    """Every job of the grid, each in a folder of its own under `<run.dir>-sweep`, named by what varies.

    Closes with a table, best validation loss first, which also lies there as `results.csv`. A job that has finished is
    not run again; asked to stop, a sweep runs no further jobs. Returns 0 if every job is done, else 1. ValueError when
    no job of the grid can be composed.
    """
    jobs = compose.sweep(settings)
    root = Path(f"{_run_dir(jobs)}-sweep")
    varied = [key for key in _by_key(jobs[0]) if len({_by_key(job).get(key) for job in jobs}) > 1]
    outcomes: list[Outcome] = []
    for job in jobs:
        name = _folder_name([f"{key}={_by_key(job)[key]}" for key in varied], [each.folder.name for each in outcomes])
        outcomes.append(Outcome(_by_key(job), root / name))
    for number, (job, outcome) in enumerate(zip(jobs, outcomes, strict=True), 1):
        print(f"\n[{number}/{len(jobs)}] {outcome.folder}", flush=True)
        _attempt(job, outcome, run)
        if outcome.status == "stopped":
            break
    outcomes.sort(key=lambda each: (each.status != "done", math.isnan(each.valid_loss), each.valid_loss))
    _close(outcomes, varied, root / "results.csv")
    return int(any(outcome.status != "done" for outcome in outcomes))


def _run_dir(jobs: list[list[str]]) -> str:
    """Where the first job that can be placed in the config tree would run; the first one's error if none can."""
    first: ValueError | None = None
    for job in jobs:
        try:
            return str(compose.raw(job).run.dir)
        except ValueError as error:
            first = first or error
    assert first is not None, "a grid has at least one job"
    raise first


def _by_key(job: list[str]) -> dict[str, str]:
    return dict(setting.lstrip("+").split("=", 1) for setting in job if "=" in setting)


def _folder_name(varied: list[str], taken: list[str]) -> str:
    """What varies, in characters that a shell needs no quotes for; a long or taken name is told apart by a digest."""
    whole = ",".join(varied)
    name = re.sub(r"[^\w.,=+-]+", "_", whole) or "only"
    if len(name) > MAX_NAME_LENGTH or name in taken:
        name = f"{name[:MAX_NAME_LENGTH]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return name


def _attempt(job: list[str], outcome: Outcome, run: Callable[[RunConfig], Ended]) -> None:
    """Run one job, unless it is finished, and note what became of it."""
    try:
        config = compose.compose(job)
        config = replace(config, run=replace(config.run, dir=str(outcome.folder)))
        if _is_finished(config):
            print("finished before", flush=True)
            ended = Ended(0)
        else:
            ended = run(config)
        outcome.reason, outcome.status = ended.reason, "failed" if ended.code else "done"
        if ended.was_asked and not _is_finished(config):
            outcome.status = "stopped"
    except ValueError as error:
        outcome.status, outcome.reason = "failed", str(error)
    if outcome.reason:
        print(outcome.reason, file=sys.stderr, flush=True)
    metrics = outcome.folder / "metrics.jsonl"
    for row in read_metrics(metrics) if metrics.exists() else []:
        outcome.step, outcome.train_loss = int(row["step"]), row["train/loss"]
        outcome.valid_loss = row.get("valid/loss", outcome.valid_loss)


def _is_finished(config: RunConfig) -> bool:
    """Whether the job's folder holds the last checkpoint of just these settings."""
    resolved = Path(config.run.dir) / "config.yaml"
    if not resolved.exists() or resolved.read_text() != compose.text(config):
        return False
    folder = config.checkpoint.folder(config.run.dir)
    return step_folders.find_latest(folder) == step_folders.step_folder(folder, config.schedule().num_steps)


def _close(outcomes: list[Outcome], varied: list[str], path: Path) -> None:
    """Write the table and print it."""
    header = [*varied, "status", "step", "train/loss", "valid/loss", "reason"]
    rows = [
        [
            *(outcome.settings[key] for key in varied),
            outcome.status,
            str(outcome.step),
            f"{outcome.train_loss:.4f}",
            f"{outcome.valid_loss:.4f}",
            outcome.reason,
        ]
        for outcome in outcomes
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    shown = [[_short(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    print()
    for row in shown:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\nresults: {path}")


def _short(cell: str) -> str:
    return cell if len(cell) <= MAX_REASON_LENGTH else f"{cell[: MAX_REASON_LENGTH - 3]}..."

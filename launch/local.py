"""`python -m launch local key=value [--multirun]`: one job, or a sweep of jobs, on this machine."""

from __future__ import annotations

import csv
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.prepare import prepare_command
from launch.ranks import start_ranks
from train import compose
from train.config import RunConfig


def local(settings: Sequence[str]) -> int:
    """Compose once, prepare the data, start the ranks; returns the job's exit code.

    With `--multirun` among the settings it sweeps instead.
    """
    if "--multirun" in settings:
        return sweep([setting for setting in settings if setting != "--multirun"])
    return run(compose.compose(settings))


def run(config: RunConfig) -> int:
    """One job: pp x dp processes on this machine that all read the same resolved config."""
    prepare_command(config.data)
    folder = Path(config.run.dir)
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=logs, prefix="launched-", suffix=".yaml") as resolved:
        resolved.write(compose.text(config))
        resolved.flush()
        num_ranks = config.parallel.pp * config.parallel.dp
        return start_ranks([sys.executable, "-m", "train", "--config", resolved.name], num_ranks, logs)


@dataclass
class Outcome:
    """What became of one job of a sweep."""

    settings: list[str]
    status: str
    folder: str = ""
    step: int = 0
    train_loss: float = math.nan
    valid_loss: float = math.nan
    reason: str = ""


def sweep(settings: Sequence[str]) -> int:
    """Every job of the grid, one after the other; a job that fails does not lose the others.

    Closes with a table, best validation loss first, which also lies in `<run.dir>-sweep/results.csv`. A job that has
    finished is not run again. Returns 0 if every job succeeded, else 1.
    """
    jobs = compose.sweep(settings)
    varied = [key for key in _keys(jobs[0]) if len({_keys(job)[key] for job in jobs}) > 1]
    base = next((_keys(job)["run.dir"] for job in jobs if "run.dir" in _keys(job)), None)
    outcomes = []
    for number, job in enumerate(jobs, 1):
        name = ",".join(f"{key}={_keys(job)[key]}" for key in varied).replace("/", "_") or "only"
        print(f"\n[{number}/{len(jobs)}] {name}", flush=True)
        outcomes.append(_attempt(job, name, base))
    outcomes.sort(key=lambda outcome: (outcome.status != "done", outcome.valid_loss))
    folder = Path(next((outcome.folder for outcome in outcomes if outcome.folder), "sweep/x")).parent
    _write_table(outcomes, varied, folder / "results.csv")
    return int(any(outcome.status != "done" for outcome in outcomes))


def _attempt(job: list[str], name: str, base: str | None) -> Outcome:
    outcome = Outcome(job, "failed")
    try:
        root = base or compose.raw([s for s in job if not s.startswith("run.dir=")]).run.dir
        folder = Path(f"{root}-sweep") / name
        outcome.folder = str(folder)
        rest = [setting for setting in job if not setting.startswith("run.dir=")]
        code = run(compose.compose([*rest, f"run.dir='{folder}'"]))
    except ValueError as error:
        outcome.reason = str(error).splitlines()[0]
        print(outcome.reason, file=sys.stderr)
        return outcome
    outcome.status = "done" if code == 0 else "failed"
    outcome.reason = "" if code == 0 else f"exit code {code}; see {folder}/logs"
    for line in (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []:
        row = json.loads(line)
        outcome.step = row["step"]
        outcome.train_loss = row["train/loss"]
        outcome.valid_loss = row.get("valid/loss", outcome.valid_loss)
    return outcome


def _keys(job: list[str]) -> dict[str, str]:
    return dict(setting.lstrip("+").split("=", 1) for setting in job if "=" in setting)


def _write_table(outcomes: list[Outcome], varied: list[str], path: Path) -> None:
    header = [*varied, "status", "step", "train/loss", "valid/loss", "reason"]
    rows = [
        [
            *(_keys(outcome.settings)[key] for key in varied),
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
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    print()
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\nresults: {path}")

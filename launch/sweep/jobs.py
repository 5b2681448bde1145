"""One job of a sweep: its config, what became of it, and the note of that in its folder."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch.ranks import Ended
from launch.sweep.config import SweepConfig
from launch.sweep.search import Proposal, Result
from train import branch, compose
from train.checkpoint import step_folders
from train.checkpoint.goes_on import read_state
from train.config import RunConfig
from train.files import replace_durably
from train.track.metrics_file import read_metrics

#: How a job ends: `failed` of its settings or of the machine, `diverged` of its numbers, `interrupted` by people.
STATUSES = ("finished", "pruned", "diverged", "failed", "interrupted", "not run")
NOTE = "outcome.json"
NOT_FINITE = 3  # the exit code of a run whose loss or gradient was not finite
MIN_PEERS = 3  # ended jobs that a median is taken of


@dataclass
class Outcome:
    """What became of one job. `history` is the metric by step; `value` its last one, NaN without any."""

    proposal: Proposal
    folder: Path
    status: str = "not run"
    reason: str = ""
    step: int = 0
    train_loss: float = math.nan
    valid_loss: float = math.nan
    value: float = math.nan
    history: dict[int, float] = field(default_factory=dict)

    def read(self, metric: str) -> None:
        """Take in what the job has measured so far."""
        path = self.folder / "metrics.jsonl"
        for row in read_metrics(path) if path.exists() else []:
            self.step, self.train_loss = int(row["step"]), row.get("train/loss", self.train_loss)
            self.valid_loss = row.get("valid/loss", self.valid_loss)
            if metric in row:
                self.history[self.step] = self.value = row[metric]

    def result(self) -> Result:
        """For the search."""
        return Result(self.status, self.value if math.isfinite(self.value) else None, self.history)


def configure(fixed: Sequence[str], proposal: Proposal, root: Path) -> RunConfig:
    """The config of a job, in a folder of its own, in wandb one of the sweep's group. ValueError if it is refused."""
    config = compose.compose([*fixed, *(f"{key}={value}" for key, value in proposal.values.items())])
    track = replace(config.track, group=config.track.group or root.name, name=config.track.name or proposal.name)
    moved = replace(config, run=replace(config.run, dir=str(root / proposal.name)), track=track)
    return branch.with_ancestry(moved, compose.text)  # a branch of its own, or what is left of it in its folder


def is_finished(config: RunConfig) -> bool:
    """Whether the job's folder holds the last checkpoint of just these settings, or one at the end of its patience."""
    resolved = Path(config.run.dir) / "config.yaml"
    if not resolved.exists() or resolved.read_text() != compose.text(config):
        return False
    folder = config.checkpoint.folder(config.run.dir)
    latest = step_folders.find_latest(folder)
    if latest is None or latest == step_folders.step_folder(folder, config.recipe().num_steps):
        return latest is not None
    patience = config.evaluate.patience
    return patience is not None and read_state(latest).num_evaluations_since_best >= patience


def remembered(outcome: Outcome, config: RunConfig, keep_failed: bool, pruner: str) -> bool:
    """Whether the job ended in an earlier sweep, and need not run again; its outcome is filled in then.

    What diverged or was pruned would do so again. A failed job may do better now, unless others were proposed in the
    knowledge that it failed (`keep_failed`). A pruned one that nothing prunes any more goes on.
    """
    try:
        note = json.loads((outcome.folder / NOTE).read_text())
    except (OSError, ValueError):
        note = {}
    status = note.get("status") if note.get("config") == compose.text(config) else None
    kept = {"diverged"} | ({"pruned"} if pruner != "none" else set()) | ({"failed"} if keep_failed else set())
    if status not in kept and not (status == "finished" and is_finished(config)):
        return False
    outcome.status, outcome.reason = status, note["reason"]
    return True


def conclude(outcome: Outcome, config: RunConfig, ended: Ended, hopeless: str) -> None:
    """Give the ended job its status, and note it in its folder. `hopeless`: why it was pruned; empty if it was not."""
    outcome.reason = hopeless or ended.reason
    if hopeless:
        outcome.status = "pruned"
    elif ended.code:
        outcome.status = "diverged" if ended.code == NOT_FINITE else "interrupted" if ended.was_asked else "failed"
    else:
        outcome.status = "interrupted" if ended.was_asked and not is_finished(config) else "finished"
    outcome.folder.mkdir(parents=True, exist_ok=True)
    note = {"status": outcome.status, "reason": outcome.reason, "config": compose.text(config)}
    replace_durably(outcome.folder / NOTE, json.dumps(note, indent=1).encode())


def hopeless_since(mine: Mapping[int, float], ended: Iterable[Outcome], config: SweepConfig) -> tuple[int, str] | None:
    """(step, sentence) where the pruner gives a job up; None while it has hope.

    The median rule: at some step after `sweep.prune_after_steps` its metric is worse than the median of those that
    ended jobs, at least three, had at that step. The same however far the job has come since.
    """
    if config.pruner != "median":
        return None
    peers = [each.history for each in ended if each.status in ("finished", "pruned")]
    sign = 1 if config.direction == "minimize" else -1
    for step, value in sorted(mine.items()):
        others = [history[step] for history in peers if math.isfinite(history.get(step, math.nan))]
        if step <= config.prune_after_steps or len(others) < MIN_PEERS:
            continue
        median = statistics.median(others)
        if not sign * value <= sign * median:
            return step, f"{config.metric} {value:.4f} at step {step}, worse than the median {median:.4f} of the others"
    return None

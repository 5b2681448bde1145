"""What a run's folder tells: its steps, loads, settings and checkpoints, and how it stands."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.checkpoint import step_folders
from train.settings import dotted
from train.track.events import EVENTS, Event, read_events
from train.track.metrics import source_of
from train.track.metrics_file import Loads, Samples, read_loads, read_metrics, read_samples
from train.track.patience import Patience

MAX_CHECKPOINTS = 50


@dataclass(frozen=True)
class Branch:
    """Where a run branched off another one: after how many steps and tokens, and (key, was, is) of what it changed."""

    run: str
    step: int
    tokens: int
    changes: list[tuple[str, Any, Any]]


@dataclass(frozen=True)
class Run:
    """One run as its files have it.

    Attributes:
        steps: name -> number, one per finished step.
        loads: expert loads of some of them.
        settings: dotted key -> value of its `config.yaml`.
        checkpoints: (name, bytes) of the complete ones, newest first.
        events: what happened to it as a job, in order.
        trouble: why it was stopped; empty where it was not.
        branches: from the first run to this one; its curves begin with those of the runs before.
        samples: how the model went on with the prompts, in some evaluations.
    """

    name: str
    folder: Path
    steps: list[dict[str, float]]
    loads: list[Loads] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[tuple[str, int]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    trouble: str = ""
    branches: list[Branch] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)

    @property
    def sources(self) -> list[str]:
        """The sources that have a validation loss of their own, in order."""
        names = dict.fromkeys(name for step in self.steps for name in step)
        return [source for name in names if (source := source_of(name)) is not None]

    @property
    def resumed(self) -> list[int]:
        """Steps after which it went on from a checkpoint."""
        return sorted({event.step for event in self.events if event.kind == "resume"})

    @property
    def since_resumed(self) -> list[dict[str, float]]:
        """The steps since it last went on from a checkpoint, perhaps elsewhere."""
        start = self.resumed[-1] if self.resumed else -1
        return [step for step in self.steps if step["step"] > start]

    @property
    def first_dense(self) -> int:
        """Layers before the first with experts."""
        return int(self.settings.get("model.first_k_dense_replace") or 0)

    @property
    def standing(self) -> str:
        """In a sentence: how far it came, and why not further."""
        last = int(self.steps[-1]["step"]) if self.steps else 0
        if self.trouble:
            return self.trouble
        end = self.settings.get("train.max_steps")
        if end is None:
            return f"after step {last}"
        if last < end and (patience := self._patience()).is_exhausted:
            return f"done after step {last} of {end}, as {patience.sentence}"
        return f"done after step {last}" if last >= end else f"not finished: step {last} of {end}"

    def _patience(self) -> Patience:
        """After all evaluations so far."""
        limit, least = (self.settings.get(f"evaluate.{key}") for key in ("patience", "min_improvement"))
        patience = Patience(limit, least or 0.0)
        for step in self.steps:
            if "valid/loss" in step:
                patience.see(step["valid/loss"])
        return patience


def read_run(folder: Path) -> Run:
    """The run in `folder`. ValueError when there is none; whatever else is missing is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{folder} is not the folder of a run: it has no metrics.jsonl")
    steps = read_metrics(path)
    config = folder / "config.yaml"
    settings = dotted(config.read_text(errors="replace")) if config.exists() else {}
    checkpoints = Path(settings.get("checkpoint.dir") or folder / "checkpoints")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        steps=steps,
        loads=read_loads(folder / "loads.jsonl"),
        settings=settings,
        checkpoints=_checkpoints(checkpoints),
        events=read_events(folder / EVENTS),
        samples=read_samples(folder / "samples.jsonl"),
        trouble=_trouble(folder / "not_finite.json", int(steps[-1]["step"]) if steps else 0),
        branches=_branches(settings.get("checkpoint.ancestry") or []),
    )


def find_runs(folder: Path) -> list[Path]:
    """A run's folder itself; of a sweep's folder, those of its jobs. ValueError where there is neither."""
    if (folder / "metrics.jsonl").exists():
        return [folder]
    jobs = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
    if not jobs:
        raise ValueError(f"run={folder} is no folder of a run or of a sweep: there is no metrics.jsonl in it")
    return jobs


def _branches(ancestry: list[dict[str, Any]]) -> list[Branch]:
    def changes(each: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        return [(change["key"], change["was"], change["now"]) for change in each["changes"]]

    return [Branch(each["run"], each["step"], each["tokens"], changes(each)) for each in ancestry]


def _checkpoints(root: Path) -> list[tuple[str, int]]:
    complete = step_folders.survey(root)[0] if root.is_dir() else []
    return [
        (folder.name, sum(entry.num_bytes for entry in step_folders.read_manifest(folder).values()))
        for folder in complete[:MAX_CHECKPOINTS]
    ]


def _trouble(path: Path, last_step: int) -> str:
    """What a report says of a run that stopped at a number that is not finite and has not come past it since."""
    try:
        step = int(json.loads(path.read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"diverged: loss or gradient not finite in step {step}" if step > last_step else ""

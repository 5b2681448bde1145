"""`sweep.*`: the settings of a sweep itself, which are no part of any job's config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from train.settings import section_of
from train.track.metrics import UNITS

SAMPLERS = ("grid", "tpe", "random")
PRUNERS = ("none", "median")
DIRECTIONS = ("minimize", "maximize")


@dataclass(frozen=True)
class SweepConfig:
    """How jobs are proposed, judged and run.

    Attributes:
        sampler: grid | tpe | random; None: tpe where a setting is an interval or `num_trials` is given, else grid.
        num_trials: jobs of a sampler that is no grid; None: 20.
        num_parallel: jobs that run at once and share this machine's cores.
        metric: what jobs are judged by, its last value; a name of `metrics.jsonl`.
        direction: minimize | maximize.
        seed: of the sampler.
        pruner: none | median: a job whose metric is worse than the median of ended jobs at the same step is stopped.
        prune_after_steps: the pruner looks at later steps only.
    """

    sampler: str | None = None
    num_trials: int | None = None
    num_parallel: int = 1
    metric: str = "valid/loss"
    direction: str = "minimize"
    seed: int = 0
    pruner: str = "none"
    prune_after_steps: int = 0

    def check(self) -> None:
        """ValueError for an unknown word, or a count below what makes sense."""
        known = {"sampler": (*SAMPLERS, None), "pruner": PRUNERS, "direction": DIRECTIONS, "metric": tuple(UNITS)}
        for name, words in known.items():
            value = getattr(self, name)
            if value not in words:
                raise ValueError(f"sweep.{name}={value} is not one of {', '.join(word or 'null' for word in words)}")
        for name, least in {"num_trials": 1, "num_parallel": 1, "seed": 0, "prune_after_steps": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"sweep.{name}={value} must be at least {least}")


def split(settings: Sequence[str]) -> tuple[SweepConfig, list[str]]:
    """The checked settings of the sweep, and what is left for its jobs. ValueError for an unknown key or value."""
    ours = [setting for setting in settings if setting.startswith("sweep.")]
    config = section_of(SweepConfig, ours, "sweep")
    config.check()
    return config, [setting for setting in settings if setting not in ours]

"""`sweep.*`: the settings of a sweep itself, which are no part of any job's config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from train.settings import read

SAMPLERS = ("grid", "tpe", "random")
PRUNERS = ("none", "median")
DIRECTIONS = ("minimize", "maximize")


@dataclass(frozen=True)
class SweepConfig:
    """`sweep`: how jobs of `--multirun` are proposed, judged and run.

    Attributes:
        sampler: `grid`: every combination; `tpe`, `random`: as Optuna draws them. None: `tpe` where a setting is an
            interval or `sweep.num_trials` is given, else `grid`.
        num_trials: jobs of a sampler; None is 20.
        num_parallel: jobs that run at once and share the cores.
        metric: what jobs are judged by: the last value of this metric of `metrics.jsonl`, as `valid/loss` or, of one
            source, `valid/web/loss`.
        direction: `minimize` or `maximize`.
        seed: draws what the sampler proposes.
        pruner: `none`, or `median`, which stops a job whose metric is worse than the median of ended jobs at the same
            step.
        prune_after_steps: the pruner looks at later steps only.
        plan: a cluster, as `cluster` of `plan` names it: a job that does not fit into its memory by its plan is refused
            before it starts, and the others go on. None: no job is planned.
    """

    sampler: str | None = None
    num_trials: int | None = None
    num_parallel: int = 1
    metric: str = "valid/loss"
    direction: str = "minimize"
    seed: int = 0
    pruner: str = "none"
    prune_after_steps: int = 0
    plan: str | None = None

    def check(self) -> None:
        """ValueError for an unknown word, or a count below what makes sense."""
        # Not above: who measures needs torch, who asks for help does not.
        from train.track.metrics import UNITS, source_of

        known = {"sampler": (*SAMPLERS, None), "pruner": PRUNERS, "direction": DIRECTIONS}
        if source_of(self.metric) is None:
            known["metric"] = tuple(UNITS)
        for name, words in known.items():
            value = getattr(self, name)
            if value not in words:
                raise ValueError(f"sweep.{name}={value} is not one of {', '.join(word or 'null' for word in words)}")
        for name, least in {"num_trials": 1, "num_parallel": 1, "seed": 0, "prune_after_steps": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"sweep.{name}={value} must be at least {least}")

    def check_source(self, sources: Sequence[str]) -> None:
        """ValueError where the metric is of a source that none of those is, which validate in the sweep's jobs."""
        from train.track.metrics import source_of

        source = source_of(self.metric)
        if source is not None and source not in sources:
            there = f"it has {', '.join(sources)}" if sources else "it has no blend and no data.valid_sources"
            raise ValueError(f"sweep.metric={self.metric}: the run has no source {source} that validates; {there}")


def split(settings: Sequence[str]) -> tuple[SweepConfig, list[str]]:
    """The checked settings of the sweep, and what is left for its jobs. ValueError for an unknown key or value."""
    ours = [setting for setting in settings if setting.startswith("sweep.")]
    return read(SweepConfig, ours, "sweep", "sweep."), [setting for setting in settings if setting not in ours]

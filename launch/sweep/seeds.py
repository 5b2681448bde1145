"""Jobs of a sweep that differ in `train.seed` alone: what their mean is, and how far seeds spread."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from launch.sweep.config import SweepConfig
from launch.sweep.jobs import STATUSES, Outcome

SEED = "train.seed"


@dataclass(frozen=True)
class Group:
    """Jobs of the same settings under several seeds, best first.

    Attributes:
        values: what varies between groups, by key; the seed is no part of it.
        outcomes: the jobs.
    """

    values: dict[str, str]
    outcomes: list[Outcome]

    @property
    def counted(self) -> list[Outcome]:
        """The jobs that the mean is over: those that finished with a number."""
        return [each for each in self.outcomes if each.status == "finished" and math.isfinite(each.value)]

    @property
    def value(self) -> Spread:
        """Mean and deviation of the metric that jobs are judged by."""
        return Spread.of([each.value for each in self.counted])

    @property
    def status(self) -> str:
        """What became of the jobs, in words: "finished", "2 finished, 1 diverged"."""
        counts = Counter(each.status for each in self.outcomes)
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (over n - 1) of some numbers; NaN where there are too few."""

    mean: float
    deviation: float
    count: int

    @staticmethod
    def of(numbers: Sequence[float]) -> Spread:
        deviation = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
        return Spread(statistics.fmean(numbers) if numbers else math.nan, deviation, len(numbers))

    def __str__(self) -> str:
        around = "" if math.isnan(self.deviation) else f" ± {self.deviation:.4f}"
        return f"{self.mean:.4f}{around}"


def is_seed(key: str) -> bool:
    """Whether a key, as it stands on a command line, is the seed."""
    return key.lstrip("+") == SEED


def grouped(outcomes: Sequence[Outcome], config: SweepConfig) -> list[Group]:
    """Groups, the best mean first; those with a job that did not finish come behind those without.

    outcomes: best first. A job whose settings nobody shares is a group of its own.
    """
    found: dict[tuple[tuple[str, str], ...], list[Outcome]] = {}
    for outcome in outcomes:
        values = {key: value for key, value in outcome.proposal.values.items() if not is_seed(key)}
        found.setdefault(tuple(values.items()), []).append(outcome)
    sign = 1 if config.direction == "minimize" else -1

    def order(group: Group) -> tuple[int, float, int]:
        worst = max(STATUSES.index(each.status) for each in group.outcomes)
        mean = group.value.mean
        first = min(each.proposal.number for each in group.outcomes)
        return worst, math.inf if math.isnan(mean) else sign * mean, first

    return sorted((Group(dict(values), jobs) for values, jobs in found.items()), key=order)

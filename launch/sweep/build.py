"""Settings of a sweep to what proposes its jobs; Optuna is imported only where it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.sweep.config import SweepConfig
from launch.sweep.search import Grid, Search
from train.compose import Swept


def sampler_of(config: SweepConfig, swept: Sequence[Swept]) -> str:
    """The sampler that is meant. ValueError where it cannot be: a grid has no intervals and counts its own jobs."""
    interval = next((each for each in swept if not each.choices), None)
    sampler = config.sampler or ("grid" if interval is None and config.num_trials is None else "tpe")
    if sampler == "grid" and interval is not None:
        raise ValueError(f"sweep.sampler=grid cannot visit an interval: list values of {interval.key}, or use tpe")
    if sampler == "grid" and config.num_trials is not None:
        raise ValueError(f"sweep.num_trials={config.num_trials} is for samplers: sweep.sampler=grid runs every job")
    if sampler != "grid" and not swept:
        raise ValueError(f"sweep.sampler={sampler} has nothing to choose: give a setting several values or an interval")
    return sampler


def build(config: SweepConfig, fixed: Sequence[str], swept: Sequence[Swept], root: Path) -> Search:
    """The search that a sweep asks for; a sampler's study lies in `root`.

    Raises ValueError as `sampler_of` does, where Optuna is needed and missing, and where the study in `root` is one of
    other settings.
    """
    sampler = sampler_of(config, swept)
    if sampler == "grid":
        return Grid(swept)
    try:
        from launch.sweep.optuna_search import Study
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        what = next((f"an interval ({each.key})" for each in swept if not each.choices), f"sweep.sampler={sampler}")
        raise ValueError(f"{what} needs Optuna, which is not installed: pip install 'halocline[sweep]'") from None
    return Study(root / "study.db", sampler, config, fixed, swept)

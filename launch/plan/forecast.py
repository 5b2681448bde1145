"""A run's plan on the machine that it is about to run on, as a file that the run reads at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from launch.plan import cluster
from launch.plan.cluster import Cluster
from launch.plan.job import Plan
from launch.plan.timed import timed_of
from launch.plan.unmeasured import unmeasured
from train import compose
from train.files import replacing


def write_plan(resolved: Path, found: Mapping[str, Any], out: Path) -> None:
    """Plan the run of a resolved config and write `step_s`, `peak_bytes` and `reason` (why one of them is missing, or
    empty). found: what the ranks that timed its layers have left. Never raises for what a plan runs into."""
    torch.set_num_threads(1)
    try:
        figures = planned(resolved, found)
    except Exception as error:  # whatever it is, it ends no run
        figures = {"reason": " ".join(str(error).split()) or type(error).__name__}
    with replacing(out, durable=False) as aside:
        aside.write_text(json.dumps(figures))


def planned(resolved: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures, as far as they can be had."""
    timed = timed_of(found)
    figures = None if timed.times is not None else measured()
    plan = Plan(compose.load(resolved), figures or unmeasured(), timed=timed)
    peak_bytes = max(rank.total for rank in plan.ranks)
    if timed.times is None and figures is None:
        how = "python -m launch plan calibrate measures this machine"
        return {"peak_bytes": peak_bytes, "reason": f"{timed.reason}, and {how}"}
    return {"peak_bytes": peak_bytes, "step_s": plan.step().step_s, "reason": ""}


def measured() -> Cluster | None:
    """This machine's figures, if `plan calibrate` has measured them. Reading them takes a second, so that nobody asks
    who has timed the run's own layers."""
    try:
        return cluster.load("here")
    except ValueError:
        return None

"""`python -m launch plan compare`: plans side by side, of settings with several values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.plan import answer
from launch.plan.cluster import Cluster
from launch.plan.job import Plan
from launch.plan.kernels import KERNELS
from launch.plan.world import MakeRouting
from launch.sweep.search import Grid
from train import compose


@dataclass(frozen=True)
class Compared:
    """One of the runs: its name by what varies, and its plan, or the rule that refuses it."""

    name: str
    values: Mapping[str, str]
    plan: Plan | None
    refused: str = ""


def compared(words: Sequence[str], figures: Cluster, make_routing: MakeRouting) -> list[Compared]:
    """The runs of these settings, in the order of the values. Layers that several have are traced once.

    ValueError where no setting has several values, or where all runs are refused.
    """
    fixed, swept = compose.space(words)
    if not any(len(each.choices) > 1 for each in swept) or not all(each.choices for each in swept):
        raise ValueError("plan compare needs a setting with several values: pipeline.schedule=1f1b,dualpipe")
    grid, kept = Grid(swept), dict[str, Any]()
    found: list[Compared] = []
    while (job := grid.ask()) is not None:
        try:
            config = compose.compose([*fixed, *(f"{key}={value}" for key, value in job.values.items())])
            # The full batch decides which schedules are possible.
            planned = Plan(config, figures, make_routing=make_routing, kept=kept)
            _ = planned.schedule
            found.append(Compared(job.name, job.values, planned))
        except ValueError as error:
            found.append(Compared(job.name, job.values, None, str(error)))
    if all(each.plan is None for each in found):
        raise ValueError(found[0].refused)
    return found


def table(runs: Sequence[Compared]) -> str:
    """A line for each run, the quickest first; those that are refused at the end, with the rule."""
    planned = [each for each in runs if each.plan is not None]
    columns = {each.name: row(each.plan) for each in planned if each.plan is not None}
    planned.sort(key=lambda each: columns[each.name]["as_written"]["step_s"])
    width = max(len(each.name) for each in runs)
    lines = [
        f"{'':<{width}}  {'step, s: as written':>19}{'published':>11}{'bound':>8}{'bubble':>9}{'MFU':>8}"
        f"{'tokens/s':>10}{'memory, GB':>12}"
    ]
    for each in planned:
        found = columns[each.name]
        steps = [found[kernels]["step_s"] for kernels in KERNELS]
        written = found["as_written"]
        lines.append(
            f"{each.name:<{width}}  {steps[0]:>19.3f}{steps[1]:>11.3f}{steps[2]:>8.3f}"
            f"{written['bubble_share']:>9.1%}{written['mfu_causal']:>8.1%}{written['tokens_per_s_per_gpu']:>10,.0f}"
            f"{found['peak_bytes'] / answer.GB:>12.1f}{'' if found['fits'] else ' does not fit'}"
        )
    lines += [f"{each.name:<{width}}  {each.refused}" for each in runs if each.plan is None]
    return "\n".join(lines)


def row(plan: Plan) -> dict[str, Any]:
    """What is compared of a plan."""
    found: dict[str, Any] = {"fits": answer.fits(plan), "peak_bytes": max(rank.total for rank in plan.ranks)}
    for kernels in KERNELS:
        step = plan.step(kernels)
        found[kernels] = {
            "step_s": step.step_s,
            "bubble_share": step.parts_s["bubble"] / step.step_s,
            "mfu_causal": plan.mfu(kernels),
            "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu(kernels),
        }
    return found


def numbers(runs: Sequence[Compared]) -> str:
    """All runs as one object for scripts."""
    return json.dumps(
        [
            {"values": dict(each.values), **(row(each.plan) if each.plan is not None else {"refused": each.refused})}
            for each in runs
        ],
        indent=1,
    )

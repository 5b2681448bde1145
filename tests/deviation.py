"""How far a run lies from the plain one: every step's numbers, every weight and router bias at the end."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tests.plain_run import PlainRun
from tests.runs import Finished, relative

# The rest of `train/*` and `moe/*` is settings, or follows from placement.
NUMBERS = (
    *("train/loss", "train/mtp_loss", "train/seq_balance_loss", "train/grad_norm"),
    *("train/device_balance_loss", "train/comm_balance_loss"),
    *("moe/max_vio", "moe/min_load"),
)


def worst(run: Finished, plain: PlainRun) -> float:
    """Largest relative deviation from the plain run of anything."""
    return max({**of_rows(run, plain), **of_states(run, plain)}.values())


def between(run: Finished, other: Finished) -> dict[str, float]:
    """Relative deviation of one run from another: each number of each step, each tensor of the last checkpoint."""
    ours, theirs = run.masters, other.masters
    assert ours.keys() == theirs.keys()
    return {**of_rows(run, other), **{name: relative(ours[name], theirs[name]) for name in theirs}}


def of_rows(run: Finished, plain: PlainRun | Finished) -> dict[str, float]:
    """Relative deviation of each number of each step, as "KEY of step S"; both runs must report the same numbers."""
    assert [row["step"] for row in run.rows] == [row["step"] for row in plain.rows]
    found = {}
    for ours, theirs in zip(run.rows, plain.rows, strict=True):
        keys = compared(theirs)
        assert keys == compared(ours), (ours, theirs)
        for key in keys:
            scale = max(abs(theirs[key]), 1e-12)
            found[f"{key} of step {theirs['step']}"] = abs(ours[key] - theirs[key]) / scale
    return found


def compared(row: Mapping[str, float]) -> list[str]:
    """Which of a step's numbers two runs must have alike."""
    return sorted(key for key in row if key in NUMBERS or key.startswith("valid/"))


def of_states(run: Finished, plain: PlainRun) -> dict[str, float]:
    """Relative deviation of each weight, and of all router biases together, in the last checkpoint."""
    states = run.masters
    found = {name: relative(states[f"master.{name}"], weight.flatten()) for name, weight in plain.weights.items()}
    # Routers are numbered as the layers are, those of the prediction depths last.
    names = sorted((name for name in states if name.endswith("e_score_correction_bias")), key=_router_order)
    assert len(names) == len(plain.biases)
    if names:
        found["router biases"] = relative(torch.stack([states[name] for name in names]), plain.biases)
    return found


def _router_order(name: str) -> tuple[bool, int]:
    """Sorts "layers.10.…" behind "layers.9.…", and "mtp.0.…" behind both."""
    kind, number = name.split(".")[:2]
    return kind == "mtp", int(number)

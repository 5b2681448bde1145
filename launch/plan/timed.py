"""Has a run's own layers timed on this machine, where that can be done, and says why not where it cannot."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from launch.plan.here import OWN_LAYERS, found_by, too_many
from launch.plan.own_layers import Timed, from_plain
from train import compose
from train.config import RunConfig

# How long layers are timed for a plan, behind a first step.
PLAN_S = 3.0


def timed(config: RunConfig, budget_s: float = PLAN_S) -> Timed:
    """Start as many ranks as the run has, and time its layers in them. Never raises for what ranks run into."""
    if reason := too_many(config):
        return Timed(None, reason)
    with tempfile.NamedTemporaryFile("w", prefix="halocline-", suffix=".yaml") as resolved:
        resolved.write(compose.text(config))
        resolved.flush()
        try:
            found = found_by(OWN_LAYERS, [resolved.name, str(budget_s)], config.parallel.world_size)
        except ValueError as error:
            return Timed(None, f"the run's layers could not be timed: {error}")
    return timed_of(found)


def timed_of(found: Mapping[str, Any]) -> Timed:
    """What rank 0 has left."""
    return Timed(None, found["reason"]) if "reason" in found else Timed(from_plain(found))

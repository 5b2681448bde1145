"""What experts get, as the settings of the verb say it; made for a run when its mesh is known, in any process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.plan.routing import Routing
from launch.plan.world import MakeRouting, balanced
from parallel.expert.placement import Placement
from train.config import RunConfig
from train.track.metrics_file import read_loads


@dataclass(frozen=True)
class Counted:
    """As a run has counted it: loads [routers][E]."""

    loads: list[list[int]]

    def __call__(self, config: RunConfig, placement: Placement) -> Routing | None:
        if not config.model.n_routed_experts:
            return None
        return Routing.of_loads(config.model, placement, _num_tokens(config), self.loads)


@dataclass(frozen=True)
class Uneven:
    """As unequal as a MaxVio says."""

    max_vio: float

    def __call__(self, config: RunConfig, placement: Placement) -> Routing | None:
        if not config.model.n_routed_experts:
            return None
        return Routing.with_max_vio(config.model, placement, _num_tokens(config), self.max_vio)


def make_routing(max_vio: float, loads: Path | None) -> MakeRouting:
    """From a run's file of loads, a MaxVio, or in balance. ValueError for a file without loads."""
    if loads is None:
        return Uneven(max_vio) if max_vio else balanced
    rows = read_loads(loads)
    if not rows:
        raise ValueError(f"loads={loads} holds no step")
    return Counted(rows[-1].loads)


def _num_tokens(config: RunConfig) -> int:
    return config.train.micro_batch_size * config.train.seq_len

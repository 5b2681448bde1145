"""`sweep.plan`: jobs that cannot fit into a cluster's memory are refused before a rank starts."""

from __future__ import annotations

from typing import Any

from launch.plan import cluster
from launch.plan.job import Plan
from train.config import RunConfig


class Fits:
    """Plans the memory of jobs on one cluster; layers that several have are traced once.

    Raises ValueError for a cluster that is not known, or whose file cannot be.
    """

    def __init__(self, name: str, key: str = "sweep.plan") -> None:
        """key: the setting that names the cluster."""
        self._said, self._figures = f"{key}={name}", cluster.load(name)
        self._kept: dict[str, Any] = {}

    def check(self, config: RunConfig) -> None:
        """ValueError for a job with a rank that needs more than a device has."""
        ranks = [rank.total for rank in Plan(config, self._figures, kept=self._kept).ranks]
        most, device = max(ranks), self._figures.memory.device_gb * 1e9
        if most > device:
            raise ValueError(
                f"{self._said}: pipeline rank {ranks.index(most)} needs {most / 1e9:.1f} GB and a device "
                f"has {device / 1e9:.1f}; python -m launch plan says where it goes, and what frees most"
            )

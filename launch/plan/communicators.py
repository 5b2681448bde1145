"""How many communicators a rank is in, each of which takes memory of a device."""

from __future__ import annotations

from parallel.mesh import Mesh
from parallel.process import held_groups
from train.config import RunConfig


def link_groups(num_links: int, device: str) -> int:
    """Communicators of a rank for so many one-way links to its neighbours: on cuda one for all ranks of a pipeline."""
    return min(num_links, 1) if device == "cuda" else num_links


def num_groups(config: RunConfig, device: str, pp_rank: int = 0) -> int:
    """Communicators of a rank beside its links; the ranks at a pipeline's ends have the most."""
    mesh = Mesh(config.parallel, pp_rank * config.parallel.dp, config.mirrored, config.shared_ends)
    return sum(map(len, held_groups(mesh, "nccl" if device == "cuda" else "gloo").values()))

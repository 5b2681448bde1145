"""The one true gradient norm: each logical parameter once, the identical number on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import ordered_sum
from parallel.zero.sets import ParamSet, ReplicaGroups, group_size

# Elements that are squared at a time: their fp64 copy (1 MiB) stays in the cache.
_CHUNK = 1 << 17


def sum_of_squares(shards: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of all elements, in fp64 (where no fp32 square overflows), as a tensor of one element."""
    parts = [
        torch.linalg.vector_norm(chunk.double()).square()
        for shard in shards
        for chunk in shard.split(_CHUNK if shard.device.type == "cpu" else 1 << 26)
    ]
    return torch.stack(parts).sum().reshape(1) if parts else torch.zeros(1, dtype=torch.float64, device=device)


def _over(group: dist.ProcessGroup | None, value: Tensor) -> Tensor:
    return value if group is None or group_size(group) == 1 else ordered_sum(value, group)


def global_norm(sets: Sequence[ParamSet], shards: Sequence[Tensor], groups: ReplicaGroups) -> float:
    """L2 norm of the whole model's gradient from this rank's reduced shards.

    Dense shards are summed over the dense replicas; expert shards over the expert replicas and then over the expert
    group, whose members hold different experts; both over the groups of `groups.norm`. Sums are taken in rank order in
    fp64, so that all ranks get the same bits and decide alike. Not finite when any gradient on any rank is not.
    """
    device = shards[0].device
    dense = [shard for each, shard in zip(sets, shards, strict=True) if not each.expert]
    experts = [shard for each, shard in zip(sets, shards, strict=True) if each.expert]
    total = _over(groups.dense, sum_of_squares(dense, device))
    if experts:
        total = total + _over(groups.ep, _over(groups.expert, sum_of_squares(experts, device)))
    for group in groups.norm:
        total = _over(group, total)
    return math.sqrt(total.item())

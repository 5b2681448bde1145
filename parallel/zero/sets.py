"""Parameters that are reduced and stepped together: one replica group, one decay class, one dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.shards import FlatLayout, ParamInfo


@dataclass(frozen=True)
class ReplicaGroups:
    """Process groups of this rank; None stands for this rank alone.

    Attributes:
        dense: ranks that hold the same dense parameters.
        expert: ranks that hold the same experts.
        embedding: ranks that hold the embedding; unused where this rank does not.
        world: all ranks, which together hold every parameter's every shard once.
    """

    dense: dist.ProcessGroup | None = None
    expert: dist.ProcessGroup | None = None
    embedding: dist.ProcessGroup | None = None
    world: dist.ProcessGroup | None = None

    def of(self, replicas: str) -> dist.ProcessGroup | None:
        """The group of `ParamInfo.replicas`."""
        return {"dense": self.dense, "expert": self.expert, "embedding": self.embedding}[replicas]


def group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


@dataclass(frozen=True)
class ParamSet:
    """Parameters of one replica group, one decay class and one dtype, in the order of the model."""

    infos: tuple[ParamInfo, ...]
    params: tuple[nn.Parameter, ...]
    group: dist.ProcessGroup | None
    weight_decay: float

    @property
    def num_shards(self) -> int:
        return group_size(self.group)

    @property
    def shard(self) -> int:
        """Number of the shard that this rank owns."""
        return group_rank(self.group)

    @property
    def numels(self) -> tuple[int, ...]:
        return tuple(param.numel() for param in self.params)

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    @property
    def master_dtype(self) -> torch.dtype:
        """Dtype of master weights and of accumulated gradients: fp32, and fp64 for fp64 parameters."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def split_sets(
    params: Sequence[tuple[ParamInfo, nn.Parameter, bool]], groups: ReplicaGroups, weight_decay: float
) -> list[ParamSet]:
    """Sort (place, parameter, decays) into sets. The order of sets is the same on every rank of a replica group."""
    kinds: dict[tuple[str, bool, str], list[tuple[ParamInfo, nn.Parameter]]] = {}
    for info, param, decay in params:
        if param.numel():
            kinds.setdefault((info.replicas, not decay, str(param.dtype)), []).append((info, param))
    return [
        ParamSet(
            infos=tuple(info for info, _ in members),
            params=tuple(param for _, param in members),
            group=groups.of(replicas),
            weight_decay=0.0 if no_decay else weight_decay,
        )
        for (replicas, no_decay, _), members in sorted(kinds.items(), key=lambda item: item[0])
    ]


def views(flat: Tensor, layout: FlatLayout, params: Sequence[nn.Parameter]) -> list[Tensor]:
    """The ranges of a flat buffer in the shapes of the parameters."""
    return [
        flat[start : start + param.numel()].view(param.shape)
        for start, param in zip(layout.starts, params, strict=True)
    ]

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
        ep: ranks that hold each other's missing experts; dense = expert x ep.
        norm: further groups, in order, over which the squared gradient norm is summed: ranks that hold other
            parameters of the model (pipeline stages).
    """

    dense: dist.ProcessGroup | None = None
    expert: dist.ProcessGroup | None = None
    ep: dist.ProcessGroup | None = None
    norm: tuple[dist.ProcessGroup, ...] = ()


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
    expert: bool
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
    kinds: dict[tuple[bool, bool, str], list[tuple[ParamInfo, nn.Parameter]]] = {}
    for info, param, decay in params:
        if param.numel():
            kinds.setdefault((info.expert, not decay, str(param.dtype)), []).append((info, param))
    return [
        ParamSet(
            infos=tuple(info for info, _ in members),
            params=tuple(param for _, param in members),
            group=groups.expert if expert else groups.dense,
            expert=expert,
            weight_decay=0.0 if no_decay else weight_decay,
        )
        for (expert, no_decay, _), members in sorted(kinds.items(), key=lambda item: item[0])
    ]


def views(flat: Tensor, layout: FlatLayout, params: Sequence[nn.Parameter]) -> list[Tensor]:
    """The ranges of a flat buffer in the shapes of the parameters."""
    return [
        flat[start : start + param.numel()].view(param.shape)
        for start, param in zip(layout.starts, params, strict=True)
    ]

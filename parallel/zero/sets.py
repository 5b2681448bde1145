"""Parameters that are reduced and stepped together: one replica group, inner optimizer, weight decay and dtype, and the
same slices of the model, as their gradients are complete at one moment and their weights needed at one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.everyone import Everyone
from parallel.shards import FlatLayout, ParamInfo, segments
from parallel.zero.inner import InnerOptimizer


@dataclass(frozen=True)
class ReplicaGroups:
    """Process groups of this rank; None stands for this rank alone.

    Attributes:
        dense: ranks that hold the same dense parameters.
        expert: ranks that hold the same experts.
        embedding: ranks that hold the embedding; unused where this rank does not.
        world: all ranks, which together hold every parameter's every shard once; as it stands, this rank alone.
    """

    dense: dist.ProcessGroup | None = None
    expert: dist.ProcessGroup | None = None
    embedding: dist.ProcessGroup | None = None
    world: Everyone = field(default_factory=Everyone)

    def of(self, replicas: str) -> dist.ProcessGroup | None:
        """The group of `ParamInfo.replicas`."""
        return {"dense": self.dense, "expert": self.expert, "embedding": self.embedding}[replicas]


def group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


@dataclass(frozen=True)
class ParamSet:
    """Parameters of one replica group, inner optimizer, weight decay and dtype, in the order of the model.

    frozen: whether they stay as they are. They keep their masters and moments, and have no part in steps and norms.
    slices: as in `ParamInfo`; empty for parameters of any slices.
    """

    infos: tuple[ParamInfo, ...]
    params: tuple[nn.Parameter, ...]
    group: dist.ProcessGroup | None
    inner: InnerOptimizer
    weight_decay: float
    frozen: bool = False
    slices: tuple[int, ...] = ()

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
    def matrix_shapes(self) -> list[tuple[int, int]]:
        """(rows, columns) of the matrices that each parameter is a stack of; all must be."""
        shapes = [info.matrix for info in self.infos if info.matrix is not None]
        assert len(shapes) == len(self.infos), f"{self.inner.name} updates matrices, and was given a vector"
        return shapes

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    @property
    def master_dtype(self) -> torch.dtype:
        """Dtype of master weights and of accumulated gradients: fp32, and fp64 for fp64 parameters."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def split_sets(
    params: Sequence[tuple[ParamInfo, nn.Parameter, InnerOptimizer, float]],
    groups: ReplicaGroups,
    frozen: Collection[str] = (),
) -> list[ParamSet]:
    """Sort (place, parameter, inner optimizer, weight decay) into sets: in one order on all replicas, those first that
    the first slices of the model need.

    Where an optimizer looks at whole matrices, those of all slices are dealt out together: they are few.
    """
    kinds: dict[_Key, list[tuple[ParamInfo, nn.Parameter, InnerOptimizer]]] = {}
    for info, param, inner, weight_decay in params:
        if param.numel():
            slices = () if inner.whole_matrices else info.slices
            key = _Key(slices, info.replicas, weight_decay, str(param.dtype), inner.name, info.name in frozen)
            kinds.setdefault(key, []).append((info, param, inner))
    return [
        ParamSet(
            infos=tuple(info for info, _, _ in members),
            params=tuple(param for _, param, _ in members),
            group=groups.of(key.replicas),
            inner=members[0][2],
            weight_decay=key.weight_decay,
            frozen=key.frozen,
            slices=key.slices,
        )
        for key, members in sorted(kinds.items(), key=lambda item: item[0].order)
    ]


class _Key(NamedTuple):
    """What the parameters of a set have in common."""

    slices: tuple[int, ...]
    replicas: str
    weight_decay: float
    dtype: str
    inner: str
    frozen: bool

    @property
    def order(self) -> tuple[Any, ...]:
        return (self.slices, self.replicas, not self.weight_decay, *self[2:])


def matrices(each: ParamSet, layout: FlatLayout) -> list[tuple[int, int, int]]:
    """(start in this rank's shard, rows, columns) of every matrix that the shard holds, all of which are whole."""
    found, shapes = [], each.matrix_shapes
    for part in segments(layout, each.shard):
        rows, columns = shapes[part.index]
        starts = range(part.in_shard, part.in_shard + part.numel, rows * columns)
        assert part.in_tensor % (rows * columns) == 0 and part.numel % (rows * columns) == 0, "a shard cuts a matrix"
        found += [(start, rows, columns) for start in starts]
    return found


def views(flat: Tensor, layout: FlatLayout, params: Sequence[nn.Parameter]) -> list[Tensor]:
    """The ranges of a flat buffer in the shapes of the parameters."""
    return [
        flat[start : start + param.numel()].view(param.shape)
        for start, param in zip(layout.starts, params, strict=True)
    ]

"""Which flat range of which global tensor a rank holds: pure arithmetic, no communication.

A rank's parameters of one kind lie end to end in a flat buffer (`FlatLayout`), the buffer is cut into equal shards, one
per replica, and a shard cuts through parameters wherever it falls. Everything that outlives a topology (masters,
moments) is therefore named by (global tensor, flat offset in it): `Piece`. Any other topology, engine or schedule can
read those, because flat ranges of global tensors mean the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ParamInfo:
    """The place of a rank's local parameter inside the global tensor of the same name.

    Attributes:
        name: full parameter name, the same on every rank.
        global_shape: shape of the whole tensor, over all ranks.
        local_offset: flat offset (elements) in the global tensor at which the local parameter starts. The local
            parameter is one contiguous range of it.
        replicas: which ranks hold the same: "dense", "expert" (ranks of an expert group hold different experts) or
            "embedding" (the stages at both ends of a pipeline may share it).
    """

    name: str
    global_shape: tuple[int, ...]
    local_offset: int = 0
    replicas: str = "dense"

    @property
    def global_numel(self) -> int:
        return math.prod(self.global_shape)


@dataclass(frozen=True)
class Piece:
    """A contiguous range of a global tensor: `tensor` is 1-D and starts at flat `offset` (elements)."""

    offset: int
    tensor: Tensor


def stacked_experts(name: str, local_shape: Sequence[int], num_experts: int, first_expert: int) -> ParamInfo:
    """Place of a stacked parameter [E_local, ...] inside [num_experts, ...].

    Raises ValueError when the local experts do not lie inside the global ones.
    """
    num_local, *expert_shape = local_shape
    if not 0 <= first_expert <= num_experts - num_local:
        raise ValueError(
            f"{name}: experts {first_expert} to {first_expert + num_local - 1} are not among {num_experts}"
        )
    return ParamInfo(name, (num_experts, *expert_shape), first_expert * math.prod(expert_shape), "expert")


@dataclass(frozen=True)
class FlatLayout:
    """Tensors end to end in a flat buffer of `numel` elements that is cut into `num_shards` equal shards.

    `starts[i]` and `numels[i]` are the place and the size (elements) of tensor i; what lies between and after them is
    padding.
    """

    starts: tuple[int, ...]
    numels: tuple[int, ...]
    numel: int
    num_shards: int

    @property
    def shard_numel(self) -> int:
        return self.numel // self.num_shards

    def shard_slice(self, shard: int) -> slice:
        """The range of the flat buffer that shard number `shard` covers."""
        return slice(shard * self.shard_numel, (shard + 1) * self.shard_numel)


def lay_out(numels: Sequence[int], num_shards: int, align: int = 1, align_shard: int = 1) -> FlatLayout:
    """Place tensors of `numels` elements in order at multiples of `align`, shards at multiples of `align_shard`."""
    starts, end = [], 0
    for numel in numels:
        start = -(-end // align) * align
        starts.append(start)
        end = start + numel
    step = num_shards * align_shard
    return FlatLayout(tuple(starts), tuple(numels), -(-end // step) * step, num_shards)


@dataclass(frozen=True)
class Segment:
    """What a shard has of tensor `index`: `numel` elements, that start at `in_tensor` there and at `in_shard` here."""

    index: int
    in_tensor: int
    in_shard: int
    numel: int


def segments(layout: FlatLayout, shard: int) -> list[Segment]:
    """What shard number `shard` holds of each tensor, in order; tensors outside of it are left out."""
    bounds = layout.shard_slice(shard)
    found = []
    for index, (start, numel) in enumerate(zip(layout.starts, layout.numels, strict=True)):
        first, last = max(start, bounds.start), min(start + numel, bounds.stop)
        if first < last:
            found.append(Segment(index, first - start, first - bounds.start, last - first))
    return found


def shard_pieces(infos: Sequence[ParamInfo], layout: FlatLayout, shard: int, values: Tensor) -> dict[str, list[Piece]]:
    """Name the ranges of a shard by their global tensors.

    Args:
        infos: one per tensor of the layout.
        values: what shard number `shard` holds, 1-D with `layout.shard_numel` elements.

    Returns: parameter name to pieces, which are views into `values`: writing to them writes to the shard. A parameter
        of which the shard holds nothing is absent.
    """
    return {
        infos[part.index].name: [
            Piece(infos[part.index].local_offset + part.in_tensor, values[part.in_shard : part.in_shard + part.numel])
        ]
        for part in segments(layout, shard)
    }

"""Which flat range of which global tensor a rank holds: pure arithmetic, no communication.

A rank's parameters of one kind lie end to end in a flat buffer (`FlatLayout`), and the buffer is cut into shards, one
per replica: equal ones that cut through parameters wherever they fall, or ones of whole matrices. Everything that
outlives a topology (masters, moments) is therefore named by (global tensor, flat offset in it): `Piece`. Any other
topology, engine or schedule can read those, because flat ranges of global tensors mean the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

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
        matrix: (rows, columns) of the matrices that the parameter is a stack of, one after the other; None for a
            vector. An optimizer that looks at whole matrices looks at these.
        slices: the slices of the model that use it, by position in the pipeline, wherever they live; empty where the
            model is not cut, or nobody asks.
    """

    name: str
    global_shape: tuple[int, ...]
    local_offset: int = 0
    replicas: str = "dense"
    matrix: tuple[int, int] | None = None
    slices: tuple[int, ...] = ()

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
    """Tensors end to end in a flat buffer that is cut into shards.

    Attributes:
        starts, numels: place and size (elements) of each tensor; what lies between and after them is padding.
        bounds: where each shard begins, and where the last one ends.
    """

    starts: tuple[int, ...]
    numels: tuple[int, ...]
    bounds: tuple[int, ...]

    @property
    def numel(self) -> int:
        return self.bounds[-1]

    @property
    def shard_numels(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in pairwise(self.bounds))

    def shard_slice(self, shard: int) -> slice:
        """The range of the flat buffer that shard number `shard` covers."""
        return slice(self.bounds[shard], self.bounds[shard + 1])


def lay_out(numels: Sequence[int], num_shards: int, align: int = 1, align_shard: int = 1) -> FlatLayout:
    """Tensors of `numels` elements in order at multiples of `align`; equal shards, of multiples of `align_shard`."""
    starts, end = _starts(numels, align)
    step = num_shards * align_shard
    shard_numel = -(-end // step) * align_shard
    return FlatLayout(starts, tuple(numels), tuple(shard_numel * shard for shard in range(num_shards + 1)))


def lay_out_whole(
    numels: Sequence[int], num_matrices: Sequence[int], costs: Sequence[float], num_shards: int, align: int = 1
) -> FlatLayout:
    """Tensors in order at multiples of `align`; shards of whole matrices, the dearest of them as cheap as can be.

    Args:
        numels: elements of each tensor.
        num_matrices: of how many equal matrices, one after the other, each tensor consists.
        costs: what one matrix of each tensor costs its owner.
    """
    starts, end = _starts(numels, align)
    matrices = [
        (start + number * (numel // count), cost)
        for start, numel, count, cost in zip(starts, numels, num_matrices, costs, strict=True)
        for number in range(count)
    ]
    low, high = max(costs), list(accumulate(cost for _, cost in matrices))[-1]
    if len(_fill(matrices, low)) <= num_shards:
        high = low
    # The smallest capacity that needs no more shards than there are: of two neighbouring floats the upper one.
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if len(_fill(matrices, middle)) <= num_shards else (middle, high)
    firsts = _fill(matrices, high)
    bounds = [0, *firsts[1:], *[end] * (num_shards - len(firsts)), end]
    return FlatLayout(starts, tuple(numels), tuple(bounds))


def _starts(numels: Sequence[int], align: int) -> tuple[tuple[int, ...], int]:
    """Where tensors start when each starts at the next multiple of `align`, and where the last one ends."""
    starts, end = [], 0
    for numel in numels:
        starts.append(-(-end // align) * align)
        end = starts[-1] + numel
    return tuple(starts), end


def _fill(matrices: Sequence[tuple[int, float]], capacity: float) -> list[int]:
    """Where each shard's first matrix starts if shards take matrices (start, cost) in order, each up to `capacity`."""
    firsts: list[int] = []
    load = math.inf
    for start, cost in matrices:
        if load + cost > capacity:
            firsts.append(start)
            load = 0.0
        load += cost
    return firsts


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
        values: what shard number `shard` holds, 1-D with `layout.shard_numels[shard]` elements.

    Returns: parameter name to pieces, which are views into `values`: writing to them writes to the shard. A parameter
        of which the shard holds nothing is absent.
    """
    return {
        infos[part.index].name: [
            Piece(infos[part.index].local_offset + part.in_tensor, values[part.in_shard : part.in_shard + part.numel])
        ]
        for part in segments(layout, shard)
    }

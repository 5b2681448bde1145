"""The one true gradient norm: each logical parameter once, the identical number on every rank."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from parallel.everyone import Everyone
from parallel.host import Host
from parallel.watch import Watch

# Elements that are squared in fp32 before the sum goes on in fp64, on CPUs.
_ROW = 4096
# Mean square below which fp32 squares of the smaller elements would be lost to its least exponent (2^-126).
_LEAST_MEAN_SQUARE = 2.0**-100
# Elements whose fp64 copy is made at a time: 1 MiB, which stays in the cache, and 512 MiB.
_CHUNK_CPU = 1 << 17
_CHUNK_GPU = 1 << 26


def squares(kernels: str, host: Host) -> Callable[[Tensor], Tensor]:
    """How the squares of a 1-D tensor are summed for "cpu" or "cuda" kernels: to an fp64 tensor of shape [1]."""
    if kernels == "cpu":
        return partial(sum_of_squares, host=host)
    return partial(_wide_sum_of_squares, chunk_size=_CHUNK_GPU)


def sum_of_squares(shard: Tensor, host: Host) -> Tensor:
    """Sum of squares of a 1-D tensor on a CPU, an fp64 tensor of shape [1], finite wherever the elements are.

    fp32: rows of 4096 are summed in fp32 and the rows in fp64, seven times faster than widening all elements;
    where a square could leave the range of fp32, all of it is done in fp64.
    """
    if shard.dtype == torch.float32:
        whole = shard.numel() // _ROW * _ROW
        parts = torch.linalg.vector_norm(shard[:whole].view(-1, _ROW), dim=1), shard[whole:].abs()
        total = torch.cat(parts).double().square().sum()
        if _LEAST_MEAN_SQUARE * shard.numel() < host.look(total) < math.inf:
            return total.reshape(1)
    return _wide_sum_of_squares(shard, _CHUNK_CPU)


def _wide_sum_of_squares(shard: Tensor, chunk_size: int) -> Tensor:
    """All of it in fp64, a chunk at a time."""
    chunks = shard.split(chunk_size)
    return torch.stack([torch.linalg.vector_norm(chunk.double()).square() for chunk in chunks]).sum().reshape(1)


def global_norm(shards: Sequence[Tensor], world: Everyone, host: Host, watch: Watch, kernels: str = "cpu") -> float:
    """L2 norm of the whole model's gradient from all ranks' reduced shards.

    Over all ranks the shards hold every element of every parameter exactly once, whatever its replicas are: experts,
    pipeline stages and their mirrors need no word here. Sums are taken in rank order in fp64, so that all ranks get the
    same bits and decide alike. Not finite when any gradient on any rank is not. A rank may have no shard.
    kernels: cpu or cuda.
    """
    sum_up = squares(kernels, host)
    total = host.put(torch.zeros(1, dtype=torch.float64))
    for shard in shards:
        total += sum_up(shard)
    total = world.all_gather(total, watch, "optimizer", "the squared norms of gradients from {peers}")
    (everyone,) = host.read("gradient norm", total.view(-1))
    return math.sqrt(reduce(operator.add, everyone))

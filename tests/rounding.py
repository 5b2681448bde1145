"""FP8 runs that place experts differently, made comparable bit for bit.

A library's product of other rows beside a row may sum that row in another order. The last bit of float32 then turns a
rounding to bfloat16 here and there, every quantiser behind it makes more of the difference, and one token may choose
another expert: how far two such runs lie apart is a matter of luck. Under `order_free_products` a row's product does
not depend on the rows beside it, and under `dispatched_alone` one process rounds sums where several ranks would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.collectives import Steps
from parallel.expert.dispatch import LocalDispatch, Plan
from parallel.host import Host
from parallel.mesh import ParallelConfig

# So many bits of each factor, and up to 2^13 terms, make sums that float64 holds exactly in any order.
BITS = 20


def _whole(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Each row (dim 1) or column (dim 0) as whole numbers of `BITS` bits, and the unit that they count."""
    x = x.double()
    unit = torch.exp2(torch.frexp(x.abs().amax(dim, keepdim=True))[1].double() - BITS)
    return (x / unit).round(), unit


_library_mm = torch.mm


def order_free_mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """In the place of `torch.mm`: an exact sum of factors rounded to 20 bits by row and by column, rounded once."""
    if a.dtype == torch.float64 or not a.numel() or not b.numel():
        return _library_mm(a, b) if out is None else _library_mm(a, b, out=out)
    assert a.shape[1] <= 1 << 53 - 2 * BITS
    (rows, row_units), (columns, column_units) = _whole(a, 1), _whole(b, 0)
    product = (_library_mm(rows, columns) * row_units * column_units).to(a.dtype)
    return product if out is None else out.copy_(product)


def order_free_addmm_(self: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """In the place of `Tensor.addmm_`."""
    return self.add_(order_free_mm(a, b))


@contextmanager
def order_free_products() -> Iterator[None]:
    """No row of a product, and no sum over rows, depends on the rows beside it or on the machine's kernels."""
    with mock.patch.object(torch, "mm", order_free_mm), mock.patch.object(Tensor, "addmm_", order_free_addmm_):
        yield


class SumsByRank(LocalDispatch):
    """All experts here, but a token's results are added as in two hops: those of a rank, of a node's ranks, of nodes,
    each sum in float32 and rounded to the type of the rows."""

    def __init__(self, num_experts: int, config: ParallelConfig, host: Host | None = None) -> None:
        super().__init__(num_experts, host)
        self._ep, self._num_nodes = config.ep, config.nodes_per_ep_group

    def combine(self, rows: Tensor, plan: Plan) -> Steps[Tensor]:
        yield from ()
        return self._sum(rows, plan)

    def dispatch_backward(self, d_rows: Tensor, d_row_weights: Tensor, plan: Plan) -> Steps[tuple[Tensor, Tensor]]:
        yield from ()
        return self._sum(d_rows, plan), plan.experts.fold_weights(d_row_weights)

    def _sum(self, rows: Tensor, plan: Plan) -> Tensor:
        experts = torch.arange(self.num_local_experts).repeat_interleave(torch.tensor(plan.rows_per_expert))
        rank_of_row = experts // (self.num_local_experts // self._ep)
        by_rank = [
            plan.experts.fold(rows.masked_fill((rank_of_row != rank).unsqueeze(1), 0)) for rank in range(self._ep)
        ]
        num_ranks = self._ep // self._num_nodes
        by_node = [_rounded_sum(by_rank[first : first + num_ranks]) for first in range(0, self._ep, num_ranks)]
        return _rounded_sum(by_node)


def _rounded_sum(parts: list[Tensor]) -> Tensor:
    """Element by element, as `Copies.fold` adds the copies of a row: its kernel has a rule of its own for ties."""
    num_rows = len(parts[0])
    order = torch.arange(num_rows * len(parts)).view(len(parts), num_rows).t().flatten()
    first = torch.arange(0, num_rows * len(parts), len(parts))
    return F.embedding_bag(order, torch.cat(parts), first, mode="sum")


@contextmanager
def dispatched_alone(config: ParallelConfig) -> Iterator[None]:
    """In the one process of a run alone: order-free products, and sums that are rounded where `config` rounds them."""

    def build(num_experts: int, groups: Any, codec: Any = None, fused: bool = False) -> SumsByRank:
        return SumsByRank(num_experts, config, groups.host)

    with order_free_products():
        if config.dispatch != "two_hop":
            yield
            return
        with mock.patch("train.assemble.build_dispatch", build):
            yield

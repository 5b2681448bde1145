"""Flat dispatch: one copy per (token, expert), in one all-to-all over the expert-parallel group."""

from __future__ import annotations

from torch import Tensor

from parallel.collectives import Steps
from parallel.expert.copies import Copies, arrange, inverse, regroup
from parallel.expert.dispatch import Dispatch, Dispatched, Hop, Plan
from parallel.expert.placement import Placement
from parallel.process import Groups


class FlatDispatch(Dispatch):
    """One all-to-all. Copies leave sorted by expert, so counts per expert replace expert ids on the wire.

    Bytes to other nodes, dispatch: (d * bytes per element + bytes of a weight) for each (token, expert) pair whose
    expert lives on another node; combine: d * bytes per element for each of the same pairs.
    """

    def __init__(self, num_experts: int, groups: Groups) -> None:
        super().__init__(Placement.of(groups.mesh, num_experts), groups.watch)
        self.group = groups.ep
        ranks_per_node = self.placement.ranks_per_node
        self.is_remote = [rank // ranks_per_node != self.placement.node for rank in range(self.placement.ep)]

    def dispatch(self, x: Tensor, weights: Tensor, indices: Tensor) -> Steps[Dispatched]:
        self._nodes_reached(indices)
        chosen = indices >= 0
        copies = arrange(chosen, indices, weighted=True)
        counts = indices[chosen].bincount(minlength=self.placement.num_experts)
        leaving = counts.view(self.placement.ep, self.num_local_experts)
        counts_arriving = self._exchange_counts(leaving, self.group)
        yield
        counts = counts_arriving.wait()  # [source rank, local expert]
        hop = Hop(copies, self.group, leaving.sum(1).tolist(), counts.sum(1).tolist(), self.is_remote)
        arriving = self._send(hop, copies.spread_weights(weights)), self._send(hop, copies.spread(x))
        yield
        order = regroup(counts)
        experts = Copies(order, inverse(order), offsets=None)
        row_weights, rows = (experts.spread(handle.wait()) for handle in arriving)
        return rows, row_weights, Plan((hop,), experts, counts.sum(0).tolist())

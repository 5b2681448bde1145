"""Flat dispatch: one copy per (token, expert), in one all-to-all over the expert-parallel group."""

from __future__ import annotations

from torch import Tensor

from parallel.collectives import Steps
from parallel.expert.copies import Copies, arrange, inverse, regroup, tally
from parallel.expert.dispatch import Codec, Dispatch, Dispatched, Hop
from parallel.expert.placement import Placement
from parallel.process import Groups


class FlatDispatch(Dispatch):
    """One all-to-all. Copies leave sorted by expert, so counts per expert replace expert ids on the wire.

    Bytes to other nodes, dispatch: (bytes of a row as the codec sends it + bytes of a weight) for each (token, expert)
    pair whose expert lives on another node; combine: d * bytes per element for each of the same pairs.
    """

    def __init__(self, num_experts: int, groups: Groups, codec: Codec | None = None) -> None:
        super().__init__(Placement.of(groups.mesh, num_experts), groups.host, groups.watch, codec)
        self.group = groups.ep
        ranks_per_node = self.placement.ranks_per_node
        self.is_remote = [rank // ranks_per_node != self.placement.node for rank in range(self.placement.ep)]

    def dispatch(self, x: Tensor, weights: Tensor, indices: Tensor) -> Steps[Dispatched]:
        self._nodes_reached(indices)
        counts = tally(indices, self.placement.num_experts).view(self.placement.ep, self.num_local_experts)
        counts, to_rank, from_rank = self._exchange_counts("expert counts", counts, self.group)
        send_counts, recv_counts = [sum(counts) for counts in to_rank], [sum(counts) for counts in from_rank]
        copies = arrange(indices >= 0, indices, sum(send_counts), weighted=True)
        hop = Hop(copies, self.group, send_counts, recv_counts, self.is_remote)
        arriving = (
            self._send(hop, copies.spread_weights(weights)),
            self._send(hop, copies.spread(self._codec.encode(x))),
        )
        yield
        order = regroup(counts, sum(recv_counts))
        experts = Copies(order, inverse(order), offsets=None)
        tokens_per_expert = [sum(counts) for counts in zip(*from_rank, strict=True)]
        row_weights, rows = (handle.wait() for handle in arriving)
        return self._arrived(rows, row_weights, experts, tokens_per_expert, (hop,), x.dtype)

"""Flat dispatch: one copy per (token, expert), in one all-to-all over the expert-parallel group."""

from __future__ import annotations

from torch import Tensor

from parallel.collectives import Steps
from parallel.expert.copier import Copier
from parallel.expert.dispatch import Codec, Dispatch, Dispatched, Hop, with_slots
from parallel.expert.placement import Placement
from parallel.process import Groups


class FlatDispatch(Dispatch):
    """One all-to-all. Copies leave sorted by expert, so counts per expert replace expert ids on the wire.

    Bytes to other nodes, dispatch: (bytes of a row as the codec sends it + bytes of a weight) for each (token, expert)
    pair whose expert lives on another node; combine: d * bytes per element for each of the same pairs.
    """

    def __init__(
        self, num_experts: int, groups: Groups, codec: Codec | None = None, copier: Copier | None = None
    ) -> None:
        super().__init__(Placement.of(groups.mesh, num_experts), groups.host, groups.watch, codec, copier)
        self.group = groups.ep
        ranks_per_node = self.placement.ranks_per_node
        self.is_remote = [rank // ranks_per_node != self.placement.node for rank in range(self.placement.ep)]

    def _plan_and_send(self, x: Tensor, weights: Tensor, indices: Tensor) -> Steps[Dispatched]:
        copier = self._copier
        self._visited(indices, self._nodes_reached(indices))
        census = copier.count(indices, 1, self.placement.num_experts)
        leaving = census.leaving.view(self.placement.ep, self.num_local_experts)
        counts_arriving = self._exchange_counts(leaving, self.group)
        to_rank, from_rank = yield from self._read("expert counts", lambda: (leaving, counts_arriving.wait()))
        send_counts, recv_counts = [sum(counts) for counts in to_rank], [sum(counts) for counts in from_rank]
        copies, _ = copier.one_per_id(census, [count for counts in to_rank for count in counts], 1)
        hop = Hop(copies, self.group, send_counts, recv_counts, self.is_remote)
        arriving = (
            self._send(hop, copies.spread_weights(weights)),
            self._send(hop, copies.spread(self._codec.encode(x))),
        )
        ((_, slot),) = with_slots([hop])
        if slot:
            yield slot
        tokens_per_expert = [sum(counts) for counts in zip(*from_rank, strict=True)]
        experts = copier.regroup(counts_arriving.wait(), tokens_per_expert, self._codec.row_multiple)
        row_weights, rows = (handle.wait() for handle in arriving)
        return self._arrived(rows, row_weights, *experts, (hop,), x.dtype)

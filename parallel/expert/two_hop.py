"""Two-hop dispatch: one copy per (token, node) across nodes, then one per (token, rank) inside the node.

The first hop runs on the rail: from each rank to the ranks with the same index on the other nodes. The second runs
inside the node, and at its end a row is copied once per local expert. On the way back rows are summed at each level, so
a token's result crosses to another node once too (DeepSeek-V3 report, section 3.2.2). The sums are therefore
re-associated: first over a rank's experts, then over a node's ranks, then over nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.collectives import Steps
from parallel.expert.copier import Copier
from parallel.expert.dispatch import Codec, Dispatch, Dispatched, Hop
from parallel.expert.placement import Placement
from parallel.process import Groups


class TwoHopDispatch(Dispatch):
    """Rail first, then the node.

    Bytes to other nodes, dispatch: bytes of a row as the codec sends it + K * (bytes of a weight + bytes of an expert
    id) for each (token, other node) such that at least one of the token's experts lives there; combine: d * bytes per
    element for each of the same.
    """

    def __init__(
        self, num_experts: int, groups: Groups, codec: Codec | None = None, copier: Copier | None = None
    ) -> None:
        super().__init__(Placement.of(groups.mesh, num_experts), groups.host, groups.watch, codec, copier)
        self.rail, self.node = groups.rail, groups.node
        self.has_rail, self.has_node = self.placement.num_nodes > 1, self.placement.ranks_per_node > 1
        self.is_remote = [node != self.placement.node for node in range(self.placement.num_nodes)]
        self.id_dtype = torch.int16 if self.placement.experts_per_node <= torch.iinfo(torch.int16).max else torch.int32

    def _plan_and_send(self, x: Tensor, weights: Tensor, indices: Tensor) -> Steps[Dispatched]:
        place, copier, local = self.placement, self._copier, [False] * self.placement.ranks_per_node
        census, leaving = copier.count_tree(indices, place.num_nodes, place.ranks_per_node, self.num_local_experts)
        counts, rail_counts, node_counts, tokens_per_expert = yield from self._counts(leaving)
        self._visited(indices, sum(rail_counts[0]))
        copies = copier.one_per_place(census, sum(rail_counts[0]))
        rail = Hop(copies, self.rail, *rail_counts, self.is_remote)
        # What the next hop needs to be planned leaves before the rows, so that it is planned while they travel.
        routes_arriving = self._send(rail, copier.pack(weights, copies, census, self.id_dtype))
        rows_arriving = self._send(rail, copies.spread(self._codec.encode(x)))
        if self.has_rail:
            yield "first hop" if self.has_node else "last hop"
        weights, ids = copier.unpack(routes_arriving.wait(), weights.dtype, self.id_dtype)

        census = copier.count(ids, self.num_local_experts, place.ranks_per_node)
        copies = copier.one_per_place(census, sum(node_counts[0]))
        node = Hop(copies, self.node, *node_counts, local)
        routes_arriving = self._send(node, copier.pack(weights, copies, census, self.id_dtype))
        rows_arriving = self._send(node, copies.spread(rows_arriving.wait()))
        if self.has_node:
            yield "last hop"
        weights, ids = copier.unpack(routes_arriving.wait(), weights.dtype, self.id_dtype)

        # Rows came from (rail, source node); the promised order is by the source's rank, (source node, rail).
        census = copier.count(ids, 1, self.num_local_experts, counts)
        experts = copier.one_per_id(census, tokens_per_expert, self._codec.row_multiple)
        return self._arrived(rows_arriving.wait(), weights, *experts, (rail, node), x.dtype)

    def _counts(
        self, leaving: Tensor
    ) -> Steps[tuple[Tensor, tuple[list[int], list[int]], tuple[list[int], list[int]], list[int]]]:
        """The numbers of rows of both hops, of what this rank's tokens come to (`Copier.count_tree`).

        The rank that a token sets out from can tell which ranks of a node its copy will be passed on to. So what every
        rank of a node will pass on is told over the rail, then to the ranks that it will pass it on to, and the host
        reads all of it at once, before any row has left.

        Returns, of the node's hop, what comes from each rank by source node [ranks, nodes]; of the rail and of the
        node, how many copies go to and come from each rank; and the rows of each local expert.
        """
        num_nodes, num_ranks = self.placement.num_nodes, self.placement.ranks_per_node
        arrived = self._exchange_counts(leaving, self.rail).wait()  # [source node, 1 + ranks + experts of this node]
        # Beside them what each rank's experts will get, so that the last step needs no counts of its own.
        passed_on = self._copier.pass_on(arrived, num_ranks, self.num_local_experts)
        arriving = self._exchange_counts(passed_on, self.node)
        to_node, from_node, to_rank, from_rank = yield from self._read(
            "hop counts", lambda: (leaving[:, 0], arrived[:, 0], passed_on, arriving.wait())
        )
        by_hop = [[sum(row[:num_nodes]) for row in rows] for rows in (to_rank, from_rank)]
        tokens_per_expert = [sum(counts) for counts in list(zip(*from_rank, strict=True))[num_nodes:]]
        counts = arriving.wait()[:, :num_nodes]
        return counts, (to_node, from_node), (by_hop[0], by_hop[1]), tokens_per_expert
